"""`robodual demo`: five-task sequences on the built-in simulator, once through both services and once by the expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robodual_client.calvin import Options, evaluate, report
from robodual_client.calvin.results import Results


def run(
    sequences: int, workers: int, out: Path, policy: str, policy_options: Mapping[str, Any] | None = None
) -> tuple[Results, Path]:
    """The first `sequences` of the published 1000 on playtable, filmed. Returns the results and the report's path.

    Raises:
        EvaluationError: with one line that says what to do.
    """
    numbers = tuple(range(sequences))
    given = policy_options or {}
    options = Options(out, policy=policy, policy_options=given, numbers=numbers, workers=workers, video="all")
    results = evaluate(options)
    return results, report.write(results, out)
