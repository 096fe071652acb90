"""The play table: sliding door, drawer, switch with its bulb, button with its LED, and the three blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pybullet

MODEL = Path(__file__).parent / "models" / "table.urdf"
DOORS = ("base__slide", "base__drawer")
FRICTION_FORCE = 4.0  # newtons that hold door, drawer and switch where they are left, and push the button back up
BUTTON_THRESHOLD = 0.01  # metres, the middle of its travel
SWITCH_THRESHOLD = 0.044

# calvin_env data/blocks (red middle, blue small, pink big) at scale 0.8: metres
BLOCK_SIZES: dict[str, tuple[float, float, float]] = {
    "block_red": (0.056, 0.04, 0.04),
    "block_blue": (0.04, 0.04, 0.04),
    "block_pink": (0.08, 0.04, 0.04),
}
BLOCK_COLOURS = {
    "block_red": (1.0, 0.0, 0.0, 1.0),
    "block_blue": (0.0, 0.0, 1.0, 1.0),
    "block_pink": (1.0, 0.0, 1.0, 1.0),
}
BLOCK_MASS = 0.3  # kilograms

LAMP_OFF = (1.0, 1.0, 1.0, 1.0)
LAMP_COLOURS = {"lightbulb": (1.0, 1.0, 0.0, 1.0), "led": (0.0, 1.0, 0.0, 1.0)}
LAMP_LINKS = {"lightbulb": "light_link", "led": "led_link"}


class Table:
    """Furniture and blocks in one physics client.

    scene_obs [24] is calvin_env's: door, drawer, button, switch (joint positions in metres), bulb, LED (0 or 1), then
    position [3] and Euler angles [3] of the red, blue and pink block.
    """

    def __init__(self, client: int) -> None:
        self.client = client
        self.body: int = pybullet.loadURDF(
            str(MODEL), useFixedBase=True, flags=pybullet.URDF_USE_INERTIA_FROM_FILE, physicsClientId=client
        )
        self.joints: dict[str, int] = {}
        self.links: dict[str, int] = {"base_link": -1}
        for index in range(pybullet.getNumJoints(self.body, physicsClientId=client)):
            facts = pybullet.getJointInfo(self.body, index, physicsClientId=client)
            self.joints[facts[1].decode()] = index
            self.links[facts[12].decode()] = index
        for name in (*DOORS, "base__switch"):
            pybullet.setJointMotorControl2(
                self.body,
                self.joints[name],
                pybullet.VELOCITY_CONTROL,
                targetVelocity=0,
                force=FRICTION_FORCE,
                physicsClientId=client,
            )
        pybullet.setJointMotorControl2(
            self.body,
            self.joints["base__button"],
            pybullet.POSITION_CONTROL,
            targetPosition=0,
            force=FRICTION_FORCE,
            physicsClientId=client,
        )
        self.blocks = {name: self._add_block(name) for name in BLOCK_SIZES}
        self.lamps = {"lightbulb": 0, "led": 0}
        self._button_down = False
        self._switch_up = False
        self._add_floor()

    def _add_block(self, name: str) -> int:
        half = [side / 2 for side in BLOCK_SIZES[name]]
        body: int = pybullet.createMultiBody(
            BLOCK_MASS,
            pybullet.createCollisionShape(pybullet.GEOM_BOX, halfExtents=half, physicsClientId=self.client),
            pybullet.createVisualShape(
                pybullet.GEOM_BOX, halfExtents=half, rgbaColor=BLOCK_COLOURS[name], physicsClientId=self.client
            ),
            physicsClientId=self.client,
        )
        pybullet.changeDynamics(body, -1, lateralFriction=0.7, spinningFriction=0.001, physicsClientId=self.client)
        return body

    def _add_floor(self) -> None:
        half = [4.0, 4.0, 0.01]
        pybullet.createMultiBody(
            0,
            pybullet.createCollisionShape(pybullet.GEOM_BOX, halfExtents=half, physicsClientId=self.client),
            pybullet.createVisualShape(
                pybullet.GEOM_BOX, halfExtents=half, rgbaColor=[0.93, 0.93, 0.94, 1], physicsClientId=self.client
            ),
            basePosition=[0, 0, -0.01],
            physicsClientId=self.client,
        )

    def reset(self, scene_obs: np.ndarray) -> None:
        """Puts every joint, lamp and block as scene_obs [24] says."""
        for name, value in zip((*DOORS, "base__button", "base__switch"), scene_obs[:4]):
            pybullet.resetJointState(self.body, self.joints[name], float(value), physicsClientId=self.client)
        self._light("lightbulb", bool(scene_obs[4] > 0.5))
        self._light("led", bool(scene_obs[5] > 0.5))
        for body, pose in zip(self.blocks.values(), scene_obs[6:].reshape(3, 6)):
            pybullet.resetBasePositionAndOrientation(
                body, pose[:3].tolist(), pybullet.getQuaternionFromEuler(pose[3:].tolist()), physicsClientId=self.client
            )
        self._button_down = self._position("base__button") > BUTTON_THRESHOLD
        self._switch_up = self._position("base__switch") > SWITCH_THRESHOLD

    def update(self) -> None:
        """After a control step: a press of the button toggles the LED, the half that the switch is in sets the bulb."""
        down = self._position("base__button") > BUTTON_THRESHOLD
        if down and not self._button_down:
            self._light("led", not self.lamps["led"])
        self._button_down = down
        up = self._position("base__switch") > SWITCH_THRESHOLD
        if up != self._switch_up:
            self._light("lightbulb", up)
        self._switch_up = up

    def _light(self, lamp: str, on: bool) -> None:
        self.lamps[lamp] = int(on)
        pybullet.changeVisualShape(
            self.body,
            self.links[LAMP_LINKS[lamp]],
            rgbaColor=LAMP_COLOURS[lamp] if on else LAMP_OFF,
            physicsClientId=self.client,
        )

    def _position(self, joint: str) -> float:
        return float(pybullet.getJointState(self.body, self.joints[joint], physicsClientId=self.client)[0])

    def observation(self) -> np.ndarray:
        """scene_obs float64 [24]."""
        values: list[float] = [self._position(name) for name in (*DOORS, "base__button", "base__switch")]
        values += [self.lamps["lightbulb"], self.lamps["led"]]
        for body in self.blocks.values():
            position, orientation = pybullet.getBasePositionAndOrientation(body, physicsClientId=self.client)
            values += [*position, *pybullet.getEulerFromQuaternion(orientation)]
        return np.array(values)

    def info(self) -> dict[str, Any]:
        """calvin_env's scene_info, which the task oracle reads."""
        blocks = {}
        for name, body in self.blocks.items():
            position, orientation = pybullet.getBasePositionAndOrientation(body, physicsClientId=self.client)
            linear, angular = pybullet.getBaseVelocity(body, physicsClientId=self.client)
            blocks[name] = {
                "uid": body,
                "current_pos": position,
                "current_orn": orientation,
                "current_lin_vel": linear,
                "current_ang_vel": angular,
                "contacts": pybullet.getContactPoints(bodyA=body, physicsClientId=self.client),
            }
        button, switch = self._position("base__button"), self._position("base__switch")
        return {
            "fixed_objects": {
                "table": {
                    "uid": self.body,
                    "links": dict(self.links),
                    "contacts": pybullet.getContactPoints(bodyA=self.body, physicsClientId=self.client),
                }
            },
            "movable_objects": blocks,
            "doors": {name: {"current_state": self._position(name)} for name in DOORS},
            "buttons": {"base__button": {"joint_state": button, "logical_state": self.lamps["led"]}},
            "switches": {"base__switch": {"joint_state": switch, "logical_state": int(self._switch_up)}},
            "lights": {name: {"logical_state": state} for name, state in self.lamps.items()},
        }
