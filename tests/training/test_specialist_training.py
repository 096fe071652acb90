"""The specialist learns, can be interrupted anywhere, and what it leaves can be served."""

from __future__ import annotations

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calvin_data import write_split
from safetensors.torch import load_file, save_file
from tiny import SOURCE, SPECIALIST, TINY, data, settings

from robodual.facts import CheckpointError, hash_state_dict
from robodual.specialist.checkpoint import save
from robodual.specialist.engine import load_specialist
from robodual.specialist.policy import Policy
from robodual.training.annotations import DatasetError
from robodual.training.frame_cache import build
from robodual.training.loop import Report
from robodual.training.runs import SpecialistOptions, train_specialist


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("specialist") / "training", lengths=[24, 20])


def state(output: Path, step: int) -> bytes:
    return (output / "checkpoints" / f"step-{step:08d}" / "state.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(split: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Report]]:
    """Seven steps without a break, over an epoch's end (14 windows, 4 a step)."""
    output, reports = tmp_path_factory.mktemp("whole"), []
    assert train_specialist(SOURCE, data(split), SPECIALIST, settings(output, 7), report=reports.append) == 7
    return output, reports


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_stopped_after_any_step_and_resumed_equals_never_stopped(
    split: Path, tmp_path: Path, whole: tuple[Path, list[Report]], stop: int
) -> None:
    def report(shown: Report) -> None:
        if shown.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train_specialist(SOURCE, data(split), SPECIALIST, settings(tmp_path, 7), report=report) == stop
    reports: list[Report] = []
    train_specialist(SOURCE, data(split), SPECIALIST, settings(tmp_path, 7), resume=True, report=reports.append)
    assert [shown.loss for shown in reports] == [shown.loss for shown in whole[1][stop:]]
    assert state(tmp_path, 7) == state(whole[0], 7)


def test_a_killed_training_goes_on_from_its_last_checkpoint(
    split: Path, tmp_path: Path, whole: tuple[Path, list[Report]]
) -> None:
    class Killed(BaseException):
        pass

    def report(shown: Report) -> None:
        if shown.step == 6:
            raise Killed

    often = settings(tmp_path, 7, save_steps=2)
    with pytest.raises(Killed):
        train_specialist(SOURCE, data(split), SPECIALIST, often, report=report)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    train_specialist(SOURCE, data(split), SPECIALIST, often, resume=True)
    assert state(tmp_path, 7) == state(whole[0], 7)


def test_data_workers_change_nothing(split: Path, tmp_path: Path, whole: tuple[Path, list[Report]]) -> None:
    train_specialist(SOURCE, data(split), SPECIALIST, settings(tmp_path, 7, num_workers=2))
    assert state(tmp_path, 7) == state(whole[0], 7)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_step_is_one_line_that_names_its_file(tmp_path: Path, workers: int) -> None:
    split = write_split(tmp_path / "training", lengths=[24])
    for path in split.glob("episode_00001[12]*.npz"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        DatasetError, match=r"^\S*episode_00001[12]\d\.npz: damaged or cut short \([^\n]*copy it again$"
    ):
        train_specialist(SOURCE, data(split), SPECIALIST, settings(tmp_path / "run", 9, num_workers=workers))


def test_the_averaged_weights_are_served_with_their_configuration(
    split: Path, tmp_path: Path, whole: tuple[Path, list[Report]]
) -> None:
    options = replace(SPECIALIST, num_inference_steps=5, cond_drop_chance=0.0, with_gripper=False)
    train_specialist(SOURCE, data(split), options, settings(tmp_path, 2))
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    policy = load_specialist("tiny", checkpoint=checkpoint / "specialist.safetensors", device="cpu").policy
    assert policy.config == replace(TINY.specialist, diffusion_steps=5, guidance_scale=1.0, with_gripper=False)
    averages = {
        name.removeprefix("average.policy."): value
        for name, value in load_file(checkpoint / "state.safetensors").items()
        if name.startswith("average.")
    }
    assert averages.keys() == dict(policy.named_parameters()).keys()
    for name, value in averages.items():
        assert torch.equal(policy.state_dict()[name], value), name
    again = load_specialist("tiny", checkpoint=whole[0] / "checkpoints" / "step-00000007" / "specialist.safetensors")
    assert again.policy.config.guidance_scale == 3
    assert again.facts.checkpoint == hash_state_dict(again.policy)


def test_the_frozen_colour_encoder_stays_and_the_rest_moves(split: Path, tmp_path: Path) -> None:
    start = tmp_path / "first"
    train_specialist(SOURCE, data(split), SPECIALIST, settings(start, 1))
    file = start / "checkpoints" / "step-00000001" / "specialist.safetensors"
    options = SpecialistOptions(start=file)
    train_specialist(SOURCE, data(split), options, settings(tmp_path / "second", 2))
    before = load_file(file)
    after = load_file(tmp_path / "second" / "checkpoints" / "step-00000002" / "specialist.safetensors")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("vision_encoder.") for name in moved)
    assert any(name.startswith("depth_encoder.") for name in moved)
    assert any(name.startswith("model.blocks.") for name in moved)


@pytest.mark.parametrize("conditioning", ["forced", "generated"])
def test_cached_conditionings_train_like_computed_ones(split: Path, tmp_path: Path, conditioning: str) -> None:
    losses = []
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        reports: list[Report] = []
        options = replace(SPECIALIST, conditioning=conditioning, cache_conditioning=cache)  # type: ignore[arg-type]
        output = tmp_path / f"run-{len(losses)}"
        train_specialist(SOURCE, data(split), options, settings(output, 4), report=reports.append)
        losses.append([shown.loss for shown in reports])
    assert losses[1] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)  # hidden states are kept as bfloat16
    assert len(list((tmp_path / "cache").glob("span-*.safetensors"))) == 2
    written = [*(tmp_path / "cache").iterdir(), *tmp_path.glob("*/checkpoints/*/*.*")]
    assert any(file.name == "state.safetensors" for file in written)
    assert len({file.stat().st_mode for file in written}) == 1  # others may train with them, and go on


def test_a_cache_of_something_else_is_refused(split: Path, tmp_path: Path) -> None:
    cached = replace(SPECIALIST, cache_conditioning=tmp_path / "cache")
    train_specialist(SOURCE, data(split), cached, settings(tmp_path / "a", 1))
    with pytest.raises(DatasetError, match="give another folder"):
        train_specialist(SOURCE, data(split), replace(cached, conditioning="generated"), settings(tmp_path / "b", 1))
    with pytest.raises(DatasetError, match="cache_conditioning: not with image_aug"):
        train_specialist(SOURCE, data(split, image_aug=True), cached, settings(tmp_path / "c", 1))


def test_no_space_for_a_cache_is_one_line_and_it_goes_on(split: Path, tmp_path: Path) -> None:
    cached = replace(SPECIALIST, cache_conditioning=tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for allowed in (10, 2000):  # for what the folder belongs to, and for a span
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, limits[1]))
        try:
            with pytest.raises(DatasetError, match=r"cache: unfinished \(.*File too large.*run the same command again"):
                train_specialist(SOURCE, data(split), cached, settings(tmp_path / "run", 1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert train_specialist(SOURCE, data(split), cached, settings(tmp_path / "run", 1)) == 1


def test_what_does_not_fit_together_is_one_line(split: Path, tmp_path: Path, whole: tuple[Path, list[Report]]) -> None:
    with pytest.raises(CheckpointError, match="pass --resume"):
        train_specialist(SOURCE, data(split), SPECIALIST, settings(whole[0], 7))
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.001 and is 0\.1"):
        train_specialist(SOURCE, data(split), SPECIALIST, settings(whole[0], 7, learning_rate=0.1), resume=True)
    with pytest.raises(CheckpointError, match="vision_weights: the colour encoder is not trained"):
        train_specialist(SOURCE, data(split), SpecialistOptions(), settings(tmp_path, 1))
    (tmp_path / "dino.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not the weights of timm"):
        train_specialist(
            SOURCE, data(split), SpecialistOptions(vision_weights=tmp_path / "dino.safetensors"), settings(tmp_path, 1)
        )
    with pytest.raises(DatasetError, match="fewer than one global batch of 64"):
        train_specialist(SOURCE, data(split), SPECIALIST, settings(tmp_path, 1, batch_size=64))


def test_other_frozen_weights_or_frames_do_not_resume_a_training(split: Path, tmp_path: Path) -> None:
    for number in (0, 1):
        policy = Policy(TINY.specialist).initialize(number)
        save(policy, tmp_path / f"specialist-{number}.safetensors")
        save_file(policy.vision_encoder.state_dict(), tmp_path / f"dino-{number}.safetensors")
    build(split, tmp_path / "frames")
    plain, first = data(split), SpecialistOptions(vision_weights=tmp_path / "dino-0.safetensors")
    output = settings(tmp_path / "run", 1)
    train_specialist(SOURCE, plain, first, output)
    assert train_specialist(SOURCE, plain, first, output, resume=True) == 1
    for options, folder, name in (
        (replace(first, vision_weights=tmp_path / "dino-1.safetensors"), plain, "vision_weights was '"),
        (SpecialistOptions(start=tmp_path / "specialist-0.safetensors"), plain, "starting_specialist was None"),
        (first, data(split, frames=tmp_path / "frames"), "frames was None and is 'as recorded'"),
    ):
        with pytest.raises(CheckpointError, match=name):
            train_specialist(SOURCE, folder, options, output, resume=True)
    again = settings(tmp_path / "second", 1)
    one, other = (SpecialistOptions(start=tmp_path / f"specialist-{number}.safetensors") for number in (0, 1))
    train_specialist(SOURCE, plain, one, again)
    with pytest.raises(CheckpointError, match="starting_specialist was '"):
        train_specialist(SOURCE, plain, other, again, resume=True)


def test_settings_are_saved_beside_the_weights(whole: tuple[Path, list[Report]]) -> None:
    saved = json.loads((whole[0] / "checkpoints" / "step-00000007" / "settings.json").read_text())
    assert saved["seed"] == 0
    assert saved["specialist"]["with_depth"] is True
    assert len(saved["generalist"]) == 64
