"""All of Triton's kernels compile for GPUs that are not there, at the published shapes, as the models launch them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("compiled.py")
STEP = {"begin": 1, "linear": 5, "attention": 1, "conclude": 1}  # a layer's and the ends', at one size of a step
READ = {"rotate": 1, "gate": 1}
CHUNK = {"self_attention", "gated_product", "cross_attention", "normed_product", "expand", "begin", "finish"}


# Bytes that a program can share: an H100's and an RTX 50's.
@pytest.mark.parametrize(
    ("capability", "quantisation", "steps", "shared"),
    [(90, "none", 4, 227 << 10), (90, "fp8", 4, 227 << 10), (120, "none", 2, 99 << 10)],
)
def test_the_generalists_compile_and_fit(
    capability: int, quantisation: str, steps: int, shared: int, tmp_path: Path
) -> None:
    kernels = compiled(tmp_path, str(capability), "generalist", quantisation)
    expected = Counter({name: count * steps for name, count in STEP.items()})
    if quantisation == "none":
        expected.update(READ)
    assert Counter(kernel["name"] for kernel in kernels) == expected
    assert max(kernel["shared"] for kernel in kernels) <= shared


def test_the_specialists_compile_and_fit(tmp_path: Path) -> None:
    kernels = compiled(tmp_path, "90", "specialist")
    assert {kernel["name"] for kernel in kernels} == {*CHUNK, "linear_kernel", "attention_kernel"}
    assert max(kernel["shared"] for kernel in kernels) <= 99 << 10  # on the smallest GPU too


def compiled(cache: Path, *arguments: str) -> list[dict[str, object]]:
    """Runs the program, with a cache of its own, so that everything is compiled."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, PROGRAM, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels: list[dict[str, object]] = json.loads(done.stdout)
    return kernels
