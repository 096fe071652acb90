import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import pytest

from robodual.serving import batching as module
from robodual.serving.batching import Batcher
from robodual.serving.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from robodual.serving.metrics import Metrics


class Model:
    """Doubles numbers; the first batch waits for `go`, so that a test can fill the queue behind it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.go = threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        self.go.wait(5)
        if any(item < 0 for item in items):
            raise ValueError(f"negative among {items}")
        return [2 * item for item in items]


@asynccontextmanager
async def batching(
    work: Callable[[Sequence[int]], Sequence[int]], *, max_batch: int = 4, max_queue: int = 100
) -> AsyncIterator[Batcher[int, int]]:
    batcher = Batcher(work, max_batch=max_batch, max_queue=max_queue, metrics=Metrics())
    yield batcher
    await batcher.close()


async def submit(batcher: Batcher[int, int], item: int, session: str) -> asyncio.Task[int]:
    """A submission that has reached the queue."""

    async def answer() -> int:
        return (await batcher.submit(item, session=session)).answer

    task = asyncio.create_task(answer())
    await asyncio.sleep(0.01)
    return task


async def test_what_waits_becomes_one_batch_in_one_thread() -> None:
    model = Model()
    async with batching(model) as batcher:
        first = await submit(batcher, 1, "a")
        rest = [await submit(batcher, item, name) for item, name in enumerate("bcdef", start=2)]
        model.go.set()
        assert await asyncio.gather(first, *rest) == [2, 4, 6, 8, 10, 12]
    assert model.batches == [[1], [2, 3, 4, 5], [6]]
    assert len(model.threads) == 1
    assert threading.get_ident() not in model.threads


async def test_an_idle_model_takes_a_request_at_once() -> None:
    async with batching(lambda items: items) as batcher:
        await batcher.submit(0, session="a")
        loop = asyncio.get_running_loop()
        times = []
        for _ in range(20):
            started = loop.time()
            await batcher.submit(0, session="a")
            times.append(loop.time() - started)
    assert min(times) < 0.005


PATIENT = 0.3  # seconds, so that what a loaded machine takes for anything is small beside it


AfterTwo = tuple[Model, Batcher[int, int]]


@pytest.fixture
async def after_two(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AfterTwo]:
    """A model and its queue after a batch of two that took long enough for all of the patience there is."""
    monkeypatch.setattr(module, "MOST_PATIENCE", PATIENT)
    monkeypatch.setattr(module, "PATIENCE", 10.0)

    class Slow(Model):
        def __call__(self, items: Sequence[int]) -> list[int]:
            time.sleep(1.5 * PATIENT / 10.0)
            return super().__call__(items)

    model = Slow()
    model.go.set()
    async with batching(model) as batcher:
        await asyncio.gather(batcher.submit(1, session="a"), batcher.submit(2, session="b"))
        assert model.batches == [[1, 2]]
        yield model, batcher


async def test_sessions_of_a_batch_come_back_together(after_two: AfterTwo) -> None:
    model, batcher = after_two
    tasks = [asyncio.ensure_future(batcher.submit(3, session="a"))]
    await asyncio.sleep(0)
    await asyncio.sleep(PATIENT / 5)
    tasks.append(asyncio.ensure_future(batcher.submit(4, session="b")))
    await asyncio.gather(*tasks)
    assert model.batches[1:] == [[3, 4]]


async def test_a_session_that_comes_back_alone_waits_no_longer_than_that(after_two: AfterTwo) -> None:
    model, batcher = after_two
    alone = await batcher.submit(3, session="a")
    assert PATIENT / 2 < alone.queued < 5 * PATIENT
    assert (await batcher.submit(4, session="a")).queued < PATIENT
    assert model.batches[1:] == [[3], [4]]


async def test_nobody_waits_for_a_batch_of_long_ago(after_two: AfterTwo) -> None:
    _, batcher = after_two
    await asyncio.sleep(1.1 * PATIENT)
    assert (await batcher.submit(3, session="c")).queued < PATIENT


async def test_nobody_waits_for_a_session_that_was_alone(after_two: AfterTwo) -> None:
    _, batcher = after_two
    await batcher.submit(3, session="a")
    assert (await batcher.submit(4, session="b")).queued < PATIENT / 2


async def test_a_session_that_was_alone_does_not_wait_for_a_turn_of_the_event_loop() -> None:
    model = Model()
    model.go.set()
    async with batching(model) as batcher:
        await batcher.submit(1, session="a")
        order = []
        task = asyncio.ensure_future(batcher.submit(2, session="a"))
        asyncio.get_running_loop().call_soon(lambda: order.append(batcher.load - batcher._count))
        await task
    assert order == [1], "it ran already"


async def test_sessions_take_turns() -> None:
    model = Model()
    async with batching(model, max_batch=2) as batcher:
        tasks = [await submit(batcher, 0, "first")]
        tasks += [await submit(batcher, item, "greedy") for item in (1, 2, 3, 4)]
        tasks += [await submit(batcher, 10, "modest"), await submit(batcher, 20, "late")]
        model.go.set()
        await asyncio.gather(*tasks)
    assert model.batches == [[0], [1, 10], [20, 2], [3, 4]]


async def test_cancelled_requests_cost_no_compute() -> None:
    model = Model()
    async with batching(model) as batcher:
        first = await submit(batcher, 0, "a")
        cancelled, kept = await submit(batcher, 1, "b"), await submit(batcher, 2, "c")
        cancelled.cancel()
        await asyncio.sleep(0)
        model.go.set()
        await asyncio.gather(first, kept)
    assert model.batches == [[0], [2]]


async def test_a_request_cancelled_in_its_batch_leaves_its_neighbours_alone() -> None:
    model = Model()
    async with batching(model) as batcher:
        running = await submit(batcher, 1, "a")
        running.cancel()
        await asyncio.sleep(0.01)
        model.go.set()
        assert (await batcher.submit(2, session="b")).answer == 4


async def test_a_request_that_is_refused_while_it_waits_or_runs_leaves_others_alone() -> None:
    model = Model()
    async with batching(model) as batcher:
        first = await submit(batcher, 0, "a")
        with pytest.raises(ValueError, match="refused"):
            await batcher.submit(1, session="b", meanwhile=partial(int, "refused"))  # waits, and costs no compute
        model.go.set()
        await first
        with pytest.raises(ValueError, match="refused"):
            await batcher.submit(2, session="a", meanwhile=partial(int, "refused"))  # runs
        assert (await batcher.submit(3, session="a")).answer == 6
    assert [1] not in model.batches


async def test_expired_requests_cost_no_compute() -> None:
    model = Model()
    async with batching(model) as batcher:
        first = await submit(batcher, 0, "a")
        soon = asyncio.get_running_loop().time() + 0.02
        late = asyncio.create_task(batcher.submit(1, session="b", deadline=soon))
        await asyncio.sleep(0.05)
        model.go.set()
        with pytest.raises(DeadlineExceeded):
            await late
        await first
    assert model.batches == [[0]]


async def test_a_request_that_expires_and_is_cancelled_at_once_leaves_the_queue_alive() -> None:
    """gRPC cancels a call when its deadline passes, so both come together, and a batch may be formed in between."""
    model = Model()
    async with batching(model) as batcher:
        first = await submit(batcher, 0, "a")
        now = asyncio.get_running_loop().time()
        late = asyncio.create_task(batcher.submit(1, session="b", deadline=now))
        gone = await submit(batcher, 2, "c")
        model.go.set()
        await asyncio.sleep(0)
        time.sleep(0.05)  # the batch ends while the loop is busy
        await asyncio.sleep(0)  # now the queue's own task is the next in line
        late.cancel()
        gone.cancel()
        await asyncio.gather(first, late, gone, return_exceptions=True)
        assert (first.result(), late.cancelled(), gone.cancelled()) == (0, True, True)
        assert (await batcher.submit(3, session="d")).answer == 6
    assert model.batches == [[0], [3]]


async def test_a_batch_is_formed_when_the_thread_is_free_of_other_work_too() -> None:
    model = Model()
    model.go.set()
    async with batching(model) as batcher:
        held = threading.Event()
        other = asyncio.create_task(batcher.call(held.wait, 5))
        await asyncio.sleep(0.01)
        kept = [await submit(batcher, item, name) for item, name in enumerate("ab")]
        cancelled = await submit(batcher, 9, "c")
        cancelled.cancel()
        await asyncio.sleep(0)
        held.set()
        await asyncio.gather(other, *kept)
    assert model.batches == [[0, 1]]


@pytest.mark.parametrize("started", [True, False])
async def test_other_work_that_is_cancelled_leaves_the_thread_alive(started: bool) -> None:
    ran = []
    async with batching(lambda items: items) as batcher:
        held = threading.Event()
        before = asyncio.create_task(batcher.call(held.wait, 5))
        await asyncio.sleep(0.01)
        cancelled = before if started else asyncio.create_task(batcher.call(ran.append, 1))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.sleep(0.01)
        held.set()
        assert (await batcher.submit(7, session="a")).answer == 7
        await asyncio.gather(before, cancelled, return_exceptions=True)
    assert not ran


async def test_other_work_that_never_ends_and_batches_take_turns() -> None:
    model, order = Model(), []
    model.go.set()
    async with batching(model) as batcher:

        async def busy() -> None:
            while True:
                await batcher.call(time.sleep, 0.005)
                order.append(0)

        others = [asyncio.create_task(busy()) for _ in range(3)]
        await asyncio.sleep(0.05)
        order.clear()
        for item in range(1, 11):
            assert (await asyncio.wait_for(batcher.submit(item, session="a"), 5)).answer == 2 * item
            order.append(item)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    assert order.count(0) in range(8, 13), "a call for each batch"


async def test_batches_that_never_end_and_other_work_take_turns() -> None:
    model = Model()
    model.go.set()
    async with batching(model, max_batch=1) as batcher:

        async def busy(session: str) -> None:
            while True:
                await batcher.submit(1, session=session)

        robots = [asyncio.create_task(busy(session)) for session in "abc"]
        for _ in range(5):
            before = len(model.batches)
            after = await asyncio.wait_for(batcher.call(lambda: len(model.batches)), 5)
            assert after - before <= 2
        for robot in robots:
            robot.cancel()
        await asyncio.gather(*robots, return_exceptions=True)


async def test_a_request_cancelled_in_a_batch_that_fails_is_not_run_again() -> None:
    batches = []
    filled, cancelled = threading.Event(), threading.Event()

    def work(items: Sequence[int]) -> list[int]:
        batches.append(list(items))
        if len(items) > 1:
            cancelled.wait(5)
            raise ValueError("too many")
        return [2 * item for item in items]

    async with batching(work) as batcher:
        other = asyncio.create_task(batcher.call(filled.wait, 5))
        await asyncio.sleep(0.01)
        kept, gone = await submit(batcher, 1, "a"), await submit(batcher, 2, "b")
        filled.set()
        await other
        while not batches:
            await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        cancelled.set()
        assert await kept == 2
    assert batches == [[1, 2], [1]]


async def test_load_counts_what_waits_and_what_runs() -> None:
    model = Model()
    async with batching(model, max_batch=2) as batcher:
        tasks = [await submit(batcher, item, str(item)) for item in range(4)]
        assert batcher.load == 4
        tasks[-1].cancel()
        await asyncio.sleep(0)
        assert batcher.load == 3
        model.go.set()
        await asyncio.gather(*tasks[:-1])
        await asyncio.sleep(0)
        assert batcher.load == 0


async def test_a_bad_item_fails_alone() -> None:
    model = Model()
    async with batching(model) as batcher:
        tasks = [await submit(batcher, item, str(item)) for item in (0, 1, -2, 3)]
        model.go.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert outcomes[:2] == [0, 2]
    assert isinstance(outcomes[2], ValueError)
    assert outcomes[3] == 6


async def test_a_model_that_loses_answers_fails_rather_than_mix_them_up() -> None:
    async with batching(lambda items: list(items)[1:]) as batcher:
        with pytest.raises(RuntimeError, match="0 answers to 1 requests"):
            await batcher.submit(1, session="a")


async def test_a_full_queue_refuses() -> None:
    model = Model()
    async with batching(model, max_queue=2) as batcher:
        tasks = [await submit(batcher, item, name) for item, name in enumerate("abc")]
        with pytest.raises(ResourceExhausted, match="2 requests wait"):
            await batcher.submit(3, session="d")
        model.go.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4]


async def test_a_session_that_fills_the_queue_gives_way() -> None:
    model = Model()
    async with batching(model, max_queue=3) as batcher:
        first = await submit(batcher, 0, "a")
        greedy = [await submit(batcher, item, "greedy") for item in (1, 2, 3)]
        with pytest.raises(ResourceExhausted):
            await batcher.submit(4, session="greedy")
        modest = await submit(batcher, 5, "modest")
        model.go.set()
        outcomes = await asyncio.gather(first, *greedy, modest, return_exceptions=True)
    assert [*outcomes[:3], outcomes[4]] == [0, 2, 4, 10]
    assert isinstance(outcomes[3], ResourceExhausted)


async def test_close_finishes_the_batch_and_fails_what_waits() -> None:
    model = Model()
    async with batching(model) as batcher:
        running, waiting = await submit(batcher, 0, "a"), await submit(batcher, 1, "b")
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        model.go.set()
        await closing
        outcomes = await asyncio.gather(running, waiting, return_exceptions=True)
        assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
        with pytest.raises(Unavailable):
            await batcher.submit(2, session="a")


async def test_other_work_runs_in_the_models_thread() -> None:
    model = Model()
    model.go.set()
    async with batching(model) as batcher:
        await batcher.submit(0, session="a")
        assert {await batcher.call(threading.get_ident)} == model.threads
