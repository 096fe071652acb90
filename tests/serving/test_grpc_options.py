"""gRPC ignores an option whose name it does not know: a wrong name would go unnoticed until it is needed."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc

from robodual.serving.server import _options
from robodual.serving.settings import SpecialistSettings
from robodual_client.channel import Tls, security


@pytest.fixture(scope="module")
def library() -> bytes:
    return Path(cygrpc.__file__).read_bytes()


def test_every_option_of_a_service_is_one_that_grpc_knows(library: bytes) -> None:
    for name, _ in _options(SpecialistSettings()):
        assert name.encode() + b"\0" in library, name


def test_every_option_of_a_client_is_one_that_grpc_knows(library: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, object]] = []
    monkeypatch.setattr(grpc, "secure_channel", lambda address, credentials, options: given.extend(options))
    security("token", Tls(name="robot")).channel(grpc, "127.0.0.1:1")
    assert len(given) > 5
    for name, _ in given:
        assert name.encode() + b"\0" in library, name
