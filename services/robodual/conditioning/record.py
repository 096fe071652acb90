"""Conditioning: what the generalist made of one frame, and which frame that was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

CHUNK = (8, 7)
MAX_LENGTH = 4096
MAX_WIDTH = 16384
MAX_VALUES = 4 * 1024 * 1024
MAX_NUMBER = 2**32 - 1
MAX_INSTRUCTION = 512
EXPONENT = np.uint16(0x7F80)  # of a bfloat16; all ones in infinities and NaNs


class Version(NamedTuple):
    """Which frame a conditioning was made of. Ordered by episode, then step."""

    episode: int
    step: int


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The generalist's conditioning of one frame and one instruction.

    `reference_actions` is float32 [8, 7]; `hidden_states` is bfloat16 [L, width], on the CPU, with L up to 4096, width
    up to 16384 and at most 4 Mi values. `instruction`, up to 512 characters, is for people: no model reads it here.
    Raises `ValueError` for anything else, non-finite values included.
    """

    episode: int
    step: int
    reference_actions: NDArray[np.float32]
    hidden_states: torch.Tensor
    instruction: str = ""

    def __post_init__(self) -> None:
        for name, number in (("episode", self.episode), ("step", self.step)):
            if not 0 <= number <= MAX_NUMBER:
                raise ValueError(f"{name}: expected 0..{MAX_NUMBER}, got {number}")
        if len(self.instruction) > MAX_INSTRUCTION:
            raise ValueError(f"instruction: expected at most {MAX_INSTRUCTION} characters, got {len(self.instruction)}")
        actions, states = self.reference_actions, self.hidden_states
        if actions.dtype != np.float32 or actions.shape != CHUNK:
            raise ValueError(
                f"reference_actions: expected float32 {list(CHUNK)}, got {actions.dtype} {list(actions.shape)}"
            )
        if not np.isfinite(actions).all():
            raise ValueError("reference_actions: expected finite values only")
        if states.dtype != torch.bfloat16 or states.ndim != 2 or states.device.type != "cpu":
            raise ValueError(
                "hidden_states: expected bfloat16 [L, width] on the CPU, "
                f"got {states.dtype} {list(states.shape)} on {states.device}"
            )
        check_size(*states.shape)
        # On the bits and in NumPy: torch would wake its thread pool, which the model beside this needs.
        if ((states.contiguous().view(torch.uint16).numpy() & EXPONENT) == EXPONENT).any():
            raise ValueError("hidden_states: expected finite values only")

    @property
    def version(self) -> Version:
        return Version(self.episode, self.step)


def check_size(length: int, width: int) -> None:
    """Raises `ValueError` unless hidden states of [length, width] are within the limits."""
    if not (1 <= length <= MAX_LENGTH and 1 <= width <= MAX_WIDTH and length * width <= MAX_VALUES):
        raise ValueError(
            f"hidden_states: expected [1..{MAX_LENGTH}, 1..{MAX_WIDTH}] with at most {MAX_VALUES} values, "
            f"got [{length}, {width}]"
        )
