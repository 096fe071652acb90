"""Runs the install commands of a Dockerfile's target without a container engine, and starts what they installed.

    python deploy/check_installs.py Dockerfile.specialist --target cpu --build-arg TORCH_INDEX=<index of CPU wheels>

Every RUN of the stages that the target is made of is carried out in one temporary folder that stands for the image's
root: absolute paths lie below it, and its Python is a virtual environment. A RUN that needs the image's system
(apt-get, useradd) is named and left out. Needs the Python that the image has.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1]
SYSTEM = re.compile(r"\b(apt-get|useradd|/usr)\b")
PATHS = re.compile(r"(?<![\w.$}/-])/(opt|source|locks|wheels|own)\b")
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.binpb", "*_pb2.pyi", "build")


@dataclass
class Stage:
    parent: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # instruction, arguments


def parse(path: Path, given: dict[str, str]) -> dict[str, Stage]:
    """The stages by name, the last one also as "". Continued lines are joined, comments left out."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for instruction, _, rest in (line.partition(" ") for line in text.splitlines() if line):
        if instruction == "FROM":
            parent, _, name = re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], rest).partition(" AS ")
            stages[name] = stages[""] = Stage(parent)
        elif stages:
            stages[""].steps.append((instruction, rest))
        elif instruction == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = given.get(name, value)
    return stages


class Build:
    def __init__(self, stages: dict[str, Stage], root: Path, given: dict[str, str]) -> None:
        self._stages = stages
        self._root = root
        self._given = given
        self._built: list[Stage] = []
        self._python = root / "python"
        subprocess.run([sys.executable, "-m", "venv", str(self._python)], check=True)
        (root / "source").mkdir()

    def build(self, name: str) -> None:
        """Carries out a stage and those that it is made of, once. Raises CalledProcessError."""
        stage = self._stages.get(name)
        if stage is None or stage in self._built:
            return
        self._built.append(stage)
        self.build(stage.parent)
        environment = {**os.environ, "PATH": f"{self._python / 'bin'}:{os.environ['PATH']}", "PIP_NO_CACHE_DIR": "1"}
        for instruction, rest in stage.steps:
            if instruction == "ARG":
                key, _, value = rest.partition("=")
                environment[key] = self._given.get(key, value.strip('"'))
            elif instruction == "COPY":
                self._copy(rest.split())
            elif instruction == "RUN":
                self._run(rest, environment)

    def _copy(self, words: list[str]) -> None:
        if words[0].startswith("--from="):
            stage, there, here = words
            self.build(stage.removeprefix("--from="))  # its files are here then
            if there != here:
                shutil.copytree(self._root / there[1:], self._root / here[1:], symlinks=True, dirs_exist_ok=True)
            return
        *sources, target = words
        place = self._root / "source" / target if not target.startswith("/") else self._root / target[1:]
        for source in (SOURCES / source for source in sources):
            if source.is_dir():
                shutil.copytree(source, place, dirs_exist_ok=True, ignore=IGNORED)
            else:
                shutil.copy(source, place)

    def _run(self, command: str, environment: dict[str, str]) -> None:
        if SYSTEM.search(command):
            print(f"left out: {command}", flush=True)
            return
        print(f"RUN {command}", flush=True)
        started = time.monotonic()
        here = PATHS.sub(lambda match: str(self._root) + match[0], command)
        subprocess.run(["sh", "-ec", here], cwd=self._root / "source", env=environment, check=True)
        print(f"    {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--target", default="", help="(the last stage)")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    given = dict(pair.split("=", 1) for pair in options.build_arg)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        Build(parse(options.dockerfile, given), root, given).build(options.target)
        installed = root / "opt" / "robodual"
        size = sum(path.stat().st_size for path in installed.rglob("*") if path.is_file() and not path.is_symlink())
        print(f"installed: {size / 1e6:,.0f} MB", flush=True)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for command in (["config", "show", "specialist"], ["serve", "specialist", "--help"]):
            subprocess.run([installed / "bin" / "robodual", *command], cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main()
