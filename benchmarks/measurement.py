"""What the benchmarks share: paired, interleaved timing, a table, a plot, and a record that says where it was taken."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol

from rich.console import Console
from rich.table import Table

from robodual import cpu

TOLERATED = 0.9  # of the earlier ratio, below which a comparison calls it a regression


@dataclass(frozen=True)
class Row:
    """One contender: times in milliseconds; `ratio` is the median over rounds of the baseline's time by this one's.

    A ratio of 0 says that there is nothing to compare with.
    """

    name: str
    median: float
    p99: float
    ratio: float


class Recorded(Protocol):
    """A row of a record: any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Timed(Recorded, Protocol):
    """A row that can be drawn and compared: `Row`, or a benchmark's own that says more."""

    @property
    def name(self) -> str: ...

    @property
    def median(self) -> float: ...

    @property
    def p99(self) -> float: ...

    @property
    def ratio(self) -> float: ...


def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> list[Row]:
    """Times each contender once a round, in turns, so that a busy moment of the machine meets all of them.

    The first contender is the baseline of the ratios.
    """
    return interleave_timed({name: partial(_seconds, run) for name, run in contenders.items()}, rounds, warmup)


def interleave_timed(contenders: Mapping[str, Callable[[], float]], rounds: int, warmup: int) -> list[Row]:
    """The same of contenders that give their own seconds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for position in range(-warmup, rounds):
        for name, run in contenders.items():
            seconds = run()
            if position >= 0:
                times[name].append(seconds * 1e3)
    return paired(times)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paired(times: Mapping[str, Sequence[float]]) -> list[Row]:
    """Rows of milliseconds by contender, a figure for each round; the first contender is the baseline."""
    baseline = next(iter(times.values()))
    return [
        Row(
            name,
            statistics.median(own),
            percentile(own, 0.99),
            statistics.median(before / after for before, after in zip(baseline, own)),
        )
        for name, own in times.items()
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed, about."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def show(title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
    """Prints a table, and notes under it."""
    table = Table("", "median ms", "p99 ms", "times faster", title=title)
    for row in rows:
        table.add_row(row.name, f"{row.median:.2f}", f"{row.p99:.2f}", f"{row.ratio:.2f}" if row.ratio else "")
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note)


def markdown(*rows: Sequence[str], header: Sequence[str] = ()) -> None:
    """Prints a table that a page can take as it is; without a header, more rows of the last one."""
    for cells in (header, ["---"] * len(header), *rows) if header else rows:
        print(f"| {' | '.join(cells)} |", flush=True)


def machine(packages: Sequence[str]) -> dict[str, object]:
    """The machine, the versions and the command, for a record."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "cpu": cpu.says("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def write(path: Path, name: str, rows: Sequence[Recorded], **facts: object) -> None:
    """Writes a record as JSON."""
    record = {"benchmark": name, "rows": [asdict(row) for row in rows], **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def regressions(path: Path, rows: Sequence[Timed]) -> list[str]:
    """The contenders whose ratio to the baseline has fallen against an earlier record's; times are not compared."""
    earlier = {row["name"]: row["ratio"] for row in json.loads(path.read_text())["rows"]}
    if not earlier.keys() & {row.name for row in rows}:
        return [f"{path} has none of these rows; give a record of the same benchmark and options"]
    return [
        f"{row.name}: {row.ratio:.2f} times faster, was {earlier[row.name]:.2f}"
        for row in rows
        if row.name in earlier and row.ratio < TOLERATED * earlier[row.name]
    ]


def plot(path: Path, title: str, rows: Sequence[Timed]) -> None:
    """Draws each row's median as a bar, with a line from it to the p99, in the format that `path` ends in.

    Rows without a time, which could not be measured, are left out.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.median]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    medians = [row.median for row in rows]
    lines = [[0.0] * len(rows), [max(0.0, row.p99 - row.median) for row in rows]]
    axes.barh([row.name for row in rows], medians, xerr=lines, capsize=4, color="#4c72b0", ecolor="#333333")
    for position, row in enumerate(rows):
        ratio = f" {row.ratio:.2f} x" if row.ratio else ""
        axes.annotate(ratio, (max(row.median, row.p99), position), va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("milliseconds: median, and p99 as a line; x: times faster than the baseline")
    axes.set_title(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The flags that every benchmark of the command line has, for `conclude`. What is wrong is said before the run."""
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--png", type=_picture, help="where to draw the rows (needs the extra `benchmarks`)")
    parser.add_argument("--compare", type=_record, help="an earlier record: exit status 1 if a ratio has fallen")


def _picture(name: str) -> Path:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("plots need matplotlib: pip install 'robodual[benchmarks]'")
    return Path(name)


def _record(name: str) -> Path:
    try:
        rows = json.loads(Path(name).read_text())["rows"]
        if not all(isinstance(row["name"], str) and isinstance(row["ratio"], float) for row in rows):
            raise ValueError("its rows lack names or ratios")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{name} is no record that a benchmark wrote by --json: {error}") from error
    return Path(name)


def conclude(
    options: argparse.Namespace, name: str, title: str, rows: Sequence[Timed], packages: Sequence[str], **facts: object
) -> int:
    """Writes and compares as the flags of `add_outputs` say; returns the exit status, 1 for a ratio that has fallen."""
    if options.json:
        write(options.json, name, rows, **facts, machine=machine(packages))
    if options.png:
        plot(options.png, title, rows)
    fallen = regressions(options.compare, rows) if options.compare else []
    for line in fallen:
        print(f"regression: {line}", file=sys.stderr)
    return 1 if fallen else 0
