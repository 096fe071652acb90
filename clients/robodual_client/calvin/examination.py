"""Whether an observation is what the models were trained on: colours, orientation, depth, proprioception, ranges.

`stage()` is a state with three blocks, a green light and the arm in known places. What the published cameras see there
is known pixel by pixel, so that swapped channels, a flipped frame or a depth in other units can be told by name. Any
environment of CALVIN's kind can be examined: the published simulator, the playtable, a wrapper around either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from robodual_client.calvin.sequences import published
from robodual_client.errors import InvalidObservation
from robodual_client.observation import encode

SENSORS = ("rgb_static", "rgb_gripper", "depth_static", "depth_gripper", "proprio")


@dataclass(frozen=True)
class Finding:
    """What was looked at, "ok", "note" or "fault", what was found and, if it is not well, what to do."""

    subject: str
    state: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class _Spot:
    """The middle of a thing on the stage as a camera sees it: column and row, which channels are lit, metres away."""

    column: int
    row: int
    lit: tuple[bool, bool, bool]
    depth: float


_RED, _GREEN, _BLUE, _PINK = (True, False, False), (False, True, False), (False, False, True), (True, False, True)
_SPOTS = {
    "static": (
        _Spot(94, 103, _RED, 4.037),
        _Spot(131, 105, _BLUE, 3.913),
        _Spot(157, 92, _PINK, 3.897),
        _Spot(76, 11, _GREEN, 4.211),
    ),
    "gripper": (_Spot(44, 16, _RED, 0.279), _Spot(75, 16, _BLUE, 0.290)),
}
_SIDES = {"static": 200, "gripper": 84}
_TOLERANCE = {"static": 0.05, "gripper": 0.01}  # metres: less than between the things on the stage and their grounds
_LIT, _DARK = 0.35, 0.25  # of full brightness
# What the published code subtracts from static depth: it means to normalise 3.5 to 6.2 m, and does not divide.
_OFFSET = 3.5 / (6.2 - 3.5)
# Mean of the static frame's channels on the stage: OpenGL, which drew CALVIN's dataset, and pybullet's CPU renderer.
_OPENGL, _CPU = np.array([168.6, 147.6, 128.1]), np.array([145.9, 128.7, 112.9])
# Quarter turns, then a mirroring left to right; what the whole amounts to.
_ORIENTATIONS = {
    (0, False): "upright",
    (2, True): "upside down (mirrored top to bottom)",
    (0, True): "mirrored left to right",
    (2, False): "rotated by 180 degrees",
    (1, False): "rotated by 90 degrees",
    (3, False): "rotated by 270 degrees",
    (1, True): "transposed",
    (3, True): "transposed and rotated by 180 degrees",
}
_BASE = np.array([-0.34, -0.46, 0.24])  # where the arm stands in the world


def stage() -> tuple[np.ndarray, np.ndarray]:
    """(robot_obs [15], scene_obs [24]) to reset to before `examine`: lights on, blocks in a row on the desk."""
    scene_obs = np.zeros(24)
    scene_obs[3:6] = 0.088, 1, 1  # switch, bulb, LED
    for block, place in zip(scene_obs[6:].reshape(3, 6), ((0.05, -0.12), (0.23, -0.12), (0.30, -0.05))):
        block[:] = *place, 0.46, 0, 0, math.pi / 2
    return published()[0].observations()[0], scene_obs


def examine(observation: Mapping[str, Any]) -> list[Finding]:
    """What is right and wrong with the observation that a reset to `stage()` gave."""
    findings = []
    for camera in ("static", "gripper"):
        for group, judge in (("rgb", _colours), ("depth", _depth)):
            frame = observation.get(f"{group}_obs", {}).get(f"{group}_{camera}")
            subject = f"{group}_{camera}"
            if frame is None:
                findings.append(Finding(subject, "note", "absent", f'add the camera "{camera}" if the model reads it'))
            else:
                findings.append(judge(subject, np.asarray(frame), camera))
    findings.append(_proprioception(np.asarray(observation["robot_obs"])))
    findings.append(_model_inputs(observation))
    return findings


def examine_actions(actions: np.ndarray) -> Finding:
    """Whether the actions [T, 7] that a policy gave are of the kind that it was trained on: relative, in [-1, 1]."""
    arm, gripper = actions[:, :6], actions[:, 6]
    found = f"{len(actions)} steps, arm {arm.min():.2f} to {arm.max():.2f}, spread {arm.std():.2f}"
    if not np.isfinite(actions).all():
        return Finding(
            "actions", "fault", "not finite", "the checkpoint is broken, or its dtype overflows: try float32"
        )
    if np.abs(arm).max() > 1:
        return Finding("actions", "fault", found, "relative actions lie in [-1, 1]: are these absolute, or in metres?")
    if not np.isin(gripper, (-1, 1)).all():
        return Finding("actions", "fault", f"gripper {np.unique(gripper)[:4]}", "the gripper must be -1 or 1")
    if len(actions) > 1 and arm.std(axis=0).max() < 1e-4:
        return Finding("actions", "fault", f"{found}: every step is the same", "is the trained checkpoint loaded?")
    if (np.abs(arm) > 0.95).mean() > 0.5:
        return Finding("actions", "fault", f"{found}: most are at the limit", "is the trained checkpoint loaded?")
    return Finding("actions", "ok", found)


def _colours(subject: str, frame: np.ndarray, camera: str) -> Finding:
    if frame.ndim != 3 or frame.shape[2] != 3:
        return Finding(subject, "fault", f"shape {frame.shape}", "it must be [height, width, 3], channels last")
    if frame.dtype != np.uint8:
        return Finding(
            subject, "fault", f"{frame.dtype}, {frame.min():g} to {frame.max():g}", "it must be uint8, 0-255"
        )
    for (turns, mirrored), orientation in _ORIENTATIONS.items():
        for order, channels in (("RGB", [0, 1, 2]), ("BGR", [2, 1, 0])):
            turned = _turn(frame, turns, mirrored)[..., channels]
            if all(_lit(turned, spot, _SIDES[camera]) == spot.lit for spot in _SPOTS[camera]):
                return _arranged(subject, frame, camera, orientation, order)
    remedy = (
        f"the {camera} camera's pose or field of view is not conf/cameras/cameras/{camera}.yaml, or frames are stale"
    )
    return Finding(subject, "fault", "the blocks' colours are not where the published camera sees them", remedy)


def _arranged(subject: str, frame: np.ndarray, camera: str, orientation: str, order: str) -> Finding:
    size = "x".join(str(side) for side in frame.shape[:2])
    found = f"{size} {order}, {orientation}"
    if orientation != "upright":
        return Finding(subject, "fault", found, f"{subject} must be upright: undo the turn where the frame is read")
    if order == "BGR":
        return Finding(
            subject, "fault", found, f"swap the channels: {subject}[..., ::-1] (OpenCV reads and writes BGR)"
        )
    if frame.shape[:2] != (_SIDES[camera],) * 2:
        return Finding(subject, "note", found, f"the published frame has {_SIDES[camera]} pixels a side: do not resize")
    return Finding(subject, "ok", found)


def _depth(subject: str, depth: np.ndarray, camera: str) -> Finding:
    if depth.ndim != 2:
        return Finding(subject, "fault", f"shape {depth.shape}", "it must be [height, width]")
    far = 10.0 if camera == "static" else 2.0
    units: dict[str, tuple[Callable[[float], float], str]] = {
        "metres": (lambda value: value, ""),
        "millimetres": (lambda value: value / 1000, "divide by 1000"),
        "centimetres": (lambda value: value / 100, "divide by 100"),
        "raw depth buffer": (
            lambda value: far * 0.01 / (far - (far - 0.01) * value) if 0 <= value <= 1 else math.nan,
            f"convert it: {far:g} * 0.01 / ({far:g} - ({far:g} - 0.01) * value)",
        ),
        "normalised": (lambda value: value * 2.7 + 3.5, "send metres: the specialist itself subtracts 3.5 / 2.7"),
        "metres less 3.5 / 2.7": (lambda value: value + _OFFSET, "send metres: the specialist itself subtracts it"),
    }
    for (turns, mirrored), orientation in _ORIENTATIONS.items():
        turned = _turn(depth, turns, mirrored)
        values = [float(np.median(_patch(turned, spot, _SIDES[camera]))) for spot in _SPOTS[camera]]
        for unit, (convert, remedy) in units.items():
            errors = [abs(convert(value) - spot.depth) for value, spot in zip(values, _SPOTS[camera])]
            if all(error < _TOLERANCE[camera] for error in errors):
                found = f"{unit}, {depth.min():.3g} to {depth.max():.3g}, {orientation}"
                if orientation != "upright":
                    remedy = "undo the turn where the frame is read"
                return Finding(subject, "fault" if remedy else "ok", found, remedy)
    found = (
        f"{depth.min():.3g} to {depth.max():.3g}; {values[0]:.3g} at the red block, {_SPOTS[camera][0].depth} m away"
    )
    return Finding(subject, "fault", found, f"{subject} must be the distance in metres along the camera's axis")


def _proprioception(robot_obs: np.ndarray) -> Finding:
    if robot_obs.shape != (15,):
        return Finding("robot_obs", "fault", f"shape {robot_obs.shape}", "15 numbers: a quaternion instead of angles?")
    due = stage()[0]
    position, angles, command = robot_obs[:3], robot_obs[3:6], robot_obs[14]
    found = f"tool at {np.round(position, 3).tolist()} m, {np.round(angles, 2).tolist()} rad, gripper {command:g}"
    if _near(position, due[:3] - _BASE, 0.005):
        return Finding(
            "robot_obs", "fault", found, "the tool is given in the arm's frame: add the base, -0.34 -0.46 0.24"
        )
    if not _near(position, due[:3], 0.005):
        return Finding(
            "robot_obs", "fault", found, f"the tool is at {np.round(due[:3], 3).tolist()} here: another link?"
        )
    if _near(np.radians(angles), due[3:6], 0.02):
        return Finding("robot_obs", "fault", found, "the angles are in degrees: convert them to radians")
    turned = (angles - due[3:6] + math.pi) % (2 * math.pi) - math.pi
    if not _near(turned, np.zeros(3), 0.02):
        remedy = (
            f"{np.round(due[3:6], 2).tolist()} is due: Euler angles about the fixed axes x, y, z, of the tool's link"
        )
        return Finding("robot_obs", "fault", found, remedy)
    if not _near(robot_obs[6:7], due[6:7], 0.005):
        remedy = "an open gripper is 0.08 m wide: the sum over both fingers"
        return Finding("robot_obs", "fault", f"gripper width {robot_obs[6]:g}", remedy)
    if command != 1:
        return Finding(
            "robot_obs", "fault", found, "robot_obs[14] is the last gripper command, -1 or 1; 1 after a reset"
        )
    return Finding("robot_obs", "ok", found)


def _model_inputs(observation: Mapping[str, Any]) -> Finding:
    """What the networks get to see of the observation, against what they were trained on.

    Static depth goes in as metres less 3.5 / 2.7, proprioception as it is; colours as they were drawn.
    """
    present = {**observation.get("rgb_obs", {}), **observation.get("depth_obs", {}), "proprio": None}
    sensors = [sensor for sensor in SENSORS if sensor in present]
    try:
        encode(observation, sensors)
    except InvalidObservation as error:
        return Finding("model inputs", "fault", str(error), "the client refuses this observation")
    parts = []
    if "depth_static" in present:
        depth = np.asarray(present["depth_static"]) - _OFFSET
        parts.append(f"depth_static {depth.min():.2f} to {depth.max():.2f}")
        if depth.min() < 1.9 or depth.max() > 5.4:
            remedy = "metres less 3.5 / 2.7 were about 2.2 to 4.9 in training"
            return Finding("model inputs", "fault", parts[0], remedy)
    mean = np.asarray(present["rgb_static"]).reshape(-1, 3).mean(axis=0)
    parts.append(f"rgb_static mean {np.round(mean).astype(int).tolist()}")
    found = ", ".join(parts)
    if _near(mean, _OPENGL, 8.0):
        return Finding("model inputs", "ok", f"{found}, drawn as the dataset was")
    if _near(mean, _CPU, 8.0):
        remedy = "policies were trained on OpenGL's frames (lighter, shadows, smooth textures): --render egl on a GPU"
        return Finding("model inputs", "note", f"{found}, drawn by the CPU renderer", remedy)
    remedy = (
        f"on this scene OpenGL gives {_OPENGL.astype(int).tolist()}, the CPU {_CPU.astype(int).tolist()}: other light"
    )
    return Finding("model inputs", "note", found, remedy)


def _turn(frame: np.ndarray, turns: int, mirrored: bool) -> np.ndarray:
    turned = np.rot90(frame, turns)
    return np.fliplr(turned) if mirrored else turned


def _patch(frame: np.ndarray, spot: _Spot, side: int) -> np.ndarray:
    """The three by three pixels around a spot that is given for a frame of `side` pixels."""
    row, column = (spot.row * frame.shape[0]) // side, (spot.column * frame.shape[1]) // side
    patch: np.ndarray = frame[row - 1 : row + 2, column - 1 : column + 2]
    return patch


def _lit(frame: np.ndarray, spot: _Spot, side: int) -> tuple[bool | None, ...]:
    """For each channel at the spot whether it is lit; None for one in between."""
    levels = _patch(frame, spot, side).reshape(-1, 3).mean(axis=0) / 255
    return tuple(True if level > _LIT else False if level < _DARK else None for level in levels)


def _near(values: Sequence[float] | np.ndarray, due: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(np.asarray(values) - due).max() < tolerance)
