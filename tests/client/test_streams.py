"""The blocking client's streams: when they are opened, and opened again."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import numpy as np
import pytest
from fake_services import episode, observation

from robodual_client import DualSystemClient, connection, stream
from robodual_client.calls import Call
from robodual_client.channel import is_proxied, security
from robodual_client.connection import Connections
from robodual_client.errors import Failure
from robodual_client.wire import rpc


def streams(client):
    return client._connections._streams


def test_a_stream_that_was_cut_while_idle_is_opened_again_unnoticed(generalist, specialist, undisturbed, monkeypatch):
    monkeypatch.setattr(stream, "REST", 0)
    with DualSystemClient(generalist.address, specialist.address, seed=3) as client:
        client.reset("lift the red block")
        actions, opened = [], set()
        for step in range(20):
            actions.append(client.step(observation(step)))
            assert client.last.failures == 0
            (current,) = streams(client).values()
            opened.add(id(current))
            if step % 5 == 0:
                current._socket.shutdown(socket.SHUT_RDWR)
                kept = current  # so that no other has its id
        del kept
    assert len(opened) > 1
    np.testing.assert_array_equal(actions, undisturbed)


def test_one_stream_serves_all_episodes(generalist, specialist, obs):
    with DualSystemClient(generalist.address, specialist.address) as client:
        opened = set()
        for _ in range(3):
            client.reset("lift the red block")
            client.step(obs)
            opened |= set(streams(client).values())
    assert len(opened) == 1


@pytest.mark.timeout(30)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("by", ["signal", "thread"])
def test_a_client_that_is_closed_in_the_middle_of_a_step_ends_it(generalist, specialist, obs, by, stream):
    client = DualSystemClient(generalist.address, specialist.address, stream=stream)
    client.reset("lift the red block")
    client.step(obs)
    before = signal.signal(signal.SIGUSR1, lambda *_: client.close())
    answered = threading.Event()
    if by == "signal":
        specialist.fail("Act", lambda: (os.kill(os.getpid(), signal.SIGUSR1), answered.wait(10)))
    else:
        specialist.fail("Act", lambda: (client.close(), answered.wait(10)))
    try:
        with pytest.raises(RuntimeError, match="the client is closed"):
            client.step(obs)
    finally:
        answered.set()
        signal.signal(signal.SIGUSR1, before)
    assert client._connections._current is None or client._connections._current._socket.fileno() == -1
    assert not streams(client)


def test_a_name_in_the_address_is_looked_up(generalist, specialist, undisturbed):
    port = specialist.address.rpartition(":")[2]
    with DualSystemClient(generalist.address, f"localhost:{port}", seed=3) as client:
        client.reset("lift the red block")
        np.testing.assert_array_equal(episode(client), undisturbed)
        assert list(streams(client)) == [f"localhost:{port}"]


def test_a_name_and_an_answer_that_take_long_have_one_time_limit_between_them(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = [f"127.0.0.1:{silent.getsockname()[1]}"]

        def slowly(name):
            time.sleep(1.4)
            return found

        monkeypatch.setattr(connection, "lookup", slowly)
        connections = Connections(security(None, False), stream=True)
        start = time.monotonic()
        with pytest.raises(Failure, match=r"DEADLINE_EXCEEDED: no answer within 1\.5 s"):
            connections._perform(Call("specialist:50052", rpc.SPECIALIST, "Act", [b"request"], 1.5))
        assert time.monotonic() - start < 2.4
        with pytest.raises(Failure, match=r"UNAVAILABLE: the name cannot be resolved: no answer within 0\.1 s"):
            connections._perform(Call("specialist:50052", rpc.SPECIALIST, "Act", [b"request"], 0.1))
        connections.close()


def test_through_a_proxy_steps_are_calls_of_grpcs(generalist, specialist, undisturbed, monkeypatch):
    monkeypatch.setattr(connection, "is_proxied", lambda address: address == specialist.address)
    with DualSystemClient(generalist.address, specialist.address, seed=3) as client:
        client.reset("lift the red block")
        np.testing.assert_array_equal(episode(client), undisturbed)
        assert not streams(client)


@pytest.mark.parametrize("name", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_a_proxy_is_one_that_the_environment_names_for_grpc(name, monkeypatch):
    for other in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    assert not is_proxied("10.0.0.1:50052")
    monkeypatch.setenv(name, "http://10.0.0.9:3128")
    assert all(map(is_proxied, ("10.0.0.1:50052", "specialist:50052")))
    assert not any(map(is_proxied, ("127.0.0.1:50052", "[::1]:50052", "localhost:50052")))


@pytest.mark.parametrize(
    ("excepted", "address", "proxied"),
    [
        ("10.0.0.1", "10.0.0.1:50052", False),
        ("lab.example, 10.0.0.0/24", "10.0.0.1:50052", False),
        ("lab.example,10.0.0.0/24", "10.0.1.1:50052", True),
        ("lab.example", "specialist.LAB.example:50052", False),
        (".lab.example", "lab.example:50052", True),
        ("fd00::/8", "[fd00::1]:50052", False),
        ("", "10.0.0.1:50052", True),
        ("*", "10.0.0.1:50052", True),
    ],
)
def test_what_no_proxy_excepts_is_reached_by_a_stream(excepted, address, proxied, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://10.0.0.9:3128")
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    monkeypatch.setenv("no_proxy", excepted)
    assert is_proxied(address) is proxied
    monkeypatch.setenv("no_proxy", "elsewhere")
    monkeypatch.setenv("no_grpc_proxy", excepted)  # which counts alone
    assert is_proxied(address) is proxied
