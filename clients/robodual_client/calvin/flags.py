"""The flags of an evaluation, and the Options that they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from robodual_client.calvin.annotations import VALIDATION
from robodual_client.calvin.options import (
    ENVIRONMENTS,
    POLICIES,
    VIDEO,
    VIDEO_FORMATS,
    EvaluationError,
    Options,
    parse_numbers,
    shard,
)
from robodual_client.calvin.pace import HOLD
from robodual_client.calvin.rollout import EPISODE_STEPS
from robodual_client.calvin.sequences import published


def add(parser: argparse.ArgumentParser, *, sweep: bool = False) -> None:
    """Adds the flags of an evaluation, or of a sweep over delays."""
    what = parser.add_argument_group("what")
    what.add_argument("--env", default="playtable", help=f"{', '.join(ENVIRONMENTS)}, or module:callable (playtable)")
    what.add_argument("--policy", default="services", help=f"{', '.join(POLICIES)}, or module:callable (services)")
    what.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    what.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    what.add_argument("--dry-run", action="store_true", help="count and estimate, run nothing")

    which = parser.add_argument_group("sequences")
    chosen = which.add_mutually_exclusive_group()
    chosen.add_argument("--num-sequences", type=int, metavar="N", help="the first N of the published 1000 (1000)")
    chosen.add_argument("--sequences", metavar="LIST", help="numbers and ranges, as 0-99,250")
    which.add_argument("--shard", metavar="I/N", help="the I-th of N shares of them, for N machines; then merge")
    which.add_argument("--ep-len", type=int, default=EPISODE_STEPS, metavar="N", help="steps a task may take (360)")
    which.add_argument("--seed", type=int, default=0, help="of the policy's noise (0)")
    which.add_argument("--annotations", type=Path, default=VALIDATION, metavar="FILE", help="JSON: task -> sentences")

    add_services(parser.add_argument_group("services (--policy services; a token is read from ROBODUAL_TOKEN)"))

    pace = parser.add_argument_group("pace (lock-step: the simulator waits for each answer)")
    if sweep:
        pace.add_argument("--delays", required=True, metavar="LIST", help="run once for each, in steps, as 0,1,2,4,8")
        pace.set_defaults(realtime=None, delay_steps=0)
    else:
        clock = pace.add_mutually_exclusive_group()
        clock.add_argument("--realtime", type=float, metavar="HZ", help="control steps a second, answer or not")
        clock.add_argument("--delay-steps", type=int, default=0, metavar="N", help="execute actions N steps late (0)")
    pace.add_argument("--hold", choices=HOLD, default="repeat", help="what the arm does meanwhile (repeat)")
    latency = "generalist=MS,specialist=MS"
    pace.add_argument("--inject-delay", default="", metavar=latency, help="add latency on purpose, in milliseconds")

    simulator = parser.add_argument_group("simulator")
    simulator.add_argument("--workers", type=int, default=1, metavar="N", help="simulator processes (1)")
    simulator.add_argument(
        "--hang-limit",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="kill a simulator that takes longer for a call, and repeat the sequence; 0: never (300)",
    )
    simulator.add_argument("--calvin-root", metavar="DIR", help="checkout of calvin_env (CALVIN_ROOT)")
    simulator.add_argument("--scene", metavar="A-D", help="CALVIN's scene (D)")
    simulator.add_argument("--render", metavar="HOW", help="CALVIN's renderer: auto, egl or cpu (auto)")

    seeing = parser.add_argument_group("seeing (extra `report`)")
    seeing.add_argument("--video", choices=VIDEO, default="none", help="which sequences to film (none)")
    seeing.add_argument("--video-format", choices=VIDEO_FORMATS, default="mp4", help="(mp4)")
    seeing.add_argument("--no-report", action="store_true", help="write no report.html")


def add_services(group: Any) -> None:
    """Adds the flags that say where the services are, to a parser or a group of one."""
    group.add_argument("--generalist", default="127.0.0.1:50051", metavar="ADDRESS", help="(127.0.0.1:50051)")
    group.add_argument(
        "--specialist",
        default="127.0.0.1:50052",
        metavar="ADDRESS",
        help="of replicas several, comma-separated, or dns:///NAME:PORT (127.0.0.1:50052)",
    )
    group.add_argument("--schedule", default="published", help="published, every-N or async (published)")
    group.add_argument("--otlp", metavar="URL", help="collector that gets a trace of each step (none)")
    group.add_argument("--tls", action="store_true", help="connect with TLS")
    group.add_argument("--tls-ca", metavar="FILE", help="PEM file of who signed the services' certificates")
    group.add_argument("--tls-certificate", metavar="FILE", help="PEM file to show services that ask for one")
    group.add_argument("--tls-key", metavar="FILE", help="PEM file of its key")


def services(given: argparse.Namespace) -> dict[str, Any]:
    """The options of the policy `services` that the flags of `add_services` ask for."""
    replicas = given.specialist.split(",")
    options = {"generalist": given.generalist, "specialist": replicas, "schedule": given.schedule}
    if given.otlp:
        options["traces"] = given.otlp
    files = {name: path for name in ("ca", "certificate", "key") if (path := getattr(given, f"tls_{name}"))}
    if given.tls or files:
        options["tls"] = files or True
    return options


def options(given: argparse.Namespace) -> Options:
    """The evaluation that the flags ask for. Raises EvaluationError for flags that make no sense."""
    if given.sequences is not None:
        numbers = parse_numbers(given.sequences)
    else:
        count = len(published()) if given.num_sequences is None else given.num_sequences
        if not 1 <= count <= len(published()):
            raise EvaluationError(f"num_sequences: must lie in 1-{len(published())}, got {count}")
        numbers = tuple(range(count))
    if given.shard is not None:
        numbers = shard(numbers, given.shard)
    simulator = {"root": given.calvin_root, "scene": given.scene, "render": given.render}
    env_options = {name: value for name, value in simulator.items() if value is not None}
    if env_options and given.env != "calvin":
        raise EvaluationError("--calvin-root, --scene and --render go with --env calvin")
    return Options(
        out=given.out,
        env=given.env,
        env_options=env_options,
        policy=given.policy,
        policy_options=services(given) if given.policy == "services" else {},
        numbers=numbers,
        seed=given.seed,
        ep_len=given.ep_len,
        annotations=given.annotations,
        realtime=given.realtime,
        delay_steps=given.delay_steps,
        hold=given.hold,
        inject_delay=_latency(given.inject_delay),
        workers=given.workers,
        hang_limit=given.hang_limit,
        video=given.video,
        video_format=given.video_format,
        resume=given.resume,
    )


def _latency(text: str) -> dict[str, float]:
    """Milliseconds of "generalist=300,specialist=20". Raises EvaluationError naming the part that is wrong."""
    latency = {}
    for part in filter(None, text.split(",")):
        name, _, milliseconds = part.partition("=")
        try:
            latency[name.strip()] = float(milliseconds)
        except ValueError:
            raise EvaluationError(f"inject_delay: {part!r} must be generalist=MS or specialist=MS") from None
    return latency
