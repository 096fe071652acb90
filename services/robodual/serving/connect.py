"""The conditioning store that the settings name."""

from __future__ import annotations

from robodual.conditioning.store import Store, Tls
from robodual.serving.settings import Settings


def connect(settings: Settings) -> Store:
    """A store that connects when it is first asked."""
    return Store(
        settings.redis_url.get_secret_value(),
        ttl=settings.conditioning_ttl,
        timeout=settings.redis_timeout,
        tls=Tls(settings.redis_ca, settings.redis_certificate, settings.redis_key),
    )
