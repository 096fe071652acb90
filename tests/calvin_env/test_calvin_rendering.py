"""EGL is tried where its abort does no harm, and what is used instead is said once."""

from __future__ import annotations

import logging
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from robodual_client.calvin import rendering
from robodual_client.calvin.checkout import SimulatorError
from robodual_client.calvin.rendering import Renderer, device_of_gpu
from robodual_client.calvin.sequences import published


def _python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Lets child processes run `body` in a shell in place of Python."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.delenv("EGL_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def _either(devices: str, draw: str) -> str:
    return f'if [ "$3" = devices ]; then {devices}; else {draw}; fi'


def test_the_cpu_renderer_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _python(monkeypatch, tmp_path, "kill -ABRT $$")
    assert rendering.choose("cpu") == Renderer("cpu")


def test_a_driver_that_aborts_leaves_the_cpu_and_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _python(monkeypatch, tmp_path, "kill -ABRT $$")
    with caplog.at_level(logging.WARNING):
        assert rendering.choose("auto") == Renderer("cpu")
    (record,) = caplog.records
    assert "SIGABRT" in record.getMessage()
    assert "80 ms a step on the CPU" in record.getMessage()
    with pytest.raises(SimulatorError, match=r"--render egl: EGL does not work here .* use --render cpu"):
        rendering.choose("egl")


def test_the_reason_that_the_child_gives_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _python(monkeypatch, tmp_path, "echo 'no EGL library: libEGL.so.1' >&2; exit 1")
    with pytest.raises(SimulatorError, match=r"no EGL library: libEGL\.so\.1"):
        rendering.choose("egl")


def test_the_gpu_that_cuda_sees_is_drawn_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw = 'echo "GL_RENDERER=GPU $EGL_VISIBLE_DEVICES"'
    _python(monkeypatch, tmp_path, _either('echo chatter; echo "[1, 0, 2, null]"', draw))
    assert rendering.choose() == Renderer("egl", 1, "GPU 1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert rendering.choose() == Renderer("egl", 2, "GPU 2")
    monkeypatch.setenv("EGL_VISIBLE_DEVICES", "3")
    assert rendering.choose() == Renderer("egl", 3, "GPU 3")


@pytest.mark.parametrize("render", ["auto", "egl"])
@pytest.mark.parametrize("device", ["GPU-5f3c", "0,1", "-1", ""])
def test_an_egl_device_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, render: str, device: str) -> None:
    monkeypatch.setenv("EGL_VISIBLE_DEVICES", device)
    with pytest.raises(SimulatorError, match=f"EGL_VISIBLE_DEVICES must be the number .*, got '{device}'"):
        rendering.choose(render)


def test_a_gpu_that_cannot_draw_gives_way_to_the_drivers_choice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    draw = '[ -z "$EGL_VISIBLE_DEVICES" ] && echo GL_RENDERER=Other'
    _python(monkeypatch, tmp_path, _either('echo "[0]"', draw))
    assert rendering.choose() == Renderer("egl", None, "Other")


def test_software_egl_is_used_only_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _python(monkeypatch, tmp_path, _either('echo "[null]"', "echo GL_RENDERER=llvmpipe"))
    assert rendering.choose("auto").name == "cpu"
    assert "EGL has no GPU here, only llvmpipe" in caplog.text
    assert rendering.choose("egl") == Renderer("egl", None, "llvmpipe")


@pytest.mark.parametrize(
    ("visible", "device"),
    [(None, 1), ("1", 0), ("2,1", 2), ("7", None), ("", None), ("-1", None), ("GPU-8a1c", None)],
)
def test_device_of_the_first_visible_gpu(visible: str | None, device: int | None) -> None:
    assert device_of_gpu([1, 0, 2, None], visible) == device


def test_an_unknown_renderer_is_refused() -> None:
    with pytest.raises(SimulatorError, match="--render is 'gpu'; it should be one of auto, egl, cpu"):
        rendering.choose("gpu")


def test_egl_moves_the_same_and_draws_the_same_scene(calvin_root: Path) -> None:
    from robodual_client.calvin.environment import CalvinEnvironment

    try:
        egl = rendering.choose("egl")
    except SimulatorError as error:
        pytest.skip(f"no EGL: {error}")
    ends = []
    for renderer in (egl, Renderer("cpu")):
        simulator = CalvinEnvironment(calvin_root, render=renderer)
        for _ in range(2):
            simulator.reset(*published()[1].observations())
            ends.append(simulator.step(np.array([1.0, 0, -1, 0, 0, 0, -1]))[0])
        simulator.close()
    for end in ends:
        np.testing.assert_array_equal(end["robot_obs"], ends[0]["robot_obs"])
    depth = [end["depth_obs"]["depth_static"] for end in ends]
    assert np.median(np.abs(depth[0] - depth[2])) < 0.02
    np.testing.assert_array_equal(ends[0]["rgb_obs"]["rgb_static"], ends[1]["rgb_obs"]["rgb_static"])
