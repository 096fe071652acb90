"""The control loop beyond the recorded cases: skipped steps, recovery, noise and odd schedules."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from robodual.specialist.control import ControlLoop, Recovery, Window, noise, reference_actions


def chunk(step: int) -> np.ndarray:
    return np.random.default_rng(step).uniform(-1, 1, (8, 7)).astype(np.float32)


def test_noise_depends_on_seed_episode_and_step_alone() -> None:
    reference = noise(5, 3, 2)
    assert reference.shape == (8, 7)
    assert reference.dtype == np.float32
    np.testing.assert_array_equal(noise(5, 3, 2), reference)
    for other in ((6, 3, 2), (5, 4, 2), (5, 3, 3), (5, 2, 3), (2**64 - 1, 2**32 - 1, 2**32 - 1)):
        assert np.abs(noise(*other) - reference).max() > 0.1
    many = np.stack([noise(1, 0, step) for step in range(500)])
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("arguments", "name"), [((-1, 0, 0), "seed"), ((0, 2**32, 0), "episode"), ((0, 0, -1), "step")]
)
def test_noise_refuses_numbers_outside_the_key(arguments: tuple[int, int, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        noise(*arguments)


@pytest.mark.parametrize(
    ("window", "conditioning_step", "step", "dropped"),
    [
        ("published", 0, 0, 0),
        ("published", 0, 1, 2),  # a row is skipped in the first window
        ("published", 0, 6, 7),
        ("published", 0, 7, 8),  # the generalist is late
        ("published", 7, 7, 0),
        ("published", 7, 8, 1),
        ("published", 7, 14, 7),
        ("published", 7, 20, 8),
        ("age", 0, 0, 0),
        ("age", 0, 1, 1),
        ("age", 0, 7, 7),
        ("age", 0, 8, 8),
        ("age", 5, 6, 1),
    ],
)
def test_reference_window_keeps_the_rows_ahead(window: Window, conditioning_step: int, step: int, dropped: int) -> None:
    source = chunk(0)
    reference = reference_actions(source, conditioning_step=conditioning_step, step=step, window=window)
    np.testing.assert_array_equal(reference[: 8 - dropped], source[dropped:])
    np.testing.assert_array_equal(reference[8 - dropped :], 0)


def test_reference_of_a_later_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="step 4"):
        reference_actions(chunk(0), conditioning_step=4, step=3, window="age")


def test_skipped_steps_are_aggregated_over_the_chunks_that_cover_the_step() -> None:
    loop = ControlLoop()
    for step in (0, 1, 4, 9):
        action = loop.advance(step, chunk(step))
    weights = np.exp([-0.5, 0.0])  # chunks of steps 4 and 9; those of 0 and 1 ended before 9
    expected = (weights[0] * chunk(4)[5] + weights[1] * chunk(9)[0]) / weights.sum()
    np.testing.assert_allclose(action[:6], expected[:6], atol=1e-6)
    assert action[6] in (-1, 1)


@pytest.mark.parametrize(("gripper", "expected"), [(-0.51, -1), (-0.5, 1), (0.9, 1), (-1, -1)])
def test_gripper_closes_below_minus_a_half(gripper: float, expected: int) -> None:
    first = np.full((8, 7), gripper, np.float32)
    assert ControlLoop().advance(0, first)[6] == expected


def test_a_restored_loop_gives_the_same_actions_bit_for_bit() -> None:
    steps = [0, 1, 2, 3, 5, 6, 7, 8, 11, 12, 30, 31]
    original = ControlLoop()
    for position, step in enumerate(steps[:-1]):
        original.advance(step, chunk(step))
        state = original.recovery()
        assert state.chunks.nbytes + state.chunk_steps.nbytes + state.history.nbytes < 4096
        restored = ControlLoop(
            Recovery(*(np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) for a in vars(state).values()))
        )
        twin = ControlLoop(original.recovery())
        for later in steps[position + 1 :]:
            assert restored.advance(later, chunk(later)).tobytes() == twin.advance(later, chunk(later)).tobytes()
            assert restored.history.tobytes() == twin.history.tobytes()
    fresh = ControlLoop()
    expected = [fresh.advance(step, chunk(step)).tobytes() for step in steps]
    assert original.advance(steps[-1], chunk(steps[-1])).tobytes() == expected[-1]
    assert restored.last_step == steps[-1]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"chunks": np.zeros((9, 8, 7), np.float32), "chunk_steps": np.arange(9, dtype=np.int32)}, "chunks"),
        ({"chunks": np.zeros((2, 8, 6), np.float32)}, "chunks"),
        ({"chunks": np.full((2, 8, 7), np.nan, np.float32)}, "chunks"),
        ({"chunk_steps": np.array([1], np.int32)}, "chunk_steps"),
        ({"chunk_steps": np.array([2, 1], np.int32)}, "chunk_steps"),
        ({"chunk_steps": np.array([1, 1], np.int32)}, "chunk_steps"),
        ({"chunk_steps": np.array([-1, 1], np.int32)}, "chunk_steps"),
        ({"chunk_steps": np.array([0, 8], np.int32)}, "chunk_steps"),
        ({"chunk_steps": np.array([-(2**31), 2**31 - 1], np.int32)}, "chunk_steps"),
        ({"history": np.zeros((3, 7), np.float32)}, "history"),
        ({"history": np.full((4, 7), np.inf, np.float32)}, "history"),
    ],
)
def test_a_recovery_state_that_does_not_fit_together_is_refused(change: dict[str, np.ndarray], name: str) -> None:
    loop = ControlLoop()
    for step in (0, 1):
        loop.advance(step, chunk(step))
    with pytest.raises(ValueError, match=name):
        ControlLoop(Recovery(**{**vars(loop.recovery()), **change}))


def test_the_loop_needs_no_torch() -> None:
    code = "import sys, robodual.specialist.control; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_steps_only_move_forward() -> None:
    loop = ControlLoop()
    loop.advance(3, chunk(3))
    with pytest.raises(ValueError, match="after 3"):
        loop.advance(3, chunk(3))
    with pytest.raises(ValueError, match="shape"):
        loop.advance(4, np.zeros((4, 7), np.float32))
