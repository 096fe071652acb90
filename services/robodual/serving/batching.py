"""The queue in front of the model: forms batches of what is waiting, fairly between sessions."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, ParamSpec, TypeVar

from robodual.serving.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from robodual.serving.metrics import Metrics

PATIENCE = 0.2  # of the time that a batch took, for its sessions to come back together
MOST_PATIENCE = 0.01  # seconds
QUICK = 1e-4  # seconds of a batch for which no thread is worth waking, since that takes as long; no GPU is so quick
QUICK_IN_A_ROW = 8  # batches of one, all of them quick, after which an item that is alone runs in the event loop
TOO_LATE = "the deadline passed while the request waited"

Item = TypeVar("Item")
Answer = TypeVar("Answer")
P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Done(Generic[Answer]):
    """An answer, the seconds that it waited and the seconds that its batch took."""

    answer: Answer
    queued: float
    computed: float


@dataclass(eq=False)
class _Ticket(Generic[Item, Answer]):
    item: Item
    session: str
    deadline: float | None
    queued_at: float
    done: asyncio.Future[Done[Answer]]

    @property
    def over(self) -> bool:
        """Whether nobody waits any more: the caller was cancelled, or has been answered."""
        return self.done.done()

    def fail(self, error: Exception) -> None:
        if not self.over:
            self.done.set_exception(error)


class Batcher(Generic[Item, Answer]):
    """Runs `work` on batches in one thread of its own, which also runs whatever else needs the model.

    A batch is what is waiting when the thread is free: at most `max_batch` items, a session's second only after every
    other session's first. There is no fixed wait for a batch to fill: a session that was alone starts at once, and
    those of a batch, who were answered together, get a little of the time that it took to come back together. Batches
    and other work take turns, where both wait. Items whose caller was cancelled or whose deadline has passed are
    dropped before they cost compute. Where a batch raises, its items run one by one, so that a bad one fails alone.
    Where batches of one have lately been so quick that waking the thread takes as long, a session that was alone is
    answered in the event loop, if the thread has nothing to do: since the loop gives it work, they never run at once.
    Several engines have a batcher each, which share their metrics; `load` says which has least to do.
    """

    def __init__(
        self, work: Callable[[Sequence[Item]], Sequence[Answer]], *, max_batch: int, max_queue: int, metrics: Metrics
    ) -> None:
        self._work = work
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._metrics = metrics
        self._waiting: OrderedDict[str, deque[_Ticket[Item, Answer]]] = OrderedDict()
        self._count = 0
        metrics.queues.append(lambda: self._count)
        self._running: list[_Ticket[Item, Answer]] = []
        self._quick = 0  # batches of one in a row that were answered, and quickly
        self._company: set[str] = set()  # the sessions of the last batch
        self._until = 0.0  # when it is given up that they come back together
        self._waking: asyncio.TimerHandle | None = None
        self._others: deque[tuple[Callable[[], None], asyncio.Future[Any]]] = deque()  # calls that wait, and their ends
        self._calling = False
        self._called = False  # rather than a batch, when the thread was last given something
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # Not an executor's: after a job it sleeps at once, so that the event loop, which the job's end has woken, does
        # not wait for the interpreter's lock.
        self._thread = threading.Thread(target=self._work_off, name="model", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Items that wait or run."""
        return self._count + len(self._running)

    async def submit(
        self,
        item: Item,
        *,
        session: str,
        deadline: float | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Done[Answer]:
        """The answer to `item`. `deadline` is a time of the event loop's clock. `meanwhile` is called once the item
        waits or runs; where it raises, nobody wants the answer any more.

        Raises `ResourceExhausted` if the queue is full (a session that fills it gives way to others),
        `DeadlineExceeded` if the deadline passes in the queue, `Unavailable` if the service shuts down, and what
        `work` raises.
        """
        if self._closed:
            raise Unavailable("the service is shutting down")
        was_alone = self._company == {session}
        if was_alone and self._quick >= QUICK_IN_A_ROW and self._is_idle:
            return self._run_here(item, deadline, meanwhile)
        if self._count >= self._max_queue:
            self._make_room(session)
        ticket: _Ticket[Item, Answer] = _Ticket(
            item, session, deadline, time.perf_counter(), self._loop.create_future()
        )
        self._waiting.setdefault(session, deque()).append(ticket)
        self._count += 1
        if was_alone:
            self._start()
        else:
            # Not at once: what arrived together with this one joins its batch.
            self._loop.call_soon(self._start)
        try:
            if meanwhile is not None:
                meanwhile()
            return await ticket.done
        except BaseException:
            self._withdraw(ticket)
            ticket.done.cancel()
            raise

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs `function` in the model's thread, between batches."""
        if self._closed:
            raise Unavailable("the service is shutting down")
        done: asyncio.Future[R] = self._loop.create_future()

        def job() -> None:
            end: Callable[[], None]
            try:
                end = partial(done.set_result, function(*args, **kwargs))
            except BaseException as error:
                end = partial(done.set_exception, error)
            self._loop.call_soon_threadsafe(self._end_call, done, end)

        self._others.append((job, done))
        self._start()
        return await done

    async def close(self) -> None:
        """Fails what waits with `Unavailable` and ends the thread after the batch it is in."""
        self._closed = True
        for tickets in (self._running, *self._waiting.values()):
            for ticket in tickets:
                ticket.fail(Unavailable("the service is shutting down"))
        for _, done in self._others:
            if not done.done():
                done.set_exception(Unavailable("the service is shutting down"))
        self._waiting.clear()
        self._others.clear()
        self._count = 0
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _start(self) -> None:
        """Gives the thread a batch of what waits, or a call, if it has no work: a batch is formed when it can run."""
        if self._running or self._calling or self._closed:
            return
        while self._others and self._others[0][1].done():  # cancelled
            self._others.popleft()
        if self._others and not (self._called and self._waiting):
            self._start_call()
            return
        if self._patient():
            return
        self._running = self._take()
        if self._running:
            self._called = False
            self._jobs.put(partial(self._run, self._running))
            self._company = {ticket.session for ticket in self._running}
        elif self._others:
            self._start_call()

    def _start_call(self) -> None:
        job, _ = self._others.popleft()
        self._calling = self._called = True
        self._jobs.put(job)

    def _end_call(self, done: asyncio.Future[Any], end: Callable[[], None]) -> None:
        self._calling = False
        if not done.done():
            end()
        self._start()

    def _patient(self) -> bool:
        """Whether the sessions of the last batch are still given time, in which case it looks again later."""
        left = self._until - time.perf_counter()
        if left <= 0 or self._company <= self._waiting.keys() or self._count >= self._max_batch:
            return False
        if self._waiting and self._waking is None:
            self._waking = self._loop.call_later(left, self._wake)
        return True

    def _wake(self) -> None:
        self._waking = None
        self._start()

    def _work_off(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # and the frames that it holds

    @property
    def _is_idle(self) -> bool:
        """Whether nothing waits, and the thread has no work."""
        return not (self._count or self._running or self._calling or self._others)

    def _run_here(self, item: Item, deadline: float | None, meanwhile: Callable[[], None] | None) -> Done[Answer]:
        """Runs a batch of one in the event loop; a slow one, or an error, is the last for a while."""
        asked = time.perf_counter()
        if meanwhile is not None:
            meanwhile()
        if deadline is not None and deadline <= self._loop.time():
            self._metrics.dropped.inc()
            raise DeadlineExceeded(TOO_LATE)
        self._quick = 0
        self._loop.call_soon(self._metrics.batch_size.observe, 1)
        started = time.perf_counter()
        (answer,) = self._answers([item])
        computed = time.perf_counter() - started
        if computed <= QUICK:
            self._quick = QUICK_IN_A_ROW
        return Done(answer, started - asked, computed)

    def _run(self, batch: Sequence[_Ticket[Item, Answer]]) -> None:
        """Runs in the thread."""
        started = time.perf_counter()  # uvloop's own clock counts whole milliseconds
        answers = self._compute(batch)
        computed = time.perf_counter() - started
        self._loop.call_soon_threadsafe(self._finish, answers, started, computed)

    def _finish(self, answers: Sequence[Answer | Exception], started: float, computed: float) -> None:
        for ticket, answer in zip(self._running, answers, strict=True):
            if isinstance(answer, Exception):
                ticket.fail(answer)
            elif not ticket.over:
                ticket.done.set_result(Done(answer, started - ticket.queued_at, computed))
        if len(self._running) > 1:
            self._until = time.perf_counter() + min(PATIENCE * computed, MOST_PATIENCE)
        elif computed > QUICK or isinstance(answers[0], Exception):  # an error may come sooner than an answer
            self._quick = 0
        else:
            self._quick += 1
        self._running = []
        self._loop.call_soon(self._go_on, len(answers))  # after those that have their answers now

    def _go_on(self, size: int) -> None:
        self._metrics.batch_size.observe(size)
        self._start()

    def _take(self) -> list[_Ticket[Item, Answer]]:
        """The next batch: one item of each session in turn, those that nobody waits for any more left out."""
        batch: list[_Ticket[Item, Answer]] = []
        now = self._loop.time()
        while self._waiting and len(batch) < self._max_batch:
            session, tickets = self._waiting.popitem(last=False)
            ticket = tickets.popleft()
            if tickets:
                self._waiting[session] = tickets
            self._count -= 1
            if ticket.deadline is not None and ticket.deadline <= now:
                ticket.fail(DeadlineExceeded(TOO_LATE))
            if ticket.over:
                self._metrics.dropped.inc()
            else:
                batch.append(ticket)
        return batch

    def _compute(self, batch: Sequence[_Ticket[Item, Answer]]) -> list[Answer | Exception]:
        """An answer or an exception for each item; runs in the thread."""
        try:
            return [*self._answers([ticket.item for ticket in batch])]
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [answer for t in batch for answer in ([error] if t.over else self._compute([t]))]

    def _answers(self, items: Sequence[Item]) -> Sequence[Answer]:
        answers = self._work(items)
        if len(answers) != len(items):
            raise RuntimeError(f"the model gave {len(answers)} answers to {len(items)} requests")
        return answers

    def _make_room(self, session: str) -> None:
        """Turns away the newest item of the session that waits most, or raises if that is the caller's."""
        own = len(self._waiting.get(session, ()))
        heaviest = max(self._waiting.values(), key=len)
        if len(heaviest) <= own + 1:
            raise ResourceExhausted(f"the queue is full: {self._count} requests wait for the model; retry later")
        ticket = heaviest[-1]
        self._withdraw(ticket)
        ticket.fail(ResourceExhausted("the queue is full, and this session waits most; retry later"))

    def _withdraw(self, ticket: _Ticket[Item, Answer]) -> None:
        tickets = self._waiting.get(ticket.session, deque())
        if ticket in tickets:
            tickets.remove(ticket)
            if not tickets:
                del self._waiting[ticket.session]
            self._count -= 1
            self._metrics.dropped.inc()
