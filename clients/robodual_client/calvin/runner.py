"""Runs an evaluation: workers do the sequences, every finished one is on disk at once, and a stopped run resumes.

A run's folder holds run.json (protocol and provenance), sequences.jsonl (one line per finished sequence), results.json
(the published figures), logs/, videos/ where asked for, and run.lock, which the evaluation that runs has locked.
"""

from __future__ import annotations

import errno
import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, TextIO

from robodual_client.calvin import provenance, records, results
from robodual_client.calvin.options import EvaluationError, Options
from robodual_client.calvin.progress import Progress, choose
from robodual_client.calvin.records import Record
from robodual_client.calvin.results import Results
from robodual_client.calvin.workers import Failed, Ready, Workers


def evaluate(options: Options, progress: Progress | None = None) -> Results:
    """Runs the sequences of `options` that are not done yet, and returns the whole run in `options.out`.

    On Ctrl-C the finished sequences and their results.json are kept, and KeyboardInterrupt goes on to the caller.
    Raises EvaluationError, before the first sequence wherever it can be known, with a message of one line.
    """
    instructions = options.instructions()
    options = options.settled()
    run, services = check(options)
    todo = [number for number in options.numbers if number not in run.sequences]
    entry = provenance.collect(options, services)
    run.provenance.append(entry)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with _alone(options.out):
            _write_run(options.out, run)
            try:
                with progress or choose(len(run.sequences) + len(todo)) as shown:
                    sensors = services["specialist"]["sensors"] if services else ()
                    workers = Workers(options, todo, instructions, sensors, run.protocol["models"])
                    _run(workers, options.out, len(run.sequences) + len(todo), run, entry, shown)
            finally:
                # Ctrl-C may come between a line's writing and its counting: the file says what is done.
                run.sequences.update(records.read(options.out / results.SEQUENCES))
                _write_run(options.out, run)
                run.save(options.out)
    except OSError as error:
        raise EvaluationError(f"out: {error}; what is finished is kept in {options.out}: --resume goes on") from error
    return run


def check(options: Options) -> tuple[Results, dict[str, dict[str, Any]]]:
    """What an earlier start of the run (of settled options) has finished, and what the services that it asks say of
    themselves.

    Raises EvaluationError if folder, extras or services do not let it start or go on. Leaves nothing behind.
    """
    _require_writable(options.out)
    _require_video(options)
    services = provenance.ask_services(options.policy_options) if options.policy == "services" else {}
    models = {name: {key: info[key] for key in ("profile", "checkpoint")} for name, info in services.items()}
    return _earlier(options, models), services


def _run(workers: Workers, out: Path, total: int, run: Results, entry: dict[str, Any], shown: Progress) -> None:
    with workers:
        for event in workers.events():
            if isinstance(event, Record):
                records.append(out / results.SEQUENCES, event)
                run.sequences[event.sequence] = event
                shown.finished(event, run, total)
            elif isinstance(event, Failed):
                shown.note(f"sequence {event.number} is repeated: {event.reason}")
            elif isinstance(event, Ready):
                if event.facts and "environment" not in entry:
                    shown.note("; ".join(event.facts.values()))
                entry["environment"] = event.facts


def _require_writable(folder: Path) -> None:
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise EvaluationError(f"out: {folder} cannot be written: {error.strerror}") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder until the block or the process ends, however it ends. Raises EvaluationError if another does."""
    with (folder / "run.lock").open("a") as lock:
        try:
            _lock(lock)
        except BlockingIOError:
            cure = "wait for its end or stop it, or choose another folder"
            raise EvaluationError(f"out: another evaluation is writing into {folder}; {cure}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # some clusters' disks have no locks
                raise
        yield


def _lock(file: TextIO) -> None:
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _require_video(options: Options) -> None:
    if options.video != "none":
        try:
            from robodual_client.calvin import video

            video.encoder()
        except ImportError as error:
            cure = "install the extra: pip install 'robodual-client[report]'"
            raise EvaluationError(f"video: {error}; {cure}") from error
        except RuntimeError as error:
            raise EvaluationError(f"video: {error}") from error


def _earlier(options: Options, models: dict[str, dict[str, str]]) -> Results:
    """What an earlier start of this run has finished. Raises EvaluationError if the folder holds another run."""
    protocol = json.loads(json.dumps({**options.protocol(), "models": models}))  # as run.json gives it back
    if not (options.out / results.SEQUENCES).exists():
        return Results({}, protocol)
    if not options.resume:
        raise EvaluationError(f"out: {options.out} already holds a run; go on with --resume or choose another folder")
    earlier = results.load(options.out)
    message = f"out: {options.out} holds a run with other settings; choose another folder"
    results.require_same(protocol, earlier.protocol, message)
    return earlier


def _write_run(folder: Path, run: Results) -> None:
    results.write_json(folder / results.RUN, {"protocol": dict(run.protocol), "provenance": run.provenance})
