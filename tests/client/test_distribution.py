"""The client's own distribution, built as for a package index: an sdist, and a wheel from nothing but that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_wheel_by_way_of_the_sdist_of_a_fresh_clone_has_wire_format_and_licence(tmp_path: Path) -> None:
    for folder in ("clients", "protos"):
        ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", "*.binpb", "*_pb2.pyi")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-m", "pip", "install", "--quiet", "build"], check=True, env=environment)
    command = [python, "-m", "build", "--outdir", str(tmp_path / "dist"), str(tmp_path / "clients")]
    subprocess.run(command, check=True, env=environment)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("robodual_v1.binpb", "common_pb2.pyi", "generalist_pb2.pyi", "specialist_pb2.pyi"):
        assert f"robodual_client/wire/{name}" in names
    assert any(name.endswith("/LICENSE") for name in names)
