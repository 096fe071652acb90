"""The network between client and specialist is cut or swallows everything; a client is slow to read its answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from deployment import Deployment
from proxy import Proxy
from recovery import Report
from robots import TIMEOUTS, Robot, Undisturbed


@pytest.fixture
def way(deployment: Deployment) -> Iterator[Proxy]:
    """The way from clients to specialist A."""
    proxy = Proxy(deployment.a.port)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("step", [7, 10], ids=["conditioning due", "between conditionings"])
def test_a_network_that_was_cut_and_is_back_is_a_late_answer(
    deployment: Deployment, undisturbed: Undisturbed, report: Report, way: Proxy, step: int
) -> None:
    robots = [Robot(number, deployment.generalist.address, way.address) for number in (1, 2, 3)]
    for robot in robots:
        robot.start(hold=[step] if robot is robots[0] else [])
    robots[0].reach(step)

    lost = time.monotonic()
    way.cut()
    robots[0].go(step)
    time.sleep(1)
    assert len(robots[0].answers) == step
    way.mend()
    back = time.monotonic()
    for robot in robots:
        robot.join()

    undisturbed.check(*robots)
    assert not any(robot.errors for robot in robots)
    report(f"network client to specialist cut before step {step}", robots, lost=lost, back=back)


def test_a_network_that_swallows_everything_is_a_clear_error_and_then_the_right_answer(
    deployment: Deployment, undisturbed: Undisturbed, report: Report, way: Proxy
) -> None:
    timeouts = replace(TIMEOUTS, act=1.0)
    robots = [Robot(number, deployment.generalist.address, way.address, timeouts=timeouts) for number in (1, 2)]
    for robot in robots:
        robot.start(hold=[10])
        robot.reach(10)

    lost = time.monotonic()
    way.stall()
    for robot in robots:
        robot.go(10)
    time.sleep(2.5)
    assert [len(robot.answers) for robot in robots] == [10, 10]
    way.mend()
    back = time.monotonic()
    for robot in robots:
        robot.join()

    undisturbed.check(*robots)
    for robot in robots:
        assert robot.errors
        assert all("Specialist.Act" in str(error) for error in robot.errors)
    report("network client to specialist stalled", robots, lost=lost, back=back)
