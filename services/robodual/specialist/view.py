"""What an observer sees of a session's steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from robodual.serving.recent import Recent
from robodual.specialist.frames import Frame

STEPS = 150
REFERENCES = 24


class Step(NamedTuple):
    """One step that was answered."""

    episode: int
    number: int
    action: NDArray[np.float32]  # [7], as executed
    age: int  # of the conditioning, in steps
    degraded: bool
    stages: list[tuple[str, float]]  # seconds


class Reference(NamedTuple):
    """The generalist's chunk as it came, [8, 7]: row n is of step `step` + n."""

    episode: int
    step: int
    actions: NDArray[np.float32]


class View:
    """A session's latest steps and reference chunks, and references to its latest frame: nothing is copied."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.steps = Recent[Step](STEPS)
        self.references = Recent[Reference](REFERENCES)

    def note(self, step: Step, frame: Frame, reference: Reference) -> None:
        """Takes in a step, with its frame and the chunk that it was conditioned on."""
        self.frame = frame
        self.steps.add(step)
        newest = self.references.newest
        if newest is None or newest[:2] != reference[:2]:
            self.references.add(reference)
