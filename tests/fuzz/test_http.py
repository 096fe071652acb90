"""The HTTP side of both services against what its own OpenAPI document says (schemathesis)."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import given
from inputs import inputs

from robodual.pair import Pair


@pytest.mark.parametrize("service", ["generalist", "specialist"])
def test_every_operation_answers_as_documented(pair: Pair, service: str) -> None:
    document = schemathesis.openapi.from_url(f"http://127.0.0.1:{pair.http_ports[service]}/openapi.json")
    operations = [result.ok() for result in document.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/healthz", "/readyz", "/metrics", "/info"}
    for operation in operations:

        @inputs(0.02 / len(operations))
        @given(operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(timeout=10)

        check()
