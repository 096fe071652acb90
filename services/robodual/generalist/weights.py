"""A generalist's weights in safetensors files: checked by name and shape, then loaded shard by shard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from robodual import tensor_file
from robodual.facts import CheckpointError
from robodual.generalist.adapters import Adapter, attach, separable
from robodual.generalist.model import Generalist, place_rotary
from robodual.generalist.quantisation import quantisable, quantise

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    kind: str  # safetensors' name of the dtype


def load_weights(
    model: Generalist,
    folder: Path,
    device: torch.device,
    adapters: tuple[Adapter, ...] = (),
    quantisation: str = "none",
    *,
    merge: bool = True,
) -> None:
    """Fills a model whose parameters are on the meta device with a folder's weights, cast to the model's dtype.

    Names and shapes are compared first, from the files' headers. Then one shard after the other goes to the device, so
    host memory holds no more than the shard being read; `adapters` are added to their weights on the way, in order, and
    the Llama's layers are quantised after that (`quantisation.QUANTISATIONS`). Without `merge` the adapters stay beside
    the layers that they change (`adapters.separable`), in the model's dtype. Raises CheckpointError that names the file
    and the fix.
    """
    files = shard_files(folder)
    entries = {name: entry for file in files for name, entry in headers(file).items()}
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check(folder, entries, expected)
    for adapter in adapters:
        adapter.check(expected)
    dtype = model.dtype
    apart = frozenset() if merge else separable(model, adapters)
    small = frozenset() if quantisation == "none" else quantisable(model)
    for file in files:
        tensors: dict[str, Tensor] = {}
        with opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dictionary)
                # Off the mapped file in any case, so that nobody who writes to it later changes the model.
                value = shard.get_tensor(name).to("cpu" if name in small else device, dtype, copy=name not in small)
                for adapter in () if name in apart else adapters:
                    value = adapter.merge(name, value)
                tensors[name] = value
            model.load_state_dict(tensors, strict=False, assign=True)
            if small:
                quantise(model, small & tensors.keys(), quantisation, device)
    attach(model, adapters, apart, dtype)
    model.requires_grad_(False)
    place_rotary(model, device)


def shard_files(folder: Path) -> list[Path]:
    """The folder's weight files, by its index where it has one."""
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        if pickles := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)):
            raise CheckpointError(
                f"{folder / pickles[0]}: pickled weights are never loaded, since they can run code; "
                "save the checkpoint again as safetensors (save_pretrained writes them)"
            )
        raise CheckpointError(f"{folder}: holds neither {INDEX} nor {SINGLE}; download the checkpoint again")
    try:
        placed: Mapping[str, str] = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(placed.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors shards ({error}); download it again") from error
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise CheckpointError(
                f"{index}: names {name!r}, expected .safetensors files of this folder; "
                "save the checkpoint again as safetensors (save_pretrained writes them)"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing, though {INDEX} names it; download it again")
    return [folder / name for name in names]


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file. Raises CheckpointError if it is truncated or something else."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not safetensors ({error}); download it again") from error


def headers(file: Path) -> dict[str, Entry]:
    """What a file holds, by its header alone."""
    entries = {}
    with opened(file) as shard:
        for name in shard.keys():  # noqa: SIM118 (not a dictionary)
            part = shard.get_slice(name)
            entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
    return entries


def check(folder: Path, entries: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless a folder holds exactly the expected names and shapes, as floating-point values."""
    missing = sorted(expected.keys() - entries.keys())
    unexpected = sorted(entries.keys() - expected.keys())
    if missing or unexpected:
        lists = f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}"
        raise CheckpointError(f"{folder}: {_cause(missing, unexpected)} ({lists})")
    shapes = [
        f"{name} is {list(entry.shape)}, expected {list(expected[name])}"
        for name, entry in sorted(entries.items())
        if entry.shape != expected[name]
    ]
    if shapes:
        raise CheckpointError(
            f"{folder}: shapes differ from what config.json describes, so that file belongs to another checkpoint; "
            f"take both from the same one ({'; '.join(shapes)})"
        )
    for name, entry in sorted(entries.items()):
        if entry.kind not in FLOATS:
            raise CheckpointError(
                f"{entry.file}: {name} is {entry.kind}, expected one of {', '.join(FLOATS)}; "
                "take the unquantised checkpoint and quantise at load"
            )


def _cause(missing: list[str], unexpected: list[str]) -> str:
    """What most likely explains names that differ, and the fix."""
    if any(".lora_A." in name or ".lora_B." in name for name in unexpected):
        return "is a LoRA adapter; give it with --adapter, and its base model with --checkpoint"
    if any(re.search(r"\.ls[12]\.gamma$", name) for name in unexpected):
        return "has timm's LayerScale names (gamma); convert it with OpenVLA's convert_openvla_weights_to_hf.py"
    if "projector.fc3.weight" in missing and "vision_backbone.fused_featurizer.pos_embed" in missing:
        return "has one vision tower (use_fused_vision_backbone false); only the fused DINOv2 + SigLIP is supported"
    prefixes = {name.split(".", 1)[0] for name in unexpected} - {"vision_backbone", "projector", "language_model"}
    if prefixes:
        return f"is another architecture (names begin with {', '.join(sorted(prefixes))}); give an OpenVLA checkpoint"
    if not unexpected:
        return "is incomplete; download every shard again"
    return "does not fit config.json (depth or tower options differ); take both from the same checkpoint"


def save_weights(folder: Path, model: Generalist, shards: int) -> None:
    """Writes model.safetensors, or that many numbered shards with an index."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    total = sum(value.numel() * value.element_size() for value in state.values())
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, value in state.items():
        if filled >= total * len(groups) / shards and len(groups) < shards:
            groups.append({})
        groups[-1][name] = value
        filled += value.numel() * value.element_size()
    if shards == 1:
        tensor_file.write(state, folder / SINGLE, {"format": "pt"})
        return
    placed: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensor_file.write(group, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
