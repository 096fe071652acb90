"""What each half of a pair contributes, and what time costs it: the model card's tables, on the same sequences.

    python -m benchmarks.ablations --out runs/ablations --sequences 200 --fewer 30

Each setting is an evaluation on the play table through Redis and both services; a stopped run goes on where it was.
The first setting runs `--sequences` of the published sequences, the others the first `--fewer` of them, and its row
is given for those too, so that settings are compared on the same sequences. Real time runs one simulator at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import measurement

from robodual.pair import Options, Pair
from robodual_client.calvin import Options as Evaluation
from robodual_client.calvin import Results, evaluate
from robodual_client.calvin.statistics import bootstrap, wilson

ONLY = "ROBODUAL_SPECIALIST_ONLY"


@dataclass(frozen=True)
class Setting:
    """How a pair is served and driven; `realtime` in hertz."""

    name: str
    services: Mapping[str, str] = field(default_factory=dict)
    schedule: str = "published"
    realtime: float | None = None


SETTINGS = {
    "pair": Setting("the pair"),
    "generalist": Setting("generalist alone", {ONLY: "generalist"}),
    "specialist": Setting("specialist without conditioning", {ONLY: "specialist"}),
    "async": Setting("the pair, async schedule", schedule="async"),
    "realtime15": Setting("the pair, real time at 15 Hz, async", schedule="async", realtime=15),
    "realtime30": Setting("the pair, real time at 30 Hz, async", schedule="async", realtime=30),
}


def run(setting: Setting, sequences: int, options: argparse.Namespace, out: Path) -> Results:
    """Evaluates one setting, or what is missing of it."""
    given: dict[str, Path | None] = {"generalist": options.generalist, "specialist": options.specialist}
    checkpoints = {name: path for name, path in given.items() if path is not None}
    pair = Options(profile=options.profile, checkpoints=checkpoints, device=options.device, settings=setting.services)
    with Pair(pair) as services:
        return evaluate(
            Evaluation(
                out,
                policy_options={**services.addresses, "schedule": setting.schedule},
                numbers=tuple(range(sequences)),
                workers=1 if setting.realtime else options.workers,
                realtime=setting.realtime,
                resume=True,
            )
        )


def row(name: str, results: Results) -> str:
    """A row of the table: rates, average length with its interval."""
    rates = " | ".join(f"{rate * 100:.1f}" for rate in results.chain_rates())
    low, high = bootstrap(results.lengths())
    return f"| {name} | {len(results.sequences)} | {rates} | {results.average_length:.2f} ({low:.2f} to {high:.2f}) |"


def first(results: Results, count: int) -> Results:
    """The results of the first sequences alone."""
    chosen = {number: results.sequences[number] for number in sorted(results.sequences)[:count]}
    return Results(chosen, results.protocol, results.provenance)


def tasks(results: Results) -> list[str]:
    """The table of tasks: successes, attempts, rate and interval."""
    lines = ["| task | solved | tried | % | 95 % |", "|---|---|---|---|---|"]
    for task, (solved, tried) in results.task_counts().items():
        low, high = wilson(solved, tried)
        lines.append(
            f"| {task} | {solved} | {tried} | {100 * solved / tried:.0f} | {100 * low:.0f} to {100 * high:.0f} |"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the settings that are asked for and prints both tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for a run of each setting")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--fewer", type=int, default=30, help="sequences of all settings but the first")
    parser.add_argument("--profile", default="playtable")
    parser.add_argument("--generalist", type=Path, help="a checkpoint; without it, the profile's own")
    parser.add_argument("--specialist", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(argv)
    found: dict[str, Results] = {}
    for index, name in enumerate(options.settings):
        found[name] = run(SETTINGS[name], options.fewer if index else options.sequences, options, options.out / name)
    lines = [
        "| setting | sequences | 1/5 | 2/5 | 3/5 | 4/5 | 5/5 | average length |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for index, (name, results) in enumerate(found.items()):
        lines.append(row(SETTINGS[name].name, results))
        if index == 0 and len(found) > 1:
            lines.append(row(f"{SETTINGS[name].name}, the sequences below", first(results, options.fewer)))
        if SETTINGS[name].realtime:
            lines.append(f"<!-- {results.lateness()} -->")
    print("\n".join([*lines, "", *tasks(next(iter(found.values())))]))
    record: dict[str, Any] = {name: {**results.to_json(), "provenance": None} for name, results in found.items()}
    record["machine"] = measurement.machine(("robodual", "robodual-client", "torch", "pybullet"))
    (options.out / "ablations.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
