"""A GPU that fails under a service ends it; a request that fails by itself does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import grpc
import pytest
import torch
from replicas import act, frame, generalist, opened, specialist, status, version

from robodual.conditioning.store import Store
from robodual.generalist.engine import load_generalist
from robodual.specialist.engine import Answer, Request, SpecialistEngine, load_specialist
from robodual_client import tensors, wire

FAILS = """
from contextlib import asynccontextmanager
from robodual.serving.metrics import Metrics
from robodual.serving.readiness import Readiness
from robodual.serving.server import Server, run
from robodual.serving.settings import SpecialistSettings

settings = SpecialistSettings(port=0, http_port=0)

@asynccontextmanager
async def service():
    server = Server(settings, Readiness(), Metrics())
    await server.start()
    server.fail()
    yield server
    await server.drain()
    await server.stop()

run(settings, service())
"""


def failure(*_: object) -> NoReturn:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class FailingSpecialist(SpecialistEngine):
    """One that says that it is on a GPU, and fails once it is told to."""

    fails = False

    def __init__(self) -> None:
        plain = load_specialist("toy", device="cpu")
        super().__init__(plain.policy, replace(plain.facts, device="cuda:0"))

    def act(self, requests: Sequence[Request]) -> list[Answer]:
        if self.fails:
            failure()
        return super().act(requests)


async def test_a_specialist_whose_gpu_is_lost_sends_its_clients_elsewhere_and_ends(
    url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FailingSpecialist()
    async with specialist(engine, url) as replica:
        await opened(replica, store)
        engine.fails = True
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        code, _ = await status(replica.stub.Act(act("robot", 0, min_conditioning=version(1, 0)), timeout=30))
        assert code is grpc.StatusCode.INTERNAL  # the GPU goes on
        assert not replica.server.failed

        monkeypatch.setattr(torch.cuda, "synchronize", failure)
        code, message = await status(replica.stub.Act(act("robot", 0, min_conditioning=version(1, 0)), timeout=30))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "cuda:0 has failed" in message
        await replica.server.ended.wait()
        assert replica.server.failed


async def test_a_generalist_whose_gpu_is_lost_ends(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_generalist("toy", device="cpu")
    monkeypatch.setattr(engine, "facts", replace(engine.facts, device="cuda:0"))
    async with generalist(engine, url) as replica:
        monkeypatch.setattr(engine, "think", failure)
        monkeypatch.setattr(torch.cuda, "synchronize", failure)
        image = tensors.encode_image(frame(0))
        request = wire.ConditionRequest(session_id="robot", episode=1, step=0, instruction="push", rgb_static=image)
        code, _ = await status(replica.stub.Condition(request, timeout=30))
        assert code is grpc.StatusCode.UNAVAILABLE
        await replica.server.ended.wait()
        assert replica.server.failed


def test_a_process_whose_service_fails_exits_with_a_status() -> None:
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "stopped" in done.stdout + done.stderr
