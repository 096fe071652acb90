"""LoRA adapter folders, as PEFT saves them: merged into the weights while these are loaded, or kept apart."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

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
    # Others, such as "pissa" and "olora", take from the base what they begin with.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
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
        """The weight of that name with the adapter in it: W + scale * B A (LoRA, arXiv 2106.09685, section 4.1).

        The product is one of float64, so that every device rounds it to the same weights.
        """
        if name not in self.low:
            return weight
        low = self.low[name].to(weight.device).double()
        high = self.high[name].to(weight.device).double()
        return weight + (self.scale * (high @ low)).to(weight.dtype)


class Adapted(nn.Module):
    """A linear layer with adapters beside it: W x + b + sum of scale * B (A x)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.low = nn.ParameterList()  # [r, in] each
        self.high = nn.ParameterList()  # [out, r] each, scaled

    @property
    def weight(self) -> Tensor:
        """The layer's own, for those who ask for its dtype or device."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        out: Tensor = self.base(x)
        for low, high in zip(self.low, self.high):
            out = out + F.linear(F.linear(x, low), high)
        return out


def separable(model: nn.Module, adapters: Iterable[Adapter]) -> frozenset[str]:
    """The weights whose adapters can be kept apart: those of linear layers, without the head, whose rows decoding
    reads one by one."""
    names = {name for adapter in adapters for name in adapter.low if not name.endswith("lm_head.weight")}
    return frozenset(n for n in names if isinstance(model.get_submodule(n.removesuffix(".weight")), nn.Linear))


def attach(model: nn.Module, adapters: Iterable[Adapter], weights: Iterable[str], dtype: torch.dtype) -> None:
    """Puts adapters beside the layers of the named weights, on the layers' device, in order."""
    wanted = frozenset(weights)
    for adapter in adapters:
        for name in sorted(wanted & adapter.low.keys()):
            path = name.removesuffix(".weight")
            layer = model.get_submodule(path)
            if not isinstance(layer, Adapted):
                layer = Adapted(layer)
                model.set_submodule(path, layer)
            for own, value in (
                (layer.low, adapter.low[name]),
                (layer.high, adapter.scale * adapter.high[name].float()),
            ):
                own.append(nn.Parameter(value.to(layer.weight.device, dtype), requires_grad=False))


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
