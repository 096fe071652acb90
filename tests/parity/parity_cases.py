"""Reads the parity cases: recorded inputs and outputs of the published implementations, in float32 on a CPU.

The folder comes from the environment variable ROBODUAL_PARITY_DIR (default: tests/data/parity). A case is a pair
NAME.json (configuration) and NAME.npz (recorded values); no weights are shipped, because every parameter and every
input follows from its name: `fill` and `draw` give the same float32 arrays on every machine (SHA-256 of the name seeds
NumPy's PCG64, whose ziggurat normals are the same everywhere).

Tests in this folder import this module as it is (`from parity_cases import cases, draw, fill_state_dict`): pytest puts
a test file's folder on the path.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(os.environ.get("ROBODUAL_PARITY_DIR") or Path(__file__).parents[1] / "data" / "parity")


@dataclass(frozen=True)
class Case:
    """One case: `name` is the file's stem, `short` the stem without the family in front (`specialist_full`: `full`)."""

    name: str
    short: str
    config: dict[str, Any]
    recorded: Mapping[str, np.ndarray]


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def paths(pattern: str) -> list[Path]:
    """The folder's files that match a glob, in the order of names (`control_loop*.npz`)."""
    return sorted(FOLDER.glob(pattern))


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an .npz file."""
    return _read_arrays(path)


def cases(family: str) -> list[Case]:
    """The cases FAMILY_*.json that have recorded values beside them (so not FAMILY_state_dict.json)."""
    found = []
    for path in paths(f"{family}_*.json"):
        values = path.with_suffix(".npz")
        if values.exists():
            config = json.loads(path.read_text())
            found.append(Case(path.stem, path.stem.removeprefix(f"{family}_"), config, _read_arrays(values)))
    return found


def state_dict_shapes(family: str) -> dict[str, tuple[list[int], str]]:
    """FAMILY_state_dict.json: parameter name -> (shape, dtype name)."""
    entries = json.loads((FOLDER / f"{family}_state_dict.json").read_text())
    return {name: (list(shape), dtype) for name, (shape, dtype) in entries.items()}


def _generator(name: str) -> np.random.Generator:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(seed))


def draw(name: str, shape: Sequence[int], low: float | None = None, high: float | None = None) -> np.ndarray:
    """The input NAME, float32: standard normal, or uniform in [low, high) where both bounds are given."""
    generator = _generator("input:" + name)
    if low is None or high is None:
        return generator.standard_normal(size=tuple(shape), dtype=np.float32)
    uniform = generator.random(size=tuple(shape), dtype=np.float32)
    return (low + (high - low) * uniform).astype(np.float32)


def fill(name: str, shape: Sequence[int]) -> np.ndarray:
    """The value of the parameter NAME, float32, scaled by its kind so that activations stay of order one."""
    size = tuple(shape)
    normal = _generator("param:" + name).standard_normal(size=size, dtype=np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("gamma_v", "scale_factor"):
        value = 0.5 + 0.1 * normal
    elif leaf == "g" or (leaf == "weight" and len(size) == 1):
        value = 1.0 + 0.1 * normal
    elif leaf == "bias":
        value = 0.1 * normal
    elif leaf in ("latents", "pos_embed", "pos_embedding", "cls_token", "reg_token", "media_pos_emb"):
        value = 0.5 * normal
    elif "embed_tokens" in name:
        value = normal
    else:
        value = 0.8 * normal / np.sqrt(int(np.prod(size[1:])))
    return value.astype(np.float32)


def fill_state_dict(module: torch.nn.Module, skip: Iterable[str] = ()) -> None:
    """Sets every entry of the module's state dict, in place, to its `fill` value.

    Entries whose name ends in one of `skip` keep the value that the module was built with.
    """
    endings = tuple(skip)
    for name, value in module.state_dict().items():
        if not (endings and name.endswith(endings)):
            value.copy_(torch.from_numpy(fill(name, value.shape)))
