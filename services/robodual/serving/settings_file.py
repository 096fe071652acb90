"""The settings file: TOML, with the tables [shared], [generalist] and [specialist]."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read(path: Path, kinds: Mapping[str, type[BaseModel]]) -> dict[str, dict[str, Any]]:
    """The values in the file at `path`, by table and setting; `kinds` has the model of each table.

    Raises:
        ValueError: naming the file, and the table or setting that is none; every table is checked.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"config: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"config: {path} is no TOML: {error}") from error
    for name, table in found.items():
        if name not in kinds or not isinstance(table, dict):
            expected = ", ".join(f"[{kind}]" for kind in kinds)
            raise ValueError(f"config: {path}: {name} is none of the tables {expected}")
        for key in table:
            if key not in kinds[name].model_fields or key == "config":
                raise ValueError(
                    f"config: {path}: {key} in [{name}] is no setting; see docs/deployment.md for those there are"
                )
    return found


def merged(tables: Mapping[str, Mapping[str, Any]], service: str) -> dict[str, Any]:
    """What `tables` say to `service`: its own table's values before the shared ones."""
    return {**tables.get("shared", {}), **tables.get(service, {})}
