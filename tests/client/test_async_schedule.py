"""The async schedule: conditioning in the background, always of the newest frame, never in a step's way."""

from __future__ import annotations

import asyncio
import threading
import time

import grpc
import numpy as np
import pytest
from fake_services import observation

from robodual_client import AsyncDualSystemClient, DualSystemClient, Timeouts, aio, connection, tensors
from robodual_client.calls import Launch
from robodual_client.errors import InvalidRequest, ServiceMismatch, Unauthenticated

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "shutting down")


@pytest.fixture(params=["blocking", "asyncio"])
def drive(request, generalist, specialist):
    """A function that runs an episode in the async schedule and gives the client's `last` after each step; `pace` is
    what a control step takes besides.
    """

    def blocking(steps, pace, where=generalist.address, **options):
        with DualSystemClient(where, specialist.address, schedule="async", **options) as client:
            client.reset("open the drawer")
            answers = []
            for step in range(steps):
                client.step(observation(step))
                answers.append(client.last)
                time.sleep(pace)
            return answers

    async def awaited(steps, pace, where=generalist.address, **options):
        async with AsyncDualSystemClient(where, specialist.address, schedule="async", **options) as client:
            await client.reset("open the drawer")
            answers = []
            for step in range(steps):
                await client.step(observation(step))
                answers.append(client.last)
                await asyncio.sleep(pace)
            return answers

    if request.param == "blocking":
        return blocking
    return lambda *arguments, **options: asyncio.run(awaited(*arguments, **options))


class InTheAir:
    """Counts the Condition calls that a slow generalist has at hand at once."""

    def __init__(self, delay):
        self._lock = threading.Lock()
        self._delay = delay
        self.now = 0
        self.most = 0

    def __call__(self):
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self._delay)
        with self._lock:
            self.now -= 1


def test_one_request_is_in_the_air_and_it_has_the_newest_frame(drive, generalist, specialist):
    air = InTheAir(0.1)
    generalist.fail("Condition", *[air] * 100)
    answers = drive(60, 0.01)
    requests = generalist.requests("Condition")
    assert air.most == 1
    asked = [request.step for request in requests]
    assert asked[0] == 0
    assert asked == sorted(set(asked))
    assert 4 <= len(asked) <= 15  # 60 steps take at least 0.6 s, an answer takes 0.1 s
    for request in requests:
        frame = observation(request.step)["rgb_obs"]["rgb_static"]
        np.testing.assert_array_equal(tensors.decode_image(request.rgb_static, field="rgb_static"), frame)
    known = [answer.conditioning.step for answer in answers]
    assert known == sorted(known)
    assert known[-1] >= asked[-3]


def test_next_request_leaves_as_soon_as_the_last_is_answered_without_waiting_for_a_step(generalist, specialist):
    generalist.fail("Condition", lambda: None, lambda: time.sleep(0.3))
    with DualSystemClient(generalist.address, specialist.address, schedule="async") as client:
        client.reset("open the drawer")
        for step in range(4):  # step 1's frame is asked about, and 2 and 3 pass meanwhile
            client.step(observation(step))
        deadline = time.monotonic() + 5
        while len(generalist.requests("Condition")) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [request.step for request in generalist.requests("Condition")] == [0, 1, 3]


def test_only_step_0_waits_for_the_generalist(drive, generalist, specialist):
    generalist.fail("Condition", lambda: None, *[lambda: time.sleep(0.5)] * 5)
    start = time.monotonic()
    answers = drive(20, 0.0)
    assert time.monotonic() - start < 3
    assert max(answer.round_trip for answer in answers) < 400
    acts = specialist.requests("Act")
    assert [request.min_conditioning.step for request in acts] == [0] * 20


def test_generalist_that_goes_away_and_comes_back_costs_age_alone(drive, generalist, specialist):
    generalist.fail("Condition", lambda: None, *[UNAVAILABLE] * 3)
    answers = drive(60, 0.02)
    assert len(answers) == 60
    assert answers[-1].conditioning.step > 20
    assert len(generalist.requests("Condition")) < 60


def test_generalist_that_takes_too_long_is_asked_anew(drive, generalist, specialist):
    generalist.fail("Condition", lambda: None, lambda: time.sleep(0.4))
    answers = drive(30, 0.02, timeouts=Timeouts(condition=0.15))
    assert answers[-1].conditioning.step > 5


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ((grpc.StatusCode.UNAUTHENTICATED, "token expired"), Unauthenticated),
        ((grpc.StatusCode.INVALID_ARGUMENT, "instruction: not English"), InvalidRequest),
    ],
)
def test_refusal_in_the_background_is_raised_by_the_next_step(drive, generalist, specialist, fault, error):
    generalist.fail("Condition", lambda: None, fault)
    with pytest.raises(error, match=fault[1]):
        drive(30, 0.02)


@pytest.mark.parametrize("launched", [False, True])
def test_ctrl_c_at_a_launch_does_not_silence_the_generalist(generalist, specialist, monkeypatch, launched):
    with DualSystemClient(generalist.address, specialist.address, schedule="async") as client:
        client.reset("open the drawer")
        client.step(observation(0))
        perform = client._connections._perform

        def interrupted(operation):
            if not isinstance(operation, Launch):
                return perform(operation)
            monkeypatch.undo()
            if launched:
                perform(operation)
            raise KeyboardInterrupt

        monkeypatch.setattr(client._connections, "_perform", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.step(observation(1))
        for step in range(1, 20):
            client.step(observation(step))
            time.sleep(0.02)
        assert client.last.conditioning.step > 10


def test_generalist_that_moves_is_looked_up_again(drive, generalist, second_generalist, specialist, monkeypatch):
    addresses, passed = [generalist.address], []

    def look_up(name):
        before = len(specialist.requests("Act"))
        time.sleep(0.2)
        passed.append(len(specialist.requests("Act")) - before)
        return list(addresses)

    def move():
        addresses[:] = [second_generalist.address]
        generalist.kill()

    monkeypatch.setattr(connection, "lookup", look_up)
    monkeypatch.setattr(aio, "lookup", look_up)
    specialist.fail("Act", *[lambda: None] * 10, move)
    answers = drive(60, 0.02, "dns:///generalist:50051")
    assert answers[-1].conditioning.step > 11
    assert answers[-1].conditioning.step in [request.step for request in second_generalist.requests("Condition")]
    assert 2 <= len(passed) <= 5  # at the start, and once each time that the generalist did not answer
    assert min(passed[1:]) > 1  # steps went on meanwhile


def test_generalist_of_another_model_is_refused_by_the_next_step(drive, generalist, specialist):
    generalist.fail("Condition", lambda: None, lambda: setattr(generalist, "checkpoint", "decaf"), UNAVAILABLE)
    with pytest.raises(ServiceMismatch, match=r"generalist at .*'decaf'"):
        drive(60, 0.02)
    assert len(generalist.requests("Condition")) == 3


def test_reset_ends_what_is_in_the_air(generalist, specialist):
    with DualSystemClient(generalist.address, specialist.address, schedule="async") as client:
        client.reset("open the drawer")
        client.step(observation(0))
        generalist.fail("Condition", lambda: time.sleep(0.3))
        client.step(observation(1))
        client.step(observation(2))
        client.reset("close the drawer")
        client.step(observation(3))
        assert client.last.conditioning.episode == 2
        time.sleep(0.4)
        client.step(observation(4))
        time.sleep(0.1)
    asked = [(request.episode, request.step) for request in generalist.requests("Condition")]
    assert (1, 2) not in asked
    assert asked[-2:] == [(2, 0), (2, 1)]


def test_conditioning_that_is_too_old_is_made_anew_of_the_current_frame(drive, generalist, specialist):
    generalist.fail("Condition", lambda: None, *[(grpc.StatusCode.UNAVAILABLE, "away")] * 2)

    def too_old():
        if len(specialist.requests("Act")) == 11:
            specialist.fail("Act", (grpc.StatusCode.FAILED_PRECONDITION, "the conditioning is of step 0"))

    specialist.fail("Act", *[too_old] * 11)
    answers = drive(15, 0.0)
    assert len(answers) == 15
    assert answers[-1].conditioning_step >= 10
