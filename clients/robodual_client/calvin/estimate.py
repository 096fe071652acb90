"""What a run would take: counted, and timed on a short piece of its first sequence."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from robodual_client.calvin.options import Options
from robodual_client.calvin.progress import Silent
from robodual_client.calvin.runner import check, evaluate
from robodual_client.calvin.sequences import CHAIN

PIECE = 30  # steps of a subtask


def estimate(options: Options) -> str:
    """Counts of sequences and steps, and how long they take here, for a person to read.

    Raises EvaluationError for what would stop the run before its first sequence.
    """
    options = options.settled()
    done = check(options)[0].sequences
    todo = [number for number in options.numbers if number not in done]
    if not todo:
        return f"nothing is left to run: {len(done)} sequences are done in {options.out}"
    with tempfile.TemporaryDirectory() as folder:
        steps = max(PIECE, options.delay_steps + 1)
        piece = replace(options, out=Path(folder), numbers=(todo[0],), ep_len=steps, workers=1, resume=False)
        record = evaluate(piece, Silent()).sequences[todo[0]]
    step = record.seconds / sum(record.steps)
    least, most = len(todo) * options.ep_len, len(todo) * options.ep_len * CHAIN
    workers = min(options.workers, len(todo))
    times = [str(timedelta(seconds=round(steps * step / workers))) for steps in (least, most)]
    return (
        f"{len(todo)} sequences to run, {len(done)} done; {CHAIN} tasks each, at most {options.ep_len} steps a task\n"
        f"{step * 1e3:.1f} ms a step with one worker, {workers} in use\n"
        f"{times[0]} if every chain fails at its first task ({least:,} steps), at most {times[1]} ({most:,} steps), "
        "if the workers do not slow each other down"
    )
