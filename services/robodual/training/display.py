"""What a training shows: a progress line, TensorBoard, a JSON line for every report, and W&B on request."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robodual.training.loop import Report

LOG = "log.jsonl"

log = logging.getLogger(__name__)


class Display:
    """Takes reports on the leading process. A log that cannot be written (a full disk) is said once; nothing ends."""

    def __init__(self, output: Path, max_steps: int, console: Console, wandb: str | None = None) -> None:
        self.path = output / LOG
        self.faults: set[Path] = set()
        self.bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("ETA"),
            TimeRemainingColumn(), TextColumn("{task.description}"), console=console,
        )  # fmt: skip
        self.line = self.bar.add_task("", total=max_steps, start=False)
        self.board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.events = output / "tensorboard"
            with self._spared(self.events):
                self.board = SummaryWriter(str(self.events))
        else:
            console.print("TensorBoard's files are not written: pip install 'robodual[train]'")
        self.run: Any = None
        if wandb is not None:
            if importlib.util.find_spec("wandb") is None:
                raise ValueError("wandb: the package is not installed; pip install 'robodual[train]'")
            import wandb as service

            place = str(output.resolve())
            identity = f"{output.resolve().name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
            self.run = service.init(project=wandb, dir=place, resume="allow", id=identity)

    def __call__(self, report: Report) -> None:
        values = {
            "loss": report.loss,
            **report.metrics,
            "learning_rate": report.learning_rate,
            "gradient_norm": report.gradient_norm,
            "samples_per_second": report.samples_per_second,
        }
        shown = {name: value for name, value in values.items() if name not in ("learning_rate", "gradient_norm")}
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
        self.bar.start_task(self.line)
        self.bar.update(self.line, completed=report.step, description=text)
        with self._spared(self.path):
            _append(self.path, json.dumps({"step": report.step, **values}) + "\n")
        if self.board is not None:
            with self._spared(self.events):
                for name, value in values.items():
                    self.board.add_scalar(name, value, report.step)
        if self.run is not None:
            self.run.log(values, step=report.step)

    def close(self) -> None:
        if self.board is not None:
            with self._spared(self.events):
                self.board.close()
        if self.run is not None:
            self.run.finish()

    @contextmanager
    def _spared(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if path not in self.faults:
                log.error("%s: could not be written (%s); the training goes on without it", path, error)
            self.faults.add(path)

    def caching(self, done: int, of: int) -> None:
        """Shows how many spans' conditionings are on the disk."""
        self.bar.update(self.line, description=f"conditioning cache: {done} of {of} spans")


def _append(path: Path, line: str) -> None:
    """A whole line, or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(line)
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise


@contextmanager
def shown(output: Path, max_steps: int, console: Console, wandb: str | None = None) -> Iterator[Display]:
    """wandb: a project of Weights & Biases to report to (WANDB_MODE=offline keeps it on this machine).

    Raises:
        ValueError: if its package is not installed.
    """
    output.mkdir(parents=True, exist_ok=True)
    display = Display(output, max_steps, console, wandb)
    try:
        with display.bar:
            yield display
    finally:
        display.close()
