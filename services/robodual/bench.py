"""The benchmarks, which live in the source checkout and not in the package."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

CHECKOUT = Path(__file__).parents[2]
MISSING = (
    "benchmarks come with the source checkout, and this is an installed package: clone the repository, "
    "run `make setup` in it, then `.venv/bin/robodual bench`"
)


def found() -> dict[str, str]:
    """What each benchmark measures, by name; empty where there is no checkout."""
    benchmarks = {}
    for file in sorted((CHECKOUT / "benchmarks").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "__main__" in text:
            benchmarks[file.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return benchmarks


def become(name: str, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by the benchmark."""
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})
