"""A model so quick that waking its thread takes longer: a request that is alone is computed in the event loop."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from robodual.serving import batching as module
from robodual.serving.batching import QUICK_IN_A_ROW, Batcher
from robodual.serving.errors import DeadlineExceeded, Unavailable
from robodual.serving.metrics import Metrics

LIMIT = 0.05  # seconds of a quick batch, so that what a loaded machine takes for anything is small beside it
SLOW = 1.5 * LIMIT


class Model:
    """Doubles numbers, negative ones slowly and zero not at all; notes where, and whether it ran twice at once."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.here: list[bool] = []  # of each batch: whether it was computed in the event loop's thread
        self.overlapped = False
        self._loop = threading.get_ident()
        self._running = False

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.overlapped |= self._running
        self._running = True
        self.batches.append(list(items))
        self.here.append(threading.get_ident() == self._loop)
        if min(items) < 0:
            time.sleep(SLOW)
        self._running = False
        if 0 in items:
            raise ValueError("zero")
        return [2 * item for item in items]


Served = tuple[Model, Batcher[int, int], Metrics]


@pytest.fixture
async def served(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(module, "QUICK", LIMIT)
    model, metrics = Model(), Metrics()
    batcher = Batcher(model, max_batch=4, max_queue=100, metrics=metrics)
    yield model, batcher, metrics
    await batcher.close()
    assert not model.overlapped


@pytest.fixture
async def quick(served: Served) -> Served:
    """A model that has just been found quick."""
    model, batcher, _ = served
    await ask(batcher, QUICK_IN_A_ROW)
    assert not any(model.here)
    model.batches.clear()
    model.here.clear()
    return served


async def ask(batcher: Batcher[int, int], times: int, item: int = 1) -> None:
    for _ in range(times):
        assert (await batcher.submit(item, session="a")).answer == 2 * item


async def test_a_model_that_has_been_quick_answers_in_the_event_loop(quick: Served) -> None:
    model, batcher, metrics = quick
    done = await batcher.submit(3, session="a")
    assert done.answer == 6
    assert 0 <= done.queued < LIMIT
    assert 0 < done.computed < LIMIT
    assert model.here == [True]
    await asyncio.sleep(0)
    assert f"robodual_batch_size_count {QUICK_IN_A_ROW + 1}.0" in metrics.exposition().decode()


async def test_another_session_joins_others_before_it_is_known_to_be_alone(quick: Served) -> None:
    model, batcher, _ = quick
    assert [(await batcher.submit(item, session="b")).answer for item in (4, 5)] == [8, 10]
    assert model.here == [False, True]


async def test_its_answer_does_not_wait_for_a_turn_of_the_event_loop(quick: Served) -> None:
    _, batcher, _ = quick
    turns: list[int] = []
    asyncio.get_running_loop().call_soon(turns.append, 1)
    await batcher.submit(3, session="a")
    assert not turns


async def test_a_slow_model_stays_in_its_thread(served: Served) -> None:
    model, batcher, _ = served
    await ask(batcher, QUICK_IN_A_ROW + 2, item=-1)
    assert not any(model.here)


async def test_a_slow_batch_sends_it_back_to_the_thread_until_it_has_been_quick_again(quick: Served) -> None:
    model, batcher, _ = quick
    await ask(batcher, 1, item=-1)
    await ask(batcher, QUICK_IN_A_ROW + 1)
    assert model.here == [True, *[False] * QUICK_IN_A_ROW, True]


async def test_an_error_is_the_callers_and_sends_it_back_to_the_thread(quick: Served) -> None:
    model, batcher, _ = quick
    with pytest.raises(ValueError, match="zero"):
        await batcher.submit(0, session="a")
    await ask(batcher, 1)
    assert model.here == [True, False]


async def test_errors_do_not_show_that_a_model_is_quick(served: Served) -> None:
    model, batcher, _ = served
    for _ in range(QUICK_IN_A_ROW):
        with pytest.raises(ValueError, match="zero"):
            await batcher.submit(0, session="a")
    await ask(batcher, 1)
    assert not any(model.here)


async def test_two_at_once_are_a_batch_in_the_thread(quick: Served) -> None:
    model, batcher, _ = quick
    for _ in range(2):
        done = await asyncio.gather(batcher.submit(1, session="b"), batcher.submit(2, session="c"))
        assert [each.answer for each in done] == [2, 4]
    assert model.batches == [[1, 2], [1, 2]]
    assert model.here == [False, False]


@pytest.mark.parametrize("started", [True, False])
async def test_it_waits_for_other_work_in_the_thread(quick: Served, started: bool) -> None:
    model, batcher, _ = quick
    other = asyncio.create_task(batcher.call(model, [-1]))
    await asyncio.sleep(0.01 if started else 0)
    await ask(batcher, 1)
    assert other.done()
    assert model.batches == [[-1], [1]]
    await ask(batcher, 1)
    assert model.here == [False, False, True]


async def test_it_waits_for_a_batch_in_the_thread(quick: Served) -> None:
    model, batcher, _ = quick
    first = asyncio.create_task(batcher.submit(-1, session="b"))
    await asyncio.sleep(0.01)
    assert (await batcher.submit(1, session="b")).answer == 2
    assert first.done()
    assert model.here == [False, False]


async def test_a_request_that_is_refused_meanwhile_costs_no_compute(quick: Served) -> None:
    model, batcher, _ = quick

    def refuse() -> None:
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        await batcher.submit(1, session="a", meanwhile=refuse)
    assert not model.batches
    assert batcher.load == 0
    await ask(batcher, 1)


async def test_a_deadline_that_has_passed_costs_no_compute(quick: Served) -> None:
    model, batcher, metrics = quick
    with pytest.raises(DeadlineExceeded):
        await batcher.submit(1, session="a", deadline=asyncio.get_running_loop().time() - 1)
    assert not model.batches
    assert metrics.value(metrics.dropped) == 1


async def test_a_caller_that_goes_costs_no_compute(quick: Served) -> None:
    model, batcher, _ = quick
    other = asyncio.create_task(batcher.call(time.sleep, SLOW))
    await asyncio.sleep(0)
    gone = asyncio.create_task(batcher.submit(1, session="a"))
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.gather(other, gone, return_exceptions=True)
    await ask(batcher, 1, item=2)
    assert model.batches == [[2]]


async def test_closing_fails_what_waits_for_the_thread(quick: Served) -> None:
    model, batcher, _ = quick
    other = asyncio.create_task(batcher.call(time.sleep, SLOW))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(batcher.submit(1, session="a"))
    await asyncio.sleep(0.01)
    await batcher.close()
    await other
    for late in (waiting, batcher.submit(1, session="a")):
        with pytest.raises(Unavailable):
            await late
    assert not model.batches
