"""An evaluation as one HTML page beside its videos, readable offline. Extra `report` (Jinja2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import jinja2
from markupsafe import Markup

from robodual_client.calvin import charts
from robodual_client.calvin.pace import describe
from robodual_client.calvin.records import Record
from robodual_client.calvin.results import REPORT, Results
from robodual_client.calvin.statistics import bootstrap, wilson

_DURATIONS = {
    "act": ("Specialist round trip", "Act, from request to action, as the client sees it"),
    "condition": ("Generalist round trip", "Condition, from frame to stored conditioning"),
    "policy": ("Policy step", "All that the policy takes for one action"),
    "env": ("Simulator step", "env.step: physics and cameras"),
}


def write(results: Results, folder: Path) -> Path:
    """Writes report.html into the run's folder and returns its path. Raises ValueError for a run without sequences."""
    if not results.sequences:
        raise ValueError("a report needs at least one finished sequence")
    return render("report.html.jinja", _page(results), folder / REPORT)


def render(template: str, values: Mapping[str, Any], path: Path) -> Path:
    """Writes a page of this folder's `template` to `path`, and returns it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    path.write_text(environment.get_template(template).render(values), encoding="utf-8")
    return path


def _page(results: Results) -> dict[str, Any]:
    total = len(results.sequences)
    intervals = [wilson(results.at_least(count + 1), total) for count in range(5)]
    order = sorted(results.sequences.values(), key=lambda record: (record.solved == len(record.tasks), record.solved))
    last = results.provenance[-1] if results.provenance else {}
    return {
        "protocol": results.protocol,
        "schedule": results.protocol.get("policy_options", {}).get("schedule", ""),
        "total": total,
        "average": results.average_length,
        "average_interval": bootstrap(results.lengths()),
        "rates": list(zip(results.chain_rates(), intervals)),
        "curve": Markup(charts.chain_curve(results.chain_rates(), intervals)),
        "tasks": _tasks(results),
        "durations": _durations(results),
        "ages": _ages(results.ages(), "Age of the conditioning, in control steps"),
        "pace": describe(results.protocol.get("pace")),
        "action_ages": _ages(results.action_ages(), "Age of the actions, in control steps"),
        "held": results.held / max(1, results.steps),
        "overrun": results.overruns / max(1, results.steps),
        "rate": results.rate,
        "degraded": sum(record.degraded for record in results.sequences.values()),
        "steps": results.steps,
        "hours": sum(record.seconds for record in results.sequences.values()) / 3600,
        "sequences": [_sequence(record) for record in order],
        "failed": sum(record.solved < len(record.tasks) for record in order),
        "videos": any(record.video for record in order),
        "last": last,
        "starts": len(results.provenance),
    }


def _ages(counts: Mapping[int, int], label: str) -> str:
    return Markup(charts.ages(counts, label)) if counts else ""


def _tasks(results: Results) -> list[dict[str, Any]]:
    """One row a task, the least successful first."""
    rows = []
    for task, (success, attempts) in results.task_counts().items():
        low, high = wilson(success, attempts)
        row = {"name": task.replace("_", " "), "success": success, "attempts": attempts}
        rows.append({**row, "rate": success / attempts, "low": low, "high": high})
    return sorted(rows, key=lambda row: (row["rate"], -row["attempts"]))


def _durations(results: Results) -> list[dict[str, Any]]:
    shown = []
    for name, (title, about) in _DURATIONS.items():
        histogram = results.milliseconds(name)
        if len(histogram):
            quantiles = {f"p{q}": histogram.quantile(q / 100) for q in (50, 90, 99)}
            drawing = Markup(charts.durations(histogram, title))
            shown.append({"title": title, "about": about, "chart": drawing, "count": len(histogram), **quantiles})
    return shown


def _sequence(record: Record) -> dict[str, Any]:
    chain = []
    for index, task in enumerate(record.tasks):
        state = "solved" if index < record.solved else "failed" if index == record.solved else "unasked"
        steps = record.steps[index] if index < len(record.steps) else None
        chain.append({"task": task.replace("_", " "), "state": state, "steps": steps})
    return {
        "number": record.sequence,
        "solved": record.solved,
        "all": record.solved == len(record.tasks),
        "chain": chain,
        "seconds": record.seconds,
        "video": record.video,
        "poster": Path(record.video).with_suffix(".jpg").as_posix() if record.video else None,
    }
