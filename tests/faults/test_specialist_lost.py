"""A specialist is killed, restarted, drained."""

from __future__ import annotations

import time

import grpc
from deployment import Deployment, until
from recovery import Report
from replicas import act, frame, version
from robots import Robot, Undisturbed

from robodual_client import tensors, wire
from robodual_client.wire import rpc


def test_another_replica_goes_on_with_the_episode_of_one_that_was_killed(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    replicas = deployment.specialists
    robots = [Robot(number, deployment.generalist.address, list(replicas)) for number in (1, 2, 3)]
    for robot in robots:
        robot.start(hold=[10] if robot is robots[0] else [])
    robots[0].reach(10)
    victim = replicas[robots[0].answers[-1].address]

    lost = time.monotonic()
    victim.kill()
    robots[0].go(10)
    for robot in robots:
        robot.join()

    undisturbed.check(*robots)
    assert {answer.address for answer in robots[0].answers} == set(replicas)
    assert not any(robot.errors for robot in robots)
    report("specialist killed, a replica beside it", robots, lost=lost, back=lost)
    victim.start()


def test_a_specialist_that_was_killed_and_restarted_goes_on_with_the_episode(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    robots = [Robot(number, deployment.generalist.address, deployment.a.address) for number in (1, 2, 3)]
    for robot in robots:
        robot.start(hold=[10] if robot is robots[0] else [])
    robots[0].reach(10)

    lost = time.monotonic()
    deployment.a.kill()
    deployment.a.start()
    robots[0].go(10)
    deployment.a.wait_until_ready()
    back = time.monotonic()
    for robot in robots:
        robot.join()

    undisturbed.check(*robots)
    assert robots[0].answers[10].failures > 0
    report("specialist killed and restarted", robots, lost=lost, back=back)


def test_a_specialist_told_to_stop_answers_what_it_has_and_hands_its_sessions_over(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    replicas = deployment.specialists
    robots = [Robot(number, deployment.generalist.address, list(replicas)) for number in (1, 2, 3)]
    for robot in robots:
        robot.start(hold=[12] if robot is robots[0] else [])
    robots[0].reach(12)
    leaving = replicas[robots[0].answers[-1].address]

    with grpc.insecure_channel(leaving.address) as channel, grpc.insecure_channel(deployment.generalist.address) as g:
        stub = rpc.Stub(channel, rpc.SPECIALIST)
        stub.Reset(wire.ResetRequest(session_id="in-flight", episode=1), timeout=20)
        in_flight = stub.Act.future(act("in-flight", 0, min_conditioning=version(1, 0)), timeout=20)
        stub.GetInfo(wire.InfoRequest(), timeout=20)  # the service has seen what was sent before this

        lost = time.monotonic()
        leaving.terminate()
        until(lambda: leaving.readiness() == 503, 5, lambda: "a service that drains says that it is ready")
        robots[0].go(12)
        assert not in_flight.done()
        rpc.Stub(g, rpc.GENERALIST).Condition(_glance("in-flight"), timeout=20)
        assert in_flight.result(20).step == 0
        for robot in robots:
            robot.join()

    assert leaving.wait(20) == 0
    undisturbed.check(*robots)
    assert robots[0].answers[12].address != leaving.address
    assert not any(robot.errors for robot in robots)
    report("specialist drained by SIGTERM, sessions handed over", robots, lost=lost, back=lost)
    leaving.start()


def test_a_replica_makes_up_for_a_store_that_was_emptied_when_the_specialist_died(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    replicas = deployment.specialists
    robot = Robot(1, deployment.generalist.address, list(replicas))
    robot.start(hold=[12])
    robot.reach(12)
    victim = replicas[robot.answers[-1].address]

    lost = time.monotonic()
    victim.kill()
    deployment.kill_redis()
    deployment.redis.start()
    back = time.monotonic()
    robot.go(12)
    robot.join()

    undisturbed.check(robot)
    assert not robot.errors
    report("specialist and the store's contents lost together", [robot], lost=lost, back=back)
    victim.start()


def _glance(session: str) -> wire.ConditionRequest:
    image = tensors.encode_image(frame(0))
    return wire.ConditionRequest(session_id=session, episode=1, step=0, instruction="push", rgb_static=image)
