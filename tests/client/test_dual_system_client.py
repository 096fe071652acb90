"""Both clients over real gRPC: what they send, when, and what they tell."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest
from fake_services import FakeSpecialist, episode, observation

from robodual_client import DualSystemClient, Timeouts, tensors, wire
from robodual_client.errors import (
    DeadlineExceeded,
    InvalidObservation,
    RoboDualError,
    ServiceFailed,
    ServiceMismatch,
    ServiceUnavailable,
    SessionLost,
)


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


def test_sessions_spread_over_replicas_and_find_theirs_again(generalist, specialist, second_specialist, obs):
    addresses = [specialist.address, second_specialist.address]
    chosen = {}
    for number in range(160):  # so many, since ports are the system's choice, and the shares so chance's
        for order in (addresses, addresses[::-1]):
            client = DualSystemClient(generalist.address, order, session=f"robot-{number}")
            chosen.setdefault(number, set()).add(client._session._specialists.current)
    assert all(len(places) == 1 for places in chosen.values())
    assert 40 <= sum(places == {specialist.address} for places in chosen.values()) <= 120


def test_name_that_is_not_there_yet_is_looked_up_again(make, generalist, specialist, obs, monkeypatch):
    real, left = socket.getaddrinfo, [2]

    def late(host, *arguments, **options):
        if left[0]:
            left[0] -= 1
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    with make(generalist.address, f"dns:///localhost:{specialist.port}") as client:
        client.reset("open the drawer")
        client.step(obs)
        assert client.last.address.startswith(("127.0.0.1:", "[::1]:"))


def test_name_that_never_resolves_is_told(make, generalist):
    expected = r"dns:///specialist\.invalid:50052: the name cannot be resolved"
    with make(generalist.address, "dns:///specialist.invalid:50052", timeouts=Timeouts(connect=0.5)) as client:
        with pytest.raises(ServiceUnavailable, match=expected):
            client.reset("open the drawer")
        assert generalist.requests("Reset") == []


def test_replica_of_another_model_is_refused(make, generalist, specialist, second_specialist, obs):
    second_specialist.checkpoint = "decaf"
    replicas = {server.address: server for server in (specialist, second_specialist)}
    with make(generalist.address, list(replicas)) as client:
        client.reset("open the drawer")
        client.step(obs)
        replicas[client.last.address].kill()
        with pytest.raises(ServiceMismatch, match="give replicas of one model"):
            client.step(obs)


def test_generalist_replica_of_another_model_is_refused(make, generalist, second_generalist, specialist):
    second_generalist.checkpoint = "decaf"
    replicas = {server.address: server for server in (generalist, second_generalist)}
    with make(list(replicas), specialist.address) as client:
        client.reset("open the drawer")
        first = client.info()["generalist"].address
        client.step(observation(0))
        replicas.pop(first).kill()
        for step in range(1, 7):
            client.step(observation(step))
        with pytest.raises(ServiceMismatch, match=r"generalist at .*'decaf'.*give replicas of one model"):
            client.step(observation(7))
        (other,) = replicas.values()
        assert not other.requests("Condition")


def redeploy(service):
    service.kill()
    service.checkpoint = "decaf"
    service.start()


def test_model_that_is_replaced_in_an_episode_is_refused(make, generalist, specialist):
    with make(generalist.address, specialist.address) as client:
        client.reset("open the drawer")
        client.step(observation(0))
        redeploy(specialist)
        with pytest.raises(ServiceMismatch, match=r"specialist at .*'decaf'.*'c0ffee'.*go on with a new client"):
            client.step(observation(1))


@pytest.mark.parametrize("name", ["generalist", "specialist"])
def test_model_that_is_replaced_between_episodes_is_refused(make, generalist, specialist, name):
    with make(generalist.address, specialist.address) as client:
        client.reset("open the drawer")
        client.step(observation(0))
        redeploy({"generalist": generalist, "specialist": specialist}[name])
        with pytest.raises(ServiceMismatch, match=f"{name} at .*'decaf'"):
            client.reset("close the drawer")
    with make(generalist.address, specialist.address) as client:
        client.reset("close the drawer")
        assert client.step(observation(0)).shape == (7,)


def test_step_asks_no_service_what_it_is(make, generalist, specialist):
    with make(generalist.address, specialist.address) as client:
        for _ in range(2):
            client.reset("open the drawer")
            asked = len(generalist.requests("GetInfo")), len(specialist.requests("GetInfo"))
            episode(client)
            assert (len(generalist.requests("GetInfo")), len(specialist.requests("GetInfo"))) == asked
    assert asked == (2, 2)


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
        ({"token": b"secret"}, "token must be printable ASCII"),
        ({"tls": "ca.pem"}, "tls must be True, False or Tls"),
        ({"tls": {"ca": "ca.pem"}}, "tls must be True, False or Tls"),
        ({"timeouts": 5}, "timeouts must be Timeouts"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": "1"}, "seed must be a whole number"),
        ({"session": 5}, "session must be"),
        ({"schedule": None}, "schedule must be"),
        ({"generalist": None}, "generalist must be 'host:port'"),
        ({"generalist": "http://a:1"}, "generalist must be 'host:port'"),
        ({"generalist": "a:99999"}, "generalist must be 'host:port'"),
        ({"specialist": "a:1\n"}, "specialist must be 'host:port'"),
        ({"latency": {"specialist": "1"}}, "latency must be seconds"),
        ({"latency": {"specialist": 1e10}}, "latency must be seconds"),
    ],
)
def test_malformed_arguments_are_refused(make, options, expected):
    with pytest.raises(ValueError, match=expected):
        make(**options)


@pytest.mark.parametrize("seconds", [0, float("inf"), float("nan"), 1e10, "1", None])
@pytest.mark.parametrize("name", ["act", "condition", "control", "budget", "connect"])
def test_timeouts_that_nothing_can_wait_for_are_refused(name, seconds):
    with pytest.raises(ValueError, match=f"timeouts: {name} must be over 0 and at most 86400 seconds, got"):
        Timeouts(**{name: seconds})


def test_the_longest_timeouts_work(make, generalist, specialist, obs):
    timeouts = Timeouts(*[86400] * 5)
    with make(generalist.address, specialist.address, timeouts=timeouts, seed=np.uint64(7)) as client:
        client.reset("open the drawer", episode=np.int32(9))
        assert client.step(obs).shape == (7,)
    assert specialist.requests("Reset")[0].seed == 7


def test_what_is_refused_changes_nothing(make, generalist, specialist, obs):
    with make(generalist.address, specialist.address) as client:
        client.reset("open the drawer")
        client.step(obs)
        for episode in (9.5, "9", 1, 2**31):
            with pytest.raises(ValueError, match="episode must be"):
                client.reset("close the drawer", episode=episode)
        for instruction in ("half of a pair \ud800", "x" + " " * 512):
            with pytest.raises(ValueError, match="instruction must be"):
                client.reset(instruction)
        for steps in (1.5, "1", None, 2**31):
            with pytest.raises(ValueError, match="steps must be"):
                client.skip(steps)
        client.skip(np.int64(2))
        client.step(obs)
        assert (client.last.episode, client.last.step) == (1, 3)


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


def test_refused_client_leaves_no_thread_behind(make):
    pytest.importorskip("opentelemetry.sdk")
    before = set(threading.enumerate())
    for options in ({"schedule": "sometimes"}, {"token": "a b"}, {"timeouts": 5}):
        with pytest.raises(ValueError, match="must be"):
            make(traces="http://127.0.0.1:9", **options)
    assert set(threading.enumerate()) <= before


def test_every_error_is_a_robodual_error():
    for error in (InvalidObservation, ServiceUnavailable, DeadlineExceeded, SessionLost):
        assert issubclass(error, RoboDualError)
    assert issubclass(DeadlineExceeded, TimeoutError)
    assert issubclass(ServiceUnavailable, ConnectionError)
