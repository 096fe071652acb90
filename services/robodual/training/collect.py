"""Collects demonstrations in parallel into a folder in CALVIN's format; what is there is kept, so it can be resumed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from robodual.training.annotations import DatasetError, Span, write_annotations, write_array
from robodual.training.demonstration import NUMBERS, Plan, Record, demonstrate, record_path
from robodual.training.pool import pool, resumable
from robodual.training.recording import Recording
from robodual.training.replacement import replacing
from robodual_client.calvin.annotations import load as evaluation_sentences
from robodual_client.calvin.sequences import CHAIN
from robodual_client.calvin.tasks import TASKS

MAX_STEPS = 10_000_000  # seven digits
STATISTICS_STEPS = 2000


@dataclass(frozen=True)
class Collection:
    """What is in the folder after a run: demonstrations, steps, spans of each task, and expert failures."""

    demonstrations: int
    steps: int
    tasks: Counter[str]
    failed: Counter[str]


def collect(
    output: Path,
    demonstrations: int,
    *,
    seed: int = 0,
    noise: float = 0.0,
    chain: int = CHAIN,
    workers: int = 1,
    sentences: Mapping[str, Sequence[str]] | None = None,
    progress: Callable[[Record], None] = lambda record: None,
) -> Collection:
    """Writes demonstrations 0 to `demonstrations` - 1 into the split folder `output`, and its index and annotations.

    What a demonstration holds does not depend on the number of workers. Those that the folder has already are kept, so
    that an interrupted run goes on when it is called again, and a larger number adds to a finished one.

    Args:
        output: a folder like `datasets/playtable/training`
        noise: see `Plan`
        chain: how many tasks follow one another in a demonstration, 1 to 5
        sentences: task to instructions, one of which is drawn for each demonstration; without it the evaluation's
        progress: called with each demonstration as it is finished

    Raises:
        DatasetError: if the folder holds demonstrations of another seed, noise or chain, a task has no sentence, the
            numbers run out of seven digits, or a worker process died or the disk is full (the next run goes on).
    """
    if not 1 <= demonstrations <= MAX_STEPS // NUMBERS:
        raise DatasetError(f"demonstrations: expected 1 to {MAX_STEPS // NUMBERS}, got {demonstrations}")
    if not 1 <= chain <= CHAIN:
        raise DatasetError(f"chain: expected 1 to {CHAIN} tasks, got {chain}")
    sentences = sentences or {task: [sentence] for task, sentence in evaluation_sentences().items()}
    if lacking := [task for task in TASKS if not sentences.get(task)]:
        raise DatasetError(f"annotations: no instruction for {', '.join(lacking)}")
    plan = Plan(output, seed, noise, chain, {task: list(sentences[task]) for task in TASKS})
    with resumable(output):
        (output / "demonstrations").mkdir(parents=True, exist_ok=True)
        records = {number: record for number in range(demonstrations) if (record := _finished(plan, number))}
        missing = [number for number in range(demonstrations) if number not in records]
        with pool(workers, len(missing)) as processes:
            futures = {processes.submit(demonstrate, plan, number): number for number in missing}
            for future in as_completed(futures):
                records[futures[future]] = record = future.result()
                progress(record)
        return _finish(output, [records[number] for number in sorted(records)])


def _finished(plan: Plan, number: int) -> Record | None:
    path = record_path(plan.output, number)
    if not path.exists():
        return None
    record = Record.read(path)
    if (record.seed, record.noise, len(record.tasks)) != (plan.seed, plan.noise, plan.chain):
        raise DatasetError(
            f"{plan.output}: has demonstrations of seed {record.seed}, noise {record.noise} and chain "
            f"{len(record.tasks)}; give the same to go on, or another folder"
        )
    return record


def _finish(output: Path, records: Sequence[Record]) -> Collection:
    """Writes the files that describe the whole split."""
    kept = [record for record in records if record.spans]
    if not kept:
        raise DatasetError(f"{output}: the expert achieved no task in {len(records)} demonstrations")
    spans: list[Span] = [span for record in kept for span in record.spans]
    write_array(output / "ep_start_end_ids.npy", np.array([(record.first, record.last) for record in kept]))
    write_annotations(output, spans)
    write_array(output / "scene_info.npy", np.array({"playtable": (kept[0].first, kept[-1].last)}, dtype=object))
    _write_statistics(output)
    return Collection(
        demonstrations=len(records),
        steps=sum(record.last - record.first + 1 for record in kept),
        tasks=Counter(span.task for span in spans),
        failed=Counter(record.tasks[len(record.spans)] for record in records if len(record.spans) < len(record.tasks)),
    )


def _write_statistics(output: Path) -> None:
    """`statistics.yaml` in CALVIN's layout: mean and deviation of the two state vectors, over a spread of steps."""
    recording = Recording(output)
    steps = recording.steps
    chosen = steps[np.linspace(0, len(steps) - 1, min(len(steps), STATISTICS_STEPS)).astype(np.int64)]
    rows = [recording.read(int(step), ("robot_obs", "scene_obs")) for step in chosen]
    lines = []
    for name in ("robot_obs", "scene_obs"):
        values: npt.NDArray[np.float64] = np.stack([row[name] for row in rows])
        lines += [
            f"{name}:",
            "- _target_: calvin_agent.utils.transforms.NormalizeVector",
            f"  mean: {json.dumps(values.mean(axis=0).tolist())}",
            f"  std: {json.dumps(values.std(axis=0).tolist())}",
        ]
    with replacing(output / "statistics.yaml") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
