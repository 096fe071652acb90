"""Control steps that went by unasked, and latency that is added on purpose."""

from __future__ import annotations

import statistics
import time

import grpc
import pytest
from fake_services import observation

from robodual_client import DualSystemClient
from robodual_client.errors import DeadlineExceeded


def test_steps_that_went_by_count_for_ages_and_for_the_schedule(make, generalist, specialist):
    with make(generalist.address, specialist.address) as client:
        client.reset("open the drawer")
        for skipped in (0, 3, 1, 4, 15):
            client.skip(skipped)
            client.step(observation(0))
        assert client.last.step == 27
    # Due at 0, 7, 15 and 23: asked at the first step from each on.
    assert [request.step for request in generalist.requests("Condition")] == [0, 11, 27]
    acts = [(request.step, request.step - request.min_conditioning.step) for request in specialist.requests("Act")]
    assert acts == [(0, 0), (4, 4), (6, 6), (11, 0), (27, 0)]


def test_steps_that_go_by_before_the_first_answer_do_not_lose_an_episode(
    make, generalist, specialist, second_specialist
):
    replicas = {server.address: server for server in (specialist, second_specialist)}
    with make(generalist.address, list(replicas)) as client:
        client.reset("open the drawer")
        for server in replicas.values():
            if server.requests("Reset"):
                server.sessions.clear()  # as after a restart
                server.fail("Act", (grpc.StatusCode.DEADLINE_EXCEEDED, "not in time"))  # and then on to the other
        with pytest.raises(DeadlineExceeded):
            client.step(observation(0))
        client.skip(3)
        client.step(observation(1))
        assert client.last.step == 3
        (home,) = [server for server in replicas.values() if server.address == client.last.address]
        home.kill()
        client.step(observation(2))
        assert client.last.address != home.address


def test_session_that_is_forgotten_before_the_first_answer_is_begun_again_at_a_later_step(make, generalist, specialist):
    with make(generalist.address, specialist.address) as client:
        client.reset("open the drawer")
        specialist.sessions.clear()
        client.skip(1)
        client.step(observation(0))
        assert client.last.step == 1


def test_each_episode_begins_at_step_0_again(make, generalist, specialist):
    with make(generalist.address, specialist.address) as client:
        for _ in range(2):
            client.reset("open the drawer")
            client.step(observation(0))
            client.skip(2)
            client.step(observation(1))
    assert [request.step for request in specialist.requests("Act")] == [0, 3, 0, 3]
    assert [request.step for request in generalist.requests("Condition")] == [0, 0]


def test_a_negative_number_of_steps_is_refused(make, generalist, specialist):
    with make(generalist.address, specialist.address) as client, pytest.raises(ValueError, match="steps must be"):
        client.skip(-1)


def test_latency_is_added_to_each_round_trip(make, generalist, specialist):
    latency = {"generalist": 0.15, "specialist": 0.04}
    acts, conditions = [], []
    with make(generalist.address, specialist.address, latency=latency, schedule="every-1") as client:
        client.reset("open the drawer")
        for step in range(3):
            client.step(observation(step))
            acts.append(client.last.round_trip)
            conditions.append(client.last.conditioning.round_trip)
    # Once, and not the other's: of three, one is not held up by whatever else this machine does.
    assert 40 <= min(acts) < 80
    assert 150 <= min(conditions) < 300


@pytest.mark.parametrize("make", ["blocking-stream", "asyncio-stream"], indirect=True)
def test_a_generalist_with_latency_ages_what_is_asked_in_the_background(make, generalist, specialist):
    acts = []
    with make(generalist.address, specialist.address, schedule="async", latency={"generalist": 0.2}) as client:
        client.reset("open the drawer")
        client.step(observation(0))
        began = time.monotonic()
        while len(generalist.requests("Condition")) < 4:
            client.step(observation(1))
            acts.append(client.last.round_trip)
            time.sleep(0.01)
    # The second was asked in the first step or after it.
    assert time.monotonic() - began >= 2 * 0.2
    assert statistics.median(acts) < 150


@pytest.mark.parametrize("latency", [{"generalist": -1}, {"specialist": float("nan")}, {"redis": 0.1}])
def test_latency_that_makes_no_sense_is_refused(latency):
    with pytest.raises(ValueError, match="latency must be seconds"):
        DualSystemClient(latency=latency)
