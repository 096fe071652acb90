from __future__ import annotations

import numpy as np
import pytest
from fake_services import Awaited, FakeGeneralist, FakeSpecialist, episode, observation
from http2_server import Http2Server

from robodual_client import DualSystemClient


@pytest.fixture
def obs():
    return observation(0)


@pytest.fixture
def generalist():
    server = FakeGeneralist()
    yield server
    server.kill()


@pytest.fixture
def second_generalist():
    server = FakeGeneralist()
    yield server
    server.kill()


@pytest.fixture
def specialist():
    server = FakeSpecialist()
    yield server
    server.kill()


@pytest.fixture
def second_specialist():
    server = FakeSpecialist()
    yield server
    server.kill()


@pytest.fixture(params=["blocking-stream", "blocking-unary", "asyncio-stream", "asyncio-unary"])
def make(request):
    """A function that makes a client, of each kind in turn."""
    kind, transport = request.param.split("-")
    client = DualSystemClient if kind == "blocking" else Awaited
    return lambda *arguments, **options: client(*arguments, stream=transport == "stream", **options)


@pytest.fixture
def undisturbed(generalist):
    """The actions of an episode of 20 steps that nothing goes wrong in."""
    server = FakeSpecialist()
    with DualSystemClient(generalist.address, server.address, seed=3) as client:
        client.reset("lift the red block")
        actions = episode(client)
    server.kill()
    generalist.calls.clear()
    assert len(np.unique(actions)) == actions.size
    return actions


@pytest.fixture
def serve():
    """A function that starts an Http2Server."""
    servers = []

    def start(handler, settings=None):
        servers.append(Http2Server(handler, settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
