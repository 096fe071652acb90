"""What is kept of one finished sequence, and the file of one JSON line each that grows while an evaluation runs."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robodual_client.calvin.histogram import Histogram

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The errors of a disk that takes no more: to try again does not help."""

DURATIONS = ("act", "condition", "policy", "env")
"""What is timed, in milliseconds a step: the specialist's round trip, the generalist's, the whole of `policy.step`,
and `env.step`. Only policies that talk to services have the first two."""


@dataclass
class Record:
    """One sequence: which tasks were asked, how many were solved, and how the steps went."""

    sequence: int
    tasks: tuple[str, ...]
    solved: int
    # Control steps that each attempted subtask took; the last is the failed one's unless all were solved.
    steps: list[int]
    seconds: float
    milliseconds: dict[str, Histogram] = field(default_factory=dict)
    # How many steps were answered with a conditioning of that age, in steps.
    ages: dict[int, int] = field(default_factory=dict)
    degraded: int = 0
    # How many steps executed an action that had been made of the observation so many steps before.
    action_ages: dict[int, int] = field(default_factory=dict)
    # Steps for which no new action had come, steps that the simulator was too slow for, and by how many seconds in all.
    held: int = 0
    overruns: int = 0
    late: float = 0.0
    video: str | None = None

    def outcome(self) -> tuple[int, tuple[str, ...], int]:
        """What must not depend on the machine or the number of workers."""
        return self.sequence, self.tasks, self.solved

    def to_json(self) -> dict[str, Any]:
        return {
            "sequence": self.sequence,
            "tasks": list(self.tasks),
            "solved": self.solved,
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "milliseconds": {name: histogram.to_json() for name, histogram in self.milliseconds.items()},
            "ages": {str(age): self.ages[age] for age in sorted(self.ages)},
            "degraded": self.degraded,
            "action_ages": {str(age): self.action_ages[age] for age in sorted(self.action_ages)},
            "held": self.held,
            "overruns": self.overruns,
            "late": round(self.late, 3),
            "video": self.video,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Record:
        """Raises KeyError, TypeError or ValueError for a row that is not one of `to_json`."""
        return cls(
            sequence=int(row["sequence"]),
            tasks=tuple(row["tasks"]),
            solved=int(row["solved"]),
            steps=[int(steps) for steps in row["steps"]],
            seconds=float(row["seconds"]),
            milliseconds={name: Histogram.from_json(counts) for name, counts in row["milliseconds"].items()},
            ages={int(age): int(count) for age, count in row["ages"].items()},
            degraded=int(row["degraded"]),
            action_ages={int(age): int(count) for age, count in row["action_ages"].items()},
            held=int(row["held"]),
            overruns=int(row["overruns"]),
            late=float(row["late"]),
            video=row["video"],
        )


def read(path: Path) -> dict[int, Record]:
    """The finished sequences in the file, by number; none if there is no file.

    A last line that a killed process left half-written is skipped. Raises ValueError for any other bad line.
    """
    if not path.is_file():
        return {}
    records = {}
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = Record.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            cure = "delete the line, and --resume runs its sequence again"
            raise ValueError(f"{path}, line {number}, is not a sequence's record: {error!r}; {cure}") from error
        records[record.sequence] = record
    return records


def append(path: Path, record: Record) -> None:
    """Adds the record as one line, on disk when this returns; a torn last line is cut off first."""
    line = json.dumps(record.to_json(), separators=(",", ":")).encode() + b"\n"
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
