"""Collected demonstrations are a CALVIN data set, the same for any number of workers, and collecting can be resumed."""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("pybullet")

from tiny import SOURCE, SPECIALIST, data, settings
from typer.testing import CliRunner

from robodual.training.annotations import DatasetError, read_annotations
from robodual.training.collect import Collection, collect
from robodual.training.data_cli import data as data_command
from robodual.training.dataset import CalvinDataset
from robodual.training.examination import examine
from robodual.training.loop import Report
from robodual.training.runs import train_specialist
from robodual_client.calvin import tasks
from robodual_client.playtable import PlayTable

SENSORS = ("rgb_static", "rgb_gripper", "depth_static", "depth_gripper", "rgb_tactile", "proprio")
SEED = 5


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Collection]:
    split = tmp_path_factory.mktemp("playtable") / "training"
    return split, collect(split, 2, seed=SEED, chain=1, workers=2)


def digests(split: Path) -> dict[str, str]:
    """Of every file; of a step, of its arrays, since a zip file knows when it was written."""

    def digest(path: Path) -> str:
        if path.suffix != ".npz":
            return hashlib.sha256(path.read_bytes()).hexdigest()
        with np.load(path) as arrays:
            return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays.files))).hexdigest()

    return {str(path.relative_to(split)): digest(path) for path in split.rglob("*") if path.is_file()}


def test_a_collection_is_a_whole_calvin_data_set(collected: tuple[Path, Collection]) -> None:
    split, found = collected
    examination = examine(split, steps=40)
    assert examination.faults == []
    assert (examination.steps, examination.tasks) == (found.steps, found.tasks)
    assert set(examination.ranges) == {
        "rgb_static", "rgb_gripper", "rgb_tactile", "depth_static", "depth_gripper", "depth_tactile",
        "robot_obs", "scene_obs", "actions", "rel_actions",
    }  # fmt: skip
    sample = CalvinDataset(split, sensors=SENSORS)[0, 3]
    assert sample.frame.rgb_static.shape == (200, 200, 3)
    assert sample.frame.rgb_gripper is not None
    assert sample.frame.rgb_gripper.shape == (84, 84, 3)
    assert (split / "statistics.yaml").exists()


def test_replaying_the_recorded_actions_achieves_the_annotated_tasks(collected: tuple[Path, Collection]) -> None:
    split, _ = collected
    spans = read_annotations(split / "lang_annotations" / "auto_lang_ann.npy")
    span = spans[0]
    steps = [np.load(split / f"episode_{step:07d}.npz") for step in range(span.start, span.end + 1)]
    with PlayTable(render=False) as table:
        table.reset(steps[0]["robot_obs"], steps[0]["scene_obs"])
        before = table.get_info()
        achieved = []
        for step in steps:
            _, _, _, info = table.step(step["rel_actions"])
            achieved.append(span.task in tasks.achieved(before, info))
        assert any(achieved)


def test_an_interrupted_collection_goes_on_to_the_same_files(
    collected: tuple[Path, Collection], tmp_path: Path
) -> None:
    split, _ = collected
    whole = digests(split)
    for path in [split / "demonstrations" / "00001.json", split / "ep_start_end_ids.npy"]:
        path.unlink()
    next(split.glob("episode_0002*.npz")).unlink()
    times = {path: path.stat().st_mtime_ns for path in split.glob("episode_0000*.npz")}
    collect(split, 2, seed=SEED, chain=1, workers=1)
    assert digests(split) == whole
    assert {path: path.stat().st_mtime_ns for path in times} == times  # the finished one was not done again


def test_the_command_says_what_is_there(collected: tuple[Path, Collection]) -> None:
    split, found = collected
    arguments = ["collect", str(split), "--demonstrations", "2", "--seed", str(SEED), "--chain", "1"]
    result = CliRunner().invoke(data_command, arguments)
    assert result.exit_code == 0, result.output
    assert f"2 demonstrations, {found.steps} steps" in " ".join(result.output.split())
    refused = CliRunner().invoke(data_command, [*arguments, "--noise", "0.5"])
    assert refused.exit_code == 1
    assert "give the same to go on, or another folder" in " ".join(refused.stderr.split())


def test_another_seed_in_the_same_folder_is_refused(collected: tuple[Path, Collection]) -> None:
    split, _ = collected
    with pytest.raises(DatasetError, match="demonstrations of seed 5"):
        collect(split, 2, seed=SEED + 1, chain=1)
    with pytest.raises(DatasetError, match="no instruction for"):
        collect(split, 2, seed=SEED, sentences={"open_drawer": ["open it"]})


def test_records_say_what_was_asked_and_what_was_achieved(collected: tuple[Path, Collection]) -> None:
    split, found = collected
    records = [json.loads(path.read_text()) for path in sorted(split.glob("demonstrations/*.json"))]
    assert len(records) == found.demonstrations == 2
    assert sum(len(record["spans"]) for record in records) == found.tasks.total()
    for record in records:
        assert [span["task"] for span in record["spans"]] == record["tasks"][: len(record["spans"])]
        assert not record["spans"] or record["spans"][-1]["end"] == record["last"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(DatasetError, match=r"split: unfinished \(.*File too large\); .*run the same command again"):
            collect(tmp_path / "split", 1, chain=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers finish what they began")
def test_no_worker_outlives_a_run_that_was_killed(tmp_path: Path) -> None:
    arguments = ["data", "collect", str(tmp_path / "split"), "--demonstrations", "50", "--workers", "2"]
    run = subprocess.Popen([sys.executable, "-m", "robodual", *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("split/*.npz"))) < 20:  # they are at work
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 2
    run.kill()
    run.wait()
    _, left = psutil.wait_procs(workers, timeout=10)
    assert not left


@pytest.mark.slow
def test_a_specialist_learns_from_the_collection(collected: tuple[Path, Collection], tmp_path: Path) -> None:
    """An untrained one predicts no noise, so that its loss is 1."""
    split, _ = collected
    reports: list[Report] = []
    values = settings(tmp_path / "run", 120, batch_size=8, learning_rate=3e-3, log_steps=20, warmup_steps=10)
    options = replace(SPECIALIST, cache_conditioning=tmp_path / "cache")
    train_specialist(SOURCE, data(split), options, values, report=reports.append)
    assert [report.step for report in reports] == [20, 40, 60, 80, 100, 120]
    assert reports[-1].loss < 0.35
