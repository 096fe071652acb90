"""Whoever reaches a port without a token holds nobody else up."""

import asyncio
import struct

from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_endpoints import channel_to, started

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + body


def _call_of_one_who_never_reads(path: str) -> bytes:
    """A call with an empty message by a peer whose HTTP/2 windows have no room for an answer."""
    headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    headers["content-type"] = "application/grpc"
    fields = b"".join(b"\0" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode() for k, v in headers.items())
    no_window = _frame(4, 0, 0, struct.pack(">HI", 4, 0))
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + no_window + _frame(4, 1, 0)
    return preface + _frame(1, 4, 1, fields) + _frame(0, 1, 1, bytes(5))


async def test_a_health_watcher_who_never_reads_holds_up_neither_health_nor_the_end() -> None:
    async with started(shutdown_grace=0.5) as server, channel_to(server) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(_call_of_one_who_never_reads("/grpc.health.v1.Health/Watch"))
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
