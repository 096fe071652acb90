"""The client as CALVIN needs it: installed under Python 3.8, in a venv of its own, against services of this Python."""

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fake_services import observation

from robodual.pair import Options, Pair
from robodual_client import DualSystemClient

ROOT = Path(__file__).parents[2]
INSTRUCTION = "push the sliding door to the left side"
SCRIPT = """
import json, sys
import numpy as np
import robodual_client
from fake_services import observation
from robodual_client import DualSystemClient
assert sys.version_info[:2] == (3, 8)
before = sorted(sys.modules)
actions = []
with DualSystemClient(sys.argv[1], sys.argv[2], seed=3) as client:
    client.reset(sys.argv[3])
    for step in range(10):
        actions.append(client.step(observation(step)).tolist())
print(json.dumps({"modules": before, "file": robodual_client.__file__, "actions": actions}))
"""


def find_python38() -> str | None:
    """ROBODUAL_PYTHON38, `python3.8` on PATH, or one of pyenv's, whichever is first to say that it is 3.8."""
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    candidates = [os.environ.get("ROBODUAL_PYTHON38"), shutil.which("python3.8")]
    for candidate in (*candidates, *sorted(glob.glob(f"{pyenv}/versions/3.8*/bin/python"))):
        if candidate and _says(candidate, "import sys; print(sys.version_info[:2])") == "(3, 8)":
            return candidate
    return None


def _says(python: str, code: str) -> str | None:
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_client_installs_under_python_38_and_drives_an_episode_like_this_one(tmp_path: Path) -> None:
    python38 = find_python38()
    if python38 is None:
        pytest.skip("no Python 3.8 on this machine: set ROBODUAL_PYTHON38 to one")
    # A copy: the build writes into its source tree.
    for folder in ("clients", "protos"):
        ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", "*.binpb", "*_pb2.pyi")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    venv = tmp_path / "venv"
    subprocess.run([python38, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(tmp_path / "clients")]
    subprocess.run(install, check=True, env=environment)

    with Pair(Options(profile="toy")) as pair:
        command = [python, "-W", "error", "-c", SCRIPT, pair.addresses["generalist"], pair.addresses["specialist"]]
        environment["PYTHONPATH"] = str(Path(__file__).parent)  # for fake_services.observation alone
        done = subprocess.run(
            [*command, INSTRUCTION], stdout=subprocess.PIPE, text=True, timeout=120, env=environment, cwd=str(tmp_path)
        )
        assert done.returncode == 0
        with DualSystemClient(**pair.addresses, seed=3) as client:
            client.reset(INSTRUCTION)
            expected = [client.step(observation(step)) for step in range(10)]
    told = json.loads(done.stdout)
    assert Path(told["file"]).is_relative_to(venv)
    loaded = {name.partition(".")[0] for name in told["modules"]}
    assert not loaded & {"torch", "pydantic", "robodual", "redis", "transformers", "pybullet"}
    np.testing.assert_array_equal(told["actions"], expected)
