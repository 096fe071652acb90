"""One session's state and logic, without input or output: each method is a plan (calls.py) for a transport to run."""

from __future__ import annotations

import logging
import operator
import re
import secrets
import time
import uuid
from functools import partial
from typing import Any, Callable, Iterable, Mapping, Sequence

import grpc
import numpy as np
import numpy.typing as npt

from robodual_client import observation, wire
from robodual_client.answer import Answer, Conditioning, ServiceInfo, checked_action
from robodual_client.calls import Attempts, Call, Halt, Plan, Replicas, Timeouts, is_wait, repeat
from robodual_client.errors import Failure, ServiceMismatch
from robodual_client.frame import Buffer, Frame
from robodual_client.schedule import Schedule
from robodual_client.thinking import Thinking
from robodual_client.tracing import Tracer
from robodual_client.wire.rpc import GENERALIST, SPECIALIST

logger = logging.getLogger(__name__)

LONGEST_INSTRUCTION = 512
LAST = 2**31 - 1  # the highest episode, and step, that the services take
CLOSING = 2.0  # seconds for each call of close


class Session:
    def __init__(
        self,
        generalist: str | Sequence[str],
        specialist: str | Sequence[str],
        *,
        session: str | None,
        schedule: str,
        seed: int,
        timeouts: Timeouts | None,
        latency: Mapping[str, float] | None,
    ) -> None:
        self.name = uuid.uuid4().hex if session is None else session
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.name):
            raise ValueError(f"session must be 1 to 64 characters of [A-Za-z0-9_.-], got {self.name!r}")
        self.schedule = Schedule.parse(schedule)
        self._answer: Callable[[], Answer | None] = lambda: None
        self.episode = 0
        self.step_number = 0
        self._seed = _whole("seed", seed)
        if not 0 <= self._seed < 2**64:
            raise ValueError(f"seed must be 0 to 2**64 - 1, got {seed}")
        self._client = 1 + secrets.randbits(63)  # tells this client from another under the same name
        self._timeouts = Timeouts() if timeouts is None else timeouts
        if not isinstance(self._timeouts, Timeouts):
            raise ValueError(f"timeouts must be Timeouts(act=..., condition=..., ...), got {timeouts!r}")
        self._latency = _checked_latency({} if latency is None else latency)
        self.tracer: Tracer | None = None
        self._traceparent = ""
        self._generalists = Replicas(_addresses(generalist, "generalist"), self.name)
        self._specialists = Replicas(_addresses(specialist, "specialist"), self.name)
        self._services = {"generalist": (GENERALIST, self._generalists), "specialist": (SPECIALIST, self._specialists)}
        self._began: dict[str, ServiceInfo] = {}  # what both were at first, and stay as long as this session lasts
        self._opened: set[str] = set()  # specialists that hold, or held, a session of ours: for close
        self._contacted = False
        self._ready = False
        self._encoder: observation.Encoder | None = None
        self._start_episode("")

    def _start_episode(self, instruction: str) -> None:
        self._instruction = instruction
        self.step_number = 0
        self._first_unseen = 0  # the step after the last one that was answered
        self._reset_at: set[str] = set()  # specialists where this episode was started
        self._answered_by = ""
        self._recovery: wire.RecoveryState | None = None
        self._previous: Frame | None = None
        self._asked: tuple[int, Frame] | None = None  # the latest frame whose conditioning was waited for
        self._conditioning: Conditioning | None = None
        self._least: int | None = None  # the step of the least conditioning that a replica must see
        self._thinking: Thinking | None = None
        self._launching = False

    @property
    def last(self) -> Answer | None:
        """The answer to the last step. Made when it is asked for, since a step needs only its action."""
        answer = self._answer()
        self._answer = lambda: answer
        return answer

    def info(self) -> Plan[dict[str, ServiceInfo]]:
        """GetInfo of both services, by "generalist" and "specialist"."""
        budget = self._timeouts.budget if self._contacted else self._timeouts.connect
        infos = {}
        for name, (service, replicas) in self._services.items():
            yield from replicas.refresh()
            response = yield from repeat(replicas, budget, partial(self._info_call, service))
            infos[name] = _checked_info(response, name, replicas.current)
        self._contacted = True
        if not self._began:
            self._began = dict(infos)
            for name, (_, replicas) in self._services.items():
                replicas.checked = infos[name].address
        return infos

    def reset(self, instruction: str, episode: int | None) -> Plan[None]:
        if not _is_text(instruction) or not instruction.strip() or len(instruction) > LONGEST_INSTRUCTION:
            raise ValueError(
                f"instruction must be 1 to {LONGEST_INSTRUCTION} characters of text, got {instruction!r:.80}"
            )
        following = self.episode + 1 if episode is None else _whole("episode", episode)
        if not self.episode < following <= LAST:
            raise ValueError(f"episode must be over {self.episode}, the last one, and at most {LAST}, got {following}")
        self._ready = False
        yield from self._stop_thinking()
        if not self._began:
            yield from self.info()
        else:
            for _, replicas in self._services.values():
                yield from replicas.refresh()
                replicas.checked = ""  # another model may have been put there since
        self.episode = following
        self._start_episode(instruction)
        self._encoder = observation.Encoder(self._began["specialist"].sensors)
        attempts = Attempts(self._specialists, self._timeouts.budget)
        while not self._reset_at:
            try:
                yield from self._admit(self._specialists.current, attempts)
            except Failure as failure:
                yield from attempts.failed(failure)
        yield from self._ask_generalist(partial(self._reset_call, GENERALIST))
        self._ready = True

    def step(self, obs: Mapping[str, Any]) -> Plan[npt.NDArray[np.float64]]:
        if self.tracer is None:
            return (yield from self._step(obs))
        where = {"session": self.name, "episode": self.episode, "step": self.step_number}
        span = self.tracer.begin("step", where)
        self._traceparent = span.traceparent
        try:
            action = yield from self._step(obs)
        except BaseException as error:
            span.end(error)
            raise
        assert self.last is not None
        span.note(specialist=self.last.address, age=self.last.age, failures=self.last.failures)
        span.end()
        return action

    def _step(self, obs: Mapping[str, Any]) -> Plan[npt.NDArray[np.float64]]:
        if not self._ready or self._encoder is None:
            raise RuntimeError("step: no episode has been started; call reset(instruction) first")
        frame = self._encoder.encode(obs)
        step = self.step_number
        if self._thinking is not None:
            self._thinking.raise_error()
        due = any(self.schedule.waits(passed) for passed in range(self._first_unseen, step + 1))
        if due and (self._asked is None or self._asked[0] != step):
            self._conditioning = yield from self._condition(step, frame)
            self._least = step
            if self.schedule.asynchronous:
                self._thinking = Thinking(self._generalists, self._conditioning)
            self._asked = step, frame
        action = yield from self._act(step, frame)
        self._previous = frame
        self.step_number = self._first_unseen = step + 1
        return action

    def skip(self, steps: int) -> None:
        steps = _whole("steps", steps)
        if not 0 <= steps <= LAST - self.step_number:
            raise ValueError(f"steps must be at least 0, and lead no further than to step {LAST}, got {steps}")
        self.step_number += steps

    def close(self) -> Plan[None]:
        """Stops what is in the background and lets the services forget the session, as far as they can be reached."""
        yield from self._stop_thinking()
        self._ready = False
        forget = [(SPECIALIST, address) for address in sorted(self._opened)]
        if self._opened:  # otherwise what is there under this name is another client's
            forget.append((GENERALIST, self._generalists.current))
        self._opened.clear()
        for service, address in forget:
            try:
                yield Call(address, service, "Close", wire.CloseRequest(session_id=self.name), CLOSING)
            except Failure as failure:
                logger.info("session %s was not closed: %s", self.name, failure)

    def _condition(self, step: int, frame: Frame) -> Plan[Conditioning]:
        start = time.perf_counter()
        response = yield from self._ask_generalist(lambda address: self._condition_call(address, step, frame))
        return Conditioning.of(response, (time.perf_counter() - start) * 1e3)

    def _ask_generalist(self, call: Callable[[str], Call]) -> Plan[Any]:
        return repeat(self._generalists, self._timeouts.budget, call, partial(self._require_model, "generalist"))

    def _act(self, step: int, frame: Frame) -> Plan[npt.NDArray[np.float64]]:
        attempts = Attempts(self._specialists, self._timeouts.budget)
        lost_at: set[str] = set()
        conditioned_again = False
        while True:
            address = self._specialists.current
            recover = attempts.failures > 0 or address != self._answered_by
            try:
                if not address == self._answered_by == self._specialists.checked:
                    yield from self._admit(address, attempts)
                request = self._act_request(step, frame, recover)
                if attempts.failures == 0 and self._thinking is not None:
                    yield from self._think(self._thinking, step, frame)
                start = time.perf_counter()
                timeout = attempts.timeout(self._timeouts.act)
                response = yield Call(address, SPECIALIST, "Act", request, timeout, self._latency["specialist"])
            except Failure as failure:
                if failure.code is grpc.StatusCode.NOT_FOUND and address not in lost_at:
                    # Restarted, or the session timed out there: give it the episode's start or its recovery state.
                    lost_at.add(address)
                    self._reset_at.discard(address)
                    self._specialists.checked = ""
                    attempts.failures += 1
                elif failure.lacks_conditioning and not conditioned_again:
                    # The store lost it, or it grew too old. In lock-step the same frame makes the same conditioning.
                    conditioned_again = True
                    yield from self._condition_again(step, frame)
                else:
                    yield from attempts.failed(failure)
                continue
            round_trip = (time.perf_counter() - start) * 1e3
            action = checked_action(response, step=step, episode=self.episode, address=address)
            self._answer = partial(
                Answer.of,
                response,
                step=step,
                episode=self.episode,
                round_trip=round_trip,
                failures=attempts.failures,
                address=address,
                conditioning=self._conditioning if self._thinking is None else self._thinking.latest,
            )
            self._answered_by = address
            self._least = response.conditioning.step
            self._recovery = response.recovery if response.HasField("recovery") else None
            return action

    def _condition_again(self, step: int, frame: Frame) -> Plan[None]:
        if not self.schedule.asynchronous and self._asked is not None:
            step, frame = self._asked
        logger.warning("the specialist has no usable conditioning: asking for that of step %d again", step)
        self._conditioning = yield from self._condition(step, frame)
        self._least = step

    def _admit(self, address: str, attempts: Attempts) -> Plan[None]:
        """Makes sure that the specialist at `address` serves the model that this session began with, and that it
        knows the episode if no action of it has been answered yet.
        """
        yield from self._require_model("specialist", attempts)
        if self._first_unseen == 0 and address not in self._reset_at:
            call = self._reset_call(SPECIALIST, address)
            yield call._replace(timeout=attempts.timeout(call.timeout))
            self._reset_at.add(address)
        self._opened.add(address)

    def _require_model(self, name: str, attempts: Attempts | None = None) -> Plan[None]:
        """Raises ServiceMismatch if the service's current replica is not known to serve the model that this session
        began with, and says, when it is asked, that it serves another.
        """
        service, replicas = self._services[name]
        address = replicas.current
        if address == replicas.checked:
            return
        call = self._info_call(service, address)
        if attempts is not None:
            call = call._replace(timeout=attempts.timeout(call.timeout))
        info, began = _checked_info((yield call), name, address), self._began[name]
        if info.model != began.model:
            raise ServiceMismatch(
                f"{name} at {address}: serves {info.model}, where this session began with {began.model} at "
                f"{began.address}: give replicas of one model, or go on with a new client"
            )
        replicas.checked = address

    def _think(self, thinking: Thinking, step: int, frame: Frame) -> Plan[None]:
        if self._launching:  # Ctrl-C came in between: nobody knows whether the request left
            thinking.stop()
            yield Halt()
            thinking = self._thinking = Thinking(self._generalists, thinking.latest)
        self._launching = True
        launch = thinking.offer(step, lambda: self._thought(step, frame))
        if launch is not None:
            yield launch
        self._launching = False

    def _thought(self, step: int, frame: Frame) -> Plan[Conditioning]:
        """One attempt at the frame's conditioning, in the background."""
        yield from self._require_model("generalist")
        start = time.perf_counter()
        response = yield self._condition_call(self._generalists.current, step, frame)
        return Conditioning.of(response, (time.perf_counter() - start) * 1e3)

    def _stop_thinking(self) -> Plan[None]:
        if self._thinking is not None:
            self._thinking.stop()
            yield Halt()
            self._thinking = None

    def _act_request(self, step: int, frame: Frame, recover: bool) -> list[Buffer]:
        head = wire.ActRequest(session_id=self.name, episode=self.episode, step=step, traceparent=self._traceparent)
        if self._least is not None:
            head.min_conditioning.episode = self.episode
            head.min_conditioning.step = self._least
        if recover and self._recovery is not None:
            head.recovery.CopyFrom(self._recovery)
            return frame.act_request(head, self._previous)
        return frame.act_request(head)

    def _condition_call(self, address: str, step: int, frame: Frame) -> Call:
        head = wire.ConditionRequest(
            session_id=self.name,
            episode=self.episode,
            step=step,
            instruction=self._instruction,
            traceparent=self._traceparent,
        )
        request, timeout = frame.condition_request(head), self._timeouts.condition
        return Call(address, GENERALIST, "Condition", request, timeout, self._latency["generalist"])

    def _reset_call(self, service: str, address: str) -> Call:
        request = wire.ResetRequest(
            session_id=self.name,
            episode=self.episode,
            seed=self._seed,
            reference_window=self.schedule.reference_window,
            client=self._client,
        )
        return Call(address, service, "Reset", request, self._timeouts.control)

    def _info_call(self, service: str, address: str) -> Call:
        # A first contact with a silent host must not outlast its budget.
        timeout = self._timeouts.control if self._contacted else min(self._timeouts.control, self._timeouts.connect)
        return Call(address, service, "GetInfo", wire.InfoRequest(), timeout)


def _addresses(given: str | Sequence[str], name: str) -> list[str]:
    addresses = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    for address in addresses:
        found = re.fullmatch(r"(dns:///)?[^/\s]+:([0-9]{1,5})", address) if isinstance(address, str) else None
        if found is None or int(found.group(2)) > 65535:
            raise ValueError(
                f"{name} must be 'host:port', 'dns:///host:port', or a list of these for replicas, got {address!r}"
            )
    if not addresses or len(set(addresses)) < len(addresses):
        raise ValueError(f"{name} must name at least one address, and none twice, got {addresses}")
    return addresses


def _whole(name: str, given: int) -> int:
    try:
        return operator.index(given)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {given!r}") from None


def _is_text(given: str) -> bool:
    """Whether it is a string, and one that can be sent: without half a surrogate pair."""
    return isinstance(given, str) and not any("\ud800" <= letter <= "\udfff" for letter in given)


def _checked_latency(given: Mapping[str, float]) -> dict[str, float]:
    latency = {"generalist": 0.0, "specialist": 0.0, **given}
    if len(latency) > 2 or not all(map(is_wait, latency.values())):
        raise ValueError(f"latency must be seconds, at least 0, of 'generalist' and 'specialist', got {dict(given)}")
    return latency


def _checked_info(response: wire.InfoResponse, name: str, address: str) -> ServiceInfo:
    if response.service != name:
        raise ServiceMismatch(
            f"{address} is a {response.service or 'nameless service'}, not a {name}: correct the address"
        )
    return ServiceInfo.of(response, address)
