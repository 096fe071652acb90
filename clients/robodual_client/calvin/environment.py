"""The published CALVIN simulator, from a checkout of calvin_env alone, behind the environment protocol.

What the published code does, and what is done about it here:

- It calls GitPython on its own checkout at start, and disconnects its physics client again on deletion: see shim.py.
- Over a reset it keeps the last gripper command, the button's last position, and the physics engine's contacts, pair
  order and random generator, so that an episode depends on those before it. Here each reset starts the simulator anew
  (0.1 s; 0.4 s with EGL) and gives bit for bit what a fresh process gives. Reloading the bodies is not enough: the
  blocks' first places are drawn at random and order the pairs, and each reload leaks 12 MB of textures under EGL.
- It looks for the robot's model in the working directory first, then in its data: here the path is absolute.
- Parts of it talk to the first physics client of the process, whichever that is: one simulator at a time, and alone.
- Without its EGL plugin it ends the process with status 0: see rendering.py.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Sequence

import numpy as np

from robodual_client.calvin import checkout as checkouts
from robodual_client.calvin import shim
from robodual_client.calvin.checkout import Checkout, SimulatorError
from robodual_client.calvin.rendering import Renderer, choose

CAMERAS = ("static", "gripper")
ROBOT_OBS, SCENE_OBS, ACTION = 15, 24, 7

Observation = Dict[str, Any]


class CalvinEnvironment:
    """calvin_env with the Panda robot, at 30 control steps a second. One at a time in a process.

    `root`: the checkout (a clone of mees/calvin_env or mees/calvin); None reads CALVIN_ROOT. `scene`: "A" to "D".
    `render`: "auto", "egl", "cpu", or what `rendering.choose` found for another process.
    `cameras`: the ones to draw; drawing is most of a step's time, so a policy that does not look passes ().
    Raises SimulatorError, with one line for a person, if it cannot start.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        scene: str = "D",
        render: str | Renderer = "auto",
        cameras: Sequence[str] = CAMERAS,
    ) -> None:
        unknown = sorted(set(cameras) - set(CAMERAS))
        if unknown:
            raise SimulatorError(f"there is no camera {unknown[0]!r}; the adapter draws {' and '.join(CAMERAS)}")
        self.checkout = checkouts.find(root)
        self.checkout.check_files(scene)
        self.scene = scene
        self.cameras = tuple(cameras)
        self._published = shim.simulator(self.checkout)
        if not cameras:
            self.renderer = Renderer("cpu")
        else:
            self.renderer = render if isinstance(render, Renderer) else choose(render)
        self._config = _compose(self.checkout, scene)
        self._sim: Any = None
        self._fresh = False
        self._start()

    @property
    def facts(self) -> dict[str, str]:
        """What a result is measured in, for its provenance and for people."""
        return {
            "simulator": f"calvin_env {self.checkout.commit() or 'of unknown commit'}",
            "scene": f"scene {self.scene}",
            "renderer": self.renderer.sentence if self.cameras else "no cameras",
        }

    def reset(self, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None) -> Observation:
        """Puts robot and scene into the given states and returns the observation one physics step later.

        robot_obs: [15], of which the gripper width and the arm's joint angles count; None: the published start pose.
        scene_obs: [24]; None: closed drawer and door, lights off, blocks at the seed's first draw.
        Raises ValueError for other shapes.
        """
        robot = None if robot_obs is None else _vector(robot_obs, ROBOT_OBS, "robot_obs")
        scene = None if scene_obs is None else _vector(scene_obs, SCENE_OBS, "scene_obs")
        if not self._fresh:
            self.close()
            self._start()
        self._fresh = False
        with _quiet():
            return _observation(self._sim.reset(robot, scene))

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, dict[str, Any]]:
        """Applies a relative action [7] for one control step: translation (1 is 2 cm), rotation (1 is 0.05 rad), both
        of the target pose and in the world's frame, then the gripper: -1 closes, 1 opens.

        Reward is 0 and done False: the oracle (tasks.py) judges the info. Raises ValueError for another action.
        """
        command = _vector(action, ACTION, "action")
        if command[6] not in (-1.0, 1.0):
            raise ValueError(f"action[6] (gripper) is {command[6]}; it must be -1 (close) or 1 (open)")
        observation, reward, done, info = self._sim.step(command)
        return _observation(observation), float(reward), bool(done), self._with_target(info)

    def get_obs(self) -> Observation:
        """rgb_obs, depth_obs (metres), robot_obs [15] and scene_obs [24] of this moment."""
        return _observation(self._sim.get_obs())

    def get_info(self) -> dict[str, Any]:
        """calvin_env's privileged view of robot and scene: uids, poses, contacts, door and light states.

        To robot_info it adds target_pos [3] and target_orn [3, Euler angles], the pose that actions are added to.
        """
        return self._with_target(self._sim.get_info())

    def close(self) -> None:
        """Disconnects the physics client. Closing again does nothing."""
        if self._sim is not None:
            with _quiet():
                self._sim.p.disconnect(physicsClientId=self._sim.cid)
            self._sim = None

    def _with_target(self, info: dict[str, Any]) -> dict[str, Any]:
        robot = self._sim.robot
        info["robot_info"].update(target_pos=robot.target_pos.copy(), target_orn=robot.target_orn.copy())
        return info

    def _start(self) -> None:
        import pybullet

        if pybullet.getConnectionInfo(physicsClientId=0)["isConnected"]:
            raise SimulatorError(
                "another pybullet simulator is open in this process; close it first, or start calvin_env in its own"
            )
        if self.renderer.device is not None:
            os.environ["EGL_VISIBLE_DEVICES"] = str(self.renderer.device)
        settings = {name: value for name, value in self._config.env.items() if not name.startswith("_")}
        settings["cameras"] = {name: self._config.cameras[name] for name in self.cameras}
        settings["use_egl"] = self.renderer.name == "egl"
        with _quiet():
            self._sim = self._published(**settings)
        self._fresh = True


def _compose(checkout: Checkout, scene: str) -> Any:
    """The simulator's configuration, from its own conf/: what CALVIN's dataset was recorded with, less the VR."""
    from hydra import compose, initialize_config_dir

    overrides = [
        "cameras=static_and_gripper",
        f"scene=calvin_scene_{scene}",
        "robot=panda_longer_finger",
        "use_vr=false",
        "env.use_scene_info=true",
        "hydra/job_logging=none",  # the configured one needs hydra-colorlog
        "hydra/hydra_logging=none",
    ]
    # Hydra 1.1 has no version_base; later ones warn without. The composition is the same under all.
    known = inspect.signature(initialize_config_dir).parameters
    version: dict[str, Any] = {"version_base": None} if "version_base" in known else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # conf/ is written for Hydra 1.0, and Hydra says so
        with initialize_config_dir(config_dir=str(checkout.repository / "conf"), **version):
            config = compose("config_data_collection", overrides=overrides)
    config.robot.filename = str(checkout.repository / "data" / config.robot.filename)
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops what the physics engine prints from C++ as it starts, first draws and ends: arguments, driver names."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _observation(observation: Observation) -> Observation:
    """The published observation with frames in contiguous memory, as encoders want them."""
    for group in ("rgb_obs", "depth_obs"):
        observation[group] = {name: np.ascontiguousarray(frame) for name, frame in observation[group].items()}
    return observation


def _vector(value: np.ndarray, length: int, name: str) -> np.ndarray:
    """`value` as float64 [length]: the published arithmetic is exact only in double precision."""
    vector: np.ndarray = np.asarray(value, dtype=np.float64)
    if vector.shape != (length,) or not np.isfinite(vector).all():
        raise ValueError(f"{name} has shape {vector.shape}; it must be {length} finite numbers")
    return vector
