"""Evaluations in processes of their own, to be killed, and what must not change by that."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from robodual_client.calvin import Options, Results


def outcomes(results: Results) -> list[Any]:
    """How each sequence ended, by number."""
    return [(*record.outcome(), record.steps) for _, record in sorted(results.sequences.items())]


def start(options: Options) -> subprocess.Popen[str]:
    """The evaluation in a process of its own."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    script = (
        "import sys\nfrom ast import literal_eval\nfrom pathlib import Path\n"
        "from robodual_client.calvin import Options, evaluate\n"
        "given = literal_eval(sys.argv[1])\n"
        "evaluate(Options(**{**given, 'out': Path(given['out']), 'annotations': Path(given['annotations'])}))"
    )
    return subprocess.Popen([sys.executable, "-c", script, repr(given)], stderr=subprocess.PIPE, text=True)


def wait_for_lines(file: Path, count: int) -> None:
    """Until so many sequences are finished."""
    deadline = time.monotonic() + 120
    while not file.is_file() or file.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, f"{count} sequences were not finished in two minutes"
        time.sleep(0.02)


def workers_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    threads = Path(f"/proc/{parent}/task").iterdir()
    for thread in threads:
        children += (thread / "children").read_text().split()
    return [int(child) for child in set(children)]


def wait_until_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline, "a worker outlived its evaluation"
        time.sleep(0.02)
