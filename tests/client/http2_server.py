"""A server that speaks HTTP/2 through h2, which refuses what breaks the protocol, and answers one call a connection."""

from __future__ import annotations

import socket
import struct
import threading

import h2.config
import h2.connection
import h2.events
import h2.settings

from robodual_client import wire
from robodual_client.channel import security
from robodual_client.stream import ActStream

TRAILERS = [("grpc-status", "0")]
HEADERS = [(":status", "200"), ("content-type", "application/grpc")]
REQUEST = [b"head", memoryview(bytes(range(256)) * 1300), b"", b"tail"]  # 333 kB
WHOLE = b"".join(REQUEST)


def message(body: bytes) -> bytes:
    return struct.pack(">BI", 0, len(body)) + body


class Peer:
    """One connection, from the server's side. `messages` gives the requests; the rest answers them."""

    def __init__(self, connection: socket.socket, settings: dict) -> None:
        self._socket = connection
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=settings)
        self.h2.max_inbound_frame_size = self.h2.local_settings.max_frame_size
        self.h2.initiate_connection()
        self.flush()
        self.headers: dict[str, str] = {}
        self.acknowledged = 0  # pings
        self.frames: list[int] = []  # sizes of data frames that came

    def flush(self) -> None:
        self.raw(self.h2.data_to_send())

    def raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def messages(self):
        body = b""
        while True:
            data = self._socket.recv(65_536)
            if not data:
                return
            for event in self.h2.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    self.headers = dict(event.headers)
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data
                    self.frames.append(len(event.data))
                    self.h2.acknowledge_received_data(event.flow_controlled_length, 1)
                elif isinstance(event, h2.events.PingAckReceived):
                    self.acknowledged += 1
            self.flush()
            while len(body) >= 5 and len(body) >= 5 + (size := struct.unpack(">I", body[1:5])[0]):
                yield body[5 : 5 + size]
                body = body[5 + size :]

    def answer(self, body: bytes, **options) -> None:
        """With its headers, if none were sent. Waits for the client to open its windows."""
        if not self.h2.streams[1].state_machine.headers_sent:
            self.h2.send_headers(1, HEADERS)
        data = message(body)
        while data:
            while not (room := min(self.h2.local_flow_control_window(1), self.h2.max_outbound_frame_size)):
                self.h2.receive_data(self._socket.recv(65_536))
            room = min(room, len(data), 16_000)
            self.h2.send_data(1, data[:room], **options)
            data = data[room:]
            self.flush()

    def end(self, headers=TRAILERS) -> None:
        self.h2.send_headers(1, headers, end_stream=True)
        self.flush()

    def ping(self) -> None:
        self.h2.ping(b"pingpong")
        self.flush()


class Http2Server:
    """`serve(peer)` for each connection, in a thread; `close` raises what one of them raised."""

    def __init__(self, serve, settings: dict | None = None, context=None) -> None:
        self._serve = serve
        self._settings = settings or {}
        self._context = context
        self._error: BaseException | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._run, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, connection: socket.socket) -> None:
        with connection:
            try:
                if self._context is not None:
                    connection = self._context.wrap_socket(connection, server_side=True)
                with connection:
                    self._serve(Peer(connection, self._settings))
            except OSError:
                pass  # the client went, or did not agree
            except BaseException as error:
                self._error = error

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join(5)
        for thread in self._threads:
            thread.join(5)
        if self._error is not None:
            raise self._error


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


def frame(kind, flags, on, payload=b""):
    return struct.pack(">IBBI", len(payload), kind, flags, on)[1:] + payload


SETTINGS = frame(4, 0, 0)
