"""The control loop reproduces the published one, step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parity_cases import arrays, draw, paths

from robodual.specialist.control import ControlLoop, reference_actions


@pytest.mark.parametrize("path", paths("control_loop*.npz"), ids=lambda path: path.stem)
def test_loop_gives_the_published_references_history_and_actions(path: Path) -> None:
    recorded = arrays(path)
    prefix = str(recorded["prefix"])
    generalist_steps = set(recorded["generalist_steps"].tolist())
    loop = ControlLoop()
    latest = -1
    for step in range(len(recorded["actions"])):
        if step in generalist_steps:
            latest = step
            generalist_chunk = draw(f"{prefix}/reference{step}", (8, 8), -1, 1)[:, :7]
        reference = reference_actions(generalist_chunk, conditioning_step=latest, step=step, window="published")
        np.testing.assert_allclose(reference, recorded["reference_actions"][step], atol=1e-6, rtol=0)
        np.testing.assert_allclose(loop.history, recorded["history"][step], atol=1e-6, rtol=0)
        action = loop.advance(step, draw(f"{prefix}/chunk{step}", (1, 8, 7), -1, 1)[0])
        np.testing.assert_allclose(action, recorded["actions"][step], atol=1e-6, rtol=0)
