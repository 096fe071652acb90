"""The settings that a service would run with, as people may see them, and where each comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from robodual.serving import settings_file
from robodual.serving.settings import SHARED_PREFIX, TABLES, Settings

HIDDEN = "**********"


def sources(kind: type[Settings], given: Mapping[str, Any]) -> dict[str, str]:
    """Where each setting of `kind` comes from, the command line having `given` some.

    Raises:
        ValueError: as `settings_file.read`, of a file that cannot be used.
    """
    own = str(kind.model_config.get("env_prefix"))
    variables = {name.upper(): value for name, value in os.environ.items() if value}
    path = given.get("config") or variables.get(f"{own}CONFIG") or variables.get(f"{SHARED_PREFIX}CONFIG")
    tables = settings_file.read(Path(path), TABLES) if path else {}

    def source(name: str) -> str:
        if name in given:
            return "command line"
        if own + name.upper() in variables:
            return own + name.upper()
        if name in Settings.model_fields and SHARED_PREFIX + name.upper() in variables:
            return SHARED_PREFIX + name.upper()
        for table in (kind.service, "shared"):
            if name in tables.get(table, {}):
                return f"{path} [{table}]"
        return "default"

    return {name: source(name) for name in kind.model_fields}


def shown(settings: Settings) -> dict[str, Any]:
    """Every setting's value as JSON has it, secrets masked; of a URL, its password and its options."""
    values: dict[str, Any] = settings.model_dump(mode="json")
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            values[name] = masked(value.get_secret_value())
    return values


def masked(url: str) -> str:
    """A URL without its password and options; of a malformed one, where the password may be anywhere, the scheme."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        return HIDDEN
    try:
        parts = urlsplit(url)
        malformed = parts.port is None and parts.netloc.endswith(":")  # asking for a port that is none raises
    except ValueError:
        malformed = True
    if malformed or parts.fragment or "@" in parts.path + parts.query:
        return f"{scheme}://{HIDDEN}"
    user, secret, place = parts.netloc.rpartition("@")
    user = user.partition(":")[0]
    return f"{parts.scheme}://{f'{user}:{HIDDEN}@' if secret else ''}{place}{parts.path}"
