"""Checkpoints of a training: whole or not there at all, the last few kept, nothing in them that can execute."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from robodual import tensor_file
from robodual.facts import CheckpointError
from robodual.training.average import Average
from robodual.training.sharding import like, whole

STATE = "state.safetensors"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Progress:
    """Everything that a training's next step depends on, beside the data and the settings.

    The order of the data and every random number follow from the seed and the step, so there is no generator's state.
    """

    parameters: Mapping[str, Tensor]  # those that are trained
    optimizer: Optimizer
    average: Average | None

    def tensors(self, keep: bool = True) -> dict[str, Tensor]:
        """Everything by name, whole; where it is spread over processes, each must call this and one should keep it."""
        found = {f"parameter.{name}": value.detach() for name, value in self.parameters.items()}
        if self.average is not None:
            found |= {f"average.{name}": value for name, value in self.average.values.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{key}.{name}"] = value
        kept = {}
        for name, value in found.items():
            gathered = whole(value)
            if keep:
                kept[name] = (gathered if gathered is value else gathered.cpu()).contiguous()
        return kept

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Sets everything to what a state file holds.

        Raises:
            CheckpointError: if the file is damaged or is of another model.
        """
        expected = {f"parameter.{name}": value.shape for name, value in self.parameters.items()}
        if self.average is not None:
            expected |= {f"average.{name}": value.shape for name, value in self.average.values.items()}
        optimizer: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        try:
            with safe_open(path, framework="pt") as file:
                names = sorted(file.keys())  # in one order on every process, which share what is spread
                if lacking := sorted(expected.keys() - set(names)):
                    raise CheckpointError(f"{path}: no {lacking[0]}; it is of another model or other settings")
                for name in names:
                    kind, _, rest = name.partition(".")
                    value = file.get_tensor(name)
                    if kind == "optimizer":
                        key, _, parameter = rest.partition(".")
                        if parameter not in optimizer:
                            raise CheckpointError(f"{path}: {name} is of another model or other settings")
                        optimizer[parameter][key] = value
                        continue
                    if expected.get(name) != value.shape:
                        raise CheckpointError(f"{path}: {name} is of another model or other settings")
                    target = self.parameters[rest] if kind == "parameter" else self._averaged(rest)
                    target.copy_(like(value, target))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: damaged ({error}); delete its folder to go on from the one before"
            ) from None
        for name, parameter in self.parameters.items():
            if optimizer[name]:
                on_device = {
                    key: value if key == "step" else like(value, parameter) for key, value in optimizer[name].items()
                }
                self.optimizer.state[parameter] = on_device

    def _averaged(self, name: str) -> Tensor:
        if self.average is None:
            raise CheckpointError("the checkpoint has a moving average and this training has none")
        return self.average.values[name]


class Folder:
    """The checkpoints of one training, `step-00001000` and so on in one folder."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(path for path in self.path.iterdir() if _NAME.fullmatch(path.name))

    def latest(self) -> tuple[int, Path] | None:
        """The newest checkpoint's step and folder."""
        found = self.checkpoints()
        return (step_of(found[-1]), found[-1]) if found else None

    def save(
        self, step: int, state: Mapping[str, Tensor], settings: Mapping[str, Any], export: Callable[[Path], None]
    ) -> Path:
        """Writes a checkpoint beside the others, moves it into place when all of it is on the disk, and only then
        deletes those that are too old.

        Args:
            step: optimiser steps done
            state: of `Progress.tensors`
            export: writes the weights to be served into the folder that it is given

        Raises:
            CheckpointError: if it could not be written (a full disk, or no memory on the GPU to merge in); the
                checkpoints before it are as they were.
        """
        final = self.path / name_of(step)
        partial = self.path / f".{final.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            tensor_file.write(state, partial / STATE)
            (partial / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            export(partial)
            _sync(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _sync_folder(self.path)
        except (OSError, SafetensorError, torch.OutOfMemoryError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            short = "memory" if isinstance(error, torch.OutOfMemoryError) else "space"
            raise CheckpointError(
                f"{final}: could not be written ({error}); free some {short}, nothing was lost"
            ) from error
        for old in self.checkpoints()[: -self.keep]:
            shutil.rmtree(old)
        return final


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's training was started with."""
    path = checkpoint / "settings.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete its folder to go on from the one before") from None
    return settings


def _sync(folder: Path) -> None:
    """Puts a folder's files on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
