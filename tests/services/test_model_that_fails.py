"""A model that raises, or says what is no number, costs its caller that answer and nobody else anything."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import grpc
import numpy as np
import pytest
from replicas import act, drive, opened, specialist, status, version

from robodual.conditioning.store import Store
from robodual.specialist.engine import Answer, Request, SpecialistEngine
from robodual_client import tensors


async def test_a_model_that_fails_is_an_internal_error_for_its_caller_alone(
    specialist_engine: SpecialistEngine, url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = specialist_engine.act

    def sabotaged(requests: list[object]) -> object:
        if any(request.frame.proprio[0] == 66 for request in requests):  # type: ignore[attr-defined]
            raise RuntimeError("a secret path and a stack trace")
        return plain(requests)  # type: ignore[arg-type]

    monkeypatch.setattr(specialist_engine, "act", sabotaged)
    async with specialist(specialist_engine, url) as replica:
        for name in ("good", "bad"):
            await opened(replica, store, name)
        request = act("bad", 0, min_conditioning=version(1, 0))
        request.observation.proprio.CopyFrom(tensors.encode(np.full(7, 66, np.float32)))
        bad, good = await asyncio.gather(
            status(replica.stub.Act(request, timeout=10)), drive(replica, range(3), "good")
        )
        assert bad[0] == grpc.StatusCode.INTERNAL
        assert "secret" not in bad[1]
        assert len(good) == 3
        await drive(replica, range(1), "bad")


async def test_an_action_that_is_not_finite_is_never_given(
    specialist_engine: SpecialistEngine, url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = specialist_engine.act

    def spoiled(requests: Sequence[Request]) -> list[Answer]:
        answers = plain(requests)
        return [replace(answer, chunk=answer.chunk * np.nan) for answer in answers] if failing else answers

    failing = False
    monkeypatch.setattr(specialist_engine, "act", spoiled)
    async with specialist(specialist_engine, url) as replica:
        for name in ("undisturbed", "robot"):
            await opened(replica, store, name)
        undisturbed = await drive(replica, range(2), "undisturbed")
        await drive(replica, range(1))
        failing = True
        code, _ = await status(replica.stub.Act(act("robot", 1, min_conditioning=version(1, 0)), timeout=10))
        failing = False
        assert code == grpc.StatusCode.INTERNAL
        (answer,) = await drive(replica, range(1, 2))
        assert answer.recovery == undisturbed[1].recovery
