"""`robodual doctor` on what is not well."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from robodual.conditioning.valkey import EmbeddedServer
from robodual.doctor import examine


def test_a_redis_url_that_is_none_is_a_finding() -> None:
    findings = asyncio.run(examine("http://127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1"))

    redis = next(finding for finding in findings if finding.subject == "redis" and finding.state == "fault")
    assert "must specify one of the following schemes" in redis.found
    assert "ROBODUAL_REDIS_URL" in redis.remedy


def test_a_password_that_makes_a_malformed_url_is_not_shown() -> None:
    findings = asyncio.run(examine("redis://:pass/word@127.0.0.1:1/0", "127.0.0.1:1", "127.0.0.1:1"))

    redis = next(finding for finding in findings if finding.subject == "redis" and finding.state == "fault")
    assert redis.found == "redis://**********: malformed; percent-encode any of /?#@:% in its password"


def test_the_user_that_the_services_have_is_enough() -> None:
    with EmbeddedServer() as server:
        port = urlsplit(server.url).port
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("ACL", "SETUSER", "robodual", "on", ">secret", "~robodual:*", "-@all", "+ping")
        url = f"redis://robodual:secret@127.0.0.1:{port}/0"
        findings = asyncio.run(examine(url, "127.0.0.1:1", "127.0.0.1:1"))

    found = next(finding for finding in findings if finding.subject == "redis" and finding.found.startswith("redis://"))
    assert found.state == "ok"
    assert found.found == f"redis://robodual:**********@127.0.0.1:{port}/0, its version is not shown to this user"


def test_files_for_tls_without_tls_are_a_finding(monkeypatch: pytest.MonkeyPatch, certificates: Path) -> None:
    monkeypatch.setenv("ROBODUAL_REDIS_CA", str(certificates / "ca.pem"))
    findings = asyncio.run(examine("redis://127.0.0.1:1/0", "127.0.0.1:1", "127.0.0.1:1"))

    redis = next(finding for finding in findings if finding.subject == "redis" and finding.state == "fault")
    assert "ROBODUAL_REDIS_CA: need a URL that begins with rediss://" in redis.found
