"""What a session wants done, as values.

A session's logic is written once, as generators (plans) that yield these operations; the blocking and the asyncio
client each run them over their own kind of gRPC.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass
from hashlib import sha256
from numbers import Real
from typing import Any, Callable, Generator, NamedTuple, Sequence, TypeVar, Union

import grpc
from google.protobuf.message import Message

from robodual_client.errors import Failure
from robodual_client.frame import Buffer

logger = logging.getLogger(__name__)

DNS = "dns:///"
FIRST_DELAY = 0.05  # seconds before a call is repeated
LONGEST_DELAY = 2.0
LONGEST_WAIT = 86_400.0  # seconds: a day


@dataclass(frozen=True)
class Timeouts:
    """Seconds. `act`, `condition` and `control` (Reset, GetInfo) limit one attempt of a call. `budget` is how long a
    call that fails for want of a service (unavailable, queue full) is repeated before it is given up, and `connect` the
    same for the first contact with each service. `act` is over the 10 seconds that a specialist waits for a
    conditioning, so that its reason arrives; a robot wants a fraction of a second.
    """

    act: float = 15.0
    condition: float = 60.0
    control: float = 10.0
    budget: float = 30.0
    connect: float = 5.0

    def __post_init__(self) -> None:
        for name, seconds in vars(self).items():
            if not is_wait(seconds) or seconds == 0:
                raise ValueError(
                    f"timeouts: {name} must be over 0 and at most {LONGEST_WAIT:.0f} seconds, got {seconds!r}"
                )


def is_wait(given: Any) -> bool:
    """Whether it is a number of seconds that can be waited: neither gRPC nor a thread can wait for ever."""
    return isinstance(given, Real) and 0 <= float(given) <= LONGEST_WAIT


class Call(NamedTuple):
    """Send `request` after `delay` seconds, and give its response to the plan or throw the Failure into it."""

    address: str
    service: str
    method: str
    request: Message | bytes | list[Buffer]  # a message, or one that is serialised already
    timeout: float
    delay: float = 0.0  # latency that was asked for

    @property
    def where(self) -> str:
        return f"{self.service.rpartition('.')[2]}.{self.method} at {self.address}"


@dataclass(frozen=True)
class Resolve:
    """Give the plan every address, "ip:port", that `name`, "host:port", stands for, or throw the Failure into it."""

    name: str


@dataclass(frozen=True)
class Sleep:
    seconds: float


@dataclass(frozen=True)
class Launch:
    """Do `operation` in the background, tell `landed` its result or Failure, and launch what that returns, if any."""

    operation: Call | Resolve
    landed: Callable[[Any], Launch | None]


class Halt:
    """Cancel what is in the background."""


Operation = Union[Call, Resolve, Sleep, Launch, Halt]
T = TypeVar("T")
Plan = Generator[Operation, Any, T]


class Replicas:
    """The addresses of one service, in the order in which this session tries them.

    The order depends on session and addresses alone (rendezvous hashing): sessions spread evenly, a session that is
    opened again finds its replica, and adding a replica moves no more sessions than it must. "dns:///host:port" stands
    for every address of the name, as of the last `refresh`.
    """

    def __init__(self, given: Sequence[str], session: str) -> None:
        self._session = session
        self._fixed = [address for address in given if not address.startswith(DNS)]
        self._names = [address[len(DNS) :] for address in given if address.startswith(DNS)]
        self._reason = "the name has not been looked up"
        # The current one first; replaced as a whole, since thinking looks from its thread.
        self._addresses: list[str] = []
        self.checked = ""  # the address that was last seen to serve the session's model, until a call fails there
        self._arrange(self._fixed)

    def __len__(self) -> int:
        return len(self._addresses)

    @property
    def current(self) -> str:
        """Raises Failure while no name could be resolved."""
        addresses = self._addresses
        if not addresses:
            raise Failure(grpc.StatusCode.UNAVAILABLE, self._reason, DNS + self._names[0])
        return addresses[0]

    def advance(self) -> str:
        """Turns to the next address; returns the one that is left."""
        addresses = self._addresses
        self._addresses = addresses[1:] + addresses[:1]
        return addresses[0] if addresses else ""

    def refresh(self, avoid: str = "") -> Plan[None]:
        """Looks the names up again. Where that finds other addresses than before, the session turns to its first choice
        among them that is not `avoid`. Those of before stay where a name cannot be resolved.
        """
        found = list(self._fixed)
        for name in self._names:
            try:
                found += yield Resolve(name)
            except Failure as failure:
                self._reason = failure.details
                logger.warning("%s", failure)
                return
        self._arrange(found, avoid)

    def _arrange(self, addresses: Sequence[str], avoid: str = "") -> None:
        order = sorted(set(addresses), key=lambda address: sha256(f"{self._session} {address}".encode()).digest())
        if order and set(order) != set(self._addresses):
            self._addresses = order[1:] + order[:1] if order[0] == avoid else order


class Attempts:
    """The attempts of one call at one of `replicas`, for at most `budget` seconds."""

    def __init__(self, replicas: Replicas, budget: float) -> None:
        self.failures = 0
        self._replicas = replicas
        self._budget = budget
        self._start = time.monotonic()

    def timeout(self, limit: float) -> float:
        """Seconds for the next attempt: `limit`, and for a repetition no more than what the budget leaves."""
        return limit if self.failures == 0 else max(FIRST_DELAY, min(limit, self._left()))

    def failed(self, failure: Failure) -> Plan[None]:
        """Turns to the next replica or waits, exponentially longer with jitter, when the call may be repeated.

        Raises RoboDualError if it may not, or if the budget is used up.
        """
        self.failures += 1
        if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._replicas.advance()  # for the next call: this one's time is up
        if not failure.transient:
            raise failure.error() from failure
        overloaded = failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        if not overloaded:
            self._replicas.checked = ""
            yield from self._replicas.refresh(avoid=self._replicas.advance())
        delay = 0.0
        if overloaded or self.failures >= len(self._replicas):
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(self.failures - 1, 10)) * random.uniform(0.5, 1.0)
        if delay >= self._left():
            raise failure.error(self.failures, time.monotonic() - self._start) from failure
        if delay:
            yield Sleep(delay)

    def _left(self) -> float:
        return self._start + self._budget - time.monotonic()


def repeat(
    replicas: Replicas,
    budget: float,
    call: Callable[[str], Call],
    before: Callable[[Attempts], Plan[None]] | None = None,
) -> Plan[Any]:
    """`call(address)` at the current replica, each time after `before`, repeated as long as that may help.

    Raises RoboDualError.
    """
    attempts = Attempts(replicas, budget)
    while True:
        try:
            if before is not None:
                yield from before(attempts)
            attempt = call(replicas.current)
            return (yield attempt._replace(timeout=attempts.timeout(attempt.timeout)))
        except Failure as failure:
            yield from attempts.failed(failure)
