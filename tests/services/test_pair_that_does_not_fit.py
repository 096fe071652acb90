"""A specialist whose context has another width than the generalist's hidden states says so, and harms nobody else."""

from __future__ import annotations

import time

import grpc
import numpy as np
import pytest
import torch
from replicas import Replica, act, chunk, conditioning, specialist, version

from robodual.conditioning.record import Conditioning
from robodual.conditioning.store import Store
from robodual.specialist.engine import SpecialistEngine
from robodual_client import wire

Refused = grpc.aio.AioRpcError
BOTH = "hidden states are 96 wide and this specialist's context is 64"


def wide(episode: int, step: int) -> Conditioning:
    """What a generalist of hidden size 96 leaves."""
    return Conditioning(episode, step, np.zeros((8, 7), np.float32), torch.zeros((20, 96), dtype=torch.bfloat16))


@pytest.mark.parametrize("waiting", [True, False])
async def test_both_widths_are_named_at_once(replica: Replica, store: Store, waiting: bool) -> None:
    await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=1))
    await store.put("robot", wide(1, 0))
    started = time.monotonic()
    with pytest.raises(Refused) as refused:
        await replica.stub.Act(act("robot", 0, **({"min_conditioning": version(1, 0)} if waiting else {})), timeout=30)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert BOTH in (refused.value.details() or "")
    assert time.monotonic() - started < 5  # not the deadline


async def test_a_session_that_moves_here_is_told_so_and_not_that_the_store_has_nothing(
    specialist_engine: SpecialistEngine, url: str, store: Store
) -> None:
    async with specialist(specialist_engine, url) as one, specialist(specialist_engine, url) as other:
        await one.stub.Reset(wire.ResetRequest(session_id="robot", episode=1))
        await store.put("robot", conditioning(1, 0))
        last = await one.stub.Act(act("robot", 0, min_conditioning=version(1, 0)), timeout=30)
        await store.put("robot", wide(1, 1))
        request = act("robot", 1, min_conditioning=version(1, 1))
        request.recovery.CopyFrom(last.recovery)
        request.previous_rgb_static.CopyFrom(act("robot", 0).observation.rgb_static)
        with pytest.raises(Refused, match=BOTH):
            await other.stub.Act(request, timeout=30)


async def test_a_conditioning_that_fits_is_used_after_one_that_did_not(replica: Replica, store: Store) -> None:
    await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=1))
    await store.put("robot", wide(1, 0))
    with pytest.raises(Refused, match=BOTH):
        await replica.stub.Act(act("robot", 0, min_conditioning=version(1, 0)), timeout=30)
    await store.put("robot", conditioning(1, 1))
    answer = await replica.stub.Act(act("robot", 1, min_conditioning=version(1, 1)), timeout=30)
    assert answer.conditioning == version(1, 1)
    assert np.isfinite(chunk(answer)).all()


async def test_an_earlier_conditioning_goes_on_being_used(replica: Replica, store: Store) -> None:
    await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=1))
    await store.put("robot", conditioning(1, 0))
    await replica.stub.Act(act("robot", 0, min_conditioning=version(1, 0)), timeout=30)
    await store.put("robot", wide(1, 1))
    answer = await replica.stub.Act(act("robot", 1), timeout=30)
    assert answer.conditioning == version(1, 0)
    with pytest.raises(Refused, match=BOTH):
        await replica.stub.Act(act("robot", 2, min_conditioning=version(1, 1)), timeout=30)
