"""Requests off the wire: observations and recovery states, with every field checked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from robodual.serving import fields
from robodual.serving.errors import InvalidArgument
from robodual.specialist.control import ControlLoop, Recovery, Window
from robodual.specialist.engine import Frame
from robodual_client import tensors, wire
from robodual_client.observation import FARTHEST

SIDES = range(8, 1025)
_BITS = np.dtype(np.uint32)
SMALL = 64  # values that are looked at faster one by one
LIMIT = 1e4  # of any value, in metres or radians: far from any robot, and from overflow in 16 bits
# Floats from 0 on are in the order of their bits, and others' bits are above: one look at its bits passes a depth map.
_FARTHEST_BITS = np.float32(FARTHEST).view(_BITS)
TACTILE = (160, 120, 6)
STEPS = range(1, 9)
WINDOWS: dict[int, Window] = {
    wire.REFERENCE_WINDOW_UNSPECIFIED: "published",
    wire.REFERENCE_WINDOW_PUBLISHED: "published",
    wire.REFERENCE_WINDOW_AGE: "age",
}


@dataclass(frozen=True)
class Resumption:
    """A checked recovery state, with the frame before the step that it goes on with."""

    episode: int
    step: int
    seed: int
    window: Window
    control: ControlLoop
    previous: NDArray[np.uint8]


async def frame(request: wire.ActRequest, sensors: Collection[str]) -> Frame:
    """The observation, but for `check_values`. Sensors that the model does not read are not looked at.

    Raises `InvalidArgument`.
    """
    if not request.HasField("observation"):
        raise InvalidArgument("observation: is missing")
    observation = request.observation

    async def colour(name: str) -> NDArray[np.uint8]:
        return await fields.image(observation, name, field=f"observation.{name}", sides=SIDES)

    def depth(name: str) -> NDArray[np.float32] | None:
        return _tensor(observation, name, "observation", np.float32, (SIDES, SIDES)) if name in sensors else None

    return Frame(
        rgb_static=await colour("rgb_static"),
        rgb_gripper=await colour("rgb_gripper") if "rgb_gripper" in sensors else None,
        depth_static=depth("depth_static"),
        depth_gripper=depth("depth_gripper"),
        rgb_tactile=(
            _tensor(observation, "rgb_tactile", "observation", np.uint8, TACTILE) if "rgb_tactile" in sensors else None
        ),
        proprio=_tensor(observation, "proprio", "observation", np.float32, (7,)),
    )


def window(number: int, field: str) -> Window:
    """The reference window. Raises `InvalidArgument`."""
    if number not in WINDOWS:
        raise InvalidArgument(f"{field}: expected PUBLISHED or AGE, got {number}")
    return WINDOWS[number]


async def resumption(request: wire.ActRequest) -> Resumption:
    """The request's recovery state. Raises `InvalidArgument` if it does not fit together or with the request."""
    state = request.recovery
    if state.episode != request.episode:
        raise InvalidArgument(f"recovery.episode: expected {request.episode} as in the request, got {state.episode}")
    if state.step >= request.step:
        raise InvalidArgument(f"recovery.step: expected a step before {request.step}, got {state.step}")
    recovery = Recovery(
        chunks=_tensor(state, "chunks", "recovery", np.float32, (STEPS, 8, 7)),
        chunk_steps=_tensor(state, "chunk_steps", "recovery", np.int32, (STEPS,)),
        history=_tensor(state, "history", "recovery", np.float32, (4, 7)),
    )
    _check_range(recovery.chunks, "recovery.chunks")
    _check_range(recovery.history, "recovery.history")
    try:
        control = ControlLoop(recovery)
    except ValueError as error:
        raise InvalidArgument(f"recovery.{error}") from error
    if control.last_step != state.step:
        raise InvalidArgument(f"recovery.chunk_steps: expected {state.step} last, got {control.last_step}")
    previous = await fields.image(request, "previous_rgb_static", field="previous_rgb_static", sides=SIDES)
    chosen = window(state.reference_window, "recovery.reference_window")
    return Resumption(state.episode, state.step, state.seed, chosen, control, previous)


def _tensor(message: Any, name: str, parent: str, dtype: DTypeLike, shape: Sequence[tensors.Dimension]) -> NDArray[Any]:
    field = f"{parent}.{name}"
    if not message.HasField(name):
        raise InvalidArgument(f"{field}: is missing")
    try:
        values = tensors.decode(getattr(message, name), field=field, dtype=dtype, shape=shape)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    return values


def check_values(frame: Frame) -> None:
    """Raises `InvalidArgument` for values that are not finite, or out of bounds. Copies nothing."""
    for name in ("depth_static", "depth_gripper", "proprio"):
        values = getattr(frame, name)
        if values is not None:
            _check_range(values, f"observation.{name}")


def _check_range(values: NDArray[np.float32], field: str) -> None:
    """Depth has bounds of its own."""
    depth = field.startswith("observation.depth")
    least, greatest = (0.0, FARTHEST) if depth else (-LIMIT, LIMIT)
    if depth:
        if np.maximum.reduce(values.view(_BITS), axis=None) <= _FARTHEST_BITS:
            return
    elif values.size <= SMALL and all(-LIMIT <= value <= LIMIT for value in values.ravel().tolist()):
        return
    # NaN compares false, so it is refused too.
    if not (values.min() >= least and values.max() <= greatest):
        if not np.isfinite(values).all():
            raise InvalidArgument(f"{field}: expected finite values only")
        unit = f"metres from {least:g} to {greatest:g}" if depth else f"values within ±{LIMIT:g}"
        raise InvalidArgument(f"{field}: expected {unit}, got {values.min():g} to {values.max():g}")
