"""Answers to steps, in two parts: what is known ahead of the step, and what its frame makes of it."""

from __future__ import annotations

from robodual.conditioning.record import Version
from robodual.specialist.control import Recovery, Window
from robodual_client import tensors, wire

WINDOWS: dict[Window, wire.ReferenceWindow] = {
    "published": wire.REFERENCE_WINDOW_PUBLISHED,
    "age": wire.REFERENCE_WINDOW_AGE,
}
FLOATS = wire.DTYPE_FLOAT32


def draft(episode: int, step: int, seed: int, window: Window, state: Recovery) -> wire.ActResponse:
    """The answer without what depends on the frame; of `state`, which the step will leave, its shapes and steps."""
    return wire.ActResponse(
        episode=episode,
        step=step,
        action=wire.Tensor(dtype=FLOATS, shape=state.history.shape[1:]),
        chunk=wire.Tensor(dtype=FLOATS, shape=state.chunks.shape[1:]),
        recovery=wire.RecoveryState(
            episode=episode,
            step=step,
            seed=seed,
            reference_window=WINDOWS[window],
            chunks=wire.Tensor(dtype=FLOATS, shape=state.chunks.shape),
            chunk_steps=tensors.encode(state.chunk_steps),
            history=wire.Tensor(dtype=FLOATS, shape=state.history.shape),
        ),
    )


def complete(answer: wire.ActResponse, state: Recovery, conditioning: Version, *, degraded: bool) -> None:
    """Puts in what the step gave: `state` is what it left."""
    answer.action.data = state.history[-1].tobytes()
    answer.chunk.data = state.chunks[-1].tobytes()
    answer.conditioning.episode, answer.conditioning.step = conditioning
    answer.age = answer.step - conditioning.step
    answer.degraded = degraded
    answer.recovery.chunks.data = state.chunks.tobytes()
    answer.recovery.history.data = state.history.tobytes()
