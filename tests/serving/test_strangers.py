"""Whoever reaches a port without a token holds nobody else up."""

import asyncio
import itertools
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_endpoints import TOKENS, bearer, channel_to, http, started

from robodual.serving import http as serving_http
from robodual.serving import server as serving_server
from robodual.serving.auth import EXEMPT, EXEMPT_CALLS
from robodual_client import wire
from robodual_client.wire import rpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + body


async def _silence() -> AsyncIterator[bytes]:
    """The requests of a call that never sends one."""
    await asyncio.Event().wait()
    yield b""


def _preface(window: int) -> bytes:
    """How a peer begins, whose HTTP/2 windows have room for so many bytes."""
    settings = _frame(4, 0, 0, struct.pack(">HI", 4, window))
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + _frame(4, 1, 0)


def _call(path: str, stream: int = 1) -> bytes:
    """A call with an empty message."""
    headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    headers["content-type"] = "application/grpc"
    fields = b"".join(b"\0" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode() for k, v in headers.items())
    return _frame(1, 4, stream, fields) + _frame(0, 1, stream, bytes(5))


async def test_a_health_watcher_who_never_reads_holds_up_neither_health_nor_the_end() -> None:
    async with started(shutdown_grace=0.5) as server, channel_to(server) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(_preface(window=0) + _call(f"{EXEMPT}Watch"))
        await asyncio.sleep(0.2)
        server.readiness.meet("store")
        await asyncio.sleep(0.1)
        assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=2)).status == SERVING
        server.readiness.lack("store", "gone")
        await asyncio.sleep(0.1)
        assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=2)).status == NOT_SERVING
        await asyncio.wait_for(server.drain(), 3)
        writer.close()


async def test_a_health_watcher_is_told_of_every_state_that_lasts() -> None:
    async with started() as server, channel_to(server) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch, of_nothing = (
            stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", "no.such.Service")
        )
        assert (await watch.read()).status == NOT_SERVING
        for state in (SERVING, NOT_SERVING, SERVING):
            server.readiness.meet("store") if state == SERVING else server.readiness.lack("store", "gone")
            assert (await asyncio.wait_for(watch.read(), 2)).status == state
        assert (await of_nothing.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_health_calls_without_end_take_places_of_health_calls_alone() -> None:
    alone = [("grpc.use_local_subchannel_pool", 1)]
    async with started(tokens=TOKENS) as server, channel_to(server) as channel:
        address = f"127.0.0.1:{server.port}"
        async with grpc.aio.insecure_channel(address, options=alone) as strangers:
            health = health_pb2_grpc.HealthStub(strangers)
            watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(EXEMPT_CALLS)]
            await asyncio.gather(*(watch.read() for watch in watches))
            checks = [strangers.stream_stream(f"{EXEMPT}Check")(_silence()) for _ in range(EXEMPT_CALLS)]
            await asyncio.sleep(0.2)
            for one_more in (
                health.Watch(health_pb2.HealthCheckRequest()).read(),
                health.Check(health_pb2.HealthCheckRequest(), timeout=5),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await one_more
                assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "16 such calls are open already" in (refused.value.details() or "")
            assert server.metrics.answered() == {"RESOURCE_EXHAUSTED": 2}
            stub = rpc.Stub(channel, rpc.SPECIALIST)
            assert (await stub.GetInfo(wire.InfoRequest(), metadata=bearer(TOKENS[0]), timeout=5)).profile == "toy"
            for call in (*watches, *checks):
                call.cancel()
        await asyncio.sleep(0.2)
        assert (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)).status


async def test_refusals_that_nobody_reads_hold_up_nobody_else() -> None:
    """Such a call stays open until its connection is given up for dead: a limit that counts it would be used up."""
    async with started(tokens=TOKENS) as server, channel_to(server) as channel:
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            deaf.connect(("127.0.0.1", server.port))
            deaf.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(deaf, _preface(window=65535))
            deadline = loop.time() + 20
            streams = itertools.count(1, 2)
            while len(asyncio.all_tasks()) < 1200:
                assert loop.time() < deadline, "the calls do not stay open, or are limited"
                # A few at a time: of more than it allows at once, gRPC drops the connection.
                calls = b"".join(
                    _call(f"/{rpc.SPECIALIST}/GetInfo", stream) for stream in itertools.islice(streams, 20)
                )
                await asyncio.wait_for(loop.sock_sendall(deaf, calls), 5)
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.5)
            stub = rpc.Stub(channel, rpc.SPECIALIST)
            assert (await stub.GetInfo(wire.InfoRequest(), metadata=bearer(TOKENS[0]), timeout=10)).profile == "toy"


async def test_a_connection_that_never_begins_to_speak_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_server, "HANDSHAKE", 0.3)
    async with started() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.wait_for(reader.read(), 5)
        writer.close()


async def test_connections_without_a_request_keep_nobody_from_http() -> None:
    async with started(tokens=TOKENS) as server:
        beginnings = [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"] * serving_http.REQUESTS
        writers = []
        for beginning in beginnings:
            _, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
            writer.write(beginning)
            writers.append(writer)
        await asyncio.sleep(0.2)
        assert (await http(server, "/healthz")).status_code == 200
        assert (await http(server, "/metrics", headers={"Authorization": f"Bearer {TOKENS[0]}"})).status_code == 200
        for writer in writers:
            writer.close()


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (b"", b""),
        (b"GET /healthz HTTP/1.1\r\nX-Slow: ", b"x"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nX-Slow: ", b"x"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", b"x"),
    ],
    ids=["silence", "a request without end", "a second request without end", "a body without end"],
)
async def test_a_connection_that_brings_no_whole_request_is_ended(
    first: bytes, then: bytes, encrypted: bool, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_http, "PATIENCE", 0.4)
    files = {"tls_certificate": certificates / "server.pem", "tls_key": certificates / "server.key"}
    trust = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    async with started(**(files if encrypted else {})) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port, ssl=trust if encrypted else None)
        writer.write(first)
        ended = asyncio.ensure_future(reader.read())
        deadline = asyncio.get_running_loop().time() + 3
        while not ended.done():
            assert asyncio.get_running_loop().time() < deadline
            writer.write(then)
            await asyncio.sleep(0.05)
        await asyncio.gather(ended, return_exceptions=True)
        writer.close()
