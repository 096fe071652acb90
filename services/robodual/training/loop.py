"""The training loop of both models: deterministic in (seed, step), resumable at any step, on one process or many."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from robodual.facts import CheckpointError
from robodual.parent import end_with_parent
from robodual.training.annotations import DatasetError
from robodual.training.average import Average
from robodual.training.checkpoint import STATE, Folder, Progress, name_of, read_settings
from robodual.training.dataset import Key, Sample
from robodual.training.group import Group
from robodual.training.order import Order
from robodual.training.schedule import Schedule
from robodual.training.sharding import shard, whole

log = logging.getLogger(__name__)

B = TypeVar("B", bound="Batch")
Evaluate = Callable[[Path], dict[str, float]]  # of a checkpoint's folder, to what was found


class Batch(Protocol):
    """What a collate function makes of samples."""

    def to(self: B, device: torch.device) -> B:
        """The same batch on another device."""


class Learner(nn.Module, Generic[B]):
    """A model with its loss. Parameters that require gradients are trained."""

    averaged = False  # whether a moving average is kept and exported

    def blocks(self) -> list[nn.Module]:
        """Submodules to gather one after the other where the weights are spread over processes."""
        return []

    def forward(self, batch: B) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the batch, and what to show beside it (scalars, means over the batch)."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def export(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Writes weights that can be served into the folder, with these values (the averaged ones, where there is an
        average) of the trained parameters."""
        raise TypeError(f"{type(self).__name__} has no export")


@dataclass(frozen=True)
class Settings:
    """How to train; names as in the published scripts where they have one. Saved with every checkpoint."""

    output: Path
    max_steps: int
    batch_size: int
    learning_rate: float
    grad_accumulation_steps: int = 1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    cosine_cycles: float = 0.0
    save_steps: int = 1000
    keep: int = 3
    seed: int = 0
    num_workers: int = 0
    log_steps: int = 10
    eval_every: int = 0  # steps between closed-loop evaluations; 0: none
    fsdp: bool = False  # weights, gradients and optimiser state spread over the processes
    bf16: bool | None = None  # autocast; None is False here, and what suits the device in `runs`


# A run may be resumed with other values of these: they change no result.
FREE = {"output", "save_steps", "keep", "num_workers", "log_steps", "eval_every", "fsdp"}

STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Report:
    """What the loop shows: means over the steps since the last report."""

    step: int  # optimiser steps done
    loss: float
    metrics: dict[str, float]
    learning_rate: float
    gradient_norm: float
    samples_per_second: float


def train(
    learner: Learner[B],
    dataset: Dataset[Sample],
    collate: Callable[[list[Sample]], B],
    settings: Settings,
    group: Group,
    *,
    described: Mapping[str, Any],
    resume: bool = False,
    report: Callable[[Report], None] = lambda report: None,
    evaluate: Evaluate | None = None,
) -> int:
    """Trains until `max_steps` optimiser steps are done, or SIGINT or SIGTERM asks for an end.

    Every random choice follows from (seed, epoch, sample), and dropout from (seed, step, rank): on a CPU, a training
    that was stopped after any step and resumed has the same weights, bit for bit, as one that was not. A checkpoint is
    saved every `save_steps`, at the end, and when stopped; where one cannot be written (a full disk) the training goes
    on, unless it is the last.

    Args:
        learner: on the group's device
        dataset: of known length
        described: what else the result depends on (model, data); saved, and compared on resuming
        resume: go on from the newest checkpoint in the output folder, if there is one
        evaluate: called on the leading process every `eval_every` steps with the checkpoint that was just saved; what
            it returns is reported with the next report

    Returns:
        The optimiser steps done.

    Raises:
        CheckpointError: if there are checkpoints and `resume` is not set, they are of other settings, processes find
            different ones, or the last checkpoint cannot be written.
    """
    if settings.fsdp and group.size > 1:
        shard(learner, learner.blocks(), group)
    parameters = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    average = Average(parameters) if learner.averaged else None
    progress = Progress(parameters, optimizer, average)
    folder = Folder(settings.output / "checkpoints", settings.keep)
    saved = _saved(settings, group, described)
    step = _resumed(folder, progress, saved, group) if resume else _fresh(folder)
    order = Order(
        len(dataset),  # type: ignore[arg-type]
        settings.batch_size,
        settings.grad_accumulation_steps,
        group.rank,
        group.size,
        settings.seed,
        step,
    )
    wrapped: nn.Module = learner
    if group.size > 1 and not settings.fsdp:
        devices = [group.device.index] if group.device.type == "cuda" else None
        wrapped = DistributedDataParallel(learner, device_ids=devices)
    schedule = Schedule(settings.learning_rate, settings.max_steps, settings.warmup_steps, settings.cosine_cycles)
    meter = _Meter(group, settings.batch_size * settings.grad_accumulation_steps * group.size)
    learner.train()
    last_saved = step
    with (
        _stopping() as stop,
        contextlib.closing(_batches(dataset, collate, order, settings, group)) as batches,
    ):
        while step < settings.max_steps and not group.any(stop.is_set()):
            _seed(settings.seed, step, group.rank)
            for values in optimizer.param_groups:
                values["lr"] = schedule(step)
            loss, metrics = _accumulate(wrapped, batches, settings, group.device)
            norm = whole(torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if average is not None:
                average.update(parameters, step)
            meter.add(loss, metrics, norm)
            looked_at = evaluate is not None and settings.eval_every > 0 and step % settings.eval_every == 0
            if looked_at:
                last_saved = _save(folder, step, progress, saved, learner, group, last_saved)
                meter.pause(_evaluated(evaluate, folder, step, group) if last_saved == step else {})
            if step % settings.log_steps == 0 or step == settings.max_steps or looked_at:
                shown = meter.report(step, schedule(step - 1))
                if group.leads:
                    report(shown)
            if step % settings.save_steps == 0 and last_saved < step < settings.max_steps:
                last_saved = _save(folder, step, progress, saved, learner, group, last_saved)
        if step > last_saved:
            _save(folder, step, progress, saved, learner, group, last_saved, final=True)
    return step


def _saved(settings: Settings, group: Group, described: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in asdict(settings).items() if name not in FREE}
    return {**values, "processes": group.size, **described}


def _fresh(folder: Folder) -> int:
    if found := folder.latest():
        raise CheckpointError(f"{found[1]}: a training is there already; pass --resume to go on, or another output")
    return 0


def _resumed(folder: Folder, progress: Progress, saved: Mapping[str, Any], group: Group) -> int:
    found = folder.latest()
    step = found[0] if found else 0
    if not group.same(step):
        raise CheckpointError(
            f"{folder.path}: the processes would resume at different steps, this one at {step}; the output must be on "
            "a disk that all machines share"
        )
    if found is None:
        return 0
    path = found[1]
    before = read_settings(path)
    differing = [name for name in saved if before.get(name) != saved[name]]
    if differing:
        changes = "; ".join(f"{name} was {before.get(name)!r} and is {saved[name]!r}" for name in differing)
        raise CheckpointError(f"{path}: was trained with other settings ({changes}); give the same to resume")
    progress.restore(path / STATE)
    log.info("resuming %s at step %d", path, step)
    return step


def _batches(
    dataset: Dataset[Sample], collate: Callable[[list[Sample]], B], order: Order, settings: Settings, group: Group
) -> Generator[B, None, None]:
    loader: DataLoader[B | ValueError] = DataLoader(
        _Read(dataset, collate),
        batch_size=None,
        sampler=order,
        num_workers=settings.num_workers,
        prefetch_factor=4 if settings.num_workers else None,
        worker_init_fn=_unstopped,
        # Of its own, so that the seed it draws for its workers does not touch the global generator.
        generator=torch.Generator().manual_seed(settings.seed),
    )
    reading: Any = iter(loader)
    try:
        for batch in reading:
            if isinstance(batch, ValueError):
                raise batch
            yield batch.to(group.device)
    finally:
        if settings.num_workers:  # Python would end those that are left by SIGTERM, and wait
            reading._shutdown_workers()


@dataclass(frozen=True)
class _Read(Dataset[B | ValueError]):
    """Batches by their samples' keys. An error is returned: raised in a worker, it would be its traceback's text."""

    dataset: Dataset[Sample]
    collate: Callable[[list[Sample]], B]

    def __getitem__(self, keys: list[Key]) -> B | ValueError:
        try:
            return self.collate([self.dataset[key] for key in keys])
        except (DatasetError, CheckpointError) as error:
            return error


def _unstopped(worker: int) -> None:
    """Signals often go to a whole process group (Ctrl-C, Slurm): workers read on until the training has saved."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def _accumulate(
    wrapped: nn.Module, batches: Iterator[B], settings: Settings, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """One optimiser step's gradients; processes exchange them in the last backward pass only."""
    turns = settings.grad_accumulation_steps
    silent = wrapped.no_sync if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext
    losses, shown = [], []
    for turn in range(turns):
        batch = next(batches)
        with contextlib.nullcontext() if turn == turns - 1 else silent():
            # Copies of weights that are gathered one block at a time are not kept until all have been.
            kept = not settings.fsdp
            with torch.autocast(device.type, torch.bfloat16, enabled=bool(settings.bf16), cache_enabled=kept):
                loss, metrics = wrapped(batch)
            (loss / turns).backward()
        losses.append(loss.detach())
        shown.append(metrics)
    means = {name: torch.stack([metrics[name] for metrics in shown]).mean() for name in shown[0]}
    return torch.stack(losses).mean(), means


def _seed(seed: int, step: int, rank: int) -> None:
    """Dropout's random numbers, and those of any library's global generator, follow from the step."""
    value = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that the signals set, so that the step in progress is finished and saved."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = [signal.signal(number, lambda *_: stop.set()) for number in STOPPING]
    try:
        yield stop
    finally:
        for number, handler in zip(STOPPING, before):
            signal.signal(number, handler)


def _evaluated(evaluate: Evaluate | None, folder: Folder, step: int, group: Group) -> dict[str, float]:
    """What the leading process finds of a checkpoint, while the others wait."""
    found: dict[str, float] = {}
    if group.leads and evaluate is not None:
        start = time.perf_counter()
        torch.cuda.empty_cache()  # what the steps' activations took is for the services, which are other processes
        found = {f"eval_{name}": value for name, value in evaluate(folder.path / name_of(step)).items()}
        found["eval_seconds"] = time.perf_counter() - start
    group.wait()
    return found


def _save(
    folder: Folder,
    step: int,
    progress: Progress,
    saved: Mapping[str, Any],
    learner: Learner[B],
    group: Group,
    last_saved: int,
    *,
    final: bool = False,
) -> int:
    """Saves from the leading process while the others wait. Returns the step of the newest checkpoint, on all alike."""
    failure = ""  # the text alone: the error's traceback would keep what was being saved in memory
    state = progress.tensors(keep=group.leads)
    if group.leads:
        kind = "average." if progress.average is not None else "parameter."
        trained = {name.removeprefix(kind): value for name, value in state.items() if name.startswith(kind)}
        try:
            folder.save(step, state, saved, lambda path: learner.export(path, trained))
        except CheckpointError as error:
            failure = str(error)
    if not group.any(bool(failure)):
        return step
    if final:
        raise CheckpointError(failure or f"{folder.path / name_of(step)}: the leading process could not write it")
    if group.leads:
        log.error("%s; the training goes on, the newest checkpoint is of step %d", failure, last_saved)
    return last_saved


class _Meter:
    """Means between two reports."""

    def __init__(self, group: Group, global_batch: int) -> None:
        self.group = group
        self.global_batch = global_batch
        self.losses: list[Tensor] = []
        self.metrics: list[dict[str, Tensor]] = []
        self.norms: list[Tensor] = []
        self.extra: dict[str, float] = {}
        self.since = time.perf_counter()

    def add(self, loss: Tensor, metrics: dict[str, Tensor], norm: Tensor) -> None:
        self.losses.append(loss)
        self.metrics.append(metrics)
        self.norms.append(norm)

    def pause(self, values: Mapping[str, float]) -> None:
        """Takes in what an evaluation found, and leaves out the `eval_seconds` that it took."""
        self.extra |= values
        self.since += values.get("eval_seconds", 0.0)

    def report(self, step: int, learning_rate: float) -> Report:
        names = list(self.metrics[0])
        rows = [torch.stack([loss, norm, *(metrics[name] for name in names)]) for loss, norm, metrics in
                zip(self.losses, self.norms, self.metrics)]  # fmt: skip
        means = self.group.mean(torch.stack(rows).float().mean(dim=0)).tolist()
        now = time.perf_counter()
        speed = len(self.losses) * self.global_batch / (now - self.since)
        self.losses, self.metrics, self.norms, self.since = [], [], [], now
        shown, self.extra = {**dict(zip(names, means[2:])), **self.extra}, {}
        return Report(step, means[0], shown, learning_rate, means[1], speed)
