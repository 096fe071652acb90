"""What a result was measured with: package versions, the services' own account, command, machine and date."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Mapping

import grpc

from robodual_client.calvin.options import EvaluationError, Options

PACKAGES = ("robodual-client", "robodual", "numpy", "grpcio", "protobuf", "pybullet", "calvin-env", "torch")


def collect(options: Options, services: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One provenance entry, for the run that starts now."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "machine": f"{platform.node()}: {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "packages": versions,
        "workers": options.workers,
        "services": {name: dict(info) for name, info in services.items()},
    }


def ask_services(addresses: Mapping[str, str], timeout: float = 5.0) -> dict[str, dict[str, Any]]:
    """What each service (`generalist`, `specialist`) answers to GetInfo.

    Raises EvaluationError if one does not answer, or is the other one.
    """
    from robodual_client import wire
    from robodual_client.wire import rpc

    found = {}
    for name, service in (("generalist", rpc.GENERALIST), ("specialist", rpc.SPECIALIST)):
        with grpc.insecure_channel(addresses[name]) as opened:
            try:
                info = rpc.Stub(opened, service).GetInfo(wire.InfoRequest(), timeout=timeout)
            except grpc.RpcError as error:
                raise EvaluationError(
                    f"{name}: {addresses[name]} does not answer ({error.code().name}: {error.details()}); "
                    "start the services with `robodual up`, or check the address"
                ) from error
        found[name] = {
            "version": info.version,
            "profile": info.profile,
            "checkpoint": info.checkpoint,
            "device": info.device,
            "dtype": info.dtype,
            "parameters": info.parameters,
            "details": dict(info.details),
        }
    return found
