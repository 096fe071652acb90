"""Worker processes for jobs that can be done again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from robodual.parent import end_with_parent


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
