"""The result of an evaluation: the published figures, what they were measured with, and runs merged or compared."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping

from robodual_client.calvin import records
from robodual_client.calvin.histogram import Histogram
from robodual_client.calvin.options import EvaluationError
from robodual_client.calvin.pace import describe
from robodual_client.calvin.records import DURATIONS, Record
from robodual_client.calvin.sequences import CHAIN
from robodual_client.calvin.tasks import TASKS

RUN, SEQUENCES, RESULTS, REPORT = "run.json", "sequences.jsonl", "results.json", "report.html"


@dataclass
class Results:
    """Finished sequences by number, the protocol that they were run under, and one provenance entry for each start
    of the runner that made them."""

    sequences: dict[int, Record]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    provenance: list[dict[str, Any]] = field(default_factory=list)

    def lengths(self) -> list[int]:
        """Solved tasks of each sequence, in the sequences' order."""
        return [self.sequences[number].solved for number in sorted(self.sequences)]

    @property
    def average_length(self) -> float:
        """Mean number of tasks solved in a row, 0 to 5; 0 for no sequences."""
        lengths = self.lengths()
        return sum(lengths) / len(lengths) if lengths else 0.0

    def at_least(self, tasks: int) -> int:
        """How many sequences solved that many tasks in a row."""
        return sum(length >= tasks for length in self.lengths())

    def chain_rates(self) -> list[float]:
        """Share of sequences that solved at least 1, 2, ... 5 tasks in a row."""
        return [self.at_least(tasks) / max(1, len(self.sequences)) for tasks in range(1, CHAIN + 1)]

    def task_counts(self) -> dict[str, tuple[int, int]]:
        """(successes, attempts) of every task that was attempted, in the published order of tasks."""
        solved: Counter[str] = Counter()
        tried: Counter[str] = Counter()
        for record in self.sequences.values():
            solved.update(record.tasks[: record.solved])
            tried.update(record.tasks[: record.solved + 1])
        return {task: (solved[task], tried[task]) for task in TASKS if tried[task]}

    def milliseconds(self, name: str) -> Histogram:
        """One of DURATIONS over all steps of all sequences; empty where the policy does not tell."""
        kept = (record.milliseconds.get(name) for record in self.sequences.values())
        return Histogram.merged(histogram for histogram in kept if histogram is not None)

    def ages(self) -> dict[int, int]:
        """How many steps were executed with a conditioning of each age."""
        return _total(record.ages for record in self.sequences.values())

    def action_ages(self) -> dict[int, int]:
        """How many steps executed an action of each age: steps since the observation that it was made of."""
        return _total(record.action_ages for record in self.sequences.values())

    @property
    def steps(self) -> int:
        return sum(sum(record.steps) for record in self.sequences.values())

    @property
    def held(self) -> int:
        """Steps for which no new action had come."""
        return sum(record.held for record in self.sequences.values())

    @property
    def overruns(self) -> int:
        """Steps that took the simulator longer than real time allows."""
        return sum(record.overruns for record in self.sequences.values())

    @property
    def rate(self) -> float | None:
        """Control steps a second that a run in real time reached; None for the simulated clock."""
        pace = self.protocol.get("pace") or {}
        if "realtime" not in pace or not self.steps:
            return None
        late = sum(record.late for record in self.sequences.values())
        return self.steps / (self.steps / float(pace["realtime"]) + late)

    def lateness(self) -> str:
        """How far answers came late, in one line."""
        ages = self.action_ages()
        steps = max(1, self.steps)
        said = f"{describe(self.protocol.get('pace'))}: {self.held / steps:.1%} of steps without a new action"
        if ages:
            said += f", actions {_quantile(ages, 0.5)} steps old (p50), {_quantile(ages, 0.99)} (p99)"
        if self.rate is not None:
            said += f"; the simulator was behind in {self.overruns / steps:.1%} of steps and made {self.rate:.1f} Hz"
        return said

    def to_json(self) -> dict[str, Any]:
        """The published results format (avg_seq_len, chain_sr, task_info) and what belongs to it."""
        quantiles = {}
        for name in DURATIONS:
            histogram = self.milliseconds(name)
            if len(histogram):
                quantiles[name] = {f"p{q}": round(histogram.quantile(q / 100), 2) for q in (50, 90, 99)}
        return {
            "avg_seq_len": self.average_length,
            "chain_sr": {str(index + 1): rate for index, rate in enumerate(self.chain_rates())},
            "task_info": {
                task: {"success": success, "total": total} for task, (success, total) in self.task_counts().items()
            },
            "sequences": len(self.sequences),
            "milliseconds": quantiles,
            "conditioning_ages": {str(age): count for age, count in self.ages().items()},
            "degraded_steps": sum(record.degraded for record in self.sequences.values()),
            "steps": self.steps,
            "held_steps": self.held,
            "action_ages": {str(age): count for age, count in self.action_ages().items()},
            "overruns": self.overruns,
            "rate": self.rate,
            "protocol": dict(self.protocol),
            "provenance": self.provenance,
        }

    def table(self) -> str:
        """The field's table, as text."""
        rates = "".join(f"{rate * 100:6.1f} " for rate in self.chain_rates())
        return (
            f"{'':>12}   1/5    2/5    3/5    4/5    5/5   Avg. Len.\n"
            f"{len(self.sequences):>5} chains {rates} {self.average_length:9.3f}"
        )

    def save(self, folder: Path) -> None:
        """Writes results.json, whole or not at all."""
        write_json(folder / RESULTS, self.to_json())


def _total(counts: Iterable[Mapping[int, int]]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for each in counts:
        total.update(each)
    return {key: total[key] for key in sorted(total)}


def _quantile(counts: Mapping[int, int], q: float) -> int:
    rank, seen = q * sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= rank:
            break
    return value


def load(folder: Path) -> Results:
    """The run in the folder, finished or not. Raises EvaluationError if there is none."""
    try:
        run = json.loads((folder / RUN).read_text())
        protocol, provenance = dict(run["protocol"]), list(run["provenance"])
    except FileNotFoundError:
        raise EvaluationError(f"{folder} holds no evaluation: {RUN} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        message = f"{folder / RUN} is not a run's protocol and provenance: {error!r}; choose another folder"
        raise EvaluationError(message) from error
    try:
        return Results(records.read(folder / SEQUENCES), protocol, provenance)
    except ValueError as error:
        raise EvaluationError(str(error)) from error


def merge(folders: Iterable[Path], out: Path) -> Results:
    """Writes the runs of `folders`, parts of one evaluation, as one run into `out`, videos included.

    Neither the order of the folders nor how the sequences were spread over them matters.
    Raises EvaluationError if the runs differ in protocol, or two hold the same sequence with different results.
    """
    parts = {folder: load(folder) for folder in sorted(folders)}
    if not parts:
        raise EvaluationError("merge: name at least one run's folder")
    protocol = next(iter(parts.values())).protocol
    chosen: dict[int, tuple[Record, Path]] = {}
    for folder, part in parts.items():
        require_same(protocol, part.protocol, f"{folder} and {next(iter(parts))} are no parts of one evaluation")
        for number, record in part.sequences.items():
            other, source = chosen.setdefault(number, (record, folder))
            if other.outcome() != record.outcome():
                raise EvaluationError(
                    f"sequence {number} has {record.solved} solved tasks in {folder} and {other.solved} in {source}"
                )
    out.mkdir(parents=True, exist_ok=True)
    if (out / SEQUENCES).exists():
        raise EvaluationError(f"out: {out} already holds a run; choose another folder")
    provenance = [entry for part in parts.values() for entry in part.provenance]
    write_json(out / RUN, {"protocol": protocol, "provenance": provenance})
    for number in sorted(chosen):
        record, folder = chosen[number]
        for file in (folder / "videos").glob(f"{number:04d}.*"):
            (out / "videos").mkdir(exist_ok=True)
            shutil.copy2(file, out / "videos" / file.name)
        records.append(out / SEQUENCES, record)
    merged = load(out)
    merged.save(out)
    return merged


def require_same(expected: Mapping[str, Any], found: Mapping[str, Any], message: str) -> None:
    """Raises EvaluationError, starting with `message`, that names the first setting in which the protocols differ."""
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise EvaluationError(f"{message}: {name} is {found.get(name)!r}, not {expected.get(name)!r}")


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    new = path.with_suffix(".new")
    with new.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
