"""Specialist checkpoints: the published EMA `.pt`, and our `.safetensors` with the configuration inside.

A published file is the state dict of ema_pytorch's wrapper: the weights that are served sit under `ema_model.`, a
training's own copy under `online_model.`, next to `initted` and `step`. Ours has the same names without the prefix.
Nothing in either can execute, and no memory is taken for a network before its names and shapes are known to fit.
"""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251 (for the name of an error alone)
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from robodual import tensor_file
from robodual.facts import CheckpointError, hash_state_dict
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.policy import Policy

EMA, ONLINE = "ema_model.", "online_model."
FORMAT = "robodual-specialist-1"
LARGEST = 1 << 16  # of a number in a configuration
MOST_BLOCKS = 256
MOST_GUIDANCE = 100.0
# Which names come with which flag; of those that fit, the first counts.
FLAGS = {
    "model.gripper_": "with_gripper",
    "tactile_encoder.": "with_tactile",
    "model.tactile_adapter.": "with_tactile",
    "depth_encoder.": "with_depth",
    "model.depth_adapter.": "with_depth",
}
UNSUPPORTED = {
    "model.hist_act_embed.": "it was trained with an action history, which no published specialist reads",
    "vision_encoder.model.": "it was trained with the Theia encoder; only DINO ViT-S/16 is supported",
}


def flags(names: Iterable[str]) -> dict[str, bool]:
    """The sensor flags of the published training (`with_depth`, ...) that a checkpoint's names show."""
    shown = dict.fromkeys(FLAGS.values(), False)
    for name in names:
        flag = _flag(name)
        if flag:
            shown[flag] = True
    return shown


def read(path: Path) -> tuple[SpecialistConfig | None, dict[str, Tensor]]:
    """A file's configuration (None in a published one, which has none) and its weights by published names, on the CPU.

    Raises:
        CheckpointError: one line with the file and the fix.
    """
    if path.is_dir():
        raise CheckpointError(
            f"{path}: is a folder, and a specialist is one file; "
            f"a generalist's folder goes to `robodual serve generalist`"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a published EMA .pt or a .safetensors of a specialist")
    if path.suffix == ".pt":
        return None, _read_ema(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise CheckpointError(f"{path}: the name must end in .pt (published EMA) or .safetensors (ours)")


def load(path: Path, config: SpecialistConfig, sensors: Mapping[str, bool] | None = None) -> Policy:
    """A policy with a file's weights: float32, on the CPU, in evaluation mode.

    Args:
        path: a published EMA `.pt` or our `.safetensors`
        config: the shapes, where the file does not carry its own
        sensors: `with_depth`, `with_gripper` and `with_tactile` where they are to differ from that

    Raises:
        CheckpointError: one line with the file and the fix; names that do not fit are listed in full, with the flag
            that explains them.
    """
    own, state = read(path)
    try:
        config = replace(own or config, **(sensors or {}))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        policy = Policy(config)
    check_names(path, policy.state_dict(), state)
    policy.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return policy.eval()


def save(policy: Policy, path: Path) -> None:
    """Writes a policy in the form that the name's ending says; the file appears whole or not at all.

    Raises:
        CheckpointError: if the ending is neither `.pt` nor `.safetensors`.
    """
    # Copies: safetensors keeps no two names of one memory.
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in policy.state_dict().items()
    }
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".pt":
            copies = {prefix + name: value for prefix in (EMA, ONLINE) for name, value in state.items()}
            torch.save({"initted": torch.tensor(True), "step": torch.tensor(0), **copies}, scratch)
        elif path.suffix == ".safetensors":
            config = {**asdict(policy.config), "guidance_scale": float(policy.config.guidance_scale)}
            metadata = {"format": FORMAT, "config": json.dumps(config)}
            tensor_file.write(state, scratch, metadata)
        else:
            raise CheckpointError(f"{path}: the name must end in .pt (published EMA) or .safetensors (ours)")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def convert(source: Path, target: Path, config: SpecialistConfig, sensors: Mapping[str, bool] | None = None) -> str:
    """Rewrites a checkpoint in the form that the target's ending says, reads it back and compares every bit.

    The published form's second copy of the weights, `online_model.`, is not kept: only the averaged one is served.

    Returns:
        The hash of the weights, the same for both files.

    Raises:
        CheckpointError: if the source cannot be used, the target is there already, or it does not read back as the
            source; there is no target then.
    """
    if target.exists():
        raise CheckpointError(f"{target}: exists already and is not overwritten; choose another name")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: no such folder; make it first")
    policy = load(source, config, sensors)
    partial = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        save(policy, partial)
        expected, written = hash_state_dict(policy), hash_state_dict(load(partial, policy.config))
        if written != expected:
            raise CheckpointError(f"{target}: reads back differently from {source}; check the disk and convert again")
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return expected


def _read_ema(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (weights only)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a plain state dict: it is corrupt or holds Python objects, which are never executed; "
            f"save the state dict of the EMA wrapper alone, with torch.save(ema.state_dict(), ...)"
        ) from error
    except Exception as error:  # torch.load fails in as many ways as a file can be broken
        raise CheckpointError(f"{path}: truncated or corrupt; copy it again and compare its size") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: not a state dict; save that of the EMA wrapper with torch.save")
    state = {str(name).removeprefix(EMA): value for name, value in content.items() if str(name).startswith(EMA)}
    if not state:
        raise CheckpointError(
            f"{path}: no name starts with {EMA}, so it is not a published specialist; "
            f"give fast_system_state_dict_ema-*.pt of RoboDual's training"
        )
    if odd := [name for name, value in state.items() if value.layout != torch.strided or value.is_meta]:
        raise CheckpointError(f"{path}: holds no plain values of {', '.join(odd)}; save dense tensors")
    return state


def _read_safetensors(path: Path) -> tuple[SpecialistConfig, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path}: no specialist of ours: its metadata has no format {FORMAT!r}; "
                    f"write one with `robodual convert`"
                )
            config = _parse(path, metadata.get("config", ""))
            names = list(file.keys())
            return config, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt; copy it again and compare its size") from error


def _parse(path: Path, text: str) -> SpecialistConfig:
    """The configuration in a file's metadata, with every number bounded before anything is built from it."""
    defaults = asdict(SpecialistConfig())
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or values.keys() != defaults.keys():
            raise ValueError(f"expected exactly the fields {', '.join(defaults)}")
        for name, default in defaults.items():
            value = values[name]
            if type(value) is not type(default) or (type(value) is float and not 0 <= value <= MOST_GUIDANCE):
                raise ValueError(f"{name} must be {type(default).__name__}, not {value!r}")
            limit = MOST_BLOCKS if name.endswith("blocks") else LARGEST
            if type(value) is int and not 1 <= value <= limit:
                raise ValueError(f"{name} must be 1 to {limit}, not {value}")
        return SpecialistConfig(**values)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: bad configuration in its metadata: {error}; convert it again") from error


def check_names(path: Path, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless a file's weights have exactly the expected names and shapes."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    found = [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
    if found:
        why = _reasons(flags(expected), flags(state), missing + unexpected, bool(shapes))
        raise CheckpointError(f"{path}: {'; '.join(why + found)}")


def _reasons(wanted: dict[str, bool], trained: dict[str, bool], names: list[str], reshaped: bool) -> list[str]:
    """Why `names` are missing or unexpected, each reason with its fix."""
    differ = [flag for flag in wanted if wanted[flag] != trained[flag]]
    reasons = []
    for flag in differ:
        way = "with" if trained[flag] else "without"
        reasons.append(f"it was trained {way} {flag.removeprefix('with_')}: set {flag} to {str(trained[flag]).lower()}")
    left = [name for name in names if _flag(name) not in differ]
    for prefix, reason in UNSUPPORTED.items():
        if any(name.startswith(prefix) for name in left):
            reasons.append(reason)
            left = [name for name in left if not name.startswith(prefix)]
    if left or reshaped:
        reasons.append("its architecture is another than the profile's: choose the profile it was trained with")
    return reasons


def _flag(name: str) -> str | None:
    return next((flag for prefix, flag in FLAGS.items() if name.startswith(prefix)), None)
