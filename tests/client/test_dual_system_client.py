"""Both clients against services with scripted faults, over real gRPC."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import grpc
import numpy as np
import pytest
from fake_services import FakeSpecialist, observation

from robodual_client import AsyncDualSystemClient, DualSystemClient, Timeouts, tensors, wire
from robodual_client.errors import (
    DeadlineExceeded,
    InvalidObservation,
    InvalidRequest,
    NoConditioning,
    RoboDualError,
    ServiceFailed,
    ServiceMismatch,
    ServiceUnavailable,
    SessionConflict,
    SessionLost,
    Unauthenticated,
)

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "shutting down")
QUEUE_FULL = (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")


class Awaited:
    """AsyncDualSystemClient, driven step by step as the blocking one is."""

    def __init__(self, *arguments, **options):
        self._client = AsyncDualSystemClient(*arguments, **options)
        self._loop = asyncio.new_event_loop()

    def __getattr__(self, name):
        value = getattr(self._client, name)
        if not asyncio.iscoroutinefunction(value):
            return value
        return lambda *arguments, **options: self._loop.run_until_complete(value(*arguments, **options))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
        self._loop.close()


@pytest.fixture(params=["blocking-stream", "blocking-unary", "asyncio-stream", "asyncio-unary"])
def make(request):
    """A function that makes a client, of each kind in turn."""
    kind, transport = request.param.split("-")
    client = DualSystemClient if kind == "blocking" else Awaited
    return lambda *arguments, **options: client(*arguments, stream=transport == "stream", **options)


def episode(client, steps=20):
    return np.array([client.step(observation(step)) for step in range(steps)])


@pytest.fixture
def undisturbed(generalist):
    """The actions of an episode of 20 steps that nothing goes wrong in."""
    server = FakeSpecialist()
    with DualSystemClient(generalist.address, server.address, seed=3) as client:
        client.reset("lift the red block")
        actions = episode(client)
    server.kill()
    generalist.calls.clear()
    assert len(np.unique(actions)) == actions.size
    return actions


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_published_schedule_conditions_and_acts_in_lock_step(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address, session="robot-1", seed=9) as client:
        client.reset("open the drawer")
        actions = episode(client)
    assert actions.shape == (20, 7)
    assert actions.dtype == np.float64
    conditions = generalist.requests("Condition")
    assert [request.step for request in conditions] == [0, 7, 15]
    assert {request.instruction for request in conditions} == {"open the drawer"}
    np.testing.assert_array_equal(
        tensors.decode_image(conditions[1].rgb_static, field="rgb_static"), observation(7)["rgb_obs"]["rgb_static"]
    )
    acts = specialist.requests("Act")
    assert [request.step for request in acts] == list(range(20))
    assert [request.min_conditioning.step for request in acts] == [0] * 7 + [7] * 8 + [15] * 5
    assert not any(request.HasField("recovery") for request in acts)
    for server in (generalist, specialist):
        (reset,) = server.requests("Reset")
        assert (reset.session_id, reset.episode, reset.seed) == ("robot-1", 1, 9)
        assert reset.reference_window == wire.REFERENCE_WINDOW_PUBLISHED
        assert [request.session_id for request in server.requests("Close")] == ["robot-1"]


def test_every_n_conditions_every_n_steps(make, generalist, specialist):
    with make(generalist.address, specialist.address, schedule="every-6") as client:
        client.reset("open the drawer")
        episode(client)
        assert client.last.age == 1
    assert [request.step for request in generalist.requests("Condition")] == [0, 6, 12, 18]
    assert specialist.requests("Reset")[0].reference_window == wire.REFERENCE_WINDOW_AGE


def test_last_tells_what_was_answered_and_how_long_it_took(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address) as client:
        assert client.last is None
        client.reset("open the drawer")
        action = client.step(obs)
        last = client.last
        assert (last.episode, last.step, last.conditioning_step, last.age, last.degraded) == (1, 0, 0, 0, False)
        np.testing.assert_array_equal(last.action, action)
        assert last.chunk.shape == (8, 7)
        assert last.timings == {"denoise": 2.0}
        assert last.conditioning.timings == {"generate": 5.0}
        assert 0 < last.round_trip < 5000
        assert 0 < last.conditioning.round_trip < 5000
        assert (last.failures, last.address) == (0, specialist.address)
        action[:] = 0  # the caller's own array
        assert last.action.any()


def test_episodes_count_upwards(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address) as client:
        assert client.episode == 0
        for expected, options in [(1, {}), (2, {}), (40, {"episode": 40}), (41, {})]:
            client.reset("open the drawer", **options)
            assert client.episode == expected
            client.step(obs)
        with pytest.raises(ValueError, match="episode must be over 41"):
            client.reset("open the drawer", episode=41)
    assert [request.episode for request in specialist.requests("Reset")] == [1, 2, 40, 41]
    assert [(request.episode, request.step) for request in generalist.requests("Condition")] == [
        (1, 0),
        (2, 0),
        (40, 0),
        (41, 0),
    ]


def test_info_tells_what_both_services_are(make, generalist, specialist):
    with make(generalist.address, specialist.address) as client:
        info = client.info()
    assert info["generalist"].service == "generalist"
    assert info["specialist"].parameters == 7
    assert info["specialist"].address == specialist.address


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


def test_sessions_spread_over_replicas_and_find_theirs_again(generalist, specialist, second_specialist, obs):
    addresses = [specialist.address, second_specialist.address]
    chosen = {}
    for number in range(40):
        for order in (addresses, addresses[::-1]):
            client = DualSystemClient(generalist.address, order, session=f"robot-{number}")
            chosen.setdefault(number, set()).add(client._session._specialists.current)
    assert all(len(places) == 1 for places in chosen.values())
    assert 10 <= sum(places == {specialist.address} for places in chosen.values()) <= 30


def test_replica_of_another_model_is_refused(make, generalist, specialist, second_specialist, obs):
    second_specialist.checkpoint = "decaf"
    replicas = {server.address: server for server in (specialist, second_specialist)}
    with make(generalist.address, list(replicas)) as client:
        client.reset("open the drawer")
        client.step(obs)
        replicas[client.last.address].kill()
        with pytest.raises(ServiceMismatch, match="give replicas of one model"):
            client.step(obs)


def test_swapped_addresses_are_told_apart(make, generalist, specialist):
    class Confused(FakeSpecialist):
        def GetInfo(self, request, context):
            return wire.InfoResponse(service="generalist")

    server = Confused()
    with make(generalist.address, server.address) as client, pytest.raises(ServiceMismatch, match="not a specialist"):
        client.reset("open the drawer")
    server.kill()
    with make(specialist.address, generalist.address) as client, pytest.raises(ServiceMismatch, match="swapped"):
        client.reset("open the drawer")


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


def test_unusable_observation_is_refused_before_anything_is_sent(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address) as client:
        client.reset("open the drawer")
        del obs["rgb_obs"]["rgb_gripper"]
        with pytest.raises(InvalidObservation, match="rgb_gripper"):
            client.step(obs)
        assert not generalist.requests("Condition")
        assert not specialist.requests("Act")


def test_action_that_is_not_finite_never_reaches_the_robot(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address) as client:
        client.reset("open the drawer")
        bad = wire.ActResponse(episode=1, step=0, action=tensors.encode(np.full(7, np.nan, np.float32)))
        bad.chunk.CopyFrom(tensors.encode(np.zeros((8, 7), np.float32)))
        specialist.sessions[client.session].update(step=0, answer=bad)
        with pytest.raises(ServiceFailed, match="the action is not finite"):
            client.step(obs)
        bad.action.CopyFrom(tensors.encode(np.zeros(6, np.float32)))
        with pytest.raises(ServiceFailed, match=r"action: shape must be \[7\], got \[6\]"):
            client.step(obs)


def test_answer_to_another_step_is_refused(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address) as client:
        client.reset("open the drawer")
        specialist.sessions[client.session].update(step=0, answer=wire.ActResponse(episode=1, step=8))
        with pytest.raises(ServiceFailed, match="answered step 8 of episode 1 when asked for step 0"):
            client.step(obs)


def test_token_goes_with_every_call(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address, token="hunter2") as client:
        client.reset("open the drawer")
        for server in (generalist, specialist):
            assert ("authorization", "Bearer hunter2") in server.metadata
            server.metadata = []
        client.step(obs)
        for server in (generalist, specialist):
            assert ("authorization", "Bearer hunter2") in server.metadata


def test_misuse_is_named(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address) as client:
        with pytest.raises(RuntimeError, match="call reset"):
            client.step(obs)
        for instruction in ("", "  ", "x" * 513, None, 5):
            with pytest.raises(ValueError, match="instruction must be 1 to 512 characters"):
                client.reset(instruction)
        assert not generalist.calls
        client.reset("open the drawer")
        client.close()
        client.close()
        with pytest.raises(RuntimeError, match="the client is closed"):
            client.step(obs)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"generalist": "localhost"}, "generalist must be 'host:port'"),
        ({"specialist": []}, "specialist must name at least one address"),
        ({"specialist": ["a:1", "a:1"]}, "none twice"),
        ({"session": "robot 1"}, "session must be 1 to 64 characters"),
        ({"session": ""}, "session must be"),
        ({"schedule": "sometimes"}, "schedule must be"),
        ({"seed": -1}, "seed must be 0 to"),
        ({"token": "a b"}, "token must be printable ASCII"),
        ({"token": ""}, "token must be printable ASCII"),
    ],
)
def test_malformed_arguments_are_refused(make, options, expected):
    with pytest.raises(ValueError, match=expected):
        make(**options)
    with pytest.raises(ValueError, match="timeouts: act must be over 0"):
        Timeouts(act=0)


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


def test_closed_client_leaves_no_thread_of_its_own(generalist, specialist, obs):
    before = set(threading.enumerate())
    client = DualSystemClient(generalist.address, specialist.address, schedule="async")
    client.reset("open the drawer")
    client.step(obs)
    client.close()
    left = [thread for thread in set(threading.enumerate()) - before if "ThreadPoolExecutor" not in thread.name]
    deadline = time.monotonic() + 5
    while any(thread.is_alive() for thread in left) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [thread.name for thread in left if thread.is_alive()] == []


def test_every_error_is_a_robodual_error():
    for error in (InvalidObservation, ServiceUnavailable, DeadlineExceeded, SessionLost):
        assert issubclass(error, RoboDualError)
    assert issubclass(DeadlineExceeded, TimeoutError)
    assert issubclass(ServiceUnavailable, ConnectionError)
