"""The generalist is killed, restarted, frozen."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from deployment import Deployment
from recovery import Report
from robots import TIMEOUTS, Robot, Undisturbed


def test_a_generalist_that_was_killed_and_restarted_is_waited_for_or_done_without(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    place = deployment.generalist.address, list(deployment.specialists)
    lockstep = Robot(1, *place)
    lockstep.start(hold=[7])
    # In the background, it never gets another conditioning than that of step 0: as one who never asks again.
    ahead = Robot(4, *place, schedule="async", steps=14)
    ahead.start(hold=[1, 13])
    lockstep.reach(7)
    ahead.reach(1)

    lost = time.monotonic()
    deployment.generalist.kill()
    lockstep.go(7)
    ahead.go(1)
    ahead.reach(13)
    assert len(lockstep.answers) == 7
    deployment.generalist.start()
    deployment.generalist.wait_until_ready()
    back = time.monotonic()
    lockstep.join()
    ahead.steps = 60
    ahead.pace = 0.1
    ahead.join()

    undisturbed.check(lockstep)
    assert not lockstep.errors
    np.testing.assert_array_equal(ahead.actions[:13], undisturbed.of(4, schedule="every-1000").actions[:13])
    assert [answer.step for answer in ahead.answers] == list(range(60))
    assert [answer.age for answer in ahead.answers[:13]] == list(range(13))
    assert all(answer.degraded == (answer.age > 16) for answer in ahead.answers)
    assert ahead.answers[-1].age < 16
    assert not ahead.errors
    report("generalist killed and restarted", [lockstep, ahead], lost=lost, back=back)


def test_a_generalist_that_freezes_is_a_late_answer_or_a_clear_error(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    place = deployment.generalist.address, list(deployment.specialists)
    patient = Robot(1, *place)
    brisk = Robot(2, *place, timeouts=replace(TIMEOUTS, condition=1.0))
    for robot in (patient, brisk):
        robot.start(hold=[7])
        robot.reach(7)

    lost = time.monotonic()
    deployment.generalist.freeze()
    for robot in (patient, brisk):
        robot.go(7)
    time.sleep(2.5)
    assert [len(patient.answers), len(brisk.answers)] == [7, 7]
    deployment.generalist.thaw()
    back = time.monotonic()
    patient.join()
    brisk.join()

    undisturbed.check(patient, brisk)
    assert not patient.errors
    assert brisk.errors
    assert all("Generalist.Condition" in str(error) for error in brisk.errors)
    report("generalist frozen for a while", [patient, brisk], lost=lost, back=back)
