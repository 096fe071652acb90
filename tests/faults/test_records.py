"""What stands in Redis under a session's key is not what the generalist made for it."""

from __future__ import annotations

import time

import grpc
import redis
from deployment import Deployment
from recovery import Report
from replicas import conditioning, frame
from robots import Robot, Undisturbed

from robodual.conditioning import codec
from robodual_client import tensors, wire
from robodual_client.wire import rpc

CHANNEL = "robodual:conditioning"


def test_random_bytes_for_a_record_are_refused_dropped_and_made_up_for(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    robots = _two(deployment)
    name = robots[0].client.session
    before = _refused(deployment)

    lost = time.monotonic()
    with redis.Redis.from_url(deployment.redis.url) as intruder:
        # Announced, and under a version that would keep the robot's own conditionings out for good.
        _write(intruder, name, 1, 5000, b"\x80\x04\x95" + bytes(range(256)) * 20)
        robots[0].go(10)
        robots[0].reach(15)
        # Not announced: found when the conditioning of step 15 is waited for.
        intruder.hset(_key(name), mapping={"episode": 1, "step": 5000, "record": b"junk"})
        back = time.monotonic()
        robots[0].go(15)
        for robot in robots:
            robot.join()

    undisturbed.check(*robots)
    assert not any(robot.errors for robot in robots)
    assert _refused(deployment) - before >= 2
    report("poisoned record: random bytes", robots, lost=lost, back=back)


def test_a_valid_record_of_another_session_is_never_acted_upon(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    robots = _two(deployment)
    name, other = (robot.client.session for robot in robots)
    before = _refused(deployment)
    robots[1].reach(23)

    lost = time.monotonic()
    with redis.Redis.from_url(deployment.redis.url) as intruder:
        theirs = intruder.hgetall(_key(other))
        assert (theirs[b"episode"], theirs[b"step"]) == (b"1", b"15")
        _write(intruder, name, 1, 15, theirs[b"record"])
        robots[0].go(10)
        robots[0].reach(15)
        intruder.hset(_key(name), mapping=theirs)
        back = time.monotonic()
        robots[0].go(15)
        for robot in robots:
            robot.join()

    undisturbed.check(*robots)
    assert not any(robot.errors for robot in robots)
    assert _refused(deployment) - before >= 2
    report("poisoned record: a valid one of another session", robots, lost=lost, back=back)


def test_an_older_conditioning_after_a_newer_changes_nothing(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    robots = _two(deployment)
    name = robots[0].client.session

    lost = time.monotonic()
    # By the rules: a frame that was long on its way.
    with grpc.insecure_channel(deployment.generalist.address) as channel:
        late = wire.ConditionRequest(
            session_id=name, episode=1, step=3, instruction="pull", rgb_static=tensors.encode_image(frame(99))
        )
        answer = rpc.Stub(channel, rpc.GENERALIST).Condition(late, timeout=20)
        assert not answer.stored
        assert (answer.latest.episode, answer.latest.step) == (1, 7)
    # And past the store's own guard.
    with redis.Redis.from_url(deployment.redis.url) as intruder:
        _write(intruder, name, 1, 4, codec.encode(conditioning(1, 4), name))
    back = time.monotonic()
    robots[0].go(10)
    robots[0].reach(15)
    robots[0].go(15)
    for robot in robots:
        robot.join()

    undisturbed.check(*robots)
    assert not any(robot.errors for robot in robots)
    report("older conditioning published after a newer", robots, lost=lost, back=back)


def _refused(deployment: Deployment) -> float:
    """Records that the specialists refused."""
    return sum(service.metric("robodual_refused_records_total") for service in (deployment.a, deployment.b))


def _two(deployment: Deployment) -> list[Robot]:
    """Robots on conditionings of step 7: the first waits before step 10, the second goes on up to step 23."""
    place = deployment.generalist.address, list(deployment.specialists)
    robots = [Robot(1, *place), Robot(2, *place)]
    robots[0].start(hold=[10, 15])
    robots[1].start(hold=[23])
    robots[0].reach(10)
    return robots


def _write(client: redis.Redis, session: str, episode: int, step: int, record: bytes) -> None:
    client.hset(_key(session), mapping={"episode": episode, "step": step, "record": record})
    client.publish(CHANNEL, f"{session} {episode} {step}")


def _key(session: str) -> str:
    return f"robodual:{session}:conditioning"
