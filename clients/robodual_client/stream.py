"""A stream of actions, over a connection of its own, in the thread that steps.

gRPC's Python hands each message from thread to thread, there and back, which takes longer than moving it. And its
streams have no time limit for an answer.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from typing import Sequence

import grpc
from google.protobuf.message import DecodeError

from robodual_client import wire
from robodual_client.channel import LARGEST_ANSWER, Security
from robodual_client.errors import Failure
from robodual_client.frame import Buffer
from robodual_client.http2 import Stream
from robodual_client.wire.rpc import SPECIALIST

READ = 65_536  # bytes at a time
WRITE = 64  # buffers at a time: the kernel takes 1024
GATHERS = hasattr(socket.socket, "sendmsg")  # Windows does not, nor does TLS
REST = 1.0  # seconds without a step, after which it is looked whether the stream is still there


class ActStream:
    """An open ActStream. Between two steps it is a socket, and nothing else.

    After a Failure, or an interruption, it is of no more use: it would take a late answer for the next one's.
    """

    def __init__(
        self,
        security: Security,
        addresses: Sequence[str],
        name: str,
        where: str,
        timeout: float,
        start: float | None = None,
    ) -> None:
        """Connects to the first of `addresses`, "ip:port", that can be reached, in `timeout` seconds at most, since
        `start`, if it is not now. `name` is what requests call the host; without its port, if it has one, its
        certificate must have it. Raises Failure.
        """
        self._where = where
        self._used = time.monotonic()
        self._set_limit(timeout, start)
        self._http = Stream(
            [
                (":method", "POST"),
                (":scheme", "http" if security.tls is None else "https"),
                (":path", f"/{SPECIALIST}/ActStream"),
                (":authority", name),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                ("user-agent", "robodual-client"),
                *security.metadata,
            ],
            where,
            LARGEST_ANSWER,
        )
        failure = self._failure(grpc.StatusCode.UNAVAILABLE, "the name has no address")
        for tried, address in enumerate(addresses):
            try:
                # One that is silent leaves the others their share of the time.
                self._socket = security.connect(address, name, self._left() / (len(addresses) - tried))
                return
            except OSError as error:
                failure = self._lost(error)
        raise failure

    def exchange(self, request: Sequence[Buffer], timeout: float, start: float | None = None) -> wire.ActResponse:
        """The answer to the next request, in `timeout` seconds at most, since `start`, if it is not now.

        Raises Failure.
        """
        self._set_limit(timeout, start)
        self._http.send(request)
        answer = None
        while answer is None:
            self._write(self._http.outgoing())
            self._http.receive(self._read())
            answer = self._http.take()
        self._used = time.monotonic()
        try:
            return wire.ActResponse.FromString(answer)
        except DecodeError as error:
            raise self._failure(grpc.StatusCode.INTERNAL, f"the answer cannot be read ({error})") from error

    def has_ended(self) -> bool:
        """Whether it was ended since the last answer: by a proxy, say, to which it was idle for too long, or by the
        service, when nobody was there to answer its pings.
        """
        if self._http.ended or time.monotonic() < self._used + REST:
            return self._http.ended
        return not self._is_open()

    def interrupt(self) -> None:
        """Has the exchange that is under way, in another thread or under this signal's handler, fail at once."""
        with contextlib.suppress(OSError):  # it was closed
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _write(self, buffers: list[Buffer]) -> None:
        try:
            if isinstance(self._socket, ssl.SSLSocket) or not GATHERS:
                self._socket.settimeout(self._left())
                self._socket.sendall(b"".join(buffers))
                return
            left = sum(map(len, buffers))
            while left:
                self._socket.settimeout(self._left())
                sent = self._socket.sendmsg(buffers[:WRITE])
                left -= sent
                if left:
                    while sent >= len(buffers[0]):
                        sent -= len(buffers.pop(0))
                    buffers[0] = memoryview(buffers[0])[sent:]
        except OSError as error:
            self._is_open()
            self._http.take()  # raises the Failure that the service gave before it closed the connection, if it did
            raise self._lost(error) from error

    def _is_open(self) -> bool:
        """Takes in what has come, without waiting. Whether more may come."""
        try:
            self._socket.settimeout(0)
            while not self._http.ended:
                data = self._socket.recv(READ)
                if not data:
                    return False
                self._http.receive(data)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        return False

    def _read(self) -> bytes:
        self._socket.settimeout(self._left())
        try:
            data = self._socket.recv(READ)
        except OSError as error:
            raise self._lost(error) from error
        if not data:
            raise self._failure(grpc.StatusCode.UNAVAILABLE, "the service closed the connection")
        return data

    def _set_limit(self, timeout: float, start: float | None) -> None:
        self._timeout = timeout
        self._deadline = (time.monotonic() if start is None else start) + timeout

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._late()
        return left

    def _late(self) -> Failure:
        return self._failure(grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer within {self._timeout:g} s")

    def _lost(self, error: OSError) -> Failure:
        if isinstance(error, socket.timeout) and error.errno is None:  # the kernel's own time limits have a number
            return self._late()
        return self._failure(grpc.StatusCode.UNAVAILABLE, f"no connection: {error}")

    def _failure(self, code: grpc.StatusCode, details: str) -> Failure:
        return Failure(code, details[:500], self._where)
