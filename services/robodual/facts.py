"""What is loaded: the description of an engine that `GetInfo`, logs and `robodual inspect` show."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line that names the file, what is wrong and the fix."""


@dataclass(frozen=True)
class EngineFacts:
    """What an engine runs.

    `checkpoint` is the hash of the weights as loaded (`hash_state_dict`), `parameters` counts values, `weight_bytes`
    is what they take on `device`; `details` holds whatever else the engine wants shown (attention, quantisation, ...).
    """

    profile: str
    checkpoint: str
    device: str
    dtype: str
    parameters: int
    weight_bytes: int
    details: dict[str, str] = field(default_factory=dict)


def together(engines: Sequence[EngineFacts]) -> EngineFacts:
    """Those of a service with one or more engines, each with the same weights on a device of its own.

    Devices are listed, bytes are added up; a detail that is not the same everywhere is listed too.
    """
    first = engines[0]
    listed = {name: dict.fromkeys(facts.details[name] for facts in engines) for name in first.details}
    return replace(
        first,
        device=",".join(facts.device for facts in engines),
        weight_bytes=sum(facts.weight_bytes for facts in engines),
        details={name: ",".join(values) for name, values in listed.items()},
    )


def hash_state_dict(module: torch.nn.Module) -> str:
    """SHA-256 (hex) over every entry of the module's state dict, in the order of names: name, dtype, shape, bytes.

    Entries are brought to the CPU one at a time, so the extra memory is one tensor.
    """
    state = module.state_dict()
    return hash_tensors((name, state[name]) for name in sorted(state))


def hash_tensors(entries: Iterable[tuple[str, torch.Tensor]]) -> str:
    """`hash_state_dict` of a module with these entries, which come in the order of names."""
    digest = hashlib.sha256()
    for name, value in entries:
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def device_memory(device: torch.device) -> dict[str, str]:
    """What `details` says of a CUDA device's memory: the bytes that this process holds there. Nothing elsewhere."""
    if device.type != "cuda":
        return {}
    return {"device_memory_bytes": str(torch.cuda.memory_allocated(device))}


def count_parameters(module: torch.nn.Module) -> int:
    """Number of values in the module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_weight_bytes(module: torch.nn.Module) -> int:
    """Bytes that the module's parameters and buffers take."""
    return sum(t.numel() * t.element_size() for group in (module.parameters(), module.buffers()) for t in group)
