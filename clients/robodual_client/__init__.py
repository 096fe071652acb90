"""Client of RoboDual Serve: needs NumPy, grpcio and protobuf only."""

from __future__ import annotations

from robodual_client.aio import AsyncDualSystemClient
from robodual_client.answer import Answer, Conditioning, ServiceInfo
from robodual_client.calls import Timeouts
from robodual_client.channel import Tls
from robodual_client.client import DualSystemClient

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AsyncDualSystemClient",
    "Conditioning",
    "DualSystemClient",
    "ServiceInfo",
    "Timeouts",
    "Tls",
    "__version__",
]
