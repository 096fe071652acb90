"""LoRA adapter folders, as PEFT saves them, merged into the weights while these are loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from robodual.facts import CheckpointError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Whatever would change the result beyond W + scale * B A, with its neutral values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "trainable_token_indices": (None,),
}


@dataclass(frozen=True)
class Adapter:
    """`low` and `high` (LoRA's A [r, in] and B [out, r], float32 or as saved) by the name of the weight they change."""

    folder: Path
    scale: float
    low: Mapping[str, Tensor]
    high: Mapping[str, Tensor]

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError if it changes weights that the model, name -> shape, lacks or has in another shape."""
        file = self.folder / WEIGHTS
        if unknown := sorted(self.low.keys() - expected.keys()):
            raise CheckpointError(f"{file}: adapts weights that this model lacks; give its base model ({unknown})")
        for name in sorted(self.low):
            shape = (self.high[name].shape[0], self.low[name].shape[1])
            if shape != expected[name]:
                raise CheckpointError(
                    f"{file}: changes {name} as {list(shape)}, the model has {list(expected[name])}; "
                    "give the base model that it was trained on"
                )

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """The weight of that name with the adapter in it: W + scale * B A (LoRA, arXiv 2106.09685, section 4.1)."""
        if name not in self.low:
            return weight
        low = self.low[name].to(weight.device).float()
        high = self.high[name].to(weight.device).float()
        return weight + (self.scale * (high @ low)).to(weight.dtype)


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter folder (adapter_config.json, adapter_model.safetensors).

    Raises CheckpointError for another kind of adapter, pickled or corrupt weights, naming the file and the fix.
    """
    path, file = folder / "adapter_config.json", folder / WEIGHTS
    fix = "merge it with PEFT (merge_and_unload) and give the merged checkpoint"
    try:
        config = json.loads(path.read_bytes())
        unusual = {key: config[key] for key, usual in NEUTRAL.items() if key in config and config[key] not in usual}
        if unusual:
            raise CheckpointError(f"{path}: {unusual} is not supported; {fix}")
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; give a LoRA adapter folder as PEFT saves it") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a LoRA configuration ({error!r}); save the adapter again") from error
    if not file.is_file():
        pickled = "its weights are pickled, which are never loaded; " if list(folder.glob("*.bin")) else ""
        raise CheckpointError(f"{file}: missing; {pickled}save the adapter again with PEFT (safetensors)")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not safetensors ({error}); save the adapter again") from error
    low = _weights_of(tensors, ".lora_A.weight")
    high = _weights_of(tensors, ".lora_B.weight")
    others = sorted(name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight")))
    if others or low.keys() != high.keys():
        halves = sorted(low.keys() ^ high.keys())
        raise CheckpointError(
            f"{file}: expected pairs of lora_A and lora_B; {fix} (others: {others}, halves: {halves})"
        )
    for name in low:
        if low[name].shape != (rank, *low[name].shape[1:]) or high[name].shape[1:] != (rank,) or low[name].ndim != 2:
            raise CheckpointError(f"{file}: the pair of {name} is not of rank {rank} as {path.name} says; {fix}")
    return Adapter(folder, scale, low, high)


def _weights_of(tensors: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    found = ((name, value) for name, value in tensors.items() if name.endswith(suffix))
    return {name.removeprefix(PREFIX).removesuffix(suffix) + ".weight": value for name, value in found}
