"""A worker process: builds one environment and runs the sequences that its parent names, one at a time.

Runs as `python -m robodual_client.calvin.worker`. The parent writes JSON lines to its standard input: first the job,
then one sequence number each. The worker answers with one JSON line each on its standard output: `{"ready": ...}` or
`{"fatal": message}`, then `{"record": ...}` or `{"error": message}`. It ends after an error, when its
input does, and on SIGTERM. Its argument is the file in which it notes what its simulator does (hanging.py).
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import queue
import signal
import sys
import threading
import traceback
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn, TextIO

from robodual_client.calvin import pace
from robodual_client.calvin.hanging import Watched, share
from robodual_client.calvin.records import FULL, Record
from robodual_client.calvin.roles import Environment, Policy, Watcher
from robodual_client.calvin.rollout import run_sequence
from robodual_client.calvin.sequences import published
from robodual_client.errors import RoboDualError
from robodual_client.observation import encode


class _OtherModel(Exception):
    """The services do not serve what the run began with: to repeat the sequence would mix the two."""


def run(lines: TextIO, answers: TextIO, memory: mmap.mmap) -> None:
    """Serves the parent at `lines` and `answers` until `lines` ends. `memory`: where it looks for a hang."""

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    job = json.loads(lines.readline())
    starting = f"policy {job['policy']}"
    try:
        make_policy = resolve(job["policy"])
        starting = job["env_name"]
        env: Environment = resolve(job["env"])(**job["env_options"])
        watched = Watched(env, memory)
        if job["sensors"]:
            robot_obs, scene_obs = published()[0].observations()
            encode(watched.reset(robot_obs=robot_obs, scene_obs=scene_obs), job["sensors"])
    except Exception as error:  # whatever a simulator's start may raise, and sensors that it lacks: the parent tells
        traceback.print_exc()
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        cure = "; install it with: pip install 'robodual-client[sim]'" if missing == "pybullet" else ""
        answer({"fatal": f"{starting} cannot start: {_one_line(error)}{cure}"})
        return
    try:
        answer({"ready": dict(getattr(env, "facts", {}))})
        for number in _numbers(lines):
            answer({"record": _run(job, watched, partial(make_policy, env), number)})
    except Exception as error:  # the parent repeats the sequence in a fresh process, or stops the run
        with suppress(OSError):  # the log is on the same disk
            traceback.print_exc()
        if isinstance(error, _OtherModel):
            answer({"fatal": f"services: {error}"})
        elif isinstance(error, OSError) and error.errno in FULL:
            answer({"fatal": f"{_one_line(error)}; make room, and --resume goes on"})
        else:
            answer({"error": _one_line(error)})
    finally:
        env.close()


def resolve(name: str) -> Callable[..., Any]:
    """The callable that `module:name` stands for. Raises ImportError or AttributeError if there is none."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), attribute)
    return found


def _run(job: dict[str, Any], env: Environment, make_policy: Callable[..., Policy], number: int) -> dict[str, Any]:
    """One sequence with a policy of its own, whose seed depends on the run's seed and the sequence's number alone."""
    sequence = published()[number]
    policy = make_policy((job["seed"] << 16) + number, **job["policy_options"])
    chosen = pace.choose(job["pace"], job["answer_delay"])

    def record_of(watcher: Watcher | None) -> Record:
        instructions, ep_len = job["instructions"], job["ep_len"]
        return run_sequence(env, policy, sequence, instructions, ep_len=ep_len, watcher=watcher, pace=chosen)

    try:
        if job["models"]:
            _require(job["models"], policy)
        if job["video"] == "none":
            return record_of(None).to_json()
        from robodual_client.calvin.video import Video  # Pillow and ffmpeg come with the extra `report`

        path = Path(job["out"]) / "videos" / f"{number:04d}.{job['video_format']}"
        with Video(path, len(sequence.tasks), job["ep_len"]) as video:
            record = record_of(video)
        if job["video"] == "failures" and record.solved == len(record.tasks):
            path.unlink()
            path.with_suffix(".jpg").unlink()
        else:
            record.video = f"videos/{path.name}"
        return record.to_json()
    finally:
        close = getattr(policy, "close", None)
        if close is not None:
            close()


def _require(models: dict[str, dict[str, str]], client: Any) -> None:
    """Raises _OtherModel if the services of `client`, which holds on to what they say here, serve others."""
    for name, info in client.info().items():
        found = {key: getattr(info, key) for key in models[name]}
        if found != models[name]:
            raise _OtherModel(
                f"{name} at {info.address} serves {found}, where this run began with {models[name]}; what is finished "
                "is kept: serve that again and go on with --resume, or choose another folder"
            )


def _numbers(lines: TextIO) -> Iterator[int]:
    """The sequence numbers on `lines`. When the parent is gone in the middle of a sequence, the process is told."""
    numbers: queue.Queue[int | None] = queue.Queue()
    idle = threading.Event()

    def listen() -> None:
        for line in lines:
            numbers.put(json.loads(line))
        numbers.put(None)
        if not idle.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        idle.set()
        number = numbers.get()
        if number is None:
            return
        idle.clear()
        yield number


def _one_line(error: BaseException) -> str:
    kind = "" if isinstance(error, RoboDualError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(143)


def main() -> None:
    signal.signal(signal.SIGTERM, _terminate)
    if sys.platform != "win32":
        faulthandler.register(signal.SIGUSR1)  # the parent asks so where a hung process is, before it kills it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides
    # Simulators print to standard output from C: keep the answers' channel to ourselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    run(sys.stdin, answers, share(sys.argv[1]))


if __name__ == "__main__":
    main()
