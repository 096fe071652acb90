"""How a running evaluation is shown: a Rich progress bar on a terminal, a line per sequence elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol

from robodual_client.calvin.records import Record
from robodual_client.calvin.results import Results


class Progress(Protocol):
    """Told what happens; a context manager around the run."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def finished(self, record: Record, results: Results, total: int) -> None: ...

    def note(self, text: str) -> None: ...


def summary(results: Results) -> str:
    """The running success rates and average length, in one line."""
    rates = " ".join(f"{index + 1}/5 {rate * 100:.0f}%" for index, rate in enumerate(results.chain_rates()))
    return f"{rates} | avg {results.average_length:.2f}"


def _chain(record: Record) -> str:
    failed = "" if record.solved == len(record.tasks) else f", failed {record.tasks[record.solved]}"
    return f"sequence {record.sequence}: {record.solved}/{len(record.tasks)}{failed}"


class Lines:
    """One line per finished sequence on standard error."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def finished(self, record: Record, results: Results, total: int) -> None:
        done = len(results.sequences)
        elapsed = time.monotonic() - self._began
        self.note(f"[{done}/{total}, {elapsed:.0f} s] {_chain(record)} | {summary(results)}")

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Silent(Lines):
    """Shows nothing."""

    def note(self, text: str) -> None:
        pass


class Bar:
    """A Rich progress bar with the running success rates."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns: list[Any] = [BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}")]
        self._bar = Progress(*columns, TimeElapsedColumn(), Remaining(), console=Console(stderr=True))
        self._task = self._bar.add_task("no sequence finished yet", total=total)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def finished(self, record: Record, results: Results, total: int) -> None:
        self._bar.update(self._task, completed=len(results.sequences), description=summary(results))

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)


def choose(total: int) -> Progress:
    """A bar if standard error is a terminal and Rich (extra `report`) is installed; lines otherwise."""
    if sys.stderr.isatty():
        try:
            return Bar(total)
        except ImportError:
            return Lines()
    return Lines()
