"""CALVIN's observation dict, checked and serialised for the wire.

An observation is what CALVIN's `env.get_obs()` returns: `obs["rgb_obs"]` and `obs["depth_obs"]` by camera name, and
`obs["robot_obs"]` [15]: TCP position (metres) and Euler angles (radians), gripper width, seven arm joints, gripper
command.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Callable, Sequence

import numpy as np
import numpy.typing as npt

from robodual_client import wire
from robodual_client.errors import InvalidObservation, ServiceMismatch
from robodual_client.frame import Buffer, Frame, field, image_buffers, tensor_buffers
from robodual_client.tensors import IMAGE_SIDES

TACTILE_SHAPE = (160, 120, 6)
# No indoor camera sees further; millimetres and centimetres show as more.
FARTHEST = 100.0
# Arrays whose memory is sent as it stands; proprioception's never is, since seven of its values are picked.
_AS_THEY_ARE = (np.dtype("u1"), np.dtype("<f4"))
# No arm reaches further; millimetres show as more.
FARTHEST_TCP = 10.0
_PROPRIO_NUMBER = wire.Observation.PROPRIO_FIELD_NUMBER
_PROPRIO = struct.Struct("<7f")
_PROPRIO_HEAD = tensor_buffers(np.zeros(7, np.float32))[0]


class Encoder:
    """Serialises an episode's observations.

    Each sensor's first array is checked in full. Later ones that are laid out like it (type, shape, memory order) go as
    they are: what else may be wrong with a camera, its unit say, shows in the first, and values that are out of bounds
    are refused by the service as well.
    """

    def __init__(self, sensors: Sequence[str]) -> None:
        """`sensors` in the order of GetInfo. Raises ServiceMismatch for one that this client does not know."""
        self._wanted = _wanted(tuple(sensors))
        self._names = ", ".join(sensors)
        self._known: dict[int, tuple[tuple[int, ...], np.dtype[Any], list[Buffer]]] = {}

    def encode(self, obs: Mapping[str, Any]) -> Frame:
        """Reads rgb_static and the wanted sensors; others are ignored, whatever they hold.

        Raises:
            InvalidObservation: naming the key in `obs`, what was expected and what was got.
        """
        if not _is_mapping(obs):
            raise InvalidObservation(f"the observation must be CALVIN's dict, got {type(obs).__name__}")
        buffers: list[Buffer] = []
        for sensor in self._wanted:
            value = sensor.find(obs)
            known = self._known.get(sensor.number)
            if known is not None and type(value) is np.ndarray and value.flags.c_contiguous:
                shape, dtype, before = known
                if value.shape == shape and value.dtype == dtype:
                    buffers += before
                    buffers.append(value.data.cast("B"))
                    continue
            if value is None:
                self._check_complete(obs)
            serialised = sensor.buffers(value)
            if sensor.number != _PROPRIO_NUMBER and value.dtype in _AS_THEY_ARE:
                self._known[sensor.number] = value.shape, value.dtype, serialised[:-1]
            buffers += serialised
        return Frame(buffers)

    def _check_complete(self, obs: Mapping[str, Any]) -> None:
        missing = [sensor.spelled for sensor in self._wanted if sensor.find(obs) is None]
        raise InvalidObservation(
            f"the observation lacks {', '.join(missing)}: the model reads {self._names}; "
            "add the camera, or serve a checkpoint without it"
        )


def encode(obs: Mapping[str, Any], sensors: Sequence[str]) -> Frame:
    """One observation, checked in full; see `Encoder`."""
    return Encoder(sensors).encode(obs)


def _image(array: npt.NDArray[Any], name: str) -> list[Buffer]:
    if array.dtype != np.uint8:
        advice = "scale it by 255 and convert it" if array.dtype.kind == "f" else "convert it"
        raise InvalidObservation(f"{name}: must be uint8, got {array.dtype}: {advice}")
    if array.ndim != 3 or array.shape[2] != 3:
        advice = ""
        if array.ndim == 3 and array.shape[0] == 3:
            advice = ": transpose it, channels last"
        elif array.ndim == 3 and array.shape[2] == 4:
            advice = ": drop the alpha channel"
        raise InvalidObservation(f"{name}: must be RGB [height, width, 3], got {list(array.shape)}{advice}")
    if array.shape[0] not in IMAGE_SIDES or array.shape[1] not in IMAGE_SIDES:
        raise InvalidObservation(
            f"{name}: each side must be {IMAGE_SIDES.start} to {IMAGE_SIDES.stop - 1} pixels, "
            f"got {array.shape[0]} x {array.shape[1]}"
        )
    return image_buffers(array)


def _depth(array: npt.NDArray[Any], name: str) -> list[Buffer]:
    if array.dtype.kind != "f":
        advice = ": millimetres? divide by 1000 and convert it" if array.dtype.kind in "ui" else ""
        raise InvalidObservation(f"{name}: must be float32 metres, got {array.dtype}{advice}")
    if array.ndim != 2 or array.shape[0] not in IMAGE_SIDES or array.shape[1] not in IMAGE_SIDES:
        raise InvalidObservation(
            f"{name}: must be [height, width], {IMAGE_SIDES.start} to {IMAGE_SIDES.stop - 1} each, "
            f"got {list(array.shape)}"
        )
    metres = np.ascontiguousarray(array, np.float32)
    least, greatest = float(metres.min()), float(metres.max())  # NaN anywhere makes both NaN
    if math.isnan(least) or math.isinf(greatest):
        raise InvalidObservation(f"{name}: has values that are not finite; fill pixels without depth, with 0 say")
    if least < 0 or greatest > FARTHEST:
        raise InvalidObservation(
            f"{name}: must be metres from 0 to {FARTHEST:g}, got {least:g} to {greatest:g}: is it in millimetres?"
        )
    return tensor_buffers(metres)


def _tactile(array: npt.NDArray[Any], name: str) -> list[Buffer]:
    if array.dtype != np.uint8 or array.shape != TACTILE_SHAPE:
        raise InvalidObservation(
            f"{name}: must be uint8 {list(TACTILE_SHAPE)}, both fingers' RGB, got {array.dtype} {list(array.shape)}"
        )
    return tensor_buffers(array)


def _proprio(array: npt.NDArray[Any], name: str) -> list[Buffer]:
    if array.dtype.kind != "f" or array.shape != (15,):
        raise InvalidObservation(f"{name}: must be float [15], got {array.dtype} {list(array.shape)}")
    values = array.tolist()
    x, y, z, roll, pitch, yaw = values[:6]
    command = values[14]
    far, turn = FARTHEST_TCP, 2 * math.pi + 1e-3
    # NaN compares false.
    if not (
        (-far <= x <= far and -far <= y <= far and -far <= z <= far)
        and (-turn <= roll <= turn and -turn <= pitch <= turn and -turn <= yaw <= turn)
        and -1 <= command <= 1
    ):
        raise InvalidObservation(f"{name}{_wrong_proprio([*values[:6], command])}")
    return [_PROPRIO_HEAD, memoryview(_PROPRIO.pack(x, y, z, roll, pitch, yaw, command))]


def _wrong_proprio(proprio: list[float]) -> str:
    """What is wrong with it."""
    if not all(map(math.isfinite, proprio)):
        return f": has values that are not finite: {proprio}"
    if max(map(abs, proprio[:3])) > FARTHEST_TCP:
        return f"[:3]: must be metres within {FARTHEST_TCP:g} of the origin, got {proprio[:3]}"
    if abs(proprio[6]) > 1:
        return f"[14]: the gripper command must be -1 (closed) to 1 (open), got {proprio[6]:g}"
    return f"[3:6]: must be radians, within two pi, got {proprio[3:6]}: are they degrees?"


class _Sensor:
    """A field of wire.Observation: where its value stands in CALVIN's dict, how that is spelled, and what checks it."""

    def __init__(self, number: int, check: Callable[[npt.NDArray[Any], str], list[Buffer]], *path: str) -> None:
        self.number = number
        self.spelled = "obs" + "".join(f'["{key}"]' for key in path)
        self._check = check
        self._path = path

    def find(self, obs: Mapping[str, Any]) -> Any:
        """The value, or None."""
        value: Any = obs
        for key in self._path:
            value = value.get(key) if _is_mapping(value) else None
        return value

    def buffers(self, value: Any) -> list[Buffer]:
        """The value, checked and serialised as a field of wire.Observation; its memory is the last buffer."""
        return field(self.number, self._check(_array(value, self.spelled), self.spelled))


_SENSORS = {
    "rgb_static": _Sensor(wire.Observation.RGB_STATIC_FIELD_NUMBER, _image, "rgb_obs", "rgb_static"),
    "rgb_gripper": _Sensor(wire.Observation.RGB_GRIPPER_FIELD_NUMBER, _image, "rgb_obs", "rgb_gripper"),
    "depth_static": _Sensor(wire.Observation.DEPTH_STATIC_FIELD_NUMBER, _depth, "depth_obs", "depth_static"),
    "depth_gripper": _Sensor(wire.Observation.DEPTH_GRIPPER_FIELD_NUMBER, _depth, "depth_obs", "depth_gripper"),
    "rgb_tactile": _Sensor(wire.Observation.RGB_TACTILE_FIELD_NUMBER, _tactile, "rgb_obs", "rgb_tactile"),
    "proprio": _Sensor(_PROPRIO_NUMBER, _proprio, "robot_obs"),
}


def _is_mapping(value: object) -> bool:
    return type(value) is dict or isinstance(value, Mapping)  # abc's own look is the slow one


@lru_cache(maxsize=16)
def _wanted(sensors: tuple[str, ...]) -> list[_Sensor]:
    """rgb_static first, since the generalist always wants it. Raises ServiceMismatch."""
    unknown = [sensor for sensor in sensors if sensor not in _SENSORS]
    if unknown:
        raise ServiceMismatch(
            f"the model reads {', '.join(map(repr, unknown))}, which this client does not know: upgrade robodual-client"
        )
    return [_SENSORS[name] for name in dict.fromkeys(("rgb_static", *sensors))]


def _array(value: Any, name: str) -> npt.NDArray[Any]:
    if not isinstance(value, np.ndarray):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        advice = ": use .cpu().numpy()" if kind.startswith("torch.") else ""
        raise InvalidObservation(f"{name}: must be a NumPy array, got {kind}{advice}")
    return value
