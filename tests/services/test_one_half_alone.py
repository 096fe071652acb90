"""`only` runs one half of the pair, so that anyone can see what each contributes."""

from __future__ import annotations

import numpy as np
from replicas import Replica, act, action, chunk, conditioning, specialist, version

from robodual.conditioning.record import Conditioning
from robodual.conditioning.store import Store
from robodual.specialist.control import reference_actions
from robodual.specialist.engine import SpecialistEngine
from robodual_client import wire


async def drive(replica: Replica, store: Store, other: Conditioning | None = None) -> list[wire.ActResponse]:
    """Ten steps from step 0, all on one conditioning."""
    await replica.stub.Reset(
        wire.ResetRequest(session_id="robot", episode=1, reference_window=wire.REFERENCE_WINDOW_AGE)
    )
    await store.put("robot", other or conditioning(1, 0))
    requests = [act("robot", step, min_conditioning=version(1, 0)) for step in range(10)]
    answers = [await replica.stub.Act(request, timeout=30) for request in requests]
    await replica.stub.Close(wire.CloseRequest(session_id="robot"))
    await store.delete("robot")
    return answers


async def test_the_generalist_alone_executes_its_chunk_row_by_row(
    specialist_engine: SpecialistEngine, url: str, store: Store
) -> None:
    async with specialist(specialist_engine, url, only="generalist") as replica:
        answers = await drive(replica, store)
        info = await replica.stub.GetInfo(wire.InfoRequest())
    rows = conditioning(1, 0).reference_actions
    for step, answer in enumerate(answers):
        expected = rows[step] if step < 8 else np.zeros(7, np.float32)
        assert np.array_equal(action(answer)[:6], expected[:6])
        assert action(answer)[6] == (-1 if expected[6] < -0.5 else 1)
        assert np.array_equal(chunk(answer), reference_actions(rows, conditioning_step=0, step=step, window="age"))
    assert info.details["only"] == "generalist"


async def test_the_specialist_alone_does_not_know_what_the_generalist_thinks(
    specialist_engine: SpecialistEngine, url: str, store: Store
) -> None:
    other = Conditioning(1, 0, -conditioning(1, 0).reference_actions, conditioning(7, 0).hidden_states)
    async with specialist(specialist_engine, url, only="specialist") as replica:
        alone = [action(answer) for answer in await drive(replica, store)]
        otherwise = [action(answer) for answer in await drive(replica, store, other)]
        assert (await replica.stub.GetInfo(wire.InfoRequest())).details["only"] == "specialist"
    async with specialist(specialist_engine, url) as replica:
        together = [action(answer) for answer in await drive(replica, store)]
        assert (await replica.stub.GetInfo(wire.InfoRequest())).details["only"] == "no"
    assert np.array_equal(alone, otherwise)
    assert not np.array_equal(alone, together)
