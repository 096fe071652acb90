"""The pool of worker processes: hands out sequence numbers, collects records, replaces a worker that dies or hangs."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Iterator, Sequence, Union

from robodual_client.calvin.hanging import Watch
from robodual_client.calvin.options import EvaluationError, Options
from robodual_client.calvin.records import Record

ATTEMPTS = 3
STOP_SECONDS = 10.0
STACK_SECONDS = 1.0  # for a hung process to write where it is


@dataclass(frozen=True)
class Ready:
    """A worker's environment stands; `facts` is what it says of itself."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """A sequence ended without an answer, and is repeated."""

    number: int
    reason: str


@dataclass(frozen=True)
class _Fatal:
    reason: str


Event = Union[Ready, Failed, Record]


class Workers:
    """The worker processes of `options`, which run `numbers`; a context manager that leaves no process behind, except
    one that a driver keeps in the kernel, which nothing can kill.

    `sensors`: what the served model reads, and the environment must give before the first sequence starts. `models`:
    what "generalist" and "specialist" must serve whenever a sequence starts; empty for a policy that is not served.
    """

    def __init__(
        self,
        options: Options,
        numbers: Sequence[int],
        instructions: dict[str, str],
        sensors: Sequence[str],
        models: dict[str, dict[str, str]],
    ) -> None:
        env, policy = options.factories()
        job = {
            "env": env,
            "env_name": options.env,
            "env_options": options.simulator(),
            "policy": policy,
            **_policy_options(options),
            "pace": options.pace(),
            "instructions": instructions,
            "sensors": list(sensors),
            "models": models,
            "seed": options.seed,
            "ep_len": options.ep_len,
            "video": options.video,
            "video_format": options.video_format,
            "out": str(options.out),
        }
        self._left = set(numbers)
        self._pending: queue.Queue[int | None] = queue.Queue()
        for number in numbers:
            self._pending.put(number)
        self._events: queue.Queue[Event | _Fatal] = queue.Queue()
        self._stop = threading.Event()
        logs = options.out / "logs"
        logs.mkdir(exist_ok=True)
        self._workers = [
            _Worker(
                json.dumps(job),
                options.hang_limit,
                logs / f"worker-{index + 1}.log",
                self._pending,
                self._events,
                self._stop,
            )
            for index in range(min(options.workers, len(numbers)))
        ]

    def __enter__(self) -> Workers:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for worker in self._workers:
            self._pending.put(None)
            if kind is not None:
                worker.signal(kill=False)
        end = time.monotonic() + STOP_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, end - time.monotonic()))
            worker.signal(kill=True)
        for worker in self._workers:
            worker.join(STOP_SECONDS)

    def events(self) -> Iterator[Event]:
        """What happens, until every number has its Record.

        Raises EvaluationError when an environment cannot start, the services serve other models than at the start, or
        a sequence fails for the third time.
        """
        failures: Counter[int] = Counter()
        while self._left:
            event = self._events.get()
            if isinstance(event, _Fatal):
                raise EvaluationError(event.reason)
            if isinstance(event, Record):
                self._left.discard(event.sequence)
            elif isinstance(event, Failed):
                failures[event.number] += 1
                if failures[event.number] == ATTEMPTS:
                    raise EvaluationError(f"sequence {event.number} failed {ATTEMPTS} times: {event.reason}")
                self._pending.put(event.number)
            yield event


class _Worker(threading.Thread):
    """Keeps one process busy."""

    def __init__(
        self,
        job: str,
        hang_limit: float,
        log: Path,
        pending: queue.Queue[int | None],
        events: queue.Queue[Event | _Fatal],
        stop: threading.Event,
    ) -> None:
        super().__init__(daemon=True, name=log.stem)
        self._job, self._log, self._pending, self._events, self._stopping = job, log, pending, events, stop
        self._hang_limit = hang_limit
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str]  # of the process
        self._watch: Watch  # of the process
        self._lock = threading.Lock()

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:  # whatever it is: the evaluation waits for an answer that nobody else would give
            reason = f"{type(error).__name__}: {error}"
            self._events.put(_Fatal(f"{self.name}: {reason}; what is finished is kept: --resume goes on"))
        finally:
            self._end()

    def _work(self) -> None:
        failures = 0
        while True:
            number = self._pending.get()
            if number is None or self._stopping.is_set():
                break
            answer = self._ask(number)
            if "record" in answer:
                self._events.put(Record.from_json(answer["record"]))
                failures = 0
            elif "fatal" in answer:
                self._events.put(_Fatal(answer["fatal"]))
                break
            else:
                failures += 1
                self._end()
                self._stopping.wait(failures - 1)  # a service that is starting anew gets a moment
                self._events.put(Failed(number, f"{answer['error']} ({self._log})"))

    def signal(self, *, kill: bool) -> None:
        """Tells the process to end now, in the middle of a sequence or not; or ends it."""
        with self._lock:
            if self._process is not None:
                self._process.kill() if kill else self._process.terminate()

    def _ask(self, number: int) -> dict[str, Any]:
        """The worker's answer for the sequence, `{"error": reason}` if it died over it."""
        if self._process is None:
            process = self._start()
            if process is None:
                return {"error": "stopped"}
            ready = self._exchange(process, self._job)
            if "ready" not in ready:
                return ready
            self._events.put(Ready(ready["ready"]))
        assert self._process is not None
        return self._exchange(self._process, str(number))

    def _start(self) -> subprocess.Popen[str] | None:
        with self._lock, self._log.open("a") as log:
            if self._stopping.is_set():
                return None
            self._watch = Watch(self._hang_limit)
            self._answers = queue.SimpleQueue()
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "robodual_client.calvin.worker", self._watch.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        threading.Thread(target=_read, args=(process.stdout, self._answers), daemon=True).start()
        return process

    def _exchange(self, process: subprocess.Popen[str], line: str) -> dict[str, Any]:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it died: that is the answer
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answer = None
        while answer is None:
            try:
                answer = self._answers.get(timeout=self._watch.period or None)
            except queue.Empty:
                hang = self._watch.look()
                if hang is not None:
                    self._kill_hung(process)
                    return {"error": hang}
        if not answer.endswith("\n"):
            code = _wait(process)
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return {"error": f"the worker process died with {how}"}
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    def _kill_hung(self, process: subprocess.Popen[str]) -> None:
        """With the line of Python that it hangs in as the last thing in its log, if it can still write that."""
        if sys.platform != "win32":
            process.send_signal(signal.SIGUSR1)
            self._stopping.wait(STACK_SECONDS)
        self.signal(kill=True)

    def _end(self) -> None:
        """Lets an idle process end by itself, and one that does not, by force."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it may be gone already
            process.stdin.close()
        _wait(process)


def _policy_options(options: Options) -> dict[str, Any]:
    """With the added latency in seconds: the client adds that of services, the pace that of any other policy."""
    latency = {name: milliseconds / 1e3 for name, milliseconds in options.latency().items()}
    if options.policy != "services":
        return {"policy_options": dict(options.policy_options), "answer_delay": latency.get("specialist", 0.0)}
    return {"policy_options": {**options.policy_options, "latency": latency}, "answer_delay": 0.0}


def _read(lines: IO[str], answers: queue.SimpleQueue[str]) -> None:
    """Hands on each of `lines`, and "" after the last."""
    with lines:
        for line in lines:
            answers.put(line)
    answers.put("")


def _wait(process: subprocess.Popen[str]) -> int:
    """The exit code of a process that is about to end; it is killed if it does not, and left if even that fails: a
    driver may keep it in the kernel."""
    for _ in range(2):
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    return -9
