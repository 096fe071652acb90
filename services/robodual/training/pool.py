"""Worker processes for jobs that can be done again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from safetensors import SafetensorError

from robodual.parent import end_with_parent
from robodual.training.annotations import DatasetError


@contextmanager
def pool(workers: int, jobs: int) -> Iterator[ProcessPoolExecutor]:
    """At most `workers` processes for so many jobs; what has not begun when the block ends is dropped.

    They are spawned, since a forked child would share the parent's threads and physics, and end with the parent.
    """
    count = min(workers, max(jobs, 1))
    with ProcessPoolExecutor(count, get_context("spawn"), initializer=end_with_parent) as processes:
        try:
            yield processes
        finally:
            processes.shutdown(cancel_futures=True)


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Raises DatasetError where what fills a folder met a full disk, or lost a worker process.

    A full disk ends a process that writes into a mapped file without an error (SIGBUS).
    """
    again = "run the same command again to go on"
    try:
        yield
    except BrokenProcessPool:
        raise DatasetError(f"{folder}: a worker process died (is the disk or the memory full?); {again}") from None
    except (OSError, SafetensorError) as error:
        raise DatasetError(f"{folder}: unfinished ({error}); mend that (free some space), and {again}") from error
