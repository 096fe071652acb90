"""Answers to steps, in two parts: what is known ahead of the step, and what its frame makes of it."""

from __future__ import annotations

from robodual.conditioning.record import Version
from robodual.specialist.control import ControlLoop, Window
from robodual_client import wire

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


def complete(answer: wire.ActResponse, control: ControlLoop, conditioning: Version, *, degraded: bool) -> None:
    """Puts in what the step gave; `control` has advanced by it."""
    state, recovery = control.recovery(), answer.recovery
    answer.action.data = state.history[-1].tobytes()
    answer.chunk.data = state.chunks[-1].tobytes()
    answer.conditioning.episode, answer.conditioning.step = conditioning
    answer.age = answer.step - conditioning.step
    answer.degraded = degraded
    recovery.chunks.shape.extend(state.chunks.shape)
    recovery.chunks.data = state.chunks.tobytes()
    recovery.chunk_steps.shape.extend(state.chunk_steps.shape)
    recovery.chunk_steps.data = state.chunk_steps.tobytes()
    recovery.history.data = state.history.tobytes()
