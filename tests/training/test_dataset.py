"""Samples are the published windows, read safely, and depend on (seed, epoch, index) alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calvin_data import TASKS, step_arrays, write_split
from torch.utils.data import DataLoader

from robodual.training.annotations import DatasetError, read_annotations
from robodual.training.dataset import CalvinDataset, Sample, read_enriched
from robodual.training.order import Order
from robodual.training.window import Window

SENSORS = ("rgb_static", "rgb_gripper", "depth_static", "depth_gripper", "rgb_tactile", "proprio")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("data") / "training")


def published_sample(split: Path, start: int, shift: int) -> dict[str, Any]:
    """The published loader, stated again: what its __getitem__ cuts from the steps of one window.

    Reads like RoboDual's prismatic/vla/datasets/calvin_dataset.py: stack the window, then index it.
    """
    steps = [np.load(split / f"episode_{start + offset:07d}.npz") for offset in range(8 + shift)]
    stacked = {name: np.stack([step[name] for step in steps]) for name in steps[0].files}
    current = shift
    previous = shift - 1 if shift > 1 else shift
    history = torch.zeros(4, 7)
    used = 4 if shift > 4 else shift
    if used > 0:
        history[-used:] = torch.from_numpy(stacked["rel_actions"]).float()[:used]
    robot = torch.from_numpy(stacked["robot_obs"]).float()
    mask = torch.zeros(8)
    mask[-(8 - shift) :] = 1
    return {
        "image": stacked["rgb_static"][0],
        "tokenised_actions": stacked["rel_actions"][:8].astype(np.float32),
        "image_dp": stacked["rgb_static"][current],
        "prev_image_dp": stacked["rgb_static"][previous],
        "gripper_image": stacked["rgb_gripper"][current],
        "rgb_tactile": stacked["rgb_tactile"][current],
        "depth_image": stacked["depth_static"][current],
        "depth_gripper": stacked["depth_gripper"][current],
        "raw_action": stacked["rel_actions"][shift:].astype(np.float32),
        "hist_action": history.numpy(),
        "proprio": torch.cat([robot[shift, :6], robot[shift, [-1]]], dim=-1).numpy(),
        "valid_cond_mask": mask.numpy(),
    }


def named_as_published(sample: Sample) -> dict[str, Any]:
    return {
        "image": sample.first_frame,
        "tokenised_actions": sample.first_actions,
        "image_dp": sample.frame.rgb_static,
        "prev_image_dp": sample.previous,
        "gripper_image": sample.frame.rgb_gripper,
        "rgb_tactile": sample.frame.rgb_tactile,
        "depth_image": sample.frame.depth_static,
        "depth_gripper": sample.frame.depth_gripper,
        "raw_action": sample.actions,
        "hist_action": sample.history,
        "proprio": sample.frame.proprio,
        "valid_cond_mask": sample.valid_cond_mask,
    }


def test_every_sample_is_the_published_one(split: Path) -> None:
    dataset = CalvinDataset(split, sensors=SENSORS, seed=3)
    spans = read_annotations(split / "lang_annotations" / "auto_lang_ann.npy")
    published_starts = [(span, start) for span in spans for start in range(span.start, span.end + 1 - 15)]
    assert len(dataset) == len(published_starts) == (40 - 15) + (30 - 15)
    shifts = set()
    for epoch in range(2):
        for index, (span, start) in enumerate(published_starts):
            sample = dataset[epoch, index]
            shifts.add(sample.window.shift)
            assert (sample.window.start, sample.instruction, sample.task) == (start, span.instruction, span.task)
            expected = published_sample(split, start, sample.window.shift)
            for name, value in named_as_published(sample).items():
                np.testing.assert_array_equal(value, expected[name], err_msg=name)
                assert value.dtype == expected[name].dtype, name
    assert shifts == set(range(8))


def test_the_generalist_has_longer_reach_and_no_shift(split: Path) -> None:
    dataset = CalvinDataset(split, chunk=0)
    assert len(dataset) == (40 - 7) + (30 - 7)
    assert {dataset[0, index].window.shift for index in range(len(dataset))} == {0}


@pytest.mark.parametrize("shift", range(8))
def test_the_reference_is_cut_as_the_published_training_cuts_it(shift: int) -> None:
    window = Window(0, shift)
    chunk = np.arange(1, 57, dtype=np.float32).reshape(8, 7)
    cut = np.zeros((8, 7), np.float32)
    count = int(window.valid_cond_mask.sum())
    cut[:count] = chunk[-count:]
    np.testing.assert_array_equal(window.reference(chunk), cut)


def test_only_the_asked_sensors_are_read(split: Path) -> None:
    frame = CalvinDataset(split)[0, 0].frame
    assert frame.rgb_gripper is frame.depth_static is frame.depth_gripper is frame.rgb_tactile is None


def test_a_sample_depends_on_seed_epoch_and_index_alone(split: Path) -> None:
    first, again = (CalvinDataset(split, sensors=SENSORS, seed=1, augment=True) for _ in range(2))
    again[0, 7]
    for name, value in named_as_published(first[5, 11]).items():
        np.testing.assert_array_equal(value, named_as_published(again[5, 11])[name])
    shifts = [[dataset[epoch, 11].window.shift for epoch in range(12)] for dataset in (first, CalvinDataset(split))]
    assert len(set(shifts[0])) > 2
    assert shifts[0] != shifts[1]


def test_workers_give_the_same_batches_as_the_main_process(split: Path) -> None:
    def batches(workers: int) -> list[list[Sample]]:
        loader = DataLoader(
            CalvinDataset(split, seed=1), batch_sampler=Order(40, 4, seed=1), num_workers=workers, collate_fn=list
        )
        return [batch for batch, _ in zip(loader, range(6))]

    for alone, shared in zip(batches(0), batches(2)):
        assert [s.window for s in alone] == [s.window for s in shared]
        np.testing.assert_array_equal(alone[0].previous, shared[0].previous)


def test_partial_data_keeps_a_fraction_of_the_annotations(tmp_path: Path) -> None:
    folder = write_split(tmp_path / "training", lengths=[16] * 20)
    kept = [CalvinDataset(folder, partial=0.1, seed=seed).spans for seed in (0, 0, 1)]
    assert len(kept[0]) == 2
    assert kept[0] == kept[1] != kept[2]
    assert set(kept[0]) <= set(CalvinDataset(folder).spans)
    with pytest.raises(DatasetError, match="partial"):
        CalvinDataset(folder, partial=0.0)


def test_enriched_instructions_are_drawn_beside_the_annotated_one(split: Path, tmp_path: Path) -> None:
    path = tmp_path / "enriched.json"
    path.write_text(json.dumps({TASKS[0]: ["pull the drawer out"]}))
    dataset = CalvinDataset(split, enriched=read_enriched(path))
    assert {dataset[epoch, 0].instruction for epoch in range(20)} == {"pull the drawer out", "Do thing 0"}
    assert {dataset[epoch, 30].instruction for epoch in range(5)} == {"Do thing 1"}
    path.write_text('{"open_drawer": "pull"}')
    with pytest.raises(DatasetError, match="open_drawer: expected a list"):
        read_enriched(path)


def test_augmentation_treats_the_frames_of_a_camera_alike(split: Path) -> None:
    plain, augmented = (CalvinDataset(split, sensors=SENSORS, augment=augment) for augment in (False, True))
    epoch = next(epoch for epoch in range(50) if plain[epoch, 0].window.shift == 0)
    before, after = plain[epoch, 0], augmented[epoch, 0]
    assert (after.frame.rgb_static != before.frame.rgb_static).mean() > 0.5
    np.testing.assert_array_equal(after.first_frame, after.frame.rgb_static)
    np.testing.assert_array_equal(after.previous, after.frame.rgb_static)
    assert after.frame.depth_static is not None
    assert before.frame.depth_static is not None
    assert set(after.frame.depth_static.ravel()) < set(before.frame.depth_static.ravel())
    np.testing.assert_array_equal(after.actions, before.actions)


def test_a_window_with_a_missing_step_moves_on_by_ten(tmp_path: Path) -> None:
    folder = write_split(tmp_path / "training", lengths=[60])
    (folder / "episode_0000104.npz").unlink()  # windows from 102, 103 and 104 need it
    dataset = CalvinDataset(folder)
    assert dataset.detours == 3
    assert [dataset[0, index].window.start for index in range(4)] == [112, 113, 114, 105]


def test_a_half_copied_data_set_says_how_many_steps_are_missing_and_which(tmp_path: Path) -> None:
    folder = write_split(tmp_path / "training", lengths=[60])
    for step in range(120, 163):
        (folder / f"episode_{step:07d}.npz").unlink()
    with pytest.raises(DatasetError, match=r"training: 42 of the 60 annotated steps are missing, the first is "
                                           r"episode_0000120\.npz; copy"):  # fmt: skip
        CalvinDataset(folder)


def test_a_damaged_step_is_named(tmp_path: Path) -> None:
    folder = write_split(tmp_path / "training", lengths=[16])
    path = folder / "episode_0000105.npz"
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole[:3000] + bytes(200) + whole[3200:]):
        path.write_bytes(damage)
        with pytest.raises(DatasetError, match=r"episode_0000105\.npz: damaged or cut short"):
            CalvinDataset(folder, sensors=SENSORS).recording.read(105, step_arrays(105))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rgb_static": np.zeros((20, 20), np.uint8)}, r"rgb_static is uint8 \[20, 20\], expected uint8 \[\?x\?x3\]"),
        ({"rel_actions": np.zeros(6)}, "rel_actions is float64"),
        ({"depth_static": np.zeros((20, 20), np.uint8)}, "depth_static is uint8 .* expected float"),
        ({"rgb_gripper": None}, "no rgb_gripper"),
        ({"rgb_static": np.array([{"a": 1}], dtype=object)}, "damaged or cut short"),
    ],
)
def test_a_step_of_another_layout_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_split(tmp_path / "training", lengths=[16])
    arrays = {name: value for name, value in (step_arrays(102) | change).items() if value is not None}
    for step in range(102, 118):
        np.savez(folder / f"episode_{step:07d}.npz", **arrays)
    with pytest.raises(DatasetError, match=r"episode_00001\d\d\.npz: " + message):
        CalvinDataset(folder, sensors=SENSORS)[0, 0]


def test_a_folder_that_is_not_a_split_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        CalvinDataset(tmp_path / "validation")
    with pytest.raises(DatasetError, match=r"no episode_0000000\.npz"):
        CalvinDataset(tmp_path)
    with pytest.raises(DatasetError, match="no window fits"):
        CalvinDataset(write_split(tmp_path / "training", lengths=[12]))


def test_every_epoch_shows_every_sample_once_in_another_order() -> None:
    order = Order(20, 2, seed=5)
    batches = [batch for batch, _ in zip(order, range(20))]
    epochs = [[key for batch in batches[start : start + 10] for key in batch] for start in (0, 10)]
    assert [sorted(index for _, index in epoch) for epoch in epochs] == [list(range(20))] * 2
    assert {epoch for epoch, _ in epochs[1]} == {1}
    assert [index for _, index in epochs[0]] != [index for _, index in epochs[1]]


@pytest.mark.parametrize(("batch", "accumulation", "processes"), [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2)])
def test_a_global_batch_is_the_same_set_however_it_is_split(batch: int, accumulation: int, processes: int) -> None:
    whole = [sorted(keys) for keys, _ in zip(Order(21, 8, seed=2), range(5))]
    parts: list[list[tuple[int, int]]] = [[] for _ in range(5)]
    for rank in range(processes):
        order = Order(21, batch, accumulation, rank, processes, seed=2)
        for turn, keys in zip(range(5 * accumulation), order):
            parts[turn // accumulation] += keys
    assert [sorted(part) for part in parts] == whole


def test_the_order_goes_on_from_any_step() -> None:
    whole = [batch for batch, _ in zip(Order(21, 2, 2, seed=2), range(40))]
    for step in (1, 4, 5, 7, 15):
        rest = [batch for batch, _ in zip(Order(21, 2, 2, seed=2, first_step=step), range(8))]
        assert rest == whole[2 * step : 2 * step + 8]


def test_fewer_samples_than_a_batch_is_an_error() -> None:
    with pytest.raises(DatasetError, match="7 windows, fewer than one global batch of 8"):
        Order(7, 2, 2, 0, 2)
