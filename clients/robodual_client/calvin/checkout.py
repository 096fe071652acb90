"""A checkout of the published calvin_env on this machine: where it is, whether it is whole, which commit it is."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from robodual_client.errors import RoboDualError

ENVIRONMENT_VARIABLE = "CALVIN_ROOT"
SCENES = ("A", "B", "C", "D")

_MARK = Path("calvin_env", "envs", "play_table_env.py")
_CLONE = "git clone https://github.com/mees/calvin_env"
_LFS_POINTER = b"version https://git-lfs"
_HEAD = 4096  # an .obj file names its materials, and a pointer says what it is, in the first lines


class SimulatorError(RoboDualError, RuntimeError):
    """The simulator cannot start. The message is one line for a person: what is wrong, and what to do."""


@dataclass(frozen=True)
class Checkout:
    """A whole calvin_env: `repository` holds the package calvin_env/, its conf/ and its data/."""

    repository: Path

    def commit(self) -> str | None:
        """The commit that is checked out; None without git, or where the files are no git checkout."""
        trusted = f"safe.directory={self.repository}"  # it may belong to another user, as in a container
        command = ["git", "-c", trusted, "-C", str(self.repository), "rev-parse", "--show-toplevel", "HEAD"]
        try:
            answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = answer.stdout.decode(errors="replace").split("\n")
        if answer.returncode != 0 or Path(lines[0]).resolve() != self.repository:
            return None  # a plain copy inside somebody else's repository has no commit of its own
        return lines[1]

    def check_files(self, scene: str) -> None:
        """Raises SimulatorError if a model, mesh or texture of the scene is absent or a git-lfs pointer.

        The simulator itself goes on without a texture, and renders a scene that no policy was trained on.
        """
        for file in self._files(scene):
            name = file.relative_to(self.repository)
            if not file.is_file():
                raise SimulatorError(
                    f"{self.repository} lacks {name}; restore it with: git -C {self.repository} checkout -- {name}"
                )
            with file.open("rb") as opened:
                pointer = opened.read(len(_LFS_POINTER)) == _LFS_POINTER
            if pointer:
                raise SimulatorError(
                    f"{self.repository / name} is a git-lfs pointer, not the file itself;"
                    f" fetch the files with: git -C {self.repository} lfs pull"
                )

    def _files(self, scene: str) -> Iterator[Path]:
        """Each file that the scene loads, before the files that it names."""
        data = self.repository / "data"
        configurations = [self.repository / "conf" / name for name in _configurations(scene)]
        yield from configurations
        descriptions = [data / "plane" / "plane.urdf"]
        for configuration in configurations:
            names = re.findall(r"^\s*file(?:name)?:\s*(\S+\.urdf)", _text(configuration), re.M)
            descriptions += [data / name for name in names]
        for description in descriptions:
            yield description
            for mesh in sorted(set(re.findall(r'filename="(?:package://)?([^"]+)"', _text(description)))):
                yield from _mesh_files(_beside(description, mesh))


def find(root: str | Path | None = None) -> Checkout:
    """The checkout at `root`, or at CALVIN_ROOT: a clone of mees/calvin_env, or of mees/calvin with its submodule.

    Raises SimulatorError if there is none.
    """
    origin = "--calvin-root"
    if root is None:
        origin, root = ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE)
    if not root:
        raise SimulatorError(
            f"no calvin_env checkout given: set {ENVIRONMENT_VARIABLE} (or --calvin-root) to a folder made by: {_CLONE}"
        )
    folder = Path(root).expanduser().resolve()
    if not folder.is_dir():
        raise SimulatorError(f"{origin} is {folder}, which is not a folder; make it with: {_CLONE} {folder}")
    for repository in (folder, folder / "calvin_env"):
        if (repository / _MARK).is_file():
            return Checkout(repository)
    submodule = folder / "calvin_env"
    if (folder / ".gitmodules").is_file() and submodule.is_dir() and not any(submodule.iterdir()):
        raise SimulatorError(
            f"{folder} is a checkout of mees/calvin whose submodule calvin_env is empty;"
            f" fetch it with: git -C {folder} submodule update --init calvin_env"
        )
    raise SimulatorError(
        f"{origin} is {folder}, which holds no {_MARK}: it should be a checkout of mees/calvin_env"
        f" (or of mees/calvin with its submodule); make one with: {_CLONE}"
    )


def _configurations(scene: str) -> list[Path]:
    if scene not in SCENES:
        raise SimulatorError(f"there is no scene {scene!r}; calvin_env has {', '.join(SCENES)}")
    return [Path("scene", f"calvin_scene_{scene}.yaml"), Path("robot", "panda_longer_finger.yaml")]


def _mesh_files(mesh: Path) -> Iterator[Path]:
    """A mesh and, where it is drawn, its materials (an .obj names them in its first lines) and their textures."""
    yield mesh
    if mesh.suffix == ".obj" and mesh.parent.name != "collision":  # of these, several name materials never published
        for material in re.findall(r"^mtllib (.+?)\s*$", _text(mesh), re.M):
            yield mesh.with_name(material)
            for texture in re.findall(r"^map_Kd (.+?)\s*$", _text(mesh.with_name(material)), re.M):
                yield Path(os.path.normpath(mesh.parent / texture))


def _beside(description: Path, mesh: str) -> Path:
    """Where a mesh of a URDF lies: in its own folder, or the one above it."""
    found = [Path(os.path.normpath(folder / mesh)) for folder in (description.parent, description.parent.parent)]
    return next((path for path in found if path.is_file()), found[0])


def _text(file: Path) -> str:
    if not file.is_file():
        return ""  # the file itself is reported as absent
    with file.open("rb") as opened:
        return opened.read(_HEAD if file.suffix == ".obj" else -1).decode(errors="replace")
