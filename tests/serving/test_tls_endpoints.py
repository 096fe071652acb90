"""TLS on both ports of a service, and mutual TLS where an authority for callers is named."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
from test_endpoints import INFO, channel_to, http, started

from robodual.serving.server import Server
from robodual_client import wire
from robodual_client.wire import rpc


@pytest.fixture(params=["tls", "mutual"])
async def secure(request: pytest.FixtureRequest, certificates: Path) -> AsyncIterator[tuple[Server, bool]]:
    mutual = request.param == "mutual"
    files = {"tls_certificate": certificates / "server.pem", "tls_key": certificates / "server.key"}
    if mutual:
        files["tls_client_ca"] = certificates / "ca.pem"
    async with started(**files) as server:
        yield server, mutual


async def over_grpc(server: Server, certificates: Path, caller: str | None) -> wire.InfoResponse:
    """GetInfo by a caller with the named certificate."""
    pair = [] if caller is None else [(certificates / f"{caller}.{kind}").read_bytes() for kind in ("key", "pem")]
    credentials = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes(), *pair)
    async with grpc.aio.secure_channel(f"127.0.0.1:{server.port}", credentials) as channel:
        return await rpc.Stub(channel, rpc.SPECIALIST).GetInfo(wire.InfoRequest(), timeout=10)


async def over_http(server: Server, certificates: Path, caller: str | None) -> httpx.Response:
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    if caller is not None:
        context.load_cert_chain(certificates / f"{caller}.pem", certificates / f"{caller}.key")
    async with httpx.AsyncClient(verify=context, trust_env=False, timeout=10) as client:
        return await client.get(f"https://127.0.0.1:{server.http_port}/info")


async def test_a_caller_with_a_certificate_of_the_authority_is_served(
    secure: tuple[Server, bool], certificates: Path
) -> None:
    server, _ = secure
    assert await over_grpc(server, certificates, "client") == INFO
    assert (await over_http(server, certificates, "client")).json()["service"] == "specialist"


@pytest.mark.parametrize("caller", [None, "stranger"])
async def test_a_caller_without_one_is_served_only_where_none_is_asked_for(
    secure: tuple[Server, bool], certificates: Path, caller: str | None
) -> None:
    server, mutual = secure
    if not mutual:
        assert await over_grpc(server, certificates, caller) == INFO
        assert (await over_http(server, certificates, caller)).status_code == 200
        return
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await over_grpc(server, certificates, caller)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    with pytest.raises(httpx.TransportError):
        await over_http(server, certificates, caller)


async def test_plain_text_is_refused(secure: tuple[Server, bool]) -> None:
    server, _ = secure
    async with channel_to(server) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await rpc.Stub(channel, rpc.SPECIALIST).GetInfo(wire.InfoRequest(), timeout=10)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    with pytest.raises(httpx.TransportError):
        await http(server, "/healthz")


async def test_what_is_no_handshake_ends_that_connection_alone(secure: tuple[Server, bool], certificates: Path) -> None:
    server, _ = secure
    for port in (server.port, server.http_port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x16\x03\x01" + bytes(4096))
        await writer.drain()
        await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert await over_grpc(server, certificates, "client") == INFO
