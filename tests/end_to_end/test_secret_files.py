"""No token and no password is shown by a service: not in its log, its pages, its errors, nor in how it was started."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
import pytest
import redis
from typer.testing import CliRunner

from robodual.cli import app
from robodual.conditioning.valkey import EmbeddedServer
from robodual.pair import SERVICES, Options, Pair
from robodual_client import wire
from robodual_client.wire import rpc

GIVEN, FILED, NEXT, WRONG = (
    "Token-that-is-given-7f",
    "Token-of-the-file-3c",
    "Token-that-is-next-9d",
    "Token-of-nobody-1a2b",
)
HALF, PASSWORD = "Half-a-tok", "Pass-word-of-redis-5e"
SECRETS = (GIVEN, FILED, NEXT, WRONG, HALF, PASSWORD)
STUBS = {"generalist": rpc.GENERALIST, "specialist": rpc.SPECIALIST}


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def pages(pair: Pair) -> list[str]:
    """What every path of both services answers, with tokens of all kinds."""
    answers = []
    for name in SERVICES:
        with httpx.Client(base_url=f"http://127.0.0.1:{pair.http_ports[name]}", trust_env=False, timeout=30) as http:
            for path in ("/healthz", "/readyz", "/metrics", "/info", "/openapi.json", "/nowhere"):
                for token in (None, WRONG, GIVEN, FILED, NEXT):
                    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                    answer = http.get(path, headers=headers)
                    answers.append(f"{path} {answer.status_code} {answer.headers} {answer.text}")
    return answers


def calls(pair: Pair) -> list[str]:
    """What calls of both services say that fail, each in its own way."""
    picture = wire.Image(encoding=wire.IMAGE_ENCODING_RAW_RGB8, height=8, width=8, data=bytes(192))
    requests = {
        ("generalist", "Condition"): wire.ConditionRequest(session_id="robot", instruction="push", rgb_static=picture),
        ("generalist", "Reset"): wire.ResetRequest(session_id="robot", episode=1),
        ("specialist", "Act"): wire.ActRequest(session_id="robot"),
        ("specialist", "Reset"): wire.ResetRequest(session_id="robot", episode=1),
    }
    said = []
    for (name, method), request in requests.items():
        with grpc.insecure_channel(pair.addresses[name]) as channel:
            call = getattr(rpc.Stub(channel, STUBS[name]), method)
            for token in (None, WRONG, GIVEN, FILED, NEXT):
                metadata = [] if token is None else [("authorization", f"Bearer {token}")]
                for message in (request, b"\xff" * 20):
                    try:
                        said.append(str(call(message, metadata=metadata, timeout=30)))
                    except grpc.RpcError as error:
                        said.append(str(error))
    return said


@pytest.mark.slow
def test_running_services_show_none(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# robots\narm-1:{FILED}\n")
    lines: list[str] = []
    shown: list[str] = []
    with EmbeddedServer() as valkey:
        with redis.Redis.from_url(valkey.url) as client:
            client.execute_command("ACL", "SETUSER", "robodual", "on", f">{PASSWORD}", "~*", "&*", "+@all")
        url = f"redis://robodual:{PASSWORD}@{valkey.url.rpartition('@')[2]}"
        settings = {
            "ROBODUAL_TOKENS": GIVEN,
            "ROBODUAL_TOKENS_FILE": str(file),
            "ROBODUAL_LOG_LEVEL": "debug",
            "ROBODUAL_REDIS_TIMEOUT": "0.5",
        }
        options = Options(redis_url=url, settings=settings)
        with Pair(options, lambda service, line: lines.append(line)) as pair:
            shown += [Path(f"/proc/{process.pid}/cmdline").read_text() for process in pair._processes.values()]
            shown += pages(pair) + calls(pair)
            file.write_text(f"arm-1:{HALF}\n")
            until(lambda: sum("tokens not read again" in line for line in lines) == 2)
            file.write_text(f"arm-1:{NEXT}\n")
            until(lambda: sum("tokens read again" in line for line in lines) == 2)
            valkey.stop()
            until(lambda: sum("store" in line and "warning" in line for line in lines) >= 2)
            shown += pages(pair) + calls(pair)
    everything = "\n".join([*lines, *shown])
    for part in (
        "UNAUTHENTICATED",
        "NOT_FOUND",
        "INVALID_ARGUMENT",
        "UNAVAILABLE",
        "/info 200",
        "/info 401",
        "refused",
    ):
        assert part in everything, f"nothing was asked that gives {part}"
    for secret in SECRETS:
        assert secret not in everything, [line for line in everything.splitlines() if secret in line][:3]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ROBODUAL_TOKENS", HALF, "at least 16"),
        ("ROBODUAL_TOKENS", f"arm:{FILED},leg:{FILED}", "another name"),
        ("ROBODUAL_TOKENS_FILE", "FILE", "at least 16"),
        ("ROBODUAL_REDIS_URL", f"redis://:{PASSWORD}/{PASSWORD}@127.0.0.1:6379/0", "redis_url: expected"),
        ("ROBODUAL_SPECIALIST_TOKEN", FILED, "is no setting"),
    ],
)
def test_a_service_that_cannot_start_shows_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    value: str,
    said: str,
) -> None:
    (tmp_path / "tokens").write_text(f"{GIVEN}\n{HALF}\n")
    monkeypatch.setenv(name, str(tmp_path / "tokens") if value == "FILE" else value)
    monkeypatch.setenv("ROBODUAL_LOG_LEVEL", "debug")
    ended = CliRunner().invoke(app, ["serve", "specialist", "--profile", "toy", "--port", "0", "--http-port", "0"])
    shown = ended.output + "".join(capfd.readouterr())
    assert ended.exit_code in (1, 2)
    assert said in shown
    assert not any(secret in shown for secret in SECRETS)
