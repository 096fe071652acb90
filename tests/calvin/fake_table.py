"""A play table without physics: CALVIN's info structure, and an action that makes a task happen at once."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from robodual_client.calvin.annotations import load
from robodual_client.calvin.tasks import TASKS

ROBOT, TABLE = 0, 5
LINKS = {"base_link": -1, "plank_link": 3, "drawer_link": 4}
BLOCKS = {"red_block": "block_red", "blue_block": "block_blue", "pink_block": "block_pink"}
UIDS = {"block_red": 2, "block_blue": 3, "block_pink": 4}
NAMES = list(TASKS)

Contact = tuple  # (other body, its link)


class FakeTable:
    """action[0] = 1 + a task's index does that task; anything else does nothing. On a `wild` table any other action
    does four tasks; which ones depends on action[1] and action[2]."""

    def __init__(self, broken: bool = False, wild: bool = False, cameras: int = 2) -> None:
        if broken:
            raise RuntimeError("the fake simulator was told\nnot to start")
        self.wild, self.cameras = wild, cameras
        self.facts = {"render": "none"}

    def reset(self, robot_obs: Any = None, scene_obs: Any = None) -> dict[str, Any]:
        self.scene = np.array(scene_obs)
        self.robot = np.array(robot_obs)
        self.doors = {"base__slide": float(scene_obs[0]), "base__drawer": float(scene_obs[1])}
        self.lights = {"lightbulb": int(scene_obs[4]), "led": int(scene_obs[5])}
        self.position, self.yaw, self.contacts = {}, {}, {}
        self.held: str | None = None
        for index, block in enumerate(UIDS):
            pose = scene_obs[6 + 6 * index : 12 + 6 * index]
            self.position[block], self.yaw[block] = np.array(pose[:3]), float(pose[5])
            self.contacts[block] = {(TABLE, LINKS["plank_link" if pose[1] > 0 else "base_link"])}
        return self.get_obs()

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
        if 1 <= action[0] <= len(NAMES):
            self.do(NAMES[int(action[0]) - 1])
        elif self.wild:
            chosen = int(abs(action[1] + action[2]) * 1e4)
            for task in (chosen, chosen // 7, chosen // 3, chosen // 5):
                self.do(NAMES[task % len(NAMES)])
        return self.get_obs(), 0.0, False, self.get_info()

    def do(self, task: str) -> None:
        verb, *rest = task.split("_")
        block = BLOCKS.get("_".join(rest[:2]), "")
        on_table = [name for name in UIDS if self.contacts[name] == {(TABLE, LINKS["base_link"])}]
        if verb == "turn":
            self.lights[rest[-1]] = int(rest[0] == "on")
        elif verb == "move":
            self.doors["base__slide"] += 0.2 if rest[-1] == "left" else -0.2
        elif verb in ("open", "close"):
            self.doors["base__drawer"] += 0.2 if verb == "open" else -0.2
        elif task == "push_into_drawer" and on_table:
            self.contacts[on_table[0]] = {(TABLE, LINKS["drawer_link"])}
        elif verb == "push" and block:
            self.position[block][0] += 0.2 if rest[-1] == "right" else -0.2
        elif verb == "rotate":
            self.yaw[block] += np.pi / 2 if rest[-1] == "left" else -np.pi / 2
        elif verb == "lift":
            self.held = block
            self.position[block][2] += 0.1
            self.contacts[block] = {(ROBOT, 9)}
        elif verb == "place" and self.held:
            link = "plank_link" if rest[-1] == "slider" else "drawer_link"
            self.contacts[self.held], self.held = {(TABLE, LINKS[link])}, None
        elif verb == "stack" and self.held and on_table:
            below = on_table[0]
            self.contacts[self.held] = {(UIDS[below], -1)}
            self.contacts[below] = {(UIDS[self.held], -1), (TABLE, LINKS["base_link"])}
            self.held = None
        elif verb == "unstack":
            self.contacts = {name: {(TABLE, LINKS["base_link"])} for name in UIDS}

    def get_obs(self) -> dict[str, Any]:
        static = np.full((200, 200, 3), 90, np.uint8)
        static[:, : int(200 * min(1, max(0, self.doors["base__slide"] * 2))), 2] = 220
        gripper = np.full((84, 84, 3), 160, np.uint8)
        static_depth, gripper_depth = np.full((200, 200), 4.0, np.float32), np.full((84, 84), 0.5, np.float32)
        return {
            "rgb_obs": dict([("rgb_static", static), ("rgb_gripper", gripper)][: self.cameras]),
            "depth_obs": dict([("depth_static", static_depth), ("depth_gripper", gripper_depth)][: self.cameras]),
            "robot_obs": self.robot,
            "scene_obs": self.scene,
        }

    def get_info(self) -> dict[str, Any]:
        robot_contacts = {(UIDS[self.held], -1)} if self.held else set()
        return {
            "robot_info": {"uid": ROBOT, "contacts": _tuples(robot_contacts)},
            "scene_info": {
                "fixed_objects": {"table": {"uid": TABLE, "links": LINKS}},
                "movable_objects": {
                    block: {
                        "uid": uid,
                        "current_pos": tuple(self.position[block]),
                        "current_orn": (0.0, 0.0, np.sin(self.yaw[block] / 2), np.cos(self.yaw[block] / 2)),
                        "current_lin_vel": (0.0, 0.0, 0.0),
                        "current_ang_vel": (0.0, 0.0, 0.0),
                        "contacts": _tuples(self.contacts[block]),
                    }
                    for block, uid in UIDS.items()
                },
                "doors": {name: {"current_state": state} for name, state in self.doors.items()},
                "lights": {name: {"logical_state": state} for name, state in self.lights.items()},
            },
        }

    def close(self) -> None:
        pass


class Hanging(FakeTable):
    """Hangs for ever, the first time for each `mark`, in its "start", "reset" or second "step"; there it holds Python's
    lock and hears no SIGTERM. Every step takes `slow` seconds."""

    def __init__(self, where: str = "", mark: str = "", slow: float = 0.0) -> None:
        super().__init__()
        self.where, self.mark, self.slow, self.steps = where, Path(mark), slow, 0
        self.hang("start")

    def reset(self, robot_obs: Any = None, scene_obs: Any = None) -> dict[str, Any]:
        self.hang("reset")
        return super().reset(robot_obs, scene_obs)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
        self.steps += 1
        if self.steps == 2:
            self.hang("step")
        time.sleep(self.slow)
        return super().step(action)

    def hang(self, where: str) -> None:
        if where != self.where or self.mark.exists():
            return
        if where == "step":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.mark.touch()
        while where == "step":
            ctypes.PyDLL(None).sleep(3600)
        time.sleep(3600)


def sized(size: tuple[int, int]) -> FakeTable:
    assert len(size) == 2
    return FakeTable()


def _tuples(contacts: set[Contact]) -> tuple[Contact, ...]:
    """As pybullet's: flag, body A, body B, link A, link B, ..."""
    return tuple((0, 99, body, 0, link) for body, link in sorted(contacts))


class Idle:
    """Looks, and holds still: not the policy `zero`, for which a simulator need not draw."""

    def __init__(self, env: Any, seed: int) -> None:
        pass

    def reset(self, instruction: str) -> None:
        pass

    def step(self, obs: dict[str, Any]) -> np.ndarray:
        assert obs["rgb_obs"]["rgb_static"].shape == (200, 200, 3)
        return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])


class Scripted:
    """Does the asked task at its third step with probability `skill`, decided by its seed alone.

    `trap`: a folder; the first policy of sequence `trapped` that finds no file in it leaves one and dies by SIGKILL
    (`how` = "die") or raises ("raise").
    """

    def __init__(
        self,
        env: FakeTable,
        seed: int,
        skill: float = 0.7,
        pause: float = 0.0,
        trap: str = "",
        trapped: int = 0,
        how: str = "die",
    ) -> None:
        self.random = np.random.default_rng(seed)
        self.skill, self.pause = skill, pause
        self.trap = Path(trap) / "sprung" if trap and seed % 65536 == trapped else None
        self.how = how
        self.tasks = {sentence: task for task, sentence in load().items()}

    def reset(self, instruction: str) -> None:
        self.task, self.steps = self.tasks[instruction], 0
        self.succeeds = self.random.uniform() < self.skill

    def step(self, obs: dict[str, Any]) -> np.ndarray:
        assert obs["rgb_obs"]["rgb_static"].shape == (200, 200, 3)
        time.sleep(self.pause)
        if self.trap is not None and (self.how == "always" or not self.trap.exists()):
            self.trap.touch()
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the scripted policy fell into its trap")
        self.steps += 1
        action = np.zeros(7)
        if self.steps == 3 and self.succeeds:
            action[0] = 1 + NAMES.index(self.task)
        return action
