"""The published windows: which steps of a recording make one training sample, and what is cut from their actions.

From the published loader (RoboDual, prismatic/vla/datasets/calvin_dataset.py). A sample of the specialist starts where
the generalist looked, and lets `shift` steps pass before the specialist looks: that is how it learns to live with an
old conditioning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from robodual.specialist.config import ACTION, CHUNK, HISTORY
from robodual.training.annotations import Span

WINDOW = 8  # steps that the generalist's chunk covers
DETOUR = 10  # a window with a missing step moves on by so many

Actions = npt.NDArray[np.float32]


def starts(span: Span, chunk: int) -> range:
    """First steps of a span's windows: up to but not including `end + 1 - (8 + chunk - 1)`.

    chunk: 8 for the specialist, 0 for the generalist, as in the published scripts (`action_chunking_size`).
    """
    return range(span.start, span.end + 1 - (WINDOW + chunk - 1))


@dataclass(frozen=True)
class Window:
    """A window whose generalist looked at step `start` and whose specialist looks at `start + shift`."""

    start: int
    shift: int

    @property
    def steps(self) -> range:
        """Every step whose action the window needs: 8 + shift of them."""
        return range(self.start, self.start + WINDOW + self.shift)

    @property
    def current(self) -> int:
        return self.start + self.shift

    @property
    def previous(self) -> int:
        """The step of the previous frame; the published loader repeats the current frame at shifts 0 and 1."""
        return self.current - 1 if self.shift > 1 else self.current

    def targets(self, actions: Actions) -> Actions:
        """What the specialist shall predict, [8, 7], of the window's actions [8 + shift, 7]."""
        return actions[self.shift :]

    def history(self, actions: Actions) -> Actions:
        """[4, 7]: the window's first min(4, shift) actions, right-aligned, zeros in front. The network reads none."""
        count = min(HISTORY, self.shift)
        padded = np.zeros((HISTORY, ACTION), np.float32)
        padded[HISTORY - count :] = actions[:count]
        return padded

    @property
    def valid_cond_mask(self) -> npt.NDArray[np.float32]:
        """[8]: its last 8 - shift entries are 1, one for each row of the generalist's chunk that is yet to come."""
        mask = np.zeros(CHUNK, np.float32)
        mask[self.shift :] = 1
        return mask

    def reference(self, chunk: Actions) -> Actions:
        """What is left of the generalist's chunk [8, 7] at the current step: its last 8 - shift rows, then zeros."""
        left = np.zeros_like(chunk)
        left[: len(chunk) - self.shift] = chunk[self.shift :]
        return left
