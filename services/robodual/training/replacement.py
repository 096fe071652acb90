"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to be `path`, beside it; moved there at the end: a reader sees the old one or the new."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)
