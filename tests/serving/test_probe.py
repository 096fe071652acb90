"""The health check of containers finds the service where the settings put it, and believes its answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from robodual.doctor import Finding, examine
from robodual.serving import probe
from robodual.serving.metrics import Metrics
from robodual.serving.readiness import Readiness
from robodual.serving.server import Server
from robodual.serving.settings import SpecialistSettings
from robodual_client import Tls


@asynccontextmanager
async def serving(**files: Path) -> AsyncIterator[tuple[Server, Readiness]]:
    readiness = Readiness(store="Redis has not answered")
    server = Server(SpecialistSettings(port=0, http_port=0, **files), readiness, Metrics())
    await server.start()
    try:
        yield server, readiness
    finally:
        await server.stop()


def files(certificates: Path, kind: str) -> dict[str, Path]:
    if kind == "plain":
        return {}
    found = {"tls_certificate": certificates / "server.pem", "tls_key": certificates / "server.key"}
    return found | ({"tls_client_ca": certificates / "ca.pem"} if kind == "mutual" else {})


@pytest.mark.parametrize("kind", ["plain", "tls", "mutual"])
@pytest.mark.parametrize("source", ["environment", "file"])
async def test_it_asks_as_the_settings_say(
    kind: str,
    source: str,
    certificates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = files(certificates, kind)
    async with serving(**chosen) as (server, readiness):
        told = {"http_port": server.http_port, **{name: str(path) for name, path in chosen.items()}}
        if source == "environment":
            for name, value in told.items():
                monkeypatch.setenv(f"ROBODUAL_SPECIALIST_{name.upper()}", str(value))
        else:
            lines = [f"{name} = {value!r}".replace("'", '"') for name, value in told.items()]
            (tmp_path / "robodual.toml").write_text("\n".join(["[specialist]", *lines]))
            monkeypatch.setenv("ROBODUAL_CONFIG", str(tmp_path / "robodual.toml"))

        assert await asyncio.to_thread(probe.main, ["specialist"]) == 1
        answer = capsys.readouterr().out
        assert answer.startswith("HTTP 503")
        assert "Redis has not answered" in answer

        readiness.meet("store")
        assert await asyncio.to_thread(probe.main, ["specialist"]) == 0
        assert capsys.readouterr().out == "ready\n"


async def test_a_service_that_is_gone_or_speaks_otherwise_is_not_ready(certificates: Path) -> None:
    shown = certificates / "server.pem", certificates / "server.key"
    async with serving(**files(certificates, "tls")) as (server, readiness):
        readiness.meet("store")
        port = server.http_port
        assert await asyncio.to_thread(probe.waiting_for, port)
        assert await asyncio.to_thread(probe.waiting_for, port, "0.0.0.0", *shown) == ""
    assert "refused" in await asyncio.to_thread(probe.waiting_for, port, "127.0.0.1", *shown)


@pytest.mark.parametrize("arguments", [[], ["client"], ["specialist", "generalist"]])
def test_it_says_how_it_is_used(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(arguments) == 2
    assert "probe {generalist,specialist}" in capsys.readouterr().err


def test_settings_that_are_wrong_are_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ROBODUAL_SPECIALIST_HTTP_PROT", "8052")
    assert probe.main(["specialist"]) == 1
    assert "ROBODUAL_SPECIALIST_HTTP_PROT is no setting" in capsys.readouterr().err


async def test_the_doctor_asks_over_tls(certificates: Path) -> None:
    def of(findings: list[Finding]) -> Finding:
        return next(finding for finding in findings if finding.subject == "specialist")

    shown = Tls(certificates / "ca.pem", certificates / "client.pem", certificates / "client.key")
    async with serving(**files(certificates, "mutual")) as (server, _):
        address = f"127.0.0.1:{server.port}"
        plain = of(await examine(None, "127.0.0.1:1", address))
        assert plain.state == "fault"
        assert "--tls-ca" in plain.remedy
        # TLS and certificate are agreed on: what is left is that no model is loaded yet.
        secured = of(await examine(None, "127.0.0.1:1", address, tls=shown))
        assert "UNAVAILABLE: the model is loading" in secured.found
    with pytest.raises(ValueError, match="no-such-file"):
        await examine(None, "127.0.0.1:1", "127.0.0.1:1", tls=Tls(certificates / "no-such-file"))
