"""One step as one trace: the client, both services as processes, and what passes through Redis between them."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from replicas import frame

from robodual.pair import Options, Pair
from robodual_client import DualSystemClient
from robodual_client.errors import NoConditioning
from robodual_client.tracing import Tracer


class Collector(ThreadingHTTPServer):
    """An OTLP/HTTP collector that keeps what it is sent: (service, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Collecting)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Collecting(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            (service,) = [a.value.string_value for a in resource.resource.attributes if a.key == "service.name"]
            self.server.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    yield server
    server.shutdown()
    server.server_close()


def observation(number: int) -> dict[str, Any]:
    depth = np.full((200, 200), 4.0, np.float32)
    return {
        "rgb_obs": {"rgb_static": frame(number), "rgb_gripper": frame(number, 84)},
        "depth_obs": {"depth_static": depth, "depth_gripper": depth[:84, :84]},
        "robot_obs": np.append(np.zeros(14), 1.0),
    }


@dataclass(frozen=True)
class Found:
    service: str
    name: str
    span: Any

    @property
    def attributes(self) -> dict[str, Any]:
        return {a.key: a.value.string_value or a.value.int_value for a in self.span.attributes}


@pytest.mark.slow
def test_a_step_is_one_trace_over_three_processes_and_log_lines_carry_its_id(collector: Collector) -> None:
    lines: list[str] = []
    settings = {"ROBODUAL_TRACES": collector.url, "ROBODUAL_LOG_FORMAT": "json"}
    with (
        Pair(Options(settings=settings), lambda service, line: lines.append(line)) as pair,
        DualSystemClient(**pair.addresses, session="robot", schedule="every-1000", traces=collector.url) as client,
    ):
        client.reset("open the drawer")
        for step in range(2):
            client.step(observation(step))
        client.skip(100)
        with pytest.raises(NoConditioning):
            client.step(observation(2))

    # Client and services have sent what they had when they stopped.
    spans = [Found(service, span.name, span) for service, span in collector.spans]
    steps = {found.attributes["step"]: found for found in spans if found.name == "step"}
    assert {found.service for found in steps.values()} == {"robodual-client"}
    assert sorted(steps) == [0, 1, 102]

    def below(parent: Found) -> dict[str, Found]:
        """By "service: name"; all of one trace."""
        children = [found for found in spans if found.span.parent_span_id == parent.span.span_id]
        assert {found.span.trace_id for found in children} <= {parent.span.trace_id}
        return {f"{found.service}: {found.name}": found for found in children}

    first = below(steps[0])
    assert set(first) == {"robodual-generalist: Condition", "robodual-specialist: Act"}
    for found in first.values():
        assert found.attributes == {"session": "robot", "episode": 1, "step": 0}
        assert steps[0].span.start_time_unix_nano <= found.span.start_time_unix_nano
        assert found.span.end_time_unix_nano <= steps[0].span.end_time_unix_nano
    thought = below(first["robodual-generalist: Condition"])
    assert {found.name for found in thought.values()} == {"decode", "queue", "think", "store"}
    action = below(first["robodual-specialist: Act"])
    assert {found.name for found in action.values()} == {"decode", "wait", "queue", "model", "conditioning"}
    assert (
        thought["robodual-generalist: store"].span.start_time_unix_nano
        < action["robodual-specialist: conditioning"].span.end_time_unix_nano
    ), "what the generalist stores in Redis, the specialist fetches"
    (second,) = below(steps[1]).values()
    assert {found.name for found in below(second).values()} == {"decode", "wait", "queue", "model"}

    failed = steps[102].span
    assert failed.status.code == 2
    assert "NoConditioning" in failed.status.message
    refused = [json.loads(line) for line in lines if '"event": "refused"' in line]
    assert refused
    for entry in refused:
        assert (entry["trace_id"], entry["session"], entry["episode"], entry["step"]) == (
            failed.trace_id.hex(),
            "robot",
            1,
            102,
        )


async def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(collector: Collector) -> None:
    tracer = Tracer(collector.url, "test")
    parents = ["00-" + "1" * 32 + "-" + "2" * 16 + "-01", "", "00-1-2-01", "x" * 10_000]
    for parent in parents:
        tracer.begin("span", {}, parent).end()
    tracer.close()

    traces = [span.trace_id.hex() for _, span in collector.spans]
    assert traces[0] == "1" * 32
    assert len(set(traces)) == len(parents)


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:4318", "file:///etc/passwd", "http://"])
def test_an_endpoint_that_is_none_is_refused_at_the_start(endpoint: str) -> None:
    with pytest.raises(ValueError, match="OTLP/HTTP"):
        DualSystemClient(traces=endpoint)


def test_a_collector_that_is_away_costs_an_episode_nothing_but_its_traces() -> None:
    tracer = Tracer("http://127.0.0.1:1", "test")
    tracer.begin("span", {}).end()
    started = time.monotonic()

    tracer.close()

    assert time.monotonic() - started < 10
