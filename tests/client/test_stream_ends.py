"""How long the stream of actions waits for whom, and how it learns that it was ended."""

from __future__ import annotations

import socket
import struct
import threading
import time

import grpc
import pytest
from h2.settings import SettingCodes
from http2_server import HEADERS, REQUEST, SETTINGS, WHOLE, connect, echo, frame, response

from robodual_client import channel, stream
from robodual_client.channel import security
from robodual_client.errors import Failure
from robodual_client.stream import ActStream


def test_a_silent_or_dripping_service_is_given_up_in_time(serve):
    def drip(peer):
        next(peer.messages())
        while True:
            peer.ping()
            time.sleep(0.05)

    for handler in (drip, lambda peer: [None for _ in peer.messages()]):
        opened = connect(serve(handler).address)
        start = time.monotonic()
        with pytest.raises(Failure, match=r"no answer within 0\.3 s") as caught:
            opened.exchange(REQUEST, 0.3)
        assert 0.25 < time.monotonic() - start < 1
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        opened.close()


def test_a_service_that_does_not_take_the_request_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        opened = connect(f"127.0.0.1:{listener.getsockname()[1]}")  # by the kernel; nobody reads
        with pytest.raises(Failure, match="DEADLINE_EXCEEDED"):
            opened.exchange(REQUEST, 0.2)
        opened.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs Linux")
def test_a_host_that_takes_nothing_is_given_up_before_the_time_for_an_answer_is_over(monkeypatch):
    monkeypatch.setattr(channel, "SILENT", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        opened = connect(f"127.0.0.1:{listener.getsockname()[1]}")
        opened._http.receive(SETTINGS + frame(8, 0, 0, b"\x40\0\0\0") + frame(4, 0, 0, struct.pack(">HI", 4, 2**30)))
        with pytest.raises(Failure, match=r"UNAVAILABLE: no connection: .*timed out"):
            opened.exchange([bytes(64 << 20)], 20)
        opened.close()


def test_the_first_address_that_can_be_reached_is_taken(serve):
    server = serve(echo)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"127.0.0.1:{listener.getsockname()[1]}"
    opened = ActStream(security(None, False), [closed, server.address], "name", "Specialist.Act", 5)
    assert opened.exchange(REQUEST, 5).step == len(WHOLE)
    opened.close()
    with pytest.raises(Failure, match=r"UNAVAILABLE: no connection: .*refused"):
        connect(closed)


def test_an_address_that_is_silent_leaves_time_for_the_next(serve):
    server = serve(echo)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first:
        silent = full.getsockname()
        first.connect(silent)  # there is no room for another
        addresses = [f"127.0.0.1:{silent[1]}", server.address]
        opened = ActStream(security(None, False), addresses, "name", "Specialist.Act", 2)
        assert opened.exchange(REQUEST, 5).step == len(WHOLE)
        opened.close()
        with pytest.raises(Failure, match="DEADLINE_EXCEEDED"):
            connect(addresses[0], 0.2)


def test_a_connection_that_was_cut_while_idle_is_noticed(serve, monkeypatch):
    cut = threading.Event()

    def once(peer):
        next(peer.messages())
        peer.answer(response().SerializeToString())
        cut.wait(5)

    opened = connect(serve(once).address)
    opened.exchange(REQUEST, 5)
    monkeypatch.setattr(stream, "REST", 0)
    assert not opened.has_ended()
    cut.set()
    until = time.monotonic() + 5
    while not opened.has_ended():
        assert time.monotonic() < until
        time.sleep(0.01)
    opened.close()


@pytest.mark.parametrize("end", [lambda h2: h2.end_stream(1), lambda h2: h2.reset_stream(1, 1)])
def test_a_stream_that_a_proxy_ended_since_it_was_idle_is_noticed_at_the_next_step(serve, end):
    idle = threading.Event()

    def proxy(peer):
        next(peer.messages())
        peer.answer(response().SerializeToString())
        idle.wait(5)
        end(peer.h2)
        peer.flush()
        list(peer.messages())

    opened = connect(serve(proxy).address)
    opened.exchange(REQUEST, 5)
    idle.set()
    until = time.monotonic() + 5  # half of what proxies wait, at least
    while not opened.has_ended():
        assert time.monotonic() < until
        time.sleep(0.1)
    opened.close()


def test_an_answer_that_nobody_asked_for_ends_the_stream(serve, monkeypatch):
    def twice(peer):
        next(peer.messages())
        peer.answer(response(1).SerializeToString())
        peer.answer(response(2).SerializeToString())
        list(peer.messages())

    opened = connect(serve(twice).address)
    assert opened.exchange(REQUEST, 5).step == 1
    monkeypatch.setattr(stream, "REST", 0)
    time.sleep(0.1)
    assert opened.has_ended()
    opened.close()


def test_why_a_service_closed_the_connection_while_the_request_was_written_is_told(serve):
    def refuse(peer):
        peer._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.h2.increment_flow_control_window(2**30)
        peer.flush()
        while 1 not in peer.h2.streams:
            peer.h2.receive_data(peer._socket.recv(65_536))
            peer.flush()
        peer.h2.send_headers(1, [*HEADERS, ("grpc-status", "16"), ("grpc-message", "withdrawn")], end_stream=True)
        peer.flush()  # what comes is not read: the connection is reset

    opened = connect(serve(refuse, {SettingCodes.INITIAL_WINDOW_SIZE: 2**30}).address)
    with pytest.raises(Failure, match="UNAUTHENTICATED: withdrawn"):
        opened.exchange([bytes(64 << 20)], 5)
    opened.close()
