"""Two runs side by side: which is better, and whether the difference is more than chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping

from robodual_client.calvin.pace import describe
from robodual_client.calvin.results import Results
from robodual_client.calvin.sequences import CHAIN
from robodual_client.calvin.statistics import bootstrap, sign_flip, wilson

SIGNIFICANT = 0.05  # the probability under which a difference is not called chance


@dataclass(frozen=True)
class Row:
    """One figure of both runs, with its 95 % intervals."""

    name: str
    a: float
    a_interval: tuple[float, float]
    b: float
    b_interval: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Success rates (0 to 1, Wilson intervals) of chains and tasks; average lengths (bootstrap intervals); and the
    mean of B's length minus A's over the sequences that both ran, which compares like with like, and the probability of
    one as large by chance."""

    chains: list[Row]
    tasks: list[Row]
    length: Row
    counts: tuple[int, int]  # chains of A and of B
    shared: int
    difference: float
    difference_interval: tuple[float, float]
    chance: float
    settings: list[tuple[str, str, str]]  # name, A's and B's, where these differ
    lateness: tuple[str, str]  # how far answers came late in A and in B

    def table(self, a: str, b: str) -> str:
        """As text; `a` and `b` are the runs' names."""
        lines = [f"{'':<26} {a:>24} {b:>24}", f"{'chains':<26} {self.counts[0]:>24} {self.counts[1]:>24}"]
        lines += [_line(row, 100, 1) for row in self.chains]
        lines.append(_line(self.length, 1, 3))
        lines += ["", *(_line(row, 100, 1) for row in self.tasks)]
        low, high = self.difference_interval
        better = b if self.difference > 0 else a
        verdict = f"{better} is better" if self.chance < SIGNIFICANT else "no difference beyond chance"
        lines += [
            "",
            f"average length, {b} - {a}, over the {self.shared} sequences of both: "
            f"{self.difference:+.3f} ({low:+.3f} to {high:+.3f}): {verdict} (p = {self.chance:.2g})",
        ]
        if self.settings:
            lines += ["", *(f"{name}: {one} in {a}, {other} in {b}" for name, one, other in self.settings)]
            lines += [f"{name}: {late}" for name, late in zip((a, b), self.lateness)]
        return "\n".join(lines)


def compare(a: Results, b: Results) -> Comparison:
    """Raises ValueError if the runs have no sequence in common."""
    shared = sorted(a.sequences.keys() & b.sequences.keys())
    if not shared:
        raise ValueError("the runs have no sequence in common, so that nothing can be compared")
    differences = [b.sequences[number].solved - a.sequences[number].solved for number in shared]
    chains = [
        _row(f"{tasks}/5", (a.at_least(tasks), len(a.sequences)), (b.at_least(tasks), len(b.sequences)))
        for tasks in range(1, CHAIN + 1)
    ]
    a_tasks, b_tasks = a.task_counts(), b.task_counts()
    tasks = [_row(task, a_tasks[task], b_tasks[task]) for task in a_tasks if task in b_tasks]
    length = Row("Avg. Len.", a.average_length, bootstrap(a.lengths()), b.average_length, bootstrap(b.lengths()))
    difference = sum(differences) / len(shared)
    return Comparison(
        chains=chains,
        tasks=tasks,
        length=length,
        counts=(len(a.sequences), len(b.sequences)),
        shared=len(shared),
        difference=difference,
        difference_interval=bootstrap(differences),
        chance=sign_flip(differences),
        settings=_settings(a.protocol, b.protocol),
        lateness=(a.lateness(), b.lateness()),
    )


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    def shown(name: str, protocol: Mapping[str, Any]) -> str:
        value = protocol.get(name)
        if isinstance(value, Mapping) and name != "pace":
            return " ".join(f"{key}={value[key]}" for key in sorted(value)) or "none"
        return describe(value) if name == "pace" else "none" if value is None else str(value)

    return [(name, shown(name, a), shown(name, b)) for name in {**a, **b} if a.get(name) != b.get(name)]


def _row(name: str, a: tuple[int, int], b: tuple[int, int]) -> Row:
    return Row(name, a[0] / a[1], wilson(*a), b[0] / b[1], wilson(*b))


def _line(row: Row, scale: float, digits: int) -> str:
    cells = [
        f"{value * scale:8.{digits}f} ({low * scale:.{digits}f} to {high * scale:.{digits}f})"
        for value, (low, high) in ((row.a, row.a_interval), (row.b, row.b_interval))
    ]
    return f"{row.name:<26} {cells[0]:>24} {cells[1]:>24}"
