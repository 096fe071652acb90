"""Clients that get in each other's way: two under one name, and one that does not read its answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from deployment import Deployment, until
from recovery import Report
from replicas import act, action, frame, version
from robots import STEPS, Robot, Undisturbed

from robodual_client import tensors, wire
from robodual_client.errors import SessionConflict
from robodual_client.wire import rpc

MANY = 120  # steps that the slow one asks for, 330 kB each
# Otherwise gRPC takes in megabytes of answers that nobody has asked for yet.
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]
GROWTH = 24 * 2**20  # bytes that a specialist may keep of them


def test_two_clients_under_one_name_never_get_each_others_actions(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    name = uuid.uuid4().hex
    place = deployment.generalist.address, list(deployment.specialists)
    first, second = Robot(1, *place, session=name), Robot(2, *place, session=name)

    # Before the first action and after it, the episode is the first one's; who is refused leaves nothing behind.
    first.reset()
    for begun in ("another client has begun episode 1", "1 has begun already"):
        with pytest.raises(SessionConflict, match=begun):
            second.reset()
        second.client.close()
        for _ in range(10):
            first.step()
        second = Robot(2, *place, session=name)
    while len(first.answers) < STEPS:
        first.step()
    undisturbed.check(first)
    assert max(answer.failures for answer in first.answers) == 0

    # A later episode is a takeover: the one that it was taken from is told, and gets nothing, also when it goes.
    lost = time.monotonic()
    heir = Robot(2, *place, session=name, episode=2)
    heir.reset()
    while len(heir.answers) < 12:
        heir.step()
        with pytest.raises(SessionConflict, match="used this session id"):
            first.step()
    first.client.close()
    back = time.monotonic()
    while len(heir.answers) < STEPS:
        heir.step()
    assert len(first.answers) == STEPS
    undisturbed.check(heir)
    report("two clients under one session id", [first, heir], lost=lost, back=back)
    for robot in (second, heir):
        robot.client.close()


def test_a_client_that_does_not_read_its_answers_costs_nobody_else_anything(
    deployment: Deployment, undisturbed: Undisturbed, report: Report
) -> None:
    with _stream(deployment, "quick", []) as quick:
        expected = [action(answer) for answer in quick]
    before = deployment.a.process.memory_info().rss

    lost = time.monotonic()
    taken: list[float] = []
    with _stream(deployment, "slow", taken) as slow:
        until(lambda: bool(taken) and time.monotonic() - taken[-1] > 1, 60, lambda: "requests went on and on")
        assert len(taken) < MANY / 2, "nothing held the requests back"
        robots = [Robot(number, deployment.generalist.address, deployment.a.address) for number in (1, 2)]
        for robot in robots:
            robot.start()
        for robot in robots:
            robot.join()
        assert deployment.a.process.memory_info().rss - before < GROWTH
        back = time.monotonic()
        answers = list(slow)

    undisturbed.check(*robots)
    assert [answer.step for answer in answers] == list(range(MANY))
    np.testing.assert_array_equal([action(answer) for answer in answers], expected)
    report("slow consumer of ActStream", robots, lost=lost, back=back)


@contextmanager
def _stream(deployment: Deployment, session: str, taken: list[float]) -> Iterator[Iterator[wire.ActResponse]]:
    """The answers of an ActStream at specialist A, whose requests are sent as fast as they are taken.

    `taken` gets the times at which they were.
    """
    with grpc.insecure_channel(deployment.generalist.address) as channel:
        image = tensors.encode_image(frame(0))
        glance = wire.ConditionRequest(session_id=session, episode=1, instruction="push", rgb_static=image)
        rpc.Stub(channel, rpc.GENERALIST).Condition(glance, timeout=60)

    def requests() -> Iterator[wire.ActRequest]:
        for step in range(MANY):
            taken.append(time.monotonic())
            yield act(session, step, min_conditioning=version(1, 0))

    with grpc.insecure_channel(deployment.a.address, options=NARROW) as channel:
        stub = rpc.Stub(channel, rpc.SPECIALIST)
        stub.Reset(wire.ResetRequest(session_id=session, episode=1, seed=7), timeout=60)
        yield stub.ActStream(requests(), timeout=120)
