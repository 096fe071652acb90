"""The endpoints of a service: gRPC with health, reflection, authentication and limits; HTTP beside it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import urlsplit

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from robodual.serving.auth import Authenticator, AuthInterceptor
from robodual.serving.calls import CallInterceptor
from robodual.serving.errors import Unavailable
from robodual.serving.health import Health
from robodual.serving.http import HttpServer, Pages, application
from robodual.serving.logging import configure
from robodual.serving.metrics import Metrics
from robodual.serving.readiness import Background, Readiness
from robodual.serving.settings import GeneralistSettings, Settings, SpecialistSettings, is_loopback
from robodual.serving.tracing import TraceInterceptor
from robodual_client import wire
from robodual_client.tracing import Tracer
from robodual_client.wire import rpc

logger = structlog.get_logger(__name__)

SHARE = 1024  # calls that one owner may have open, at least
CALLS = 4  # of a session: its stream, one that the network lost, and calls beside them
HANDSHAKE = 10.0  # seconds that a connection may take to begin; gRPC's own limit is two minutes
LAST_WORDS = 0.2  # seconds for an answer that is given to reach the wire


class Server:
    """One service's endpoints. They answer from `start` on, so that loading can be watched; methods from `open` on."""

    def __init__(
        self,
        settings: GeneralistSettings | SpecialistSettings,
        readiness: Readiness,
        metrics: Metrics,
        pages: Pages | None = None,
    ) -> None:
        self.readiness = readiness
        self.metrics = metrics
        self.port = 0
        self.ended = asyncio.Event()  # set when the service is to end
        self.failed = False
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self._name = {"generalist": rpc.GENERALIST, "specialist": rpc.SPECIALIST}[settings.service]
        metrics.expect(method.name for method in wire.POOL.FindServiceByName(self._name).methods)
        self._info: wire.InfoResponse | None = None
        self._authenticator = Authenticator(settings.tokens, file=settings.tokens_file, max_rate=settings.max_rate)
        app = application(readiness, metrics, self._authenticator, lambda: self._info, pages)
        self._http = HttpServer(
            app,
            settings.host,
            settings.http_port,
            certificate=settings.tls_certificate,
            key=settings.tls_key,
            client_ca=settings.tls_client_ca,
        )
        self._health = Health("", self._name)
        # Calls first: an interceptor wraps those after it.
        self._calls = CallInterceptor(metrics)
        self._tracer = None if settings.traces is None else Tracer(settings.traces, f"robodual-{settings.service}")
        tracing = [] if self._tracer is None else [TraceInterceptor(self._tracer)]
        # Without maximum_concurrent_rpcs: refusals count until they are read, so strangers could fill it.
        self._grpc = grpc.aio.server(
            interceptors=[self._calls, AuthInterceptor(self._authenticator, share=_share(settings)), *tracing],
            options=_options(settings),
        )
        self._methods = _Methods(self._name)
        self._grpc.add_generic_rpc_handlers((self._methods,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((self._name, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
        self._background = Background(readiness)
        self._end_streams: Callable[[], None] | None = None

    @property
    def http_port(self) -> int:
        return self._http.port

    async def start(self) -> None:
        """Listens on both ports; until `open`, methods are UNAVAILABLE. Raises `OSError` if a port is taken."""
        await self._http.start()
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            if settings.tls_certificate is not None and settings.tls_key is not None:
                pair = (settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes())
                ca = None if settings.tls_client_ca is None else settings.tls_client_ca.read_bytes()
                credentials = grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)
                self.port = self._grpc.add_secure_port(f"{host}:{settings.port}", credentials)
            else:
                self.port = self._grpc.add_insecure_port(f"{host}:{settings.port}")
        except RuntimeError as error:
            await self._http.stop()
            # gRPC ends in order only what it has started.
            await self._grpc.start()
            await self._grpc.stop(None)
            raise OSError(f"port: cannot listen on {host}:{settings.port}; does another service?") from error
        self._publish()
        await self._grpc.start()
        self._background.run("health", self._keep_publishing())
        if settings.tokens_file is not None:
            self._background.run("tokens", self._authenticator.follow())
        if not is_loopback(settings.host) and settings.tls_certificate is None:
            logger.warning("tokens and frames travel unencrypted; set tls_certificate and tls_key")
        store = urlsplit(settings.redis_url.get_secret_value())
        if store.scheme == "redis" and not is_loopback(store.hostname or "localhost"):
            logger.warning("conditionings and the password of Redis travel unencrypted; use rediss:// in redis_url")

    def open(
        self,
        servicer: object,
        info: wire.InfoResponse,
        *,
        readers: Mapping[str, Callable[[bytes], Any]] | None = None,
        end_streams: Callable[[], None] | None = None,
    ) -> None:
        """Puts `servicer` behind the methods, with `readers` for the requests of some (see `rpc.handler`).

        `end_streams` is called at the beginning of the drain.
        """
        self._info = info
        self._end_streams = end_streams
        self._methods.serve(rpc.handler(self._name, servicer, readers))

    def fail(self) -> None:
        """Has the service end, as one that failed. From any thread."""
        self.failed = True
        self._loop.call_soon_threadsafe(self.ended.set)

    async def drain(self) -> None:
        """Takes no new calls, lets those in flight finish for `shutdown_grace` seconds, then stops gRPC."""
        self.readiness.lack("serving", "draining")
        self._publish()
        if self._end_streams is not None:
            self._end_streams()
        grace = self._settings.shutdown_grace
        stopping = asyncio.create_task(self._grpc.stop(grace))
        # Health watchers never end by themselves: once our own calls are through, the rest is cut short.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._calls.idle(), grace)
        await self._grpc.stop(LAST_WORDS)
        await stopping

    async def stop(self) -> None:
        """Stops at once what `drain` has left."""
        await self._grpc.stop(None)
        await self._background.close()
        await self._http.stop()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    def _publish(self) -> None:
        self.metrics.ready.set(self.readiness.ready)
        self._health.set(serving=self.readiness.ready)

    async def _keep_publishing(self) -> None:
        while True:
            await self.readiness.change()
            self._publish()


class _Methods(grpc.GenericRpcHandler):
    """A service's methods: UNAVAILABLE until there is a servicer behind them."""

    def __init__(self, name: str) -> None:
        self._paths = {f"/{name}/{method.name}" for method in wire.POOL.FindServiceByName(name).methods}
        self._handler: grpc.GenericRpcHandler | None = None

    def serve(self, handler: grpc.GenericRpcHandler) -> None:
        self._handler = handler

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if self._handler is not None:
            return self._handler.service(handler_call_details)
        if handler_call_details.method in self._paths:
            return grpc.stream_stream_rpc_method_handler(_not_yet)
        return None


def _not_yet(requests: Any, context: Any) -> AsyncIterator[Any]:
    raise Unavailable("the model is loading; retry later")


def deadline(context: Any) -> float | None:
    """When the caller stops waiting, as a time of the event loop's clock; None if it never does."""
    remaining: float | None = context.time_remaining()
    return None if remaining is None else asyncio.get_running_loop().time() + remaining


def run(settings: Settings, service: AbstractAsyncContextManager[Server]) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Blocks; uses uvloop where it is installed.

    Exits with status 1 and one line in the log where the service cannot start (a port that is taken, a file that is
    missing, a setting or a checkpoint that does not fit), and where it fails for good.
    """
    configure(settings)

    async def main() -> None:
        async with service as server:
            # Only now: until there is something to drain, ending at once is better.
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, server.ended.set)
            # What the start has made stays: a collection that walked through it would hold a step up for 0.1 s.
            gc.collect()
            gc.freeze()
            logger.info("ready", host=settings.host, port=server.port, http_port=server.http_port)
            await server.ended.wait()
            logger.info("draining")
        logger.info("stopped")
        if server.failed:
            raise SystemExit(1)

    # By default the loop would first wait for the thread that loads, which cannot be interrupted.
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    try:
        if sys.platform == "win32":
            asyncio.run(main())
        else:
            import uvloop

            uvloop.run(main())
    except (OSError, ValueError) as error:
        logger.error("cannot serve", reason=str(error))
        logger.debug("traceback", exc_info=error)
        raise SystemExit(1) from error


def _share(settings: GeneralistSettings | SpecialistSettings) -> int:
    return max(SHARE, CALLS * settings.max_sessions if isinstance(settings, SpecialistSettings) else 0)


def _options(settings: GeneralistSettings | SpecialistSettings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE * 1000)),
        # A client's own process may have all robots of an owner.
        ("grpc.max_concurrent_streams", _share(settings)),
        # Two services on one port would share its calls between them unnoticed.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients look whether a silent call is alive every ten seconds.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]
