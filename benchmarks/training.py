"""Does the data keep the model fed? Samples a second that are read, and that are trained on, and the memory it takes.

    python -m benchmarks.training --profile toy --batch-size 8 --workers 0 1
    python -m benchmarks.training --profile robodual-7b --data task_ABC_D/training --workers 8 --json training.json

Without --data it writes a small recording of random pixels at CALVIN's sizes, the worst case for decompression. Steps
are the trainings' own (`robodual train`), with random weights: LoRA of rank 32 on the generalist, and the specialist
with its conditioning computed on the fly by a frozen generalist.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np
import torch
from benchmarks import measurement
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from robodual.generalist.engine import load_generalist
from robodual.profiles import PROFILES
from robodual.specialist.frames import Preparation
from robodual.training.annotations import Span, write_annotations
from robodual.training.conditioner import Conditioner
from robodual.training.dataset import CalvinDataset, Sample
from robodual.training.generalist import GeneralistCollate, GeneralistLearner, Lora
from robodual.training.loop import Batch, Learner
from robodual.training.order import Order
from robodual.training.specialist import SpecialistCollate, SpecialistLearner
from robodual.training.starting_weights import starting_policy

STEPS = 160
PREFETCHED = 2  # batches that each worker reads ahead, by default

B = TypeVar("B", bound=Batch)


class Row(TypedDict):
    """One model's training; `trained` and `read` in samples a second, the latter by the number of workers."""

    model: str
    step_ms: float
    trained: float
    memory_gb: float
    read: dict[int, float]


def write_recording(split: Path) -> None:
    """Random steps at CALVIN's sizes, uncompressible where the real ones are not."""
    random = np.random.default_rng(0)
    for step in range(STEPS):
        np.savez_compressed(
            split / f"episode_{step:07d}.npz",
            rgb_static=random.integers(0, 256, (200, 200, 3), dtype=np.uint8),
            rgb_gripper=random.integers(0, 256, (84, 84, 3), dtype=np.uint8),
            depth_static=random.uniform(3.5, 6.2, (200, 200)).astype(np.float32),
            depth_gripper=random.uniform(0, 2, (84, 84)).astype(np.float32),
            robot_obs=random.standard_normal(15),
            rel_actions=random.uniform(-1, 1, 7),
        )
    text = "take the red block and rotate it to the right"
    write_annotations(split, [Span(start, start + 79, "task", text) for start in (0, 80)])


def reading(dataset: CalvinDataset, collate: Callable[[list[Sample]], object], batch: int, workers: int) -> float:
    """Samples a second that the loader gives once it is under way: what workers have read ahead is not counted."""
    order = Order(len(dataset), batch)
    loader = DataLoader(dataset, batch_sampler=order, collate_fn=collate, num_workers=workers)
    batches = iter(loader)
    for _ in range(1 + PREFETCHED * workers):
        next(batches)
    rounds = max(2, 64 // batch, 4 * workers)
    start = time.perf_counter()
    for _ in range(rounds):
        next(batches)
    return rounds * batch / (time.perf_counter() - start)


def training(learner: Learner[B], batch: B, rounds: int, *, bf16: bool) -> float:
    """Milliseconds of an optimiser step, median."""
    optimizer = torch.optim.AdamW([value for value in learner.parameters() if value.requires_grad], lr=1e-5)
    learner.train()
    device = next(learner.parameters()).device
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, _ = learner(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times[1:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="toy", choices=sorted(PROFILES))
    parser.add_argument("--data", type=Path, help="a split folder in CALVIN's format")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=20, help="optimiser steps that are timed")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the record")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        if options.data is None:
            write_recording(Path(temporary))
        rows = _measure(options, options.data or Path(temporary))
    table = Table("model", "step ms", "trained on /s", "memory GB", "read /s by workers",
                  title=f"training {options.profile}, batch {options.batch_size}")  # fmt: skip
    for row in rows:
        read = "  ".join(f"{workers}: {speed:.1f}" for workers, speed in row["read"].items())
        table.add_row(row["model"], f"{row['step_ms']:.1f}", f"{row['trained']:.1f}", f"{row['memory_gb']:.2f}", read)
    Console().print(table)
    if options.json:
        facts = {"profile": options.profile, "batch": options.batch_size, "threads": torch.get_num_threads()}
        record = {**facts, "rows": rows, "machine": measurement.machine(("torch", "peft", "robodual"))}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def _measure(options: argparse.Namespace, split: Path) -> list[Row]:
    engine = load_generalist(options.profile, device=options.device)
    device = engine.model.device
    config = PROFILES[options.profile].specialist
    preparation = Preparation(config, "resize-naive", torch.device("cpu"), torch.float32)
    conditioner = Conditioner(engine.model, constrained=engine.constrained)
    policy = starting_policy(config, 0).to(device)

    def adapted() -> GeneralistLearner:
        return GeneralistLearner(
            engine.model, engine.processor.tokenizer, lora=Lora(), constrained=engine.constrained,
            gradient_checkpointing=options.gradient_checkpointing,
        ).to(device)  # fmt: skip

    def measure(
        name: str, dataset: CalvinDataset, collate: Callable[[list[Sample]], B], build: Callable[[], Learner[B]]
    ) -> Row:
        size = options.batch_size
        read = {workers: reading(dataset, collate, size, workers) for workers in options.workers}
        batch = collate([dataset[0, index] for index in range(size)])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = training(build(), batch.to(device), options.rounds, bf16=device.type == "cuda")
        memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else _resident()
        return {"model": name, "step_ms": step, "trained": size / step * 1e3, "memory_gb": memory, "read": read}

    # The specialist first: adapters would change the generalist that conditions it.
    frames, chunks = CalvinDataset(split, sensors=config.sensors), CalvinDataset(split, chunk=0)
    collate = SpecialistCollate(preparation, engine.processor, 0, 0.1)
    return [
        measure("specialist", frames, collate, lambda: SpecialistLearner(policy, conditioner)),
        measure("generalist, LoRA 32", chunks, GeneralistCollate(engine.processor), adapted),
    ]


def _resident() -> float:
    """The process's peak resident memory, GB (Linux, macOS)."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


if __name__ == "__main__":
    sys.exit(main())
