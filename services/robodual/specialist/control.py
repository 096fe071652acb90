"""The control loop around the specialist, for one episode: noise, reference window, aggregation, gripper, history.

Pure NumPy, and exact: a loop restored from another's recovery state gives the same actions, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robodual.specialist.config import ACTION, CHUNK, HISTORY

Window = Literal["published", "age"]
Array = NDArray[np.float32]
FLOAT, INT = np.dtype("<f4"), np.dtype("<i4")  # as on the wire

DECAY = 0.1  # an action that was planned n steps ago weighs exp(-DECAY * n)
GRIPPER_THRESHOLD = -0.5  # below it the gripper closes


@lru_cache(maxsize=1024)
def noise(seed: int, episode: int, step: int) -> Array:
    """The diffusion's starting sample, float32 [8, 7], standard normal: a function of its three arguments alone.

    Read-only: who asks again gets the same array.

    `seed` is a uint64, `episode` and `step` are uint32: together they are Philox's 128-bit key.

    Raises:
        ValueError: if one of them is out of its range.
    """
    for name, value, bits in (("seed", seed, 64), ("episode", episode, 32), ("step", step, 32)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must be 0 to 2**{bits} - 1, not {value}")
    key = np.array([seed, episode << 32 | step], dtype=np.uint64)
    sample = np.random.Generator(np.random.Philox(key=key)).standard_normal((CHUNK, ACTION), dtype=np.float32)
    sample.flags.writeable = False
    return sample


def reference_actions(chunk: Array, *, conditioning_step: int, step: int, window: Window) -> Array:
    """The generalist's chunk [8, 7] as the specialist gets it at `step`: the rows still ahead, then zero rows.

    With age n = step - conditioning_step, `age` drops the first n rows. `published` also drops one more while the
    conditioning is that of step 0 and n > 0: in RoboDual's evaluation (vla-scripts/dual_sys_evaluation.py) the last
    8 - (step + 1) % 8 rows are kept, all 8 at step 0, with the generalist asked at steps 0, 7, 15, 23, ...

    Raises:
        ValueError: if the conditioning is of a later step.
    """
    age = step - conditioning_step
    if age < 0:
        raise ValueError(f"the conditioning is of step {conditioning_step}, after step {step}")
    dropped = age + (window == "published" and conditioning_step == 0 and age > 0)
    reference = np.zeros((CHUNK, ACTION), np.float32)
    if dropped < CHUNK:
        reference[: CHUNK - dropped] = chunk[dropped:]
    return reference


@dataclass(frozen=True)
class Recovery:
    """What another replica needs to carry on after a step."""

    chunks: Array  # [n, 8, 7], n <= 8: the latest chunks, oldest first
    chunk_steps: NDArray[np.int32]  # [n]: the steps they were made at
    history: Array  # [4, 7]: the last executed actions, oldest first, zeros in front


class ControlLoop:
    """Turns the specialist's chunks into actions; one object an episode, fed in the order of steps.

    Args:
        recovery: the state of another loop to go on from; checked like any input

    Raises:
        ValueError: naming the field, if the recovery state does not fit together.
    """

    def __init__(self, recovery: Recovery | None = None) -> None:
        if recovery is None:
            recovery = Recovery(
                np.zeros((0, CHUNK, ACTION), FLOAT), np.zeros(0, INT), np.zeros((HISTORY, ACTION), FLOAT)
            )
        _check(recovery)
        self._state = recovery
        # The latest step that has had its action, or None.
        self.last_step = int(recovery.chunk_steps[-1]) if len(recovery.chunk_steps) else None
        self._planned: _Plan | None = None

    @property
    def history(self) -> Array:
        """The last 4 executed actions [4, 7], oldest first, zeros in front. The published network does not read it."""
        return self._state.history.copy()

    def prepare(self, step: int) -> Recovery:
        """Does ahead what `advance` does for `step` before it looks at the chunk.

        Returns the state that it will leave, with zeros for the chunk and the action.
        """
        self._planned = _Plan(self._state, step)
        return self._planned.following

    def advance(self, step: int, chunk: Array) -> Array:
        """The action [7], float32, for `step`, whose diffusion gave `chunk` [8, 7].

        It is the weighted mean of all chunks that cover the step (weights exp(-0.1 * age of the chunk), RoboDual's
        temporal aggregation), also where steps were skipped; then the gripper becomes -1 below -0.5, else 1.

        Raises:
            ValueError: if `step` is not after the last one, or the chunk has another shape.
        """
        last = self.last_step
        if last is not None and step <= last:
            raise ValueError(f"step must be after {last}, not {step}")
        if chunk.shape != (CHUNK, ACTION):
            raise ValueError(f"chunk must have shape {(CHUNK, ACTION)}, not {chunk.shape}")
        planned, self._planned = self._planned, None
        plan = planned if planned is not None and planned.step == step else _Plan(self._state, step)
        mean = [(total + now) / (plan.weight + 1) for total, now in zip(plan.total, chunk[0].tolist())]
        mean[-1] = -1 if mean[-1] < GRIPPER_THRESHOLD else 1
        action = np.array(mean, FLOAT)
        self._state, self.last_step = plan.following, step
        self._state.chunks[-1], self._state.history[-1] = chunk, action
        return action

    def recovery(self) -> Recovery:
        """The state after the last step: at most 1,937 bytes of values."""
        return self._state


class _Plan:
    """What is known of `step` before its chunk.

    `total` (7 numbers) and `weight` are the sums of what earlier chunks plan for it, weighted, and of the weights;
    `following` is the state after it, with room for its chunk and its action.
    """

    def __init__(self, state: Recovery, step: int) -> None:
        covering = state.chunk_steps > step - CHUNK
        chunks, steps = state.chunks[covering], state.chunk_steps[covering]
        ages = step - steps
        weights = np.exp(-DECAY * ages)
        self.step = step
        self.total: list[float] = (weights @ chunks[np.arange(len(ages)), ages].astype(np.float64)).tolist()
        self.weight = float(weights.sum())
        self.following = Recovery(
            np.concatenate((chunks, np.zeros((1, CHUNK, ACTION), FLOAT))),
            np.concatenate((steps, np.array([step], INT))),
            np.concatenate((state.history[1:], np.zeros((1, ACTION), FLOAT))),
        )


def _check(recovery: Recovery) -> None:
    chunks, steps, history = recovery.chunks, recovery.chunk_steps, recovery.history
    if chunks.ndim != 3 or chunks.shape[1:] != (CHUNK, ACTION) or len(chunks) > CHUNK:
        raise ValueError(f"chunks must have shape (n, {CHUNK}, {ACTION}) with n <= {CHUNK}, not {chunks.shape}")
    if steps.shape != (len(chunks),):
        raise ValueError(f"chunk_steps must have shape ({len(chunks)},) as chunks do, not {steps.shape}")
    if history.shape != (HISTORY, ACTION):
        raise ValueError(f"history must have shape ({HISTORY}, {ACTION}), not {history.shape}")
    for name, values in (("chunks", chunks), ("history", history)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite")
    ordered = steps.astype(np.int64)
    if len(ordered) and (ordered[0] < 0 or (np.diff(ordered) <= 0).any() or ordered[-1] - ordered[0] >= CHUNK):
        raise ValueError(f"chunk_steps must rise from at least 0 and span less than {CHUNK} steps: {steps.tolist()}")
