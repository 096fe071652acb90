"""States to start from: the published robot pose, and random scenes as calvin_env draws them."""

from __future__ import annotations

import math

import numpy as np

from robodual_client.playtable.arm import FINGER_OPEN, HOME_JOINTS
from robodual_client.playtable.table import BLOCK_SIZES

# calvin_env conf/scene/calvin_scene_D.yaml: opposite corners in metres
SURFACES = (
    ((0.0, -0.15, 0.46), (0.35, -0.03, 0.46)),
    ((-0.32, 0.05, 0.461), (-0.16, 0.12, 0.461)),
    ((-0.05, 0.05, 0.461), (0.13, 0.12, 0.461)),
)


def home_robot() -> np.ndarray:
    """robot_obs [15] of the published initial pose; its tool pose (0:6) is left to forward kinematics, here zero."""
    return np.array([0.0] * 6 + [2 * FINGER_OPEN, *HOME_JOINTS, 1.0])


def random_scene(generator: np.random.Generator) -> np.ndarray:
    """scene_obs [24]: doors, button and switch at rest, lamps off, blocks anywhere on table or shelf, not touching."""
    scene = np.zeros(24)
    placed: list[tuple[np.ndarray, float]] = []
    for index, size in enumerate(BLOCK_SIZES.values()):
        radius = math.hypot(size[0], size[1]) / 2
        while True:
            low, high = SURFACES[generator.integers(len(SURFACES))]
            position = generator.uniform(low, high)
            if all(np.linalg.norm(position - other) > radius + reach for other, reach in placed):
                break
        placed.append((position, radius))
        scene[6 + 6 * index : 9 + 6 * index] = position
        scene[11 + 6 * index] = generator.uniform(-math.pi, math.pi)
    return scene
