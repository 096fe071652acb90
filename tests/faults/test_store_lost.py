"""Redis is killed, frozen, cut off, full."""

from __future__ import annotations

import time
from dataclasses import replace

import redis
from deployment import Deployment, until
from recovery import Report
from robots import TIMEOUTS, Robot, Undisturbed


def test_a_store_that_was_killed_and_comes_back_empty_is_waited_for(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    robots = _held(deployment, 7)

    lost = time.monotonic()
    deployment.kill_redis()
    _let_go(robots, 7)
    time.sleep(1)
    assert len(robots[0].answers) == 7, "the conditioning of step 7 was waited for in vain"
    until(lambda: not deployment.b.ready(), 10, lambda: "ready without its store")
    deployment.redis.start()
    back = time.monotonic()
    for robot in robots:
        robot.join()

    undisturbed.check(*robots)
    assert not any(robot.errors for robot in robots)
    report("Redis killed, restarted empty", robots, lost=lost, back=back)


def test_a_store_that_freezes_for_longer_than_its_time_limit_is_waited_for(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    robots = _held(deployment, 7)

    lost = time.monotonic()
    with deployment.frozen_redis():
        _let_go(robots, 7)
        time.sleep(3)
        assert len(robots[0].answers) == 7
    back = time.monotonic()
    for robot in robots:
        robot.join()

    undisturbed.check(*robots)
    assert not any(robot.errors for robot in robots)
    report("Redis frozen for a while", robots, lost=lost, back=back)


def test_a_specialist_cut_off_from_the_store_goes_on_and_then_waits(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    robots = _held(deployment, 10, 15, only_a=True)

    lost = time.monotonic()
    deployment.link.cut()
    until(lambda: not deployment.a.ready(), 10, lambda: "ready without its store")
    _let_go(robots, 10)
    for robot in robots:
        robot.reach(15)
        assert [answer.degraded for answer in robot.answers] == [False] * 10 + [True] * 5
    _let_go(robots, 15)
    time.sleep(1)
    assert [len(robot.answers) for robot in robots] == [15, 15], "a conditioning came through a network that is cut"
    deployment.link.mend()
    back = time.monotonic()
    for robot in robots:
        robot.join()

    undisturbed.check(*robots)
    assert not any(robot.errors for robot in robots)
    assert not robots[0].answers[-1].degraded
    report("network specialist to Redis cut", robots, lost=lost, back=back)


def test_a_network_to_the_store_that_swallows_everything_is_noticed_and_survived(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    robots = _held(deployment, 7, only_a=True)

    lost = time.monotonic()
    deployment.link.stall()
    _let_go(robots, 7)
    time.sleep(4)
    assert len(robots[0].answers) == 7
    deployment.link.mend()
    back = time.monotonic()
    for robot in robots:
        robot.join()

    undisturbed.check(*robots)
    assert not any(robot.errors for robot in robots)
    report("network specialist to Redis stalled", robots, lost=lost, back=back)


def test_a_full_store_is_a_clear_error_until_there_is_room(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    robots = _held(deployment, 7)
    hasty = Robot(3, deployment.generalist.address, list(deployment.specialists), timeouts=replace(TIMEOUTS, budget=1))
    hasty.start(hold=[15])
    hasty.reach(15)

    with redis.Redis.from_url(deployment.redis.url) as client:
        before = client.config_get("maxmemory*")
        lost = time.monotonic()
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1mb")
        _let_go(robots, 7)
        hasty.go(15)
        # Not every error says it: a budget may run out in the middle of an attempt.
        until(lambda: any("used memory > 'maxmemory'" in str(error) for error in hasty.errors), 60, lambda: "no reason")
        assert [len(robots[0].answers), len(hasty.answers)] == [7, 15]
        until(lambda: not deployment.generalist.ready(), 10, lambda: "ready with a store that takes nothing")
        client.config_set("maxmemory", before["maxmemory"])
        client.config_set("maxmemory-policy", before["maxmemory-policy"])
        back = time.monotonic()
    for robot in (*robots, hasty):
        robot.join()

    undisturbed.check(*robots, hasty)
    assert not any(robot.errors for robot in robots)
    report("Redis full (maxmemory, noeviction)", [*robots, hasty], lost=lost, back=back)


def _held(deployment: Deployment, *steps: int, only_a: bool = False) -> list[Robot]:
    """Two robots before the first of the steps, which wait there; at 7 and 15 the next conditioning is due."""
    specialists = [deployment.a.address] if only_a else list(deployment.specialists)
    robots = [Robot(number, deployment.generalist.address, specialists) for number in (1, 2)]
    for robot in robots:
        robot.start(hold=steps)
        robot.reach(steps[0])
    return robots


def _let_go(robots: list[Robot], step: int) -> None:
    for robot in robots:
        robot.go(step)
