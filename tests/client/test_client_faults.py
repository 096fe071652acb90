"""Both clients when services fail: what is repeated, what is carried on with elsewhere, and what is raised."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import grpc
import numpy as np
import pytest
from fake_services import observation

from robodual_client import AsyncDualSystemClient, DualSystemClient, Timeouts
from robodual_client.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NoConditioning,
    ServiceFailed,
    ServiceMismatch,
    ServiceUnavailable,
    SessionConflict,
    SessionLost,
    Unauthenticated,
)

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "shutting down")
QUEUE_FULL = (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("fault", [UNAVAILABLE, QUEUE_FULL, (grpc.StatusCode.CANCELLED, "gone")])
def test_every_call_is_repeated_when_a_service_is_briefly_away(make, generalist, specialist, undisturbed, fault):
    for server, methods in ((generalist, ("GetInfo", "Reset", "Condition")), (specialist, ("GetInfo", "Reset", "Act"))):
        for method in methods:
            server.fail(method, fault, fault)
    with make(generalist.address, specialist.address, seed=3) as client:
        client.reset("lift the red block")
        first = client.step(observation(0))
        assert client.last.failures == 2
        rest = [client.step(observation(step)) for step in range(1, 20)]
    np.testing.assert_array_equal([first, *rest], undisturbed)
    assert [request.step for request in generalist.requests("Condition")] == [0, 0, 0, 7, 15]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ((grpc.StatusCode.INVALID_ARGUMENT, "observation.rgb_static: too small"), InvalidRequest),
        ((grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 4)"), InvalidRequest),
        ((grpc.StatusCode.UNAUTHENTICATED, "no token"), Unauthenticated),
        ((grpc.StatusCode.PERMISSION_DENIED, "session of another token"), Unauthenticated),
        ((grpc.StatusCode.FAILED_PRECONDITION, "step: the session is at step 9"), SessionConflict),
        ((grpc.StatusCode.INTERNAL, "broken"), ServiceFailed),
        ((grpc.StatusCode.UNIMPLEMENTED, "no such method"), ServiceMismatch),
        ((grpc.StatusCode.DEADLINE_EXCEEDED, "not in time"), DeadlineExceeded),
    ],
)
def test_refusals_are_raised_at_once_with_what_and_where(make, generalist, specialist, obs, fault, error):
    with make(generalist.address, specialist.address) as client:
        client.reset("open the drawer")
        specialist.fail("Act", fault)
        with pytest.raises(error) as raised:
            client.step(obs)
        assert len(specialist.requests("Act")) == 1
        for part in (fault[1], fault[0].name, f"Specialist.Act at {specialist.address}"):
            assert part in str(raised.value)
        assert client.step(obs).shape == (7,)  # the same step, asked for again
        assert client.last.step == 0


def test_deadline_is_kept_and_the_step_can_be_asked_for_again(make, generalist, specialist, undisturbed):
    with make(generalist.address, specialist.address, seed=3, timeouts=Timeouts(act=0.3)) as client:
        client.reset("lift the red block")
        actions = [client.step(observation(step)) for step in range(5)]
        specialist.fail("Act", lambda: time.sleep(0.6))
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"Specialist\.Act at 127"):
            client.step(observation(5))
        assert 0.25 < time.monotonic() - start < 0.55
        time.sleep(0.5)  # the fake answers one request at a time
        actions += [client.step(observation(step)) for step in range(5, 20)]
    np.testing.assert_array_equal(actions, undisturbed)


def test_unreachable_service_is_reported_within_the_time_for_connecting(make, generalist):
    nobody = closed_port()
    with make(generalist.address, nobody, timeouts=Timeouts(connect=0.5)) as client:
        start = time.monotonic()
        with pytest.raises(ServiceUnavailable, match=f"GetInfo at {nobody}.*attempts in.*robodual doctor"):
            client.reset("open the drawer")
        assert time.monotonic() - start < 2


def test_host_that_says_nothing_is_reported_within_the_time_for_connecting(make, generalist):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with make(generalist.address, address, timeouts=Timeouts(connect=0.5)) as client:
            start = time.monotonic()
            with pytest.raises((DeadlineExceeded, ServiceUnavailable), match=f"GetInfo at {address}"):
                client.reset("open the drawer")
            assert time.monotonic() - start < 2


def test_specialist_that_stays_away_is_given_up_after_the_budget(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address, timeouts=Timeouts(budget=0.6)) as client:
        client.reset("open the drawer")
        client.step(obs)
        specialist.kill()
        start = time.monotonic()
        with pytest.raises(ServiceUnavailable, match=r"attempts in 0\.\d s"):
            client.step(obs)
        assert time.monotonic() - start < 2


def test_stream_that_ended_between_two_steps_says_why(generalist, specialist):
    async def drive():
        timeouts = Timeouts(budget=0.01)
        async with AsyncDualSystemClient(generalist.address, specialist.address, timeouts=timeouts) as client:
            await client.reset("open the drawer")
            await client.step(observation(0))
            specialist.kill()
            await asyncio.sleep(0.2)
            await client.step(observation(1))

    with pytest.raises(ServiceUnavailable, match=r"the stream had ended \([A-Z]+: [A-Za-z]+"):
        asyncio.run(drive())


def test_restarted_specialist_goes_on_with_the_same_actions(make, generalist, specialist, undisturbed):
    with make(generalist.address, specialist.address, seed=3) as client:
        client.reset("lift the red block")
        actions = []
        for step in range(20):
            if step in (1, 7, 12):
                specialist.kill()
                specialist.start()
            actions.append(client.step(observation(step)))
    np.testing.assert_array_equal(actions, undisturbed)


def test_another_replica_goes_on_with_the_same_actions(make, generalist, specialist, second_specialist, undisturbed):
    replicas = {server.address: server for server in (specialist, second_specialist)}
    with make(generalist.address, list(replicas), seed=3) as client:
        client.reset("lift the red block")
        actions = []
        for step in range(20):
            if step in (0, 4, 11):
                others = set(replicas) - {client.last.address if client.last else specialist.address}
                if step == 0:
                    others = {server.address for server in replicas.values() if not server.requests("Reset")}
                victim = replicas[(set(replicas) - others).pop()]
                victim.kill()
                actions.append(client.step(observation(step)))
                assert client.last.address in others
                assert client.last.failures >= 1
                victim.start()
            else:
                actions.append(client.step(observation(step)))
                assert client.last.failures == 0
    np.testing.assert_array_equal(actions, undisturbed)


def test_session_that_a_specialist_forgot_is_carried_on_with(make, generalist, specialist, undisturbed):
    with make(generalist.address, specialist.address, seed=3) as client:
        client.reset("lift the red block")
        actions = []
        for step in range(20):
            if step in (0, 1, 8):
                specialist.sessions.clear()
            actions.append(client.step(observation(step)))
    np.testing.assert_array_equal(actions, undisturbed)


def test_session_that_cannot_be_carried_on_with_is_lost(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address) as client:
        client.reset("open the drawer")
        client.step(obs)
        specialist.fail("Act", *[(grpc.StatusCode.NOT_FOUND, "not open here")] * 2)
        with pytest.raises(SessionLost, match="Reset to start the episode anew"):
            client.step(obs)


@pytest.mark.parametrize("code", [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_conditioning_that_the_store_lost_is_made_again_of_the_same_frame(
    make, generalist, specialist, undisturbed, code
):
    with make(generalist.address, specialist.address, seed=3) as client:
        client.reset("lift the red block")
        actions = [client.step(observation(step)) for step in range(10)]
        specialist.fail("Act", (code, "no conditioning of this episode"))
        actions += [client.step(observation(step)) for step in range(10, 20)]
    np.testing.assert_array_equal(actions, undisturbed)
    requests = generalist.requests("Condition")
    assert [request.step for request in requests] == [0, 7, 7, 15]
    assert requests[1] == requests[2]


def test_conditioning_that_never_arrives_is_reported(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address) as client:
        client.reset("open the drawer")
        specialist.fail("Act", *[(grpc.StatusCode.FAILED_PRECONDITION, "no conditioning of this episode")] * 2)
        with pytest.raises(NoConditioning, match="generalist and Redis"):
            client.step(obs)


def test_a_client_that_was_refused_closes_nothing_of_the_session_s_owner(make, generalist, specialist):
    with make(generalist.address, specialist.address, session="robot") as client:
        specialist.fail("Reset", (grpc.StatusCode.FAILED_PRECONDITION, "episode: 1 has begun already"))
        with pytest.raises(SessionConflict):
            client.reset("open the drawer")
    assert not generalist.requests("Close")
    assert not specialist.requests("Close")


def test_close_does_not_wait_for_services_that_are_gone(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address) as client:
        client.reset("open the drawer")
        client.step(obs)
        specialist.kill()
        generalist.kill()
        start = time.monotonic()
        client.close()
        assert time.monotonic() - start < 3


def test_interrupted_step_can_be_asked_for_again(generalist, specialist, undisturbed, monkeypatch):
    with DualSystemClient(generalist.address, specialist.address, seed=3) as client:
        client.reset("lift the red block")
        actions = [client.step(observation(step)) for step in range(3)]
        main = threading.main_thread().ident
        specialist.fail("Act", lambda: (time.sleep(0.1), _interrupt(main), time.sleep(0.2)))
        with pytest.raises(KeyboardInterrupt):
            client.step(observation(3))
        actions += [client.step(observation(step)) for step in range(3, 20)]
    np.testing.assert_array_equal(actions, undisturbed)


def _interrupt(thread):
    import signal

    signal.pthread_kill(thread, signal.SIGINT)


def test_cancelled_step_can_be_asked_for_again(generalist, specialist, undisturbed):
    async def drive():
        async with AsyncDualSystemClient(generalist.address, specialist.address, seed=3) as client:
            await client.reset("lift the red block")
            actions = [await client.step(observation(step)) for step in range(3)]
            specialist.fail("Act", lambda: time.sleep(0.4))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.step(observation(3)), 0.1)
            await asyncio.sleep(0.4)
            return actions + [await client.step(observation(step)) for step in range(3, 20)]

    np.testing.assert_array_equal(asyncio.run(drive()), undisturbed)
