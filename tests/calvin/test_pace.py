from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_table import FakeTable, Scripted

from robodual_client.calvin import EvaluationError, Options, evaluate
from robodual_client.calvin.annotations import load
from robodual_client.calvin.pace import Pace, RealTime, Tick
from robodual_client.calvin.rollout import run_sequence
from robodual_client.calvin.sequences import published

RATE = 50.0


class Echo:
    """Answers with the number in the observation, `seconds` after it was asked."""

    def __init__(self, seconds: float = 0.0, gripper: float = -1.0) -> None:
        self.seconds, self.gripper = seconds, gripper
        self.asked: list[int] = []
        self.skipped: list[int] = []
        self.at_once = threading.Lock()

    def reset(self, instruction: str) -> None:
        pass

    def skip(self, steps: int) -> None:
        self.skipped.append(steps)

    def step(self, obs: dict[str, Any]) -> np.ndarray:
        assert self.at_once.acquire(blocking=False)
        self.asked.append(obs["number"])
        time.sleep(self.seconds)
        self.at_once.release()
        return np.array([obs["number"], 1.0, 1.0, 1.0, 1.0, 1.0, self.gripper])


def observation(number: int) -> dict[str, Any]:
    return {"number": number, "robot_obs": np.ones(15)}


def drive(pace: Pace, policy: Echo, steps: int, simulator: float = 0.0) -> tuple[list[Tick], list[float]]:
    """What the arm did, and when, in seconds from the start."""
    ticks, times = [], []
    pace.begin(policy)
    began = time.perf_counter()
    try:
        for number in range(steps):
            ticks.append(pace.tick(observation(number)))
            times.append(time.perf_counter() - began)
            time.sleep(simulator)
            pace.stepped()
    finally:
        pace.end()
    return ticks, times


def executed(ticks: list[Tick]) -> list[int | None]:
    """The observation's number that each action was made of; None for a still arm."""
    return [int(tick.action[0]) if tick.action[1] else None for tick in ticks]


def test_lock_step_executes_each_action_at_once() -> None:
    policy = Echo()
    ticks, _ = drive(Pace(), policy, 5)
    assert executed(ticks) == policy.asked == [0, 1, 2, 3, 4]
    assert {tick.action_age for tick in ticks} == {0}
    assert not policy.skipped


def test_late_by_steps_repeats_the_last_action_until_the_next_is_due() -> None:
    policy = Echo()
    ticks, _ = drive(Pace("repeat", delay_steps=3), policy, 11)
    assert policy.asked == [0, 3, 6, 9]
    assert policy.skipped == [2, 2, 2]
    assert executed(ticks) == [None, None, None, 0, 0, 0, 3, 3, 3, 6, 6]
    assert [tick.action_age for tick in ticks] == [None] * 3 + [3, 4, 5, 3, 4, 5, 3, 4]
    assert [bool(tick.arrived) for tick in ticks] == [False] * 3 + [True, False, False] * 2 + [True, False]


def test_late_by_one_step_misses_none_but_the_first() -> None:
    ticks, _ = drive(Pace("repeat", delay_steps=1), Echo(), 6)
    assert executed(ticks) == [None, 0, 1, 2, 3, 4]


def test_held_still_the_arm_keeps_its_gripper() -> None:
    ticks, _ = drive(Pace("zero", delay_steps=2), Echo(gripper=-1.0), 7)
    assert executed(ticks) == [None, None, 0, None, 2, None, 4]
    grippers = [tick.action[6] for tick in ticks]
    assert grippers == [1, 1, -1, -1, -1, -1, -1]  # open as observed, until the policy's first command
    assert ticks[3].action_age is None


def test_a_policy_may_use_the_client_s_names_for_things_of_its_own() -> None:
    class Own(Echo):
        skip = 4  # frames
        last = None

        def step(self, obs: dict[str, Any]) -> np.ndarray:
            self.last = super().step(obs)
            return self.last

    ticks, _ = drive(Pace("repeat", delay_steps=2), Own(), 6)
    assert executed(ticks) == [None, None, 0, 0, 2, 2]
    assert {tick.conditioning_age for tick in ticks} == {None}


def test_in_real_time_a_fast_policy_acts_as_in_lock_step() -> None:
    policy = Echo(0.001)
    ticks, times = drive(RealTime(10), policy, 10, simulator=0.002)
    assert executed(ticks) == list(range(10))
    assert not policy.skipped
    assert times[-1] >= 9 / 10


def test_simulated_time_does_not_run_ahead_of_the_clock() -> None:
    _, times = drive(RealTime(RATE), Echo(), 20)
    assert all(at >= number / RATE for number, at in enumerate(times))


@pytest.mark.parametrize("hold", ["repeat", "zero"])
def test_in_real_time_steps_go_on_while_an_answer_is_late(hold: str) -> None:
    policy = Echo(3.5 / RATE)
    pace = RealTime(RATE, hold)
    ticks, times = drive(pace, policy, 30)
    assert 29 / RATE <= times[-1] < 29 / RATE + pace.late + 0.1
    new, held = [tick for tick in ticks if tick.arrived], [tick for tick in ticks if not tick.arrived]
    assert 15 <= len(held) <= 26  # an answer takes four of the steps, more on a busy machine
    assert {tick.source is None for tick in held if tick.step > new[0].step} == {hold == "zero"}
    assert all(3 <= (tick.action_age or 0) <= 8 for tick in new)
    # The next question is about the newest observation there is.
    assert policy.asked[1:-1] == [tick.step for tick in new][: len(policy.asked) - 2]
    assert sum(policy.skipped) + len(policy.asked) == policy.asked[-1] + 1


def test_a_simulator_that_cannot_keep_up_is_told_and_never_catches_up() -> None:
    pace = RealTime(RATE)
    ticks, times = drive(pace, Echo(), 15, simulator=1.5 / RATE)
    assert pace.overruns == 15
    assert pace.late >= 15 * 0.5 / RATE
    assert np.diff(times).min() >= 1.45 / RATE
    assert max(tick.action_age or 0 for tick in ticks) <= 1  # the policy is fast, and is not blamed


def test_the_end_of_a_subtask_waits_for_the_answer_in_the_air() -> None:
    policy, pace = Echo(0.2), RealTime(RATE)
    drive(pace, policy, 2)
    assert policy.at_once.acquire(blocking=False)
    policy.at_once.release()
    ticks, _ = drive(pace, policy, 2)
    assert executed(ticks) == [None, None]  # what the last subtask asked for is not executed in this one


def test_what_the_policy_raises_is_raised_by_a_step() -> None:
    class Broken(Echo):
        def step(self, obs: dict[str, Any]) -> np.ndarray:
            raise RuntimeError("the policy broke")

    with pytest.raises(RuntimeError, match="the policy broke"):
        drive(RealTime(RATE), Broken(), 5)


def test_a_sequence_in_real_time_is_the_one_in_lock_step_if_the_policy_is_fast() -> None:
    env, sequence = FakeTable(), published()[4]
    plain = run_sequence(env, Scripted(env, 5), sequence, load(), ep_len=20)
    timed = run_sequence(env, Scripted(env, 5), sequence, load(), ep_len=20, pace=RealTime(10))
    assert (plain.solved, plain.steps) == (timed.solved, timed.steps)
    assert timed.action_ages == plain.action_ages == {0: sum(plain.steps)}
    assert timed.seconds >= (sum(timed.steps) - 5) / 10


def test_added_latency_costs_what_it_says(options: Callable[..., Options]) -> None:
    settings = {"numbers": (0, 1), "policy_options": {"skill": 1.0}, "inject_delay": {"specialist": 45.0}}
    locked = evaluate(options("locked", **settings))
    assert locked.lengths() == [5, 5]
    assert locked.milliseconds("policy").quantile(0.0) >= 44
    assert locked.held == 0
    timed = evaluate(options("timed", realtime=50.0, **settings))
    assert timed.held / timed.steps > 0.5
    assert min(timed.action_ages()) >= 2
    assert 30 < (timed.rate or 0) <= 50
    assert "real time at 50 Hz" in timed.lateness()
    late = evaluate(options("late", delay_steps=2, hold="zero", numbers=(0, 1), policy_options={"skill": 1.0}))
    # Its third action, which does the task, is made of the observation of step 4 and executed in step 6.
    assert [record.steps for record in late.sequences.values()] == [[7] * 5] * 2
    assert late.protocol["pace"] == {"delay_steps": 2, "hold": "zero"}
    with pytest.raises(EvaluationError, match=r"pace is .*delay_steps.*, not None"):
        evaluate(options("late", numbers=(0, 1, 2), policy_options={"skill": 1.0}, resume=True))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"realtime": 0.0}, "realtime: must be over 0"),
        ({"delay_steps": 20}, "delay_steps: must be 0 to 19"),
        ({"realtime": 30.0, "delay_steps": 2}, "is for the simulated clock"),
        ({"hold": "still"}, "hold: must be repeat or zero"),
        ({"inject_delay": {"redis": 4.0}}, "got redis=4"),
        ({"inject_delay": {"generalist": 4.0}}, "has no generalist"),
    ],
)
def test_a_pace_that_makes_no_sense_is_refused(
    options: Callable[..., Options], settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(EvaluationError, match=complaint):
        options(**settings)
