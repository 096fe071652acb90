"""Two minutes of eight sessions through the real pair; by hand it is half an hour (docs/testing.md)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_eight_sessions_leave_memory_descriptors_and_latency_where_they_were(tmp_path: Path) -> None:
    written = tmp_path / "soak.json"
    # What else runs on a machine of CI moves p99, and with the sizes of the batches what the allocator keeps of them
    # (450 to 503 MiB). Of 330 kB a step, 10,000 steps of a leak would be gigabytes.
    command = ["-m", "benchmarks.soak", "--minutes", "2", "--sessions", "8", "--profile", "toy"]
    bounds = ["--growth", "1.15", "--flat", "2"]
    done = subprocess.run(
        [sys.executable, *command, *bounds, "--every", "15", "--json", str(written)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(written.read_text())["rows"]
    assert sum(row["steps"] for row in rows) > 1000
    assert set(rows[-1]["memory"]) == {"generalist", "specialist", "redis", "client"}
