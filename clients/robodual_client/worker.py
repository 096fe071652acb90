"""A thread for what a signal must not interrupt."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any, Callable

logger = logging.getLogger(__name__)

JOIN = 2.0  # seconds that the end of each thread is waited for

Job = Callable[[], Any]


class Worker:
    """Does what it is given, in order. Python runs signal handlers in the main thread alone, so none comes here."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="robodual-calls", daemon=True)
        self._thread.start()

    def do(self, job: Job) -> None:
        """Returns at once."""
        self._jobs.put(job)

    def ask(self, job: Job) -> Any:
        """What `job` returns. Raises what it raises."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def answer() -> None:
            try:
                answers.put((job(), None))
            except Exception as error:
                answers.put((None, error))

        self._jobs.put(answer)
        found, error = answers.get()
        if error is not None:
            raise error
        return found

    def end(self, last: Job, timeout: float) -> None:
        """Does `last` and ends; returns then, or after `timeout` seconds."""
        if threading.current_thread() is self._thread:  # a finalizer runs wherever the last reference went
            last()
            self._jobs.put(None)
            return
        self._jobs.put(last)
        self._jobs.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                job()
            except Exception:
                logger.exception("a call could not be made or ended")
            del job
