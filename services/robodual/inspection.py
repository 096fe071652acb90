"""What a checkpoint is, read without building its network: `robodual inspect`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from robodual.facts import CheckpointError, hash_tensors
from robodual.generalist.adapters import Adapter, read_adapter
from robodual.generalist.checkpoint import read_checkpoint
from robodual.generalist.config import GeneralistConfig
from robodual.generalist.engine import DTYPES
from robodual.generalist.model import build
from robodual.generalist.weights import Entry, check, headers, opened, shard_files
from robodual.profiles import PROFILES
from robodual.specialist import checkpoint as specialist
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.policy import Policy, served_dtype

SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    `parameters` counts as GetInfo does, `parts` by the parameters' leading names, `dtypes` the values as stored.
    `checkpoint` is GetInfo's hash of the same weights served unquantised in `served_dtype`; None where it was not asked
    for. An adapter's is that of its own tensors, as stored.
    """

    path: str
    kind: str
    architecture: str
    parameters: int
    parts: dict[str, int]
    dtypes: dict[str, int]
    checkpoint: str | None
    served_dtype: str
    tokenizer: str | None = None
    image_strategy: str | None = None
    sensors: tuple[str, ...] = ()
    details: dict[str, str] = field(default_factory=dict)


def inspect(path: Path, *, dtype: str = "auto", adapters: Sequence[Path] = (), hashed: bool = True) -> Inspection:
    """Reads a generalist's folder, a LoRA adapter's folder, a published specialist `.pt` or our `.safetensors`.

    All that loading would refuse is refused here. A generalist's folder is read by its files' headers, and for the hash
    one tensor at a time.

    Args:
        path: what to look at
        dtype: what the weights would be served in; auto is what `robodual serve` would take on this machine
        adapters: LoRA folders that a generalist's hash has merged into it, in order
        hashed: whether to read the values for the hash

    Raises:
        CheckpointError: one line with the file and the fix.
        ValueError: naming the argument, if dtype or adapters do not apply.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype: expected auto or one of {', '.join(DTYPES)}, not {dtype!r}")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; download a hub checkpoint first")
    if path.is_dir() and not (path / "adapter_config.json").exists():
        return _generalist(path, dtype, tuple(map(read_adapter, adapters)), hashed)
    if adapters:
        raise ValueError(f"adapters: are merged into a generalist's folder, and {path} is none")
    return _specialist(path, dtype, hashed) if path.is_file() else _adapter(path, hashed)


def fitting(path: Path, state: Mapping[str, Tensor]) -> tuple[str, SpecialistConfig]:
    """The first profile whose specialist, with the sensors that the names show, has a published file's shapes.

    Raises:
        CheckpointError: if there is none.
    """
    shapes = {name: value.shape for name, value in state.items()}
    for name, profile in PROFILES.items():
        try:
            config = replace(profile.specialist, **specialist.flags(state))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if {name: value.shape for name, value in _policy(config).state_dict().items()} == shapes:
            return name, config
    # The published profile's refusal lists the names that differ.
    specialist.check_names(path, _policy(PROFILES["robodual-7b"].specialist).state_dict(), state)
    raise CheckpointError(f"{path}: fits none of the profiles {', '.join(PROFILES)}; convert it where it was trained")


def _generalist(folder: Path, dtype: str, adapters: Sequence[Adapter], hashed: bool) -> Inspection:
    found = read_checkpoint(folder)
    files = shard_files(folder)
    entries = {name: entry for file in files for name, entry in headers(file).items()}
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    model = build(found.config, attention="sdpa", dtype=DTYPES[dtype])
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check(folder, entries, expected)
    for adapter in adapters:
        adapter.check(expected)
    dtypes: Counter[str] = Counter()
    for entry in entries.values():
        dtypes[SAFETENSORS[entry.kind]] += torch.Size(entry.shape).numel()
    tokens = found.config.tokens
    size = found.tokenizer.get_vocab_size(with_added_tokens=True)
    return Inspection(
        path=str(folder),
        kind="generalist",
        architecture=_generalist_shapes(found.config),
        parameters=sum(_sizes(model).values()),
        parts=_parts(_sizes(model)),
        dtypes=dict(dtypes),
        checkpoint=hash_tensors(_merged(entries, DTYPES[dtype], adapters)) if hashed else None,
        served_dtype=dtype,
        tokenizer=(
            f"{type(found.tokenizer.model).__name__}, {size} tokens; actions {tokens.action_start} to "
            f"{tokens.action_end - 1}, separator {tokens.separator}"
        ),
        image_strategy=found.config.images.strategy,
        sensors=("rgb_static",),
        details={
            "hidden_size": str(found.config.language.width),
            "shards": str(len(files)),
            "adapters": ", ".join(adapter.folder.name for adapter in adapters) or "none",
        },
    )


def _merged(
    entries: Mapping[str, Entry], dtype: torch.dtype, adapters: Sequence[Adapter]
) -> Iterator[tuple[str, Tensor]]:
    """The weights as they would be served, in the order of names. A file is closed again after each, so that no more
    of it than one tensor stays mapped."""
    for name in sorted(entries):
        with opened(entries[name].file) as shard:
            value = shard.get_tensor(name).to(dtype)
            for adapter in adapters:
                value = adapter.merge(name, value)
            yield name, value


def _generalist_shapes(config: GeneralistConfig) -> str:
    towers = " and ".join(f"{tower.depth} x {tower.width}" for tower in config.towers)
    language, size = config.language, config.images.size
    return (
        f"openvla: DINOv2 and SigLIP {towers} (patch {config.towers[0].patch}, {size} px), "
        f"Llama {language.layers} x {language.width} ({language.heads} heads, vocabulary {language.vocabulary})"
    )


def _adapter(folder: Path, hashed: bool) -> Inspection:
    adapter = read_adapter(folder)
    values = {f"{name} {half}": v for half in ("low", "high") for name, v in getattr(adapter, half).items()}
    ranks = {len(value) for value in adapter.low.values()}
    leaves = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in adapter.low}
    base = json.loads((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    dtypes = _stored(values.values())
    return Inspection(
        path=str(folder),
        kind="adapter",
        architecture=f"LoRA of rank {', '.join(map(str, sorted(ranks)))}, scale {adapter.scale:g}",
        parameters=sum(value.numel() for value in values.values()),
        parts=_parts({name: value.numel() for name, value in values.items()}),
        dtypes=dtypes,
        checkpoint=hash_tensors((name, values[name]) for name in sorted(values)) if hashed else None,
        served_dtype=", ".join(dtypes),
        details={
            "adapts": f"{len(adapter.low)} weights ({', '.join(sorted(leaves))})",
            "base_model": str(base or "not named"),
        },
    )


def _specialist(path: Path, dtype: str, hashed: bool) -> Inspection:
    config, state = specialist.read(path)
    details = {}
    if config is None:
        kind = "specialist (published EMA)"
        details["profile"], config = fitting(path, state)
    else:
        kind = "specialist (safetensors)"
        specialist.check_names(path, _policy(config).state_dict(), state)
    policy = _policy(config)
    served = "float32" if dtype == "auto" else dtype
    # Loading widens to float32 first.
    values = ((name, state[name].float().to(served_dtype(name, DTYPES[served]))) for name in sorted(state))
    return Inspection(
        path=str(path),
        kind=kind,
        architecture=(
            f"specialist: DINO ViT {config.vision_blocks} x {config.vision_width} ({config.image_size} px), "
            f"diffusion transformer {config.blocks} x {config.width} ({config.heads} heads)"
        ),
        parameters=sum(_sizes(policy).values()),
        parts=_parts(_sizes(policy)),
        dtypes=_stored(state.values()),
        checkpoint=hash_tensors(values) if hashed else None,
        served_dtype=served,
        sensors=config.sensors,
        details={
            **details,
            "context_width": str(config.context_width),
            "diffusion_steps": str(config.diffusion_steps),
            "guidance_scale": f"{config.guidance_scale:g}",
        },
    )


def _policy(config: SpecialistConfig) -> Policy:
    with torch.device("meta"):
        return Policy(config)


def _sizes(module: nn.Module) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in module.named_parameters()}


def _parts(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes summed by the first component of their names; of the two vision towers, by the first two."""
    parts: Counter[str] = Counter()
    for name, size in sizes.items():
        depth = 2 if name.startswith("vision_backbone.") else 1
        parts[".".join(name.split(".")[:depth])] += size
    return dict(parts)


def _stored(values: Iterable[Tensor]) -> dict[str, int]:
    dtypes: Counter[str] = Counter()
    for value in values:
        dtypes[str(value.dtype).removeprefix("torch.")] += value.numel()
    return dict(dtypes)
