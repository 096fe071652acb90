"""Which renderer draws the cameras: a GPU through EGL where that works, pybullet's software renderer otherwise.

A driver that cannot do EGL often aborts the process instead of reporting an error. So EGL is tried in a child process:
`python -m robodual_client.calvin.rendering devices` lists the EGL devices, and `... draw` draws one image.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Mapping

from robodual_client.calvin.checkout import SimulatorError

CHOICES = ("auto", "egl", "cpu")

log = logging.getLogger(__name__)

_TIMEOUT_S = 60
_SOFTWARE = re.compile("llvmpipe|softpipe|swrast|swiftshader", re.IGNORECASE)
_CPU_COST = "about 80 ms a step on the CPU, without the shadows and smooth textures of the images in CALVIN's dataset"
# EGL/eglext.h: the CUDA device that an EGL device is.
_EGL_CUDA_DEVICE_NV = 0x323A
_MAX_DEVICES = 32


@dataclass(frozen=True)
class Renderer:
    """`name` is "egl" or "cpu"; `device` the EGL device's index (None: the driver's first that works)."""

    name: str
    device: int | None = None
    description: str = "pybullet's software renderer"

    @property
    def sentence(self) -> str:
        """What draws, and what that costs."""
        return f"rendering with {self.description}" if self.name == "egl" else f"rendering takes {_CPU_COST}"


def choose(render: str = "auto") -> Renderer:
    """The renderer for `render`: "egl", "cpu", or "auto", which is EGL on a GPU, else the CPU with a warning.

    EGL in software (Mesa's llvmpipe) counts only when asked for by name: it draws OpenGL's image, but slower than
    pybullet's own renderer. Raises SimulatorError if EGL is asked for and does not work, or EGL_VISIBLE_DEVICES is no
    number.
    """
    if render not in CHOICES:
        raise SimulatorError(f"--render is {render!r}; it should be one of {', '.join(CHOICES)}")
    if render == "cpu":
        return Renderer("cpu")
    device = os.environ.get("EGL_VISIBLE_DEVICES", "0")
    if not device.isdecimal():
        raise SimulatorError(f"EGL_VISIBLE_DEVICES must be the number of one EGL device, as 0, got {device!r}")
    try:
        renderer = _egl()
    except SimulatorError as error:
        if render == "egl":
            raise SimulatorError(f"--render egl: {error}; use --render cpu ({_CPU_COST})") from None
        log.warning("%s: rendering takes %s", error, _CPU_COST)
        return Renderer("cpu")
    if render == "auto" and _SOFTWARE.search(renderer.description):
        log.warning(
            "EGL has no GPU here, only %s: rendering takes %s (--render egl draws the dataset's way, more slowly)",
            renderer.description,
            _CPU_COST,
        )
        return Renderer("cpu")
    return renderer


def device_of_gpu(cuda_devices: list[int | None], visible: str | None) -> int | None:
    """Index of the EGL device that is the first GPU of CUDA_VISIBLE_DEVICES (`visible`; None: all are).

    `cuda_devices` has the CUDA ordinal of each EGL device, or None for one that is no CUDA device. None is returned
    where there is no such device, or `visible` is empty or names it by UUID.
    """
    first = "0" if visible is None else visible.split(",")[0].strip()
    return cuda_devices.index(int(first)) if first.isdigit() and int(first) in cuda_devices else None


def _egl() -> Renderer:
    """EGL on the GPU that CUDA would use. Raises SimulatorError with the reason if nothing can be drawn."""
    environment = dict(os.environ)
    visible = environment.pop("CUDA_VISIBLE_DEVICES", None)  # so that the driver numbers all its devices
    if "EGL_VISIBLE_DEVICES" in environment:
        devices: list[int | None] = [int(environment.pop("EGL_VISIBLE_DEVICES"))]
    else:
        answer = json.loads(_child("devices", environment).strip().split("\n")[-1])
        device = device_of_gpu(answer, visible)
        devices = [None] if device is None else [device, None]
    for device in devices:
        chosen = {} if device is None else {"EGL_VISIBLE_DEVICES": str(device)}
        try:
            output = _child("draw", {**environment, **chosen})
        except SimulatorError:
            if device is devices[-1]:
                raise
            continue
        name = re.search(r"^GL_RENDERER=(.+)$", output, re.MULTILINE)
        return Renderer("egl", device, name.group(1) if name else "unnamed OpenGL renderer")
    raise AssertionError("unreachable: the last device returns or raises")


def _child(task: str, environment: Mapping[str, str]) -> str:
    """What this module prints when it runs `task` in a process of its own. Raises SimulatorError if that fails."""
    command = [sys.executable, "-m", "robodual_client.calvin.rendering", task]
    try:
        child = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, env=dict(environment))
    except subprocess.TimeoutExpired:
        raise SimulatorError(f"EGL does not work here (the driver did not answer within {_TIMEOUT_S} s)") from None
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise SimulatorError(f"EGL does not work here (the driver ended the process with {name})")
    if child.returncode != 0:
        lines = child.stderr.decode(errors="replace").strip().split("\n")
        raise SimulatorError(f"EGL does not work here ({lines[-1] or 'no reason given'})")
    return child.stdout.decode(errors="replace")


def _cuda_devices() -> list[int | None]:
    """For each EGL device, its CUDA ordinal (EGL_NV_device_cuda), or None."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError as error:
        sys.exit(f"no EGL library: {error}")
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    functions: dict[str, int] = {}
    for name in ("eglQueryDevicesEXT", "eglQueryDeviceAttribEXT"):
        address = egl.eglGetProcAddress(name.encode())
        if not address:
            sys.exit(f"the EGL library has no {name}")
        functions[name] = address
    handle, integer = ctypes.c_void_p, ctypes.c_int32
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, integer, ctypes.POINTER(handle), ctypes.POINTER(integer))(
        functions["eglQueryDevicesEXT"]
    )
    query_attribute = ctypes.CFUNCTYPE(ctypes.c_uint, handle, integer, ctypes.POINTER(ctypes.c_ssize_t))(
        functions["eglQueryDeviceAttribEXT"]
    )
    devices, count, ordinal = (handle * _MAX_DEVICES)(), integer(), ctypes.c_ssize_t()
    if not query_devices(_MAX_DEVICES, devices, ctypes.byref(count)) or count.value == 0:
        sys.exit("EGL lists no device")
    return [
        int(ordinal.value) if query_attribute(devices[index], _EGL_CUDA_DEVICE_NV, ctypes.byref(ordinal)) else None
        for index in range(count.value)
    ]


def _draw() -> None:
    """Draws a red square that fills the image; exits with a line on stderr unless the image is red."""
    import pybullet

    plugin = importlib.util.find_spec("eglRenderer")
    if plugin is None or plugin.origin is None:
        sys.exit("this pybullet was built without its EGL renderer")
    client = pybullet.connect(pybullet.DIRECT, options="--width=32 --height=32")
    if pybullet.loadPlugin(plugin.origin, "_eglRendererPlugin", physicsClientId=client) < 0:
        sys.exit("pybullet's EGL plugin did not load")
    square = pybullet.createVisualShape(pybullet.GEOM_BOX, halfExtents=[1, 1, 1], rgbaColor=[1, 0, 0, 1])
    pybullet.createMultiBody(baseVisualShapeIndex=square)
    view = pybullet.computeViewMatrix([0, 0, 2], [0, 0, 0], [0, 1, 0])
    projection = pybullet.computeProjectionMatrixFOV(45, 1, 0.1, 10)
    pixels = pybullet.getCameraImage(32, 32, view, projection, physicsClientId=client)[2]
    red, green, blue = (int(value) for value in pixels[16][16][:3])
    pybullet.disconnect(client)
    if red < 100 or green > 50 or blue > 50:
        sys.exit(f"it drew ({red}, {green}, {blue}) where red was due")


if __name__ == "__main__":
    if sys.argv[1] == "devices":
        print(json.dumps(_cuda_devices()))
    else:
        _draw()
