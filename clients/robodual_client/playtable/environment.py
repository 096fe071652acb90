"""PlayTable: CALVIN's environment interface over the built-in physics."""

from __future__ import annotations

from typing import Any, Dict, Sequence

import numpy as np
import pybullet

from robodual_client.playtable.arm import Arm, panda_urdf
from robodual_client.playtable.camera import Camera, gripper_view, static_view
from robodual_client.playtable.states import home_robot, random_scene
from robodual_client.playtable.table import Table

PHYSICS_RATE = 240  # hertz
SUBSTEPS = 8  # a control step is a thirtieth of a second
ROBOT_OBS_SIZE = 15
SCENE_OBS_SIZE = 24
ACTION_SIZE = 7

Observation = Dict[str, Any]


class PlayTable:
    """CALVIN's play table with the Panda arm: same frames, cameras, observations, actions and info as calvin_env.

    An observation holds rgb_obs (rgb_static uint8 [200, 200, 3], rgb_gripper uint8 [84, 84, 3]), depth_obs
    (depth_static float32 [200, 200], depth_gripper float32 [84, 84], metres), robot_obs float64 [15] and scene_obs
    float64 [24]. With render=False it holds the last two only. Every reset builds the world anew, so that an episode
    depends on its start and its actions alone; `seed` only picks the scenes of resets without a scene_obs.
    """

    def __init__(self, seed: int = 0, render: bool = True) -> None:
        self.render = render
        self._random = np.random.default_rng(seed)
        self._client: int = pybullet.connect(pybullet.DIRECT)
        self._static = Camera(self._client, 200, field_of_view=10, near=0.01, far=10)
        self._gripper = Camera(self._client, 84, field_of_view=75, near=0.01, far=2)
        self._static_view = static_view()
        self._arm: Arm
        self._table: Table
        self.reset()

    def reset(
        self,
        robot_obs: Sequence[float] | np.ndarray | None = None,
        scene_obs: Sequence[float] | np.ndarray | None = None,
    ) -> Observation:
        """Starts from exactly robot_obs [15] (its joints, gripper width and command) and scene_obs [24].

        Without robot_obs the arm is in the published initial pose; without scene_obs the blocks lie at random on table
        and shelf. Raises ValueError when a vector has the wrong size or is not finite.
        """
        robot = home_robot() if robot_obs is None else _checked(robot_obs, ROBOT_OBS_SIZE, "robot_obs")
        scene = random_scene(self._random) if scene_obs is None else _checked(scene_obs, SCENE_OBS_SIZE, "scene_obs")
        client = self._client
        pybullet.resetSimulation(physicsClientId=client)
        pybullet.setPhysicsEngineParameter(deterministicOverlappingPairs=1, physicsClientId=client)
        pybullet.setTimeStep(1 / PHYSICS_RATE, physicsClientId=client)
        pybullet.setGravity(0, 0, -9.8, physicsClientId=client)
        with panda_urdf() as urdf:
            self._arm = Arm(client, urdf)
        self._table = Table(client)
        self._arm.reset(robot)
        self._table.reset(scene)
        pybullet.performCollisionDetection(physicsClientId=client)  # so that info has contacts before the first step
        return self.get_obs()

    def step(self, action: Sequence[float] | np.ndarray) -> tuple[Observation, float, bool, dict[str, Any]]:
        """One control step of 1/30 s with a relative action [7].

        action[:3] / 50 metres and action[3:6] / 20 radians (Euler angles) are added to the target pose; the gripper
        opens for action[6] > 0 and closes otherwise. Reward and done are always 0 and False: the task oracle judges.
        Raises ValueError when the action is not seven finite numbers.
        """
        self._arm.apply(_checked(action, ACTION_SIZE, "action"))
        for _ in range(SUBSTEPS):
            pybullet.stepSimulation(physicsClientId=self._client)
        self._table.update()
        return self.get_obs(), 0.0, False, self.get_info()

    def get_obs(self) -> Observation:
        """The current observation."""
        observation: Observation = {"robot_obs": self._arm.observation(), "scene_obs": self._table.observation()}
        if self.render:
            rgb_static, depth_static = self._static.render(self._static_view)
            rgb_gripper, depth_gripper = self._gripper.render(
                gripper_view(self._client, self._arm.body, self._arm.camera)
            )
            observation["rgb_obs"] = {"rgb_static": rgb_static, "rgb_gripper": rgb_gripper}
            observation["depth_obs"] = {"depth_static": depth_static, "depth_gripper": depth_gripper}
        return observation

    def get_info(self) -> dict[str, Any]:
        """calvin_env's info: robot_info and scene_info, with contact tuples as pybullet gives them."""
        return {"robot_info": self._arm.info(), "scene_info": self._table.info()}

    def close(self) -> None:
        """Frees the physics world. Closing twice is harmless."""
        if self._client >= 0:
            pybullet.disconnect(physicsClientId=self._client)
            self._client = -1

    def __enter__(self) -> PlayTable:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _checked(values: Sequence[float] | np.ndarray, size: int, field: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (size,) or not np.isfinite(array).all():
        raise ValueError(f"{field} must be {size} finite numbers, got an array of shape {array.shape}: {array}")
    return array
