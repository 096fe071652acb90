"""What a result was measured with: package versions, the services' own account, command, machine and date."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Mapping

from robodual_client.calvin.options import EvaluationError, Options
from robodual_client.errors import RoboDualError

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


def ask_services(policy_options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each service ("generalist", "specialist") says of itself.

    Raises EvaluationError if an option is malformed, or a service does not answer, or is the other one.
    """
    from robodual_client.calvin.policies import client

    try:
        with client(**policy_options) as asked:
            return {name: asdict(info) for name, info in asked.info().items()}
    except (ValueError, RoboDualError) as error:
        raise EvaluationError(f"services: {error}") from error
