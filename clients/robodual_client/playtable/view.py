"""What the scripted expert sees: poses out of an observation, and where the furniture's handles are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from robodual_client.playtable.table import BLOCK_SIZES

HOME_YAW = 1.5  # radians; with it the fingers open along x, and yaws within pi of it are in the wrist's reach
SLOPE = np.array([0.0, 0.5, math.sqrt(0.75)])  # up the cabinet's face, which rises at 60 degrees
OUTWARD = np.array([0.0, -math.sqrt(0.75), 0.5])  # out of the face

TABLE_TOP = 0.44
SHELF_TOP = 0.441
DRAWER_FLOOR = 0.34
DESK_EDGE = -0.18  # y of its front
BUTTON = np.array([-0.12, -0.12, 0.484])  # the middle of its upper face, not pressed


def wrapped(angle: float) -> float:
    """The same angle in [-pi, pi)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def downward(yaw: float, tilt: float = 0.0) -> np.ndarray:
    """Euler angles [3] of a gripper that points down, turned by `yaw` about z, and by `tilt` radians about the axis
    along which the fingers close: at the home yaw, the fingertips towards the cabinet."""
    return np.array([math.pi, -tilt, yaw])


class Block:
    """A block's pose: centre [3], Euler angles [3], size [3]."""

    def __init__(self, name: str, pose: np.ndarray) -> None:
        self.name = name
        self.position, self.euler = pose[:3], pose[3:]
        self.size = np.array(BLOCK_SIZES[name])

    @property
    def edges(self) -> np.ndarray:
        """Its three edges [3, 3] in metres, one a column."""
        roll, pitch, yaw = self.euler
        cr, sr, cp, sp, cy, sy = (f(a) for a in (roll, pitch, yaw) for f in (math.cos, math.sin))
        rotation = np.array(
            [
                [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
                [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
                [-sp, cp * sr, cp * cr],
            ]
        )
        edges: np.ndarray = rotation * self.size
        return edges

    @property
    def grips(self) -> list[tuple[float, float]]:
        """The two ways to close on it from above, however it lies: yaw in [0, pi) and distance between the faces."""
        edges = self.edges
        first, second = np.argsort(np.abs(edges[2] / self.size))[:2]  # the edges that lie flattest
        return [
            (math.atan2(edges[1, along], edges[0, along]) % math.pi, float(self.size[across]))
            for along, across in ((first, second), (second, first))
        ]

    def lean(self, yaw: float) -> float:
        """How far its upward side leans back from the gripper's forward side, as a tilt does to a block: radians."""
        edges = self.edges / self.size
        up = edges[:, int(np.argmax(np.abs(edges[2])))]
        up = up * math.copysign(1.0, up[2])
        return math.asin(float(np.clip(-(up[0] * math.cos(yaw) + up[1] * math.sin(yaw)), -1.0, 1.0)))

    @property
    def bottom(self) -> float:
        """The height of its lowest corner."""
        return float(self.position[2] - np.abs(self.edges[2]).sum() / 2)

    def reach(self, direction: np.ndarray) -> float:
        """Half its extent along a horizontal unit vector [2]."""
        return float(np.abs(direction @ self.edges[:2]).sum() / 2)


PLACES = [*range(3), *range(7, 14), 15, 16, *(21 + 6 * block + axis for block in range(3) for axis in range(3))]
JUMP = 0.12  # metres or radians in one control step, of the tool, the arm's joints, the doors and the blocks


class View:
    """The latest observation, read. `update` takes the next one."""

    def __init__(self) -> None:
        self.tool = np.zeros(3)
        self.euler = np.zeros(3)
        self.width = 0.0
        self.closing = False
        self.slide = self.drawer = self.button = self.switch = 0.0
        self.blocks: dict[str, Block] = {}
        self.jumped = True  # since the last update, farther than physics does: the environment was reset
        self._state = np.full(39, np.inf)

    def update(self, observation: dict[str, Any]) -> None:
        """Reads robot_obs [15] and scene_obs [24]."""
        robot, scene = observation["robot_obs"], observation["scene_obs"]
        state = np.concatenate([robot, scene])
        self.jumped = bool(np.abs(state - self._state)[PLACES].max() > JUMP)
        self._state = state
        self.tool, self.euler, self.width, self.closing = robot[:3], robot[3:6], float(robot[6]), bool(robot[14] < 0)
        self.slide, self.drawer, self.button, self.switch = (float(value) for value in scene[:4])
        self.blocks = {name: Block(name, pose) for name, pose in zip(BLOCK_SIZES, scene[6:].reshape(3, 6))}

    @property
    def slide_handle(self) -> np.ndarray:
        """The middle of the sliding door's handle [3]."""
        return np.array([0.04 - self.slide, 0.0144, 0.5703])

    @property
    def drawer_handle(self) -> np.ndarray:
        """The middle of the drawer's handle [3]."""
        return np.array([0.18, -0.25 - self.drawer, 0.36])

    @property
    def switch_handle(self) -> np.ndarray:
        """The middle of the switch's bar [3]."""
        return np.array([0.3, 0.0609, 0.4949]) + 0.054 * OUTWARD + (self.switch + 0.008) * SLOPE

    def held(self) -> Block | None:
        """The block between the fingers, if any."""
        block = self.nearest()
        between = self.closing and self.width > 0.03 and np.linalg.norm(block.position - self.tool) < 0.045
        return block if between else None

    def nearest(self) -> Block:
        """The block nearest the tool centre."""
        return min(self.blocks.values(), key=lambda block: float(np.linalg.norm(block.position - self.tool)))

    def on_shelf(self, block: Block) -> bool:
        """Whether it lies in the sliding cabinet."""
        return bool(block.position[1] > 0.02 and block.position[2] > TABLE_TOP)

    def in_drawer(self, block: Block) -> bool:
        """Whether it lies in the drawer."""
        return bool(block.position[2] < TABLE_TOP - 0.02)
