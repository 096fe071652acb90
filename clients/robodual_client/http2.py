"""The caller's side of one gRPC stream on an HTTP/2 connection of its own, without input or output.

RFC 9113 is HTTP/2, and "gRPC over HTTP2" of gRPC's documentation how a call looks in it.
"""

from __future__ import annotations

import struct
from typing import Iterable, Iterator, Sequence
from urllib.parse import unquote

import grpc
import hpack

from robodual_client.errors import Failure
from robodual_client.frame import Buffer

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
ACK = END_STREAM = 0x1
END_HEADERS, PADDED, PRIORITIZED = 0x4, 0x8, 0x20
ENABLE_PUSH, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, HEADER_TABLE_SIZE = 0x2, 0x4, 0x5, 0x1

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LARGEST_FRAME = 16_384  # that we take: the least that RFC 9113 has
LARGEST_BLOCK = 65_536  # of headers
INITIAL_WINDOW = 65_535
LARGEST_WINDOW = 2**31 - 1
WINDOW = 4 << 20  # that we give
CONNECTION, STREAM = 0, 1
_HEAD = struct.Struct(">HBBBI")  # of a frame: its size in three bytes, type, flags, stream

# What a stream that was reset, and an HTTP status that is not 200, mean: of gRPC's documentation.
RESETS = {
    0x7: grpc.StatusCode.UNAVAILABLE,  # REFUSED_STREAM
    0x8: grpc.StatusCode.CANCELLED,  # CANCEL
    0xB: grpc.StatusCode.RESOURCE_EXHAUSTED,  # ENHANCE_YOUR_CALM
    0xC: grpc.StatusCode.PERMISSION_DENIED,  # INADEQUATE_SECURITY
}
STATUSES = {
    b"400": grpc.StatusCode.INTERNAL,
    b"401": grpc.StatusCode.UNAUTHENTICATED,
    b"403": grpc.StatusCode.PERMISSION_DENIED,
    b"404": grpc.StatusCode.UNIMPLEMENTED,
    b"429": grpc.StatusCode.UNAVAILABLE,
    b"502": grpc.StatusCode.UNAVAILABLE,
    b"503": grpc.StatusCode.UNAVAILABLE,
    b"504": grpc.StatusCode.UNAVAILABLE,
}
CODES = {str(code.value[0]).encode(): code for code in grpc.StatusCode}


class Stream:
    """One call: `send` a message, write what `outgoing` gives, `receive` what is read, until `take` has the answer."""

    def __init__(self, headers: Iterable[tuple[str, str]], where: str, largest: int) -> None:
        """`headers` of the request, pseudo-headers first; `largest` message, in bytes, that is taken."""
        self._headers = list(headers)
        self._where = where
        self._largest = largest
        self._opened = False
        self._control: list[Buffer] = [
            PREFACE,
            _frame(SETTINGS, 0, CONNECTION, struct.pack(">HIHI", ENABLE_PUSH, 0, INITIAL_WINDOW_SIZE, WINDOW)),
            _frame(WINDOW_UPDATE, 0, CONNECTION, struct.pack(">I", WINDOW - INITIAL_WINDOW)),
        ]
        self._waiting: list[Buffer] = []  # of the message that is sent, what was not given out yet
        self._size = 0  # of that
        # What the peer lets us send, and how.
        self._windows = [INITIAL_WINDOW, INITIAL_WINDOW]
        self._initial_window = INITIAL_WINDOW
        self._frame_size = LARGEST_FRAME
        # What came.
        self._rest = b""  # of what was read: a frame whose end is still to come
        self._decoder = hpack.Decoder()
        self._block: bytearray | None = None  # a header block whose end is still to come
        self._block_ends = False  # the stream, that is
        self._answering = False  # the response's headers came
        self._draining = False  # the peer asks for calls to be made on another connection
        self._body = bytearray()
        self._taken = 0  # bytes since the windows that we give were last opened
        self._end: Failure | None = None

    def send(self, message: Sequence[Buffer]) -> None:
        """The request to send next, in pieces. The one before it must have been answered."""
        size = sum(map(len, message))
        self._waiting = [struct.pack(">BI", 0, size), *message]
        self._size = size + 5

    def outgoing(self) -> list[Buffer]:
        """What can be written now. Empty where the peer's window is closed, or its settings have not come."""
        buffers, self._control = self._control, []
        while self._size and self._opened:
            room = min(*self._windows, self._frame_size)
            if room <= 0:
                break
            size = min(room, self._size)
            self._windows = [window - size for window in self._windows]
            self._size -= size
            buffers.append(_head(size, DATA, 0, STREAM))
            if self._size:
                buffers += self._cut(size)
            else:
                buffers += self._waiting
                self._waiting = []
        return buffers

    def _cut(self, size: int) -> Iterator[Buffer]:
        """The next `size` bytes of the message."""
        while size:
            piece = memoryview(self._waiting[0])[:size]
            if len(piece) < len(self._waiting[0]):
                self._waiting[0] = memoryview(self._waiting[0])[size:]
            else:
                del self._waiting[0]
            size -= len(piece)
            yield piece

    def take(self) -> bytes | None:
        """The answer, once it is there in full. Raises Failure where none will come: the call has ended, say."""
        if len(self._body) >= 5:
            compressed, size = struct.unpack_from(">BI", self._body)
            if compressed:
                raise self._failure(grpc.StatusCode.INTERNAL, "the answer is compressed, which was not asked for")
            if size > self._largest:
                # The words by which gRPC says it.
                details = f"CLIENT: Received message larger than max ({size} vs. {self._largest})"
                raise self._failure(grpc.StatusCode.RESOURCE_EXHAUSTED, details)
            if len(self._body) >= 5 + size:
                answer = bytes(self._body[5 : 5 + size])
                del self._body[: 5 + size]
                return answer
        if self._end is not None:
            raise self._end
        return None

    @property
    def ended(self) -> bool:
        """Whether another request belongs elsewhere: the call is over or ends soon, or more came than was asked for."""
        return self._end is not None or self._draining or bool(self._body)

    def receive(self, data: bytes) -> None:
        """Takes what was read."""
        if self._end is None:
            try:
                self._receive(data)
            except Failure as end:
                self._end = end

    def _receive(self, data: bytes) -> None:
        data = self._rest + data if self._rest else data
        start = 0
        while len(data) - start >= 9:
            high, low, kind, flags, stream = _HEAD.unpack_from(data, start)
            size = high << 8 | low
            if size > LARGEST_FRAME:
                raise self._broken(f"a frame of {size} bytes, where {LARGEST_FRAME} are the most")
            end = start + 9 + size
            if len(data) < end:
                break
            payload = data[start + 9 : end]
            start = end
            try:
                self._take_frame(kind, flags, stream & LARGEST_WINDOW, payload)
            except (struct.error, IndexError):
                raise self._broken(f"a frame of type {kind} and {size} bytes, which is no size for it") from None
        self._rest = data[start:]

    def _take_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block is not None and kind != CONTINUATION:
            raise self._broken("a header block that is not continued")
        if not self._opened and kind != SETTINGS:
            raise self._broken("no settings at first")
        if kind == DATA:
            self._take_data(flags, stream, payload)
        elif kind == WINDOW_UPDATE:
            self._open_window(stream, struct.unpack(">I", payload)[0] & LARGEST_WINDOW)
        elif kind == PING:
            if not flags & ACK:
                self._control.append(_frame(PING, ACK, CONNECTION, payload))
        elif kind == SETTINGS:
            if not flags & ACK:
                self._take_settings(payload)
        elif kind == HEADERS:
            payload = _unpadded(flags, payload)
            self._block = bytearray(payload[5:] if flags & PRIORITIZED else payload)
            self._block_ends = bool(flags & END_STREAM)
            self._take_block(flags, stream)
        elif kind == CONTINUATION:
            if self._block is None:
                raise self._broken("a continuation of no header block")
            self._block += payload
            self._take_block(flags, stream)
        elif kind == RST_STREAM:
            (code,) = struct.unpack(">I", payload)
            details = f"the service reset the stream (HTTP/2 error {code})"
            raise self._failure(RESETS.get(code, grpc.StatusCode.INTERNAL), details)
        elif kind == GOAWAY:
            last, code = struct.unpack_from(">II", payload)
            if code or last & LARGEST_WINDOW < STREAM:
                reason = payload[8:].decode("latin-1") or f"HTTP/2 error {code}"
                raise self._failure(grpc.StatusCode.UNAVAILABLE, f"the service ended the connection: {reason}")
            self._draining = True
        elif kind == PUSH_PROMISE:
            raise self._broken("a push, which was forbidden")

    def _take_data(self, flags: int, stream: int, payload: bytes) -> None:
        if stream != STREAM or not self._answering:
            raise self._broken("data of no call, or before its headers")
        self._body += _unpadded(flags, payload)
        self._taken += len(payload)
        if self._taken >= WINDOW // 2:
            update = struct.pack(">I", self._taken)
            self._control += [_frame(WINDOW_UPDATE, 0, stream, update) for stream in (CONNECTION, STREAM)]
            self._taken = 0
        if flags & END_STREAM:
            raise self._failure(grpc.StatusCode.INTERNAL, "the service ended the stream without a status")

    def _open_window(self, stream: int, more: int) -> None:
        if stream in (CONNECTION, STREAM):
            self._windows[stream] += more
            if more == 0 or self._windows[stream] > LARGEST_WINDOW:
                raise self._broken(f"a window that was opened by {more} bytes")

    def _take_settings(self, payload: bytes) -> None:
        table = 4096
        for name, value in struct.iter_unpack(">HI", payload):
            if name == INITIAL_WINDOW_SIZE:
                if value > LARGEST_WINDOW:
                    raise self._broken(f"a window of {value} bytes")
                self._windows[STREAM] += value - self._initial_window
                self._initial_window = value
            elif name == MAX_FRAME_SIZE:
                if not LARGEST_FRAME <= value < 1 << 24:
                    raise self._broken(f"frames of {value} bytes at most")
                self._frame_size = value
            elif name == HEADER_TABLE_SIZE:
                table = min(table, value)
        self._control.append(_frame(SETTINGS, ACK, CONNECTION))
        if not self._opened:
            self._opened = True
            encoder = hpack.Encoder()
            encoder.header_table_size = table
            secret = [hpack.NeverIndexedHeaderTuple(name, value) for name, value in self._headers]
            self._control.append(_frame(HEADERS, END_HEADERS, STREAM, encoder.encode(secret)))

    def _take_block(self, flags: int, stream: int) -> None:
        assert self._block is not None
        if stream != STREAM:
            raise self._broken("headers of no call")
        if len(self._block) > LARGEST_BLOCK:
            raise self._broken(f"headers of over {LARGEST_BLOCK} bytes")
        if flags & END_HEADERS:
            block, self._block = bytes(self._block), None
            try:
                headers = dict(self._decoder.decode(block, raw=True))
            except hpack.HPACKError as error:
                raise self._broken(f"headers that cannot be read ({error})") from error
            self._take_headers(headers)

    def _take_headers(self, headers: dict[bytes, bytes]) -> None:
        status = headers.get(b":status", b"")
        if status.startswith(b"1"):
            return
        if b"grpc-status" in headers:
            code = CODES.get(headers[b"grpc-status"], grpc.StatusCode.UNKNOWN)
            details = unquote(headers.get(b"grpc-message", b"").decode("latin-1"))
            if code is grpc.StatusCode.OK:
                code, details = grpc.StatusCode.UNAVAILABLE, "the service ended the stream"
            raise self._failure(code, details or "no details")
        kind = headers.get(b"content-type", b"")
        if not self._answering and (status != b"200" or not kind.startswith(b"application/grpc")):
            code = STATUSES.get(status, grpc.StatusCode.UNKNOWN)
            got = f"HTTP status {status.decode('latin-1')}, {kind.decode('latin-1') or 'no content type'}"
            raise self._failure(code, f"{got}: is this a gRPC service?")
        if self._answering or self._block_ends:
            raise self._failure(grpc.StatusCode.INTERNAL, "the service ended the stream without a status")
        self._answering = True

    def _broken(self, what: str) -> Failure:
        return self._failure(grpc.StatusCode.UNAVAILABLE, f"the service does not keep to HTTP/2: {what}")

    def _failure(self, code: grpc.StatusCode, details: str) -> Failure:
        return Failure(code, details[:500], self._where)


def _head(size: int, kind: int, flags: int, stream: int) -> bytes:
    return _HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream)


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return _head(len(payload), kind, flags, stream) + payload


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & PADDED:
        return payload
    end = len(payload) - payload[0]
    if end < 1:
        raise IndexError
    return payload[1:end]
