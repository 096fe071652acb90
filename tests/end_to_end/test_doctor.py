"""`robodual doctor` on what is not well."""

from __future__ import annotations

import asyncio

from robodual.doctor import examine


def test_a_redis_url_that_is_none_is_a_finding() -> None:
    findings = asyncio.run(examine("http://127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1"))

    redis = next(finding for finding in findings if finding.subject == "redis" and finding.state == "fault")
    assert "must specify one of the following schemes" in redis.found
    assert "ROBODUAL_REDIS_URL" in redis.remedy


def test_a_password_that_makes_a_malformed_url_is_not_shown() -> None:
    findings = asyncio.run(examine("redis://:pass/word@127.0.0.1:1/0", "127.0.0.1:1", "127.0.0.1:1"))

    redis = next(finding for finding in findings if finding.subject == "redis" and finding.state == "fault")
    assert redis.found == "redis://***@127.0.0.1:1/0: malformed; percent-encode any of /?#@:% in its password"
