"""Both services, as processes, are sent what nobody should send: they refuse it in time and go on."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator, Sequence

import grpc
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs import BLOBS, DAMAGE, SPOILING, damaged, inputs, spoiled

from robodual.pair import Pair
from robodual_client import tensors, wire
from robodual_client.wire import rpc

DEADLINE = 10.0  # seconds for any answer
GROWTH = 100 * 2**20  # bytes that a service may grow by
USES = 40  # requests to a session, after which another takes its place
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class Target:
    """Both services: valid requests for them, and what they may answer to others."""

    def __init__(self, pair: Pair) -> None:
        self.channels = {
            rpc.GENERALIST: grpc.insecure_channel(pair.addresses["generalist"]),
            rpc.SPECIALIST: grpc.insecure_channel(pair.addresses["specialist"]),
        }
        self.generalist = rpc.Stub(self.channels[rpc.GENERALIST], rpc.GENERALIST)
        self.specialist = rpc.Stub(self.channels[rpc.SPECIALIST], rpc.SPECIALIST)
        self._session, self._step = "", USES

    def act(self) -> wire.ActRequest:
        """A request that would be answered: the next step of a session that is open, with all that may be in it."""
        if self._step >= USES:
            self.specialist.Close(wire.CloseRequest(session_id=self._session or "none"), timeout=DEADLINE)
            # No damage to one name gives another that is in use.
            self._session, self._step = uuid.uuid4().hex, 0
            self.open(self._session)
        self._step += 1
        return _act(self._session, self._step)

    def open(self, session: str) -> None:
        self.specialist.Reset(wire.ResetRequest(session_id=session, episode=1), timeout=DEADLINE)
        assert self.generalist.Condition(_glance(session), timeout=DEADLINE).stored

    def send(self, service: str, method: str, request: bytes) -> None:
        """Sends one unary call and checks its answer."""
        call = self.channels[service].unary_unary(f"/{service}/{method}")
        began = time.monotonic()
        try:
            call(request, timeout=DEADLINE)
        except grpc.RpcError as error:
            _check(error)
        assert time.monotonic() - began < DEADLINE

    def stream(self, requests: Sequence[bytes]) -> None:
        """Sends an ActStream and checks its answers."""
        call = self.channels[rpc.SPECIALIST].stream_stream(f"/{rpc.SPECIALIST}/ActStream")
        began = time.monotonic()
        try:
            answers = list(call(iter(requests), timeout=DEADLINE))
            assert len(answers) == len(requests)
        except grpc.RpcError as error:
            _check(error)
        assert time.monotonic() - began < DEADLINE


@pytest.fixture(scope="module")
def target(pair: Pair) -> Iterator[Target]:
    """Checks at the end that both still do what they are there for, and have not grown."""
    target = Target(pair)
    services = [psutil.Process(pair.pids[name]) for name in ("generalist", "specialist")]
    for number in range(10):
        target.open(f"warm-{number}")
        target.specialist.Act(_act(f"warm-{number}", 1), timeout=DEADLINE)
    before = [service.memory_info().rss for service in services]
    yield target
    target.open("after")
    assert target.specialist.Act(_act("after", 1), timeout=DEADLINE).step == 1
    for service, memory in zip(services, before, strict=True):
        assert service.memory_info().rss - memory < GROWTH, service.cmdline()
    for channel in target.channels.values():
        channel.close()


@inputs(0.10)
@given(SPOILING)
def test_an_act_with_fields_spoiled(target: Target, spoiling: list) -> None:
    target.send(rpc.SPECIALIST, "Act", spoiled(target.act(), spoiling).SerializeToString())


@inputs(0.08)
@given(DAMAGE)
def test_an_act_with_bytes_damaged(target: Target, damage: list) -> None:
    target.send(rpc.SPECIALIST, "Act", damaged(target.act().SerializeToString(), damage))


@inputs(0.04)
@given(st.lists(st.one_of(st.just([]), SPOILING), min_size=1, max_size=4))
def test_a_stream_of_acts_some_of_them_spoiled(target: Target, spoilings: list[list]) -> None:
    target.stream([spoiled(target.act(), spoiling).SerializeToString() for spoiling in spoilings])


@inputs(0.03)
@given(SPOILING)
def test_a_condition_with_fields_spoiled(target: Target, spoiling: list) -> None:
    target.send(rpc.GENERALIST, "Condition", spoiled(_glance("fuzz"), spoiling).SerializeToString())


@inputs(0.04)
@given(DAMAGE)
def test_a_condition_with_bytes_damaged(target: Target, damage: list) -> None:
    target.send(rpc.GENERALIST, "Condition", damaged(_glance("fuzz").SerializeToString(), damage))


@inputs(0.05)
@given(
    st.sampled_from([rpc.GENERALIST, rpc.SPECIALIST]),
    st.sampled_from(["Reset", "Close", "GetInfo"]),
    SPOILING,
    st.one_of(st.just([]), DAMAGE),
)
def test_the_small_calls(target: Target, service: str, method: str, spoiling: list, damage: list) -> None:
    request = spoiled(wire.ResetRequest(session_id="fuzz", episode=1, seed=3), spoiling)
    target.send(service, method, damaged(request.SerializeToString(), damage))


@inputs(0.02)
@given(
    st.sampled_from(["ports", "http_ports"]), st.sampled_from(["generalist", "specialist"]), st.lists(BLOBS, max_size=8)
)
def test_bytes_on_a_port(pair: Pair, target: Target, ports: str, name: str, blobs: list[bytes]) -> None:
    with socket.create_connection(("127.0.0.1", getattr(pair, ports)[name]), DEADLINE) as connection:
        try:
            connection.sendall(b"".join(blobs))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
        except OSError:
            pass  # hung up on: as good an answer as any


def _check(error: grpc.RpcError) -> None:
    code, details = error.code(), error.details() or ""
    # A caller's own condition may not arrive; anything else has to be answered in time.
    waited = code is grpc.StatusCode.DEADLINE_EXCEEDED and details.startswith("min_conditioning: ")
    assert code in REFUSALS or waited, f"{code}: {details}"
    assert len(details) < 1000


def _act(session: str, step: int) -> wire.ActRequest:
    random = np.random.default_rng(step)
    image = tensors.encode_image(random.integers(0, 256, (8, 8, 3), np.uint8))
    depth = tensors.encode(np.ones((8, 8), np.float32))
    return wire.ActRequest(
        session_id=session,
        episode=1,
        step=step,
        observation=wire.Observation(
            rgb_static=image,
            rgb_gripper=image,
            depth_static=depth,
            depth_gripper=depth,
            proprio=tensors.encode(np.zeros(7, np.float32)),
        ),
        min_conditioning=wire.Version(episode=1, step=0),
        recovery=wire.RecoveryState(
            episode=1,
            step=step - 1,
            seed=5,
            chunks=tensors.encode(np.zeros((1, 8, 7), np.float32)),
            chunk_steps=tensors.encode(np.array([step - 1], np.int32)),
            history=tensors.encode(np.zeros((4, 7), np.float32)),
        ),
        previous_rgb_static=image,
    )


def _glance(session: str) -> wire.ConditionRequest:
    image = tensors.encode_image(np.zeros((8, 8, 3), np.uint8))
    return wire.ConditionRequest(session_id=session, episode=1, instruction="push", rgb_static=image)
