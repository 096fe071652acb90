"""Success against delay: one evaluation per delay, and the curve by which asynchronous methods are compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Mapping

from robodual_client.calvin.options import EvaluationError, Options
from robodual_client.calvin.results import REPORT, Results, write_json
from robodual_client.calvin.runner import check, evaluate
from robodual_client.calvin.sequences import CHAIN
from robodual_client.calvin.statistics import bootstrap, wilson

SWEEP, PAGE = "sweep.json", "sweep.html"
_FOLDER = "delay-"

Sweep = Mapping[int, Results]  # by delay, in control steps


def parse_delays(text: str) -> tuple[int, ...]:
    """Delays of "0,1,2,4", ascending, each once. Raises EvaluationError for another text."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise EvaluationError(f"delays: must be control steps, as 0,1,2,4, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def plan(options: Options, delays: tuple[int, ...]) -> dict[int, Options]:
    """The evaluation of each delay, and of those that a resumed sweep has begun already.

    Raises EvaluationError if one of them could not start.
    """
    options = options.settled()
    begun = [folder.name[len(_FOLDER) :] for folder in options.out.glob(f"{_FOLDER}*")] if options.resume else []
    chosen = sorted({*delays, *(int(delay) for delay in begun if delay.isdecimal())})
    runs = {delay: replace(options, out=folder_of(options.out, delay), delay_steps=delay) for delay in chosen}
    for run in runs.values():
        check(run)
    return runs


def sweep(options: Options, delays: tuple[int, ...], note: Callable[[str], None]) -> dict[int, Results]:
    """Evaluates `options` at each delay, in a folder of its own under `options.out`, and writes sweep.json.

    Raises EvaluationError before the first evaluation if one of them cannot be.
    """
    done: dict[int, Results] = {}
    for delay, run in plan(options, delays).items():
        note(f"{delay} steps late: {run.out}")
        done[delay] = evaluate(run)
        write_json(options.out / SWEEP, to_json(done))
    return done


def folder_of(out: Path, delay: int) -> Path:
    """Where the run of one delay lies in the sweep's folder."""
    return out / f"{_FOLDER}{delay:02d}"


def to_json(runs: Sweep) -> dict[str, Any]:
    """Each delay's figures with their 95 % intervals."""
    return {
        "delays": {
            str(delay): {
                "sequences": len(run.sequences),
                "avg_seq_len": run.average_length,
                "avg_seq_len_interval": bootstrap(run.lengths()),
                "chain_sr": {str(index + 1): rate for index, rate in enumerate(run.chain_rates())},
                "chain_sr_intervals": {str(index + 1): each for index, each in enumerate(chain_intervals(run))},
                "held_steps": run.held,
                "steps": run.steps,
            }
            for delay, run in runs.items()
        }
    }


def chain_intervals(run: Results) -> list[tuple[float, float]]:
    """95 % Wilson intervals of the chain rates."""
    return [wilson(run.at_least(tasks), len(run.sequences)) for tasks in range(1, CHAIN + 1)]


def table(runs: Sweep) -> str:
    """The field's table, a row a delay, with 95 % intervals (Wilson; bootstrap for the length)."""
    heads = "".join(f"{f'{tasks}/5':>20}" for tasks in range(1, CHAIN + 1))
    lines = [f"{'delay':>5} {'chains':>7}{heads}{'Avg. Len.':>22}"]
    for delay, run in runs.items():
        cells = [
            f"{rate * 100:.1f} ({low * 100:.1f}-{high * 100:.1f})"
            for rate, (low, high) in zip(run.chain_rates(), chain_intervals(run))
        ]
        low, high = bootstrap(run.lengths())
        length = f"{run.average_length:.3f} ({low:.2f}-{high:.2f})"
        lines.append(f"{delay:>5} {len(run.sequences):>7}{''.join(f'{cell:>20}' for cell in cells)}{length:>22}")
    return "\n".join(lines)


def write_page(runs: Sweep, folder: Path) -> Path:
    """Writes sweep.html into the folder and returns its path. Extra `report`."""
    from markupsafe import Markup

    from robodual_client.calvin import charts, report

    delays, results = list(runs), list(runs.values())
    lengths = [bootstrap(run.lengths()) for run in results]
    curves = [("Average length", [run.average_length for run in results], lengths, CHAIN)]
    for tasks in (1, CHAIN):
        rates = [run.chain_rates()[tasks - 1] for run in results]
        intervals = [chain_intervals(run)[tasks - 1] for run in results]
        curves.append((f"Chains with at least {tasks}/5", rates, intervals, 1))
    rows = [
        {
            "delay": delay,
            "run": (folder_of(Path(), delay) / REPORT).as_posix(),
            "chains": len(run.sequences),
            "rates": list(zip(run.chain_rates(), chain_intervals(run))),
            "average": run.average_length,
            "interval": interval,
            "held": run.held / max(1, run.steps),
        }
        for delay, run, interval in zip(delays, results, lengths)
    ]
    values = {
        "protocol": results[0].protocol,
        "hold": next((run.protocol["pace"]["hold"] for run in results if run.protocol.get("pace")), ""),
        "curves": [
            {"title": title, "chart": Markup(charts.delay_curve(delays, figures, intervals, most, title))}
            for title, figures, intervals, most in curves
        ],
        "rows": rows,
    }
    return report.render("sweep.html.jinja", values, folder / PAGE)
