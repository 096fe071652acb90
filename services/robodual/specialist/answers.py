"""Answers to steps, in two parts: what is known ahead of the step, and what its frame makes of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robodual.conditioning.record import Version
from robodual.specialist.control import ControlLoop, Window
from robodual_client import tensors, wire

WINDOWS: dict[Window, wire.ReferenceWindow] = {
    "published": wire.REFERENCE_WINDOW_PUBLISHED,
    "age": wire.REFERENCE_WINDOW_AGE,
}
FLOATS = wire.DTYPE_FLOAT32


def draft(episode: int, step: int, seed: int, window: Window) -> wire.ActResponse:
    """The answer without its values."""
    return wire.ActResponse(
        episode=episode,
        step=step,
        action=wire.Tensor(dtype=FLOATS, shape=(7,)),
        chunk=wire.Tensor(dtype=FLOATS, shape=(8, 7)),
        recovery=wire.RecoveryState(
            episode=episode,
            step=step,
            seed=seed,
            reference_window=WINDOWS[window],
            chunks=wire.Tensor(dtype=FLOATS),
            chunk_steps=wire.Tensor(dtype=wire.DTYPE_INT32),
            history=wire.Tensor(dtype=FLOATS, shape=(4, 7)),
        ),
    )


def complete(
    answer: wire.ActResponse,
    *,
    action: NDArray[np.float32],
    chunk: NDArray[np.float32],
    conditioning: Version,
    degraded: bool,
    control: ControlLoop,
) -> None:
    """Puts in what the step gave; `control` has advanced by it."""
    answer.action.data = tensors.data(action)
    answer.chunk.data = tensors.data(chunk)
    answer.conditioning.episode, answer.conditioning.step = conditioning
    answer.age = answer.step - conditioning.step
    answer.degraded = degraded
    state, recovery = control.recovery(), answer.recovery
    recovery.chunks.shape.extend(state.chunks.shape)
    recovery.chunks.data = tensors.data(state.chunks)
    recovery.chunk_steps.shape.extend(state.chunk_steps.shape)
    recovery.chunk_steps.data = tensors.data(state.chunk_steps)
    recovery.history.data = tensors.data(state.history)
