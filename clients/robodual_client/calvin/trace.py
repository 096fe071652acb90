"""Recorded runs of the published simulator, replayed and compared bit for bit.

`python -m robodual_client.calvin.trace FILE...` replays recordings in the checkout that CALVIN_ROOT names, and prints
one JSON line each: the first difference of every recorded quantity, or null.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Mapping, Protocol

import numpy as np

from robodual_client.calvin.sequences import published

SHIPPED = Path(__file__).with_name("trace_sequence0.npz")
STATES = ("robot_obs", "scene_obs")
FRAMES = ("rgb_static_mean", "first_rgb_static", "first_depth_static")
EVERY = 4  # rows and columns of a recorded frame


class Simulator(Protocol):
    def reset(self, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None) -> dict[str, Any]: ...
    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, dict[str, Any]]: ...


@dataclass(frozen=True)
class Difference:
    """Where a replay first leaves its recording (`index`: step, then column; or pixel), and by how much at most."""

    index: tuple[int, ...]
    recorded: float
    replayed: float
    largest: float


def load(file: Path) -> dict[str, np.ndarray]:
    """A recording: sequence [], actions [T, 7], robot_obs [T + 1, 15], scene_obs [T + 1, 24], and FRAMES or none.

    Raises ValueError if the file is no recording.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            trace = dict(stored)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a recorded trace: {error}") from None
    missing = [name for name in ("sequence", "actions", *STATES) if name not in trace]
    if missing:
        raise ValueError(f"{file} is not a recorded trace: it has no {', '.join(missing)}")
    return trace


def replay(simulator: Simulator, trace: Mapping[str, np.ndarray]) -> dict[str, Difference | None]:
    """Repeats the recording from its sequence's initial state. One entry for each recorded quantity: None is exact."""
    observations = [simulator.reset(*published()[int(trace["sequence"])].observations())]
    observations += [simulator.step(action)[0] for action in trace["actions"]]
    got = {name: np.array([observation[name] for observation in observations]) for name in STATES}
    frames = [observation["rgb_obs"].get("rgb_static") for observation in observations]
    if all(frame is not None for frame in frames):
        got["rgb_static_mean"] = np.array([frame.mean() for frame in frames])
        got["first_rgb_static"] = frames[0][::EVERY, ::EVERY]
        got["first_depth_static"] = observations[0]["depth_obs"]["depth_static"][::EVERY, ::EVERY]
    return {name: difference(trace[name], value) for name, value in got.items() if name in trace}


def difference(recorded: np.ndarray, replayed: np.ndarray) -> Difference | None:
    """The first place where two arrays of one shape differ; None if they are equal bit for bit."""
    if recorded.shape != replayed.shape:
        raise ValueError(f"the recording has shape {recorded.shape}, the replay {replayed.shape}")
    unequal = np.argwhere(recorded != replayed)
    if len(unequal) == 0:
        return None
    first = tuple(int(index) for index in unequal[0])
    largest = np.abs(recorded.astype(float) - replayed.astype(float)).max()
    return Difference(first, float(recorded[first]), float(replayed[first]), float(largest))


def main(files: list[str]) -> None:
    from robodual_client.calvin.environment import CalvinEnvironment

    simulator = CalvinEnvironment(render="cpu")  # what the recordings were drawn with
    for file in files:
        differences = replay(simulator, load(Path(file)))
        print(json.dumps({name: found and asdict(found) for name, found in differences.items()}))
    simulator.close()


if __name__ == "__main__":
    main(sys.argv[1:])
