"""The Panda arm: published pose, relative Cartesian control, and its part of an observation."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np
import pybullet
import pybullet_data

# calvin_env conf/scene/calvin_scene_D.yaml and conf/robot/panda.yaml
BASE_POSITION = (-0.34, -0.46, 0.24)
HOME_JOINTS = (-1.21779206, 1.03987646, 2.11978261, -2.34205014, -0.87015947, 1.64119353, 0.55344866)
LOWER_LIMITS = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
UPPER_LIMITS = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
FINGER_OPEN = 0.04  # metres, each finger
TRANSLATION_UNIT = 0.02  # metres of target motion for an action of 1 (relative actions are metres x 50)
ROTATION_UNIT = 0.05  # radians for an action of 1 (radians x 20)
JOINT_FORCE = 200.0
JOINT_SPEED = 2.0
FINGER_SPEED = 1.0
CLOSING_FORCE = 60.0  # firm enough for a carried block, low enough that pads do not sink into it
OPENING_FORCE = 2.0

ARM_JOINTS = range(7)
MODEL = Path(__file__).parent / "models" / "panda.urdf"


@contextlib.contextmanager
def panda_urdf() -> Iterator[str]:
    """A loadable copy of the arm's description: its meshes lie in pybullet_data, at an absolute path for Bullet."""
    with tempfile.TemporaryDirectory(prefix="playtable-") as folder:
        path = Path(folder) / "panda.urdf"
        path.write_text(MODEL.read_text().replace("{data}", Path(pybullet_data.getDataPath()).as_posix()))
        yield str(path)


class Arm:
    """The Panda in one physics client. Poses are of the tool centre, in the world frame, metres and radians."""

    def __init__(self, client: int, urdf: str) -> None:
        self.client = client
        self.body: int = pybullet.loadURDF(
            urdf,
            BASE_POSITION,
            useFixedBase=True,
            flags=pybullet.URDF_USE_INERTIA_FROM_FILE,
            physicsClientId=client,
        )
        links = {}
        for index in range(pybullet.getNumJoints(self.body, physicsClientId=client)):
            links[pybullet.getJointInfo(self.body, index, physicsClientId=client)[12].decode()] = index
        self.tool, self.camera = links["tcp"], links["gripper_cam"]
        self.fingers = (links["panda_leftfinger"], links["panda_rightfinger"])
        self.gripper_action = 1.0
        self.target_position = np.zeros(3)
        self.target_orientation = np.zeros(3)
        self._keep_fingers_centred()
        self._add_pedestal()

    def _keep_fingers_centred(self) -> None:
        gear = pybullet.createConstraint(
            self.body,
            self.fingers[0],
            self.body,
            self.fingers[1],
            jointType=pybullet.JOINT_GEAR,
            jointAxis=[1, 0, 0],
            parentFramePosition=[0, 0, 0],
            childFramePosition=[0, 0, 0],
            physicsClientId=self.client,
        )
        pybullet.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50, physicsClientId=self.client)

    def _add_pedestal(self) -> None:
        x, y, height = BASE_POSITION
        shape = pybullet.createVisualShape(
            pybullet.GEOM_CYLINDER,
            radius=0.13,
            length=height,
            rgbaColor=[0.9, 0.9, 0.9, 1],
            physicsClientId=self.client,
        )
        pybullet.createMultiBody(
            baseVisualShapeIndex=shape, basePosition=[x - 0.05, y, height / 2], physicsClientId=self.client
        )

    def reset(self, robot_obs: np.ndarray) -> None:
        """Takes the joints (7:14), the gripper's width (6) and its last command (14) from robot_obs [15]."""
        joints, finger = robot_obs[7:14], float(robot_obs[6]) / 2
        for joint, angle in zip(ARM_JOINTS, joints):
            pybullet.resetJointState(self.body, joint, float(angle), physicsClientId=self.client)
        for joint in self.fingers:
            pybullet.resetJointState(self.body, joint, finger, physicsClientId=self.client)
        self.gripper_action = 1.0 if robot_obs[14] > 0 else -1.0
        self._drive_arm(joints)
        self._drive_fingers()
        position, orientation = self.tool_pose()
        self.target_position, self.target_orientation = np.array(position), np.array(orientation)

    def apply(self, action: np.ndarray) -> None:
        """Moves the target pose by a relative action [7] and drives the joints towards it (calvin_env robot.py)."""
        self.target_position = self.target_position + action[:3] * TRANSLATION_UNIT
        self.target_orientation = self.target_orientation + action[3:6] * ROTATION_UNIT
        self.gripper_action = 1.0 if action[6] > 0 else -1.0
        self._drive_arm(self._inverse_kinematics())
        self._drive_fingers()

    def _inverse_kinematics(self) -> np.ndarray:
        # Limits and ranges of 7 rad and the home pose as rest pose: the published null-space settings.
        rest = [*HOME_JOINTS, FINGER_OPEN, FINGER_OPEN]
        joints = pybullet.calculateInverseKinematics(
            self.body,
            self.tool,
            self.target_position.tolist(),
            pybullet.getQuaternionFromEuler(self.target_orientation.tolist()),
            [-7.0] * 9,
            [7.0] * 9,
            [7.0] * 9,
            rest,
            physicsClientId=self.client,
        )
        clipped: np.ndarray = np.clip(joints[:7], LOWER_LIMITS, UPPER_LIMITS)
        return clipped

    def _drive_arm(self, joints: Sequence[float] | np.ndarray) -> None:
        for joint, angle in zip(ARM_JOINTS, joints):
            self._drive(joint, float(angle), JOINT_FORCE, JOINT_SPEED)

    def _drive_fingers(self) -> None:
        opening = self.gripper_action > 0
        for joint in self.fingers:
            self._drive(
                joint, FINGER_OPEN if opening else 0.0, OPENING_FORCE if opening else CLOSING_FORCE, FINGER_SPEED
            )

    def _drive(self, joint: int, target: float, force: float, speed: float) -> None:
        pybullet.setJointMotorControl2(
            self.body,
            joint,
            pybullet.POSITION_CONTROL,
            targetPosition=target,
            force=force,
            maxVelocity=speed,
            physicsClientId=self.client,
        )

    def tool_pose(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Position [3] in metres and Euler angles [3] (x, y, z) in radians of the tool centre."""
        state = pybullet.getLinkState(self.body, self.tool, computeForwardKinematics=1, physicsClientId=self.client)
        return state[0], pybullet.getEulerFromQuaternion(state[1])

    def observation(self) -> np.ndarray:
        """robot_obs float64 [15]: tool position, Euler angles, gripper width, arm joints, last gripper command."""
        position, orientation = self.tool_pose()
        return np.array([*position, *orientation, self._width(), *self._joints(), self.gripper_action])

    def info(self) -> dict[str, Any]:
        """calvin_env's robot_info: pose, joints, body id and contact tuples; and the target pose that actions move."""
        position, orientation = self.tool_pose()
        return {
            "tcp_pos": position,
            "tcp_orn": orientation,
            "target_pos": tuple(self.target_position),
            "target_orn": tuple(self.target_orientation),
            "gripper_opening_width": self._width(),
            "arm_joint_states": self._joints(),
            "gripper_action": self.gripper_action,
            "uid": self.body,
            "contacts": pybullet.getContactPoints(bodyA=self.body, physicsClientId=self.client),
        }

    def _joints(self) -> list[float]:
        states = pybullet.getJointStates(self.body, list(ARM_JOINTS), physicsClientId=self.client)
        return [state[0] for state in states]

    def _width(self) -> float:
        states = pybullet.getJointStates(self.body, list(self.fingers), physicsClientId=self.client)
        return float(states[0][0] + states[1][0])
