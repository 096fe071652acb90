"""What an evaluation is asked to do, in terms that a command line, a file and a worker process all can hold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Mapping

from robodual_client.calvin import checkout, rendering, shim
from robodual_client.calvin.annotations import VALIDATION, load
from robodual_client.calvin.pace import HOLD
from robodual_client.calvin.rollout import EPISODE_STEPS
from robodual_client.calvin.sequences import published
from robodual_client.errors import RoboDualError

ENVIRONMENTS = {
    "playtable": "robodual_client.playtable:PlayTable",
    "calvin": "robodual_client.calvin.environment:CalvinEnvironment",
}
POLICIES = {
    "services": "robodual_client.calvin.policies:services",
    "expert": "robodual_client.calvin.policies:expert",
    "random": "robodual_client.calvin.policies:random",
    "zero": "robodual_client.calvin.policies:zero",
}
BLIND = ("expert", "random", "zero")
"""The policies that do not look at pictures."""
SERVICES = ("generalist", "specialist")
VIDEO = ("none", "failures", "all")
VIDEO_FORMATS = ("mp4", "gif")


class EvaluationError(RoboDualError):
    """The evaluation cannot start or go on; the message says in one line what to do about it."""


@dataclass(frozen=True)
class Options:
    """One evaluation run.

    `env` and `policy` are a name of ENVIRONMENTS or POLICIES, or `module:callable` of your own. An environment is
    called with `env_options`; a policy with (env, seed) and `policy_options`, once a sequence.

    The policy is waited for (lock-step) unless `realtime`, in control steps a second of wall time, or `delay_steps`
    says otherwise; `hold` is what the arm does meanwhile. `inject_delay` is latency added on purpose, in milliseconds:
    of the "generalist" (policy "services" alone) and of the "specialist", or of whatever else gives the actions.

    A call of the environment that takes over `hang_limit` seconds (0: no limit; four times as long up to a process's
    first step) is a hang: the process is killed, and its sequence repeated.
    """

    out: Path
    env: str = "playtable"
    env_options: Mapping[str, Any] = field(default_factory=dict)
    policy: str = "services"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    numbers: tuple[int, ...] = tuple(range(5))
    seed: int = 0
    ep_len: int = EPISODE_STEPS
    annotations: Path = VALIDATION
    realtime: float | None = None
    delay_steps: int = 0
    hold: str = "repeat"
    inject_delay: Mapping[str, float] = field(default_factory=dict)
    workers: int = 1
    hang_limit: float = 300.0
    video: str = "none"
    video_format: str = "mp4"
    resume: bool = False

    def __post_init__(self) -> None:
        """Raises EvaluationError for values that no run can have."""
        last = len(published()) - 1
        if not self.numbers:
            raise EvaluationError("sequences: none are left to run; choose some with --sequences or --num-sequences")
        if not all(0 <= number <= last for number in self.numbers):
            raise EvaluationError(f"sequences: must lie in 0-{last}, got {min(self.numbers)}-{max(self.numbers)}")
        if self.ep_len < 1:
            raise EvaluationError(f"ep_len: must be at least 1 step, got {self.ep_len}")
        if self.workers < 1:
            raise EvaluationError(f"workers: must be at least 1, got {self.workers}")
        if self.hang_limit != 0 and not 1 <= self.hang_limit <= 86_400:
            raise EvaluationError(f"hang_limit: must be 1 to 86400 seconds, or 0 for none, got {self.hang_limit:g}")
        if not 0 <= self.seed < 2**32:
            raise EvaluationError(f"seed: must lie in 0..2^32-1, got {self.seed}")
        if self.video not in VIDEO:
            raise EvaluationError(f"video: must be one of {', '.join(VIDEO)}, got {self.video!r}")
        if self.video_format not in VIDEO_FORMATS:
            raise EvaluationError(f"video_format: must be {' or '.join(VIDEO_FORMATS)}, got {self.video_format!r}")
        self._check_pace()
        for name, value, known in (("env", self.env, ENVIRONMENTS), ("policy", self.policy, POLICIES)):
            if value not in known and ":" not in value:
                raise EvaluationError(f"{name}: must be {', '.join(known)} or module:callable, got {value!r}")

    def _check_pace(self) -> None:
        if self.realtime is not None and not 0 < self.realtime <= 1000:
            raise EvaluationError(
                f"realtime: must be over 0 and up to 1000 control steps a second, got {self.realtime:g}"
            )
        if not 0 <= self.delay_steps < self.ep_len:
            raise EvaluationError(f"delay_steps: must be 0 to {self.ep_len - 1}, under ep_len, got {self.delay_steps}")
        if self.realtime is not None and self.delay_steps:
            raise EvaluationError("delay_steps: is for the simulated clock; with realtime, give inject_delay instead")
        if self.hold not in HOLD:
            raise EvaluationError(f"hold: must be {' or '.join(HOLD)}, got {self.hold!r}")
        for name, milliseconds in self.inject_delay.items():
            if name not in SERVICES or not 0 <= milliseconds <= 60_000:
                wanted = "generalist=MS or specialist=MS with 0 to 60000 milliseconds"
                raise EvaluationError(f"inject_delay: must be {wanted}, got {name}={milliseconds:g}")
        if self.inject_delay.get("generalist") and self.policy != "services":
            raise EvaluationError(f"inject_delay: policy {self.policy!r} has no generalist; give specialist=MS")

    def pace(self) -> dict[str, Any] | None:
        """How answers meet the simulator's clock, as `pace.choose` takes it."""
        if self.realtime is not None:
            return {"realtime": self.realtime, "hold": self.hold}
        return {"delay_steps": self.delay_steps, "hold": self.hold} if self.delay_steps else None

    def latency(self) -> dict[str, float]:
        """`inject_delay`, of whom it is over zero."""
        return {name: float(self.inject_delay[name]) for name in SERVICES if self.inject_delay.get(name)}

    def factories(self) -> tuple[str, str]:
        """`module:callable` of the environment and of the policy."""
        return ENVIRONMENTS.get(self.env, self.env), POLICIES.get(self.policy, self.policy)

    def settled(self) -> Options:
        """With what this machine decides for CALVIN: the renderer that "auto" is, in the protocol like one by name. So
        all workers draw alike, and the run is neither resumed nor merged with another renderer's pictures.

        Raises EvaluationError if the simulator or the renderer is not there.
        """
        if self.env != "calvin":
            return self
        given = {"scene": "D", "render": "auto", **self.env_options}
        try:
            checkout.find(given.get("root")).check_files(given["scene"])
            shim.require_packages()
            if self.policy not in BLIND:
                given["render"] = rendering.choose(given["render"]).name
        except checkout.SimulatorError as error:
            raise EvaluationError(f"{self.env} cannot start: {error}") from error
        return replace(self, env_options=given)

    def simulator(self) -> dict[str, Any]:
        """`env_options`, with the cameras of the built-in simulators off where neither policy nor video looks."""
        looks = self.policy not in BLIND or self.video != "none"
        dark: dict[str, dict[str, Any]] = {"playtable": {"render": False}, "calvin": {"cameras": []}}
        return {**({} if looks else dark.get(self.env, {})), **self.env_options}

    def instructions(self) -> dict[str, str]:
        """Each task's sentence. Raises EvaluationError if the annotations file is not one."""
        try:
            return load(self.annotations)
        except ValueError as error:
            raise EvaluationError(str(error)) from error

    def protocol(self) -> dict[str, Any]:
        """What two runs must share for their sequences to be merged, or one to be resumed: of settled options."""
        return {
            "env": self.env,
            "simulator": checkout.find(self.env_options.get("root")).commit() if self.env == "calvin" else None,
            "env_options": _what(self.env_options),
            "policy": self.policy,
            "policy_options": _what(self.policy_options),
            "seed": self.seed,
            "ep_len": self.ep_len,
            "pace": self.pace(),
            "inject_delay": self.latency() or None,
            "annotations": hashlib.sha256(self.annotations.read_bytes()).hexdigest()[:16],
        }


def _what(options: Mapping[str, Any]) -> dict[str, Any]:
    """Less what says where something is, or goes, which does not change a result."""
    where = ("root", "generalist", "specialist", "tls", "traces")
    return {name: value for name, value in options.items() if name not in where}


def parse_numbers(text: str) -> tuple[int, ...]:
    """Sequence numbers of "0-99,250": ascending, each once. Raises EvaluationError naming the part that is wrong."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise EvaluationError(f"sequences: {part.strip()!r} must be a number or a range like 0-99")
        if int(last or first) >= len(published()):
            raise EvaluationError(f"sequences: {part.strip()!r} is beyond the last sequence, {len(published()) - 1}")
        numbers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


def shard(numbers: tuple[int, ...], text: str) -> tuple[int, ...]:
    """The share of "i/n" (1/4 to 4/4): every n-th number from the i-th on. Raises EvaluationError for another text."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise EvaluationError(f"shard: must be i/n with 1 <= i <= n, as 1/4, got {text!r}")
    return numbers[int(index) - 1 :: int(count)]
