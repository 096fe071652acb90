"""The stream of actions on HTTP/2: against h2's side of the protocol, and against bytes that break it."""

from __future__ import annotations

import random
import struct

import grpc
import hpack
import pytest
from h2.settings import SettingCodes
from http2_server import HEADERS, REQUEST, SETTINGS, WHOLE, connect, echo, frame, message, response

from robodual_client import stream
from robodual_client.errors import Failure
from robodual_client.http2 import Stream


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


def test_requests_arrive_whole_where_the_system_takes_one_buffer_at_a_time(serve, monkeypatch):
    monkeypatch.setattr(stream, "GATHERS", False)
    opened = connect(serve(echo).address)
    assert opened.exchange(REQUEST, 5).step == len(WHOLE)
    opened.close()


def test_request_is_one_of_grpc(serve):
    seen = []

    def keep(peer):
        for _ in peer.messages():
            seen.append(peer.headers)
            assert peer.h2.remote_settings.enable_push == 0
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
        (lambda peer: (peer.h2.reset_stream(1, 11), peer.flush()), "RESOURCE_EXHAUSTED", "HTTP/2 error 11"),
        (lambda peer: (peer.h2.reset_stream(1, 12), peer.flush()), "PERMISSION_DENIED", "HTTP/2 error 12"),
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
