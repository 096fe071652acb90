"""A service's endpoints: tokens, health, readiness, reflection and the HTTP side, with a servicer of no model."""

import asyncio
import gc
import logging
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from robodual.serving.errors import FailedPrecondition
from robodual.serving.metrics import Metrics
from robodual.serving.readiness import Readiness
from robodual.serving.server import Server
from robodual.serving.settings import SpecialistSettings
from robodual_client import wire
from robodual_client.wire import rpc

TOKENS = ("token-number-one-1", "token-number-two-2")
INFO = wire.InfoResponse(service="specialist", version="1", profile="toy", details={"diffusion_steps": "10"})
Start = Callable[..., AbstractAsyncContextManager[Server]]


class Servicer:
    async def Act(self, request: wire.ActRequest, context: Any) -> wire.ActResponse:
        if request.step == 13:
            raise FailedPrecondition("step: 13 is never served")
        await asyncio.sleep(request.step / 100)
        return wire.ActResponse(step=request.step)

    async def ActStream(
        self, requests: AsyncIterator[wire.ActRequest], context: Any
    ) -> AsyncIterator[wire.ActResponse]:
        async for request in requests:
            yield wire.ActResponse(step=request.step)

    async def Reset(self, request: wire.ResetRequest, context: Any) -> wire.ResetResponse:
        raise RuntimeError("a secret")

    async def Close(self, request: wire.CloseRequest, context: Any) -> wire.CloseResponse:
        return wire.CloseResponse()

    async def GetInfo(self, request: wire.InfoRequest, context: Any) -> wire.InfoResponse:
        return INFO


@asynccontextmanager
async def started(**settings: Any) -> AsyncIterator[Server]:
    server = Server(SpecialistSettings(**{"port": 0, "http_port": 0} | settings), Readiness(store="away"), Metrics())
    await server.start()
    server.open(Servicer(), INFO)
    yield server
    await server.drain()
    await server.stop()


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


def channel_to(server: Server) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")


async def http(server: Server, path: str, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}", trust_env=False) as client:
        return await client.get(path, **options)


async def test_any_of_the_tokens_opens_and_nothing_else_does() -> None:
    async with started(tokens=TOKENS) as server, channel_to(server) as channel:
        stub = rpc.Stub(channel, rpc.SPECIALIST)
        for token in TOKENS:
            assert (await stub.GetInfo(wire.InfoRequest(), metadata=bearer(token))).profile == "toy"
        wrong: list[Any] = [
            None,
            bearer(TOKENS[0][:-1]),
            bearer(TOKENS[0] + "x"),
            bearer(""),
            [("authorization", TOKENS[0])],
            [("authorization", f"Basic {TOKENS[0]}")],
            [("token", TOKENS[0])],
        ]
        for metadata in wrong:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.GetInfo(wire.InfoRequest(), metadata=metadata)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
            stream = stub.ActStream(metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stream.read()
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        stream = stub.ActStream(metadata=bearer(TOKENS[1]))
        await stream.write(wire.ActRequest(step=3))
        assert (await stream.read()).step == 3
        stream.cancel()


async def test_reflection_needs_a_token_and_health_does_not() -> None:
    async with started(tokens=TOKENS) as server, channel_to(server) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest())
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await reflect(iter([question])).read()
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        answer = await reflect(iter([question]), metadata=bearer(TOKENS[0])).read()
        names = {service.name for service in answer.list_services_response.service}
        assert {rpc.SPECIALIST, "grpc.health.v1.Health"} <= names


async def test_health_of_a_service_that_is_not_here_is_not_found() -> None:
    async with started() as server, channel_to(server) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=r"expected one of robodual\.v1\.Specialist, or none") as refused:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="robodual.v1.Act"))
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


async def test_http_asks_for_the_same_token_but_not_for_health() -> None:
    async with started(tokens=TOKENS) as server:
        for path in ("/metrics", "/info", "/openapi.json"):
            refused = await http(server, path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            wrong = await http(server, path, headers={"Authorization": "Bearer token-number-three"})
            assert wrong.status_code == 401
            accepted = await http(server, path, headers={"Authorization": f"Bearer {TOKENS[1]}"})
            assert accepted.status_code == 200
        assert (await http(server, "/healthz")).json() == {"status": "ok"}
        assert (await http(server, "/readyz")).status_code == 503
        assert (await http(server, "/docs")).status_code == 404


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="needs IPv6")
async def test_without_tokens_another_sites_name_for_this_machine_does_not_open_through_ipv6_either() -> None:
    async with started(host="::", insecure=True) as server:
        for own in ("127.0.0.1", "[::1]"):
            async with httpx.AsyncClient(base_url=f"http://{own}:{server.http_port}", trust_env=False) as client:
                assert (await client.get("/info", headers={"Host": "evil.example"})).status_code == 403
                assert (await client.get("/info")).status_code == 200


async def test_readiness_means_what_it_says_on_both_sides() -> None:
    async with started() as server, channel_to(server) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def state(service: str) -> str:
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

        answer = await http(server, "/readyz")
        assert (answer.status_code, answer.json()) == (503, {"ready": False, "missing": {"store": "away"}})
        assert await state("") == await state(rpc.SPECIALIST) == "NOT_SERVING"
        server.readiness.meet("store")
        await asyncio.sleep(0.05)
        answer = await http(server, "/readyz")
        assert (answer.status_code, answer.json()) == (200, {"ready": True, "missing": {}})
        assert await state("") == await state(rpc.SPECIALIST) == "SERVING"
        server.readiness.lack("store", "gone")
        await asyncio.sleep(0.05)
        assert await state(rpc.SPECIALIST) == "NOT_SERVING"


async def test_info_says_the_same_on_both_sides() -> None:
    async with started() as server, channel_to(server) as channel:
        assert await rpc.Stub(channel, rpc.SPECIALIST).GetInfo(wire.InfoRequest()) == INFO
        answer = (await http(server, "/info")).json()
        assert answer == {
            "service": "specialist",
            "version": "1",
            "profile": "toy",
            "details": {"diffusion_steps": "10"},
        }


async def test_before_the_model_is_loaded_both_sides_say_so() -> None:
    server = Server(SpecialistSettings(port=0, http_port=0), Readiness(model="loading"), Metrics())
    await server.start()
    assert (await http(server, "/healthz")).status_code == 200
    assert (await http(server, "/readyz")).json()["missing"] == {"model": "loading"}
    assert (await http(server, "/info")).status_code == 503
    async with channel_to(server) as channel:
        for call in (
            rpc.Stub(channel, rpc.SPECIALIST).GetInfo(wire.InfoRequest()),
            rpc.Stub(channel, rpc.SPECIALIST).ActStream().read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert (refused.value.code(), "loading" in (refused.value.details() or "")) == (
                grpc.StatusCode.UNAVAILABLE,
                True,
            )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(f"/{rpc.SPECIALIST}/Invented")(b"")
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "Invented" not in (await http(server, "/metrics")).text, "labels that strangers choose"
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=rpc.SPECIALIST))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    await server.stop()


async def test_answers_are_counted_by_status_and_unexpected_errors_tell_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    async with started() as server, channel_to(server) as channel:
        stub = rpc.Stub(channel, rpc.SPECIALIST)
        await stub.Act(wire.ActRequest(step=1))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Act(wire.ActRequest(step=13))
        assert (refused.value.code(), refused.value.details()) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "step: 13 is never served",
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Reset(wire.ResetRequest())
        assert refused.value.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in (refused.value.details() or "")
        text = (await http(server, "/metrics")).text
    for line in (
        'robodual_requests_total{code="OK",method="Act"} 1.0',
        'robodual_requests_total{code="FAILED_PRECONDITION",method="Act"} 1.0',
        'robodual_requests_total{code="INTERNAL",method="Reset"} 1.0',
        'robodual_requests_total{code="INTERNAL",method="ActStream"} 0.0',
    ):
        assert line in text


async def test_a_deadline_that_passes_during_a_call_is_counted_as_missed() -> None:
    async with started() as server, channel_to(server) as channel:
        stub = rpc.Stub(channel, rpc.SPECIALIST)
        with pytest.raises(grpc.aio.AioRpcError) as missed:
            await stub.Act(wire.ActRequest(step=100), timeout=0.2)
        assert missed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        changed_its_mind = stub.Act(wire.ActRequest(step=100), timeout=30)
        await asyncio.sleep(0.1)
        changed_its_mind.cancel()
        await asyncio.sleep(0.2)
        assert server.metrics.answered() == {"DEADLINE_EXCEEDED": 1}
        (problem,) = server.metrics.problems.since(0)
        assert (problem.method, problem.code) == ("Act", "DEADLINE_EXCEEDED")


async def test_a_drain_waits_for_calls_but_not_for_health_watchers() -> None:
    async with started() as server, channel_to(server) as channel:
        await channel.channel_ready()
        watcher = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watcher.read()
        call = rpc.Stub(channel, rpc.SPECIALIST).Act(wire.ActRequest(step=50))
        await asyncio.sleep(0.1)
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        await server.drain()
        assert (await call).step == 50
        assert 0.3 < loop.time() - started_at < 3


async def test_calls_over_the_grace_are_cut_short() -> None:
    async with started(shutdown_grace=0.2) as server, channel_to(server) as channel:
        await channel.channel_ready()
        call = rpc.Stub(channel, rpc.SPECIALIST).Act(wire.ActRequest(step=1000))
        await asyncio.sleep(0.1)
        await server.drain()
        with pytest.raises(grpc.aio.AioRpcError):
            await call


async def test_a_port_that_is_taken_is_an_error_at_once() -> None:
    async with started() as server:
        for settings in ({"port": server.port, "http_port": 0}, {"port": 0, "http_port": server.http_port}):
            with pytest.raises(OSError, match=r"port|in use"):
                async with started(**settings):
                    pass


async def test_bytes_that_are_no_request_are_refused_and_not_an_error_of_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    request = wire.ActRequest(session_id="abcd", step=1).SerializeToString()
    async with started() as server, channel_to(server) as channel:
        stub = rpc.Stub(channel, rpc.SPECIALIST)
        for unreadable in (b"\xff" * 100, request.replace(b"abcd", b"\xff\xfe\xfd\xfc")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Act(unreadable)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "robodual.v1.ActRequest" in str(refused.value.details())
            stream = stub.ActStream()
            await stream.write(unreadable)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stream.read()
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert (await stub.Act(wire.ActRequest(step=1))).step == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_call_that_has_ended_badly_keeps_no_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    size = 2**20
    request = wire.ActRequest(step=13, observation={"rgb_static": {"data": bytes(size)}})
    unreadable = b"\xff" * size
    async with started() as server, channel_to(server) as channel:
        stub = rpc.Stub(channel, rpc.SPECIALIST)
        # Without the collections that would clear away what gRPC's references to itself keep.
        gc.disable()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for message in [request, unreadable] * 10:
                stream = stub.ActStream()
                await stream.write(unreadable)
                for call in (stub.Act(message), stream.read()):
                    with pytest.raises(grpc.aio.AioRpcError):
                        await call
                given_up = stub.ActStream()
                await given_up.write(wire.ActRequest(observation=request.observation))
                await given_up.read()
                given_up.cancel()
            await asyncio.sleep(0.1)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()
    assert after - before < 10 * size
