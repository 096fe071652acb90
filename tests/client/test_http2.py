"""The stream of actions on HTTP/2: against h2's side of the protocol, and against bytes that break it."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time

import grpc
import hpack
import pytest
from h2.settings import SettingCodes
from http2_server import HEADERS, Http2Server, message

from robodual_client import channel, stream, wire
from robodual_client.channel import security
from robodual_client.errors import Failure
from robodual_client.http2 import Stream
from robodual_client.stream import ActStream

REQUEST = [b"head", memoryview(bytes(range(256)) * 1300), b"", b"tail"]  # 333 kB
WHOLE = b"".join(REQUEST)


@pytest.fixture
def serve():
    """A function that starts an Http2Server."""
    servers = []

    def start(handler, settings=None):
        servers.append(Http2Server(handler, settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def connect(address, timeout=5.0, token=None):
    return ActStream(security(token, False), [address], address, "Specialist.Act", timeout)


def response(step=7, size=0):
    """An ActResponse of some `size` bytes more than it needs."""
    return wire.ActResponse(step=step, action=wire.Tensor(data=bytes(size)))


def echo(peer):
    """Answers each request with its number of bytes."""
    for request in peer.messages():
        assert request == WHOLE
        peer.answer(response(len(request)).SerializeToString())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {SettingCodes.INITIAL_WINDOW_SIZE: 1_000},
        {SettingCodes.INITIAL_WINDOW_SIZE: 16 << 20, SettingCodes.MAX_FRAME_SIZE: 4 << 20},
        {SettingCodes.MAX_FRAME_SIZE: 20_000},
        {SettingCodes.HEADER_TABLE_SIZE: 0},
        {SettingCodes.HEADER_TABLE_SIZE: 65_536, SettingCodes.MAX_CONCURRENT_STREAMS: 1},
    ],
)
def test_requests_arrive_whole_in_whatever_pieces_the_service_takes(serve, settings):
    server = serve(echo, settings)
    opened = connect(server.address)
    for _ in range(5):
        assert opened.exchange(REQUEST, 5).step == len(WHOLE)
    opened.close()
    assert server.connections == 1


def test_request_is_one_of_grpc(serve):
    seen = []

    def keep(peer):
        for _ in peer.messages():
            seen.append(peer.headers)
            peer.answer(response().SerializeToString())

    opened = connect(serve(keep).address, token="secret")
    opened.exchange(REQUEST, 5)
    opened.close()
    assert seen[0].pop(":authority").startswith("127.0.0.1:")
    assert seen[0] == {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/robodual.v1.Specialist/ActStream",
        "te": "trailers",
        "content-type": "application/grpc",
        "user-agent": "robodual-client",
        "authorization": "Bearer secret",
    }


def test_large_and_padded_answers_come_whole_for_as_long_as_it_takes(serve):
    def flood(peer):
        for number, _ in enumerate(peer.messages()):
            peer.answer(response(number, 200_000).SerializeToString(), pad_length=number)

    opened = connect(serve(flood).address)
    for number in range(60):  # three times the windows that the client gives
        answer = opened.exchange([b"more"], 5)
        assert (answer.step, len(answer.action.data)) == (number, 200_000)
    opened.close()


def test_pings_are_answered_and_what_is_unknown_is_ignored(serve):
    answered = []

    def talk(peer):
        for _ in peer.messages():
            answered.append(peer.acknowledged)
            peer.ping()
            peer.raw(struct.pack(">IBBI", 3, 0xBE, 0, 0)[1:] + b"abc")  # a type of frame that nobody knows
            peer.answer(response().SerializeToString())

    opened = connect(serve(talk).address)
    for _ in range(3):
        opened.exchange([b"more"], 5)
    opened.close()
    assert answered == [0, 1, 2]


def test_an_answer_that_comes_with_the_end_of_the_call_counts(serve):
    def last_words(peer):
        next(peer.messages())
        peer.h2.send_headers(1, HEADERS)
        peer.h2.send_data(1, message(response(3).SerializeToString()))
        peer.end([("grpc-status", "14"), ("grpc-message", "the service is shutting down")])

    opened = connect(serve(last_words).address)
    assert opened.exchange(REQUEST, 5).step == 3
    assert opened.has_ended()
    with pytest.raises(Failure, match="UNAVAILABLE"):
        opened.exchange(REQUEST, 5)
    opened.close()


def test_a_service_that_drains_still_answers_but_the_next_step_belongs_elsewhere(serve):
    def drain(peer):
        for _ in peer.messages():
            peer.raw(struct.pack(">IBBIII", 8, 0x7, 0, 0, 2**31 - 1, 0)[1:])  # GOAWAY: no new streams
            peer.answer(response().SerializeToString())

    opened = connect(serve(drain).address)
    for _ in range(3):
        assert opened.exchange(REQUEST, 5).step == 7
        assert opened.has_ended()  # it will be cut when the service's patience ends
    opened.close()


def end_with(*headers):
    return lambda peer: (peer.h2.send_headers(1, HEADERS), peer.end(list(headers)))


def only(*headers):
    return lambda peer: (peer.h2.send_headers(1, list(headers), end_stream=True), peer.flush())


def goaway(error, last=1):
    return lambda peer: peer.raw(struct.pack(">IBBIII", 12, 0x7, 0, 0, last, error)[1:] + b"calm")


def data(body):
    return lambda peer: (peer.h2.send_headers(1, HEADERS), peer.h2.send_data(1, body), peer.flush())


STATUS = (":status", "200"), ("content-type", "application/grpc")


@pytest.mark.parametrize(
    ("end", "code", "details"),
    [
        (end_with(("grpc-status", "5"), ("grpc-message", "session_id: 100%25 lost")), "NOT_FOUND", "100% lost"),
        (end_with(("grpc-status", "16")), "UNAUTHENTICATED", "no details"),
        (end_with(("grpc-status", "99")), "UNKNOWN", "no details"),
        (end_with(("grpc-status", "0")), "UNAVAILABLE", "ended the stream"),
        (end_with(("x", "y")), "INTERNAL", "without a status"),
        (only(*STATUS, ("grpc-status", "8"), ("grpc-message", "full")), "RESOURCE_EXHAUSTED", "full"),
        (only(*STATUS), "INTERNAL", "without a status"),
        (only((":status", "503")), "UNAVAILABLE", "HTTP status 503"),
        (only((":status", "401")), "UNAUTHENTICATED", "HTTP status 401"),
        (only((":status", "418")), "UNKNOWN", "is this a gRPC service"),
        (only((":status", "200"), ("content-type", "text/html")), "UNKNOWN", "text/html"),
        (lambda peer: (peer.h2.reset_stream(1, 8), peer.flush()), "CANCELLED", "HTTP/2 error 8"),
        (lambda peer: (peer.h2.reset_stream(1, 7), peer.flush()), "UNAVAILABLE", "HTTP/2 error 7"),
        (lambda peer: (peer.h2.reset_stream(1, 2), peer.flush()), "INTERNAL", "HTTP/2 error 2"),
        (goaway(11), "UNAVAILABLE", "ended the connection: calm"),
        (goaway(0, last=0), "UNAVAILABLE", "ended the connection: calm"),
        (lambda peer: None, "UNAVAILABLE", "closed the connection"),
        (data(struct.pack(">BI", 1, 3) + b"zip"), "INTERNAL", "compressed"),
        (data(struct.pack(">BI", 0, 2 << 20)), "RESOURCE_EXHAUSTED", "larger than max"),
        (data(struct.pack(">BI", 0, 3) + b"\xff\xff\xff"), "INTERNAL", "cannot be read"),
    ],
)
def test_how_a_call_ends_is_told_as_grpc_does(serve, end, code, details):
    def once(peer):
        next(peer.messages())
        end(peer)

    opened = connect(serve(once).address)
    with pytest.raises(Failure) as caught:
        opened.exchange(REQUEST, 5)
    opened.close()
    assert caught.value.code is grpc.StatusCode[code]
    assert details in caught.value.details


def frame(kind, flags, on, payload=b""):
    return struct.pack(">IBBI", len(payload), kind, flags, on)[1:] + payload


SETTINGS = frame(4, 0, 0)
OK = frame(1, 4, 1, hpack.Encoder().encode([(":status", "200"), ("content-type", "application/grpc")]))


@pytest.mark.parametrize(
    ("sent", "what"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "frame of"),
        (frame(6, 0, 0, bytes(8)), "no settings at first"),
        (SETTINGS + frame(0, 0, 1, b"early"), "before its headers"),
        (SETTINGS + OK + frame(0, 0, 3, b"other"), "data of no call"),
        (SETTINGS + frame(1, 4, 3, b""), "headers of no call"),
        (SETTINGS + OK + struct.pack(">IBBI", 16_385, 0, 0, 1)[1:], "a frame of 16385 bytes"),
        (SETTINGS + frame(5, 4, 1, bytes(8)), "a push"),
        (SETTINGS + frame(8, 0, 1, bytes(4)), "opened by 0 bytes"),
        (SETTINGS + frame(8, 0, 0, b"\x7f\xff\xff\xff"), "opened by 2147483647 bytes"),
        (SETTINGS + frame(8, 0, 0, b"\x7f"), "no size for it"),
        (SETTINGS + OK + frame(0, 8, 1, b"\x09abc"), "no size for it"),
        (SETTINGS + OK + frame(0, 8, 1, b""), "no size for it"),
        (frame(4, 0, 0, struct.pack(">HI", 4, 2**31)), "a window of"),
        (frame(4, 0, 0, struct.pack(">HI", 5, 100)), "frames of 100 bytes"),
        (frame(4, 0, 0, bytes(5)), "no size for it"),
        (SETTINGS + frame(1, 0, 1, b"\x88") + frame(6, 0, 0, bytes(8)), "not continued"),
        (SETTINGS + frame(9, 4, 1, b"\x88"), "a continuation of no"),
        (SETTINGS + frame(1, 4, 1, b"\xff\xff\xff\xff\xff\xff"), "cannot be read"),
        (SETTINGS + frame(1, 0, 1, bytes(16_384)) + 4 * frame(9, 0, 1, bytes(16_384)), "headers of over 65536"),
    ],
)
def test_what_breaks_the_protocol_is_said(sent, what):
    client = Stream([(":method", "POST")], "here", 1 << 20)
    client.send([b"request"])
    client.receive(sent)
    with pytest.raises(Failure, match=what) as caught:
        client.take()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE  # of this connection: another one may do better


def test_headers_may_be_continued_prioritised_and_preceded_by_others():
    encoder = hpack.Encoder()
    early = encoder.encode([(":status", "103"), ("link", "x")])
    block = encoder.encode([(":status", "200"), ("content-type", "application/grpc+proto")])
    client = Stream([(":method", "POST")], "here", 1 << 20)
    client.receive(SETTINGS + frame(1, 4, 1, early) + frame(1, 0x20, 1, bytes(5) + block[:1]))
    client.receive(frame(9, 4, 1, block[1:]) + frame(0, 0, 1, message(b"answer")))
    assert client.take() == b"answer"


def test_answers_are_the_same_byte_by_byte():
    sent = SETTINGS + OK + b"".join(frame(0, 0, 1, piece) for piece in (message(b"an")[:3], message(b"an")[3:], b""))
    client = Stream([(":method", "POST")], "here", 1 << 20)
    for number in range(len(sent)):
        assert client.take() is None
        client.receive(sent[number : number + 1])
        if number == len(sent) - 10:
            break
    assert client.take() == b"an"


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_is_an_answer_or_a_failure(seed):
    draw = random.Random(seed)
    for _ in range(200):
        client = Stream([(":method", "POST")], "here", 1 << 20)
        client.send([b"request"])
        sent = bytearray(SETTINGS + OK + frame(6, 0, 0, bytes(8)) + frame(0, 0, 1, message(b"answer" * 9)))
        for _ in range(draw.randrange(1, 5)):
            sent[draw.randrange(len(sent))] = draw.randrange(256)
        client.receive(bytes(sent))
        try:
            assert client.take() is None or not client.ended or client.take() is None
            client.outgoing()
        except Failure:
            assert client.ended or len(client._body) >= 5


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
