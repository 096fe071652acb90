"""One step as one trace: the client, both services as processes, and what passes through Redis between them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from replicas import frame

from robodual.pair import Options, Pair
from robodual_client import DualSystemClient
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
            import gzip

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


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True])
def test_a_step_is_one_trace_over_three_processes_and_its_log_lines_carry_the_id(
    collector: Collector, stream: bool
) -> None:
    lines: list[str] = []
    settings = {"ROBODUAL_TRACES": collector.url, "ROBODUAL_LOG_FORMAT": "json"}
    with Pair(Options(settings=settings), lambda service, line: lines.append(line)) as pair:
        with DualSystemClient(**pair.addresses, session="robot", traces=collector.url, stream=stream) as client:
            client.reset("open the drawer")
            for step in range(2):
                client.step(observation(step))
            client._session._recovery = None
            client.skip(100)
            with pytest.raises(Exception, match="100 steps ago|no conditioning"):
                client.step(observation(2))
    # Both services have exported what was left when they stopped.
    traces: dict[bytes, dict[str, Any]] = {}
    for service, span in collector.spans:
        traces.setdefault(span.trace_id, {}).setdefault(f"{service}: {span.name}", []).append(span)
    print(json.dumps({trace.hex(): list(found) for trace, found in traces.items()}, indent=1), *lines, sep="\n")
    raise AssertionError
