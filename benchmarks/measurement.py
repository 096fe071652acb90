"""What the benchmarks share: paired, interleaved timing, a table, and a JSON record that says where it was taken."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

TOLERATED = 0.9  # of the earlier ratio, below which a comparison calls it a regression


@dataclass(frozen=True)
class Row:
    """One contender: times in milliseconds; `ratio` is the median over rounds of the baseline's time by this one's."""

    name: str
    median: float
    p99: float
    ratio: float


def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> list[Row]:
    """Times each contender once a round, in turns, so that a busy moment of the machine meets all of them.

    The first contender is the baseline of the ratios.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for position in range(-warmup, rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if position >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    baseline = next(iter(times.values()))
    return [
        Row(
            name,
            statistics.median(own),
            sorted(own)[min(len(own) - 1, int(0.99 * len(own)))],
            statistics.median(before / after for before, after in zip(baseline, own)),
        )
        for name, own in times.items()
    ]


def show(title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
    """Prints a table, and notes under it."""
    table = Table("", "median ms", "p99 ms", "times faster", title=title)
    for row in rows:
        table.add_row(row.name, f"{row.median:.2f}", f"{row.p99:.2f}", f"{row.ratio:.2f}")
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note)


def machine(packages: Sequence[str]) -> dict[str, object]:
    """The machine, the versions and the command, for a record."""
    cpu = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = models[0] if models else cpu
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def write(path: Path, name: str, rows: Sequence[Row], **facts: object) -> None:
    """Writes a record as JSON."""
    record = {"benchmark": name, "rows": [asdict(row) for row in rows], **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def regressions(path: Path, rows: Sequence[Row]) -> list[str]:
    """The contenders whose ratio to the baseline has fallen against an earlier record's; times are not compared."""
    earlier = {row["name"]: row["ratio"] for row in json.loads(path.read_text())["rows"]}
    return [
        f"{row.name}: {row.ratio:.2f} times faster, was {earlier[row.name]:.2f}"
        for row in rows
        if row.name in earlier and row.ratio < TOLERATED * earlier[row.name]
    ]
