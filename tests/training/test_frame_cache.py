"""A cache of decoded frames trains like the files that it was made of, and belongs to them alone."""

from __future__ import annotations

import copy
import multiprocessing
import pickle  # noqa: TID251 (workers are given objects by it)
import resource
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from calvin_data import write_split
from tiny import SOURCE, SPECIALIST, data, settings
from typer.testing import CliRunner

from robodual.specialist.config import SpecialistConfig
from robodual.specialist.frames import Preparation
from robodual.specialist.policy import Observation
from robodual.training.annotations import DatasetError
from robodual.training.data_cli import data as data_cli
from robodual.training.dataset import CalvinDataset
from robodual.training.frame_cache import FrameCache, build
from robodual.training.loop import Report
from robodual.training.recording import Recording
from robodual.training.runs import GeneralistOptions, train_generalist, train_specialist

SIZE = 32
CONFIG = replace(SpecialistConfig.toy(), image_size=SIZE, with_tactile=True, tactile_size=SIZE)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("frames") / "training", lengths=[24, 20])


@pytest.fixture(scope="module")
def cache(split: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "frames"
    counts: list[tuple[int, int]] = []
    every = ("rgb_static", "rgb_gripper", "depth_static", "depth_gripper", "rgb_tactile")
    build(split, folder, size=SIZE, sensors=every, progress=lambda done, of: counts.append((done, of)))
    assert counts == [(0, 50), (50, 50)]
    return folder


def test_a_model_of_the_caches_size_sees_what_it_would_see_without(split: Path, cache: Path) -> None:
    plain = CalvinDataset(split, sensors=CONFIG.sensors, seed=1)
    cached = CalvinDataset(split, sensors=CONFIG.sensors, seed=1, frames=cache)
    preparation = Preparation(CONFIG, "resize-naive", torch.device("cpu"), torch.float32)
    for index in range(0, len(plain), 3):
        one, other = plain[0, index], cached[0, index]
        assert np.array_equal(one.actions, other.actions)
        assert np.array_equal(one.frame.proprio, other.frame.proprio)
        seen = [preparation.observation(sample.frame, sample.previous) for sample in (one, other)]
        for field in fields(Observation):
            expected, found = (getattr(observation, field.name) for observation in seen)
            if not field.name.startswith("depth"):
                assert torch.equal(expected, found), field.name
        for name in ("static_depth", "gripper_depth"):
            maps = [getattr(preparation, name)([sample.frame]) for sample in (one, other)]
            assert (maps[0] - maps[1]).abs().max() < 1e-4, name


def test_training_from_a_cache_is_training_from_the_files(split: Path, tmp_path: Path) -> None:
    build(split, tmp_path / "native")
    losses = []
    for frames in (None, tmp_path / "native"):
        reports: list[Report] = []
        output = tmp_path / f"run-{len(losses)}"
        train_specialist(SOURCE, data(split, frames=frames), SPECIALIST, settings(output, 3), report=reports.append)
        losses.append([shown.loss for shown in reports])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # depth is kept to a tenth of a millimetre


def test_frames_of_another_size_or_strategy_train_nothing(split: Path, tmp_path: Path) -> None:
    build(split, tmp_path / "both", size=56)  # the tiny generalist's, and not the tiny specialist's
    build(split, tmp_path / "boxed", size=56, strategy="letterbox")
    values = settings(tmp_path / "run", 1)
    with pytest.raises(
        DatasetError, match=r"holds frames of 56 pixels \(resize-naive\), expected the models' 32 and 56"
    ):
        train_specialist(SOURCE, data(split, frames=tmp_path / "both"), SPECIALIST, values)
    with pytest.raises(DatasetError, match=r"56 pixels \(letterbox\), expected the models' 56 \(resize-naive\); run"):
        train_generalist(SOURCE, data(split, frames=tmp_path / "boxed"), GeneralistOptions(), values)
    train_generalist(SOURCE, data(split, frames=tmp_path / "both"), GeneralistOptions(), values)


def test_an_interrupted_cache_is_refused_and_goes_on(split: Path, tmp_path: Path) -> None:
    def interrupt(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(split, tmp_path / "frames", size=SIZE, progress=interrupt)
    with pytest.raises(DatasetError, match=r"unfinished; run `robodual data cache` again"):
        FrameCache(tmp_path / "frames", Recording(split))
    build(split, tmp_path / "frames", size=SIZE)
    assert FrameCache(tmp_path / "frames", Recording(split)).read(105, ["rgb_static"])["rgb_static"].shape == (
        32,
        32,
        3,
    )


def test_a_full_disk_is_one_line_and_the_cache_goes_on(split: Path, tmp_path: Path) -> None:
    """While the arrays are made the system says so; while they are filled it ends the process that writes (SIGBUS)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            DatasetError, match=r"frames: unfinished \(.*File too large.*\); .*run the same command again"
        ):
            build(split, tmp_path / "frames", size=SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def end_a_worker() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        workers[0].kill()

    ending = threading.Thread(target=end_a_worker)
    with pytest.raises(DatasetError, match=r"a worker process died \(is the disk or the memory full\?\); run the same"):
        build(split, tmp_path / "frames", size=SIZE, progress=lambda done, of: ending.start())
    ending.join()
    build(split, tmp_path / "frames", size=SIZE)
    assert FrameCache(tmp_path / "frames", Recording(split)).contents.size == SIZE


def test_workers_map_the_arrays_for_themselves(split: Path, cache: Path) -> None:
    frames = FrameCache(cache, Recording(split))
    before = frames.read(100, ["rgb_static"])
    assert len(pickle.dumps(frames)) < 10_000  # what a data loader's worker is given
    assert np.array_equal(copy.copy(frames).read(100, ["rgb_static"])["rgb_static"], before["rgb_static"])


def test_a_cache_of_something_else_is_refused(split: Path, cache: Path, tmp_path: Path) -> None:
    other = write_split(tmp_path / "other", lengths=[18])
    with pytest.raises(
        DatasetError, match=r"holds 50 steps from 100 to .*run `robodual data cache` again, into another"
    ):
        CalvinDataset(other, frames=cache)
    with pytest.raises(DatasetError, match="no frame cache"):
        CalvinDataset(split, frames=tmp_path)
    with pytest.raises(DatasetError, match="give another folder"):
        build(split, cache, size=16)
    build(split, tmp_path / "blind", size=16, sensors=("rgb_static",))
    dataset = CalvinDataset(split, sensors=("rgb_static", "rgb_gripper", "proprio"), frames=tmp_path / "blind")
    with pytest.raises(DatasetError, match="has no rgb_gripper"):
        dataset[0, 0]
    with pytest.raises(DatasetError, match="sensors: expected some of"):
        build(split, tmp_path / "odd", sensors=("rgb_wrist",))


def test_the_command(split: Path, tmp_path: Path) -> None:
    assert tiny.TINY
    arguments = ["cache", str(split), str(tmp_path / "frames"), "--size", "32", "--workers", "1"]
    result = CliRunner().invoke(data_cli, arguments)
    assert result.exit_code == 0, result.output
    assert "50 steps in" in result.output
    result = CliRunner().invoke(data_cli, [*arguments[:-3], "16"])
    assert result.exit_code == 1
    assert "holds another cache" in result.stderr


def test_windows_start_every_so_many_steps(split: Path) -> None:
    every, third = CalvinDataset(split), CalvinDataset(split, stride=3)
    assert third.starts.tolist() == [
        start for span in every.spans for start in range(span.start, span.end - 14, 3)
    ]  # fmt: skip
