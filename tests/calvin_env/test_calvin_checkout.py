"""What is wrong with a checkout is said in one line that names the cure."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from robodual_client.calvin import checkout
from robodual_client.calvin.checkout import Checkout, SimulatorError


def _linked(root: Path, target: Path) -> Path:
    """A tree at `target` that is the checkout at `root`, with links for files, so that one can be replaced."""
    shutil.copytree(str(checkout.find(root).repository), str(target), copy_function=lambda a, b: Path(b).symlink_to(a))
    return target


def _find_whole(root: Path | None) -> Checkout:
    found = checkout.find(root)
    found.check_files("D")
    return found


def _complaint(root: Path | None) -> str:
    with pytest.raises(SimulatorError) as caught:
        _find_whole(root)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_root_at_all_names_the_variable_and_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CALVIN_ROOT", raising=False)
    assert "set CALVIN_ROOT" in _complaint(None)
    assert "git clone https://github.com/mees/calvin_env" in _complaint(None)


def test_an_absent_folder_is_told_from_a_wrong_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not a folder" in _complaint(tmp_path / "nowhere")
    monkeypatch.setenv("CALVIN_ROOT", str(tmp_path))
    assert "holds no calvin_env/envs/play_table_env.py" in _complaint(None)


def test_an_empty_submodule_is_told_with_the_command_that_fills_it(tmp_path: Path) -> None:
    (tmp_path / ".gitmodules").write_text('[submodule "calvin_env"]\n')
    (tmp_path / "calvin_env").mkdir()
    assert f"git -C {tmp_path.resolve()} submodule update --init calvin_env" in _complaint(tmp_path)


def test_both_repositories_are_accepted(calvin_root: Path, tmp_path: Path) -> None:
    plain = checkout.find(calvin_root).repository
    (tmp_path / "calvin_env").symlink_to(plain, target_is_directory=True)
    assert checkout.find(plain) == Checkout(plain)
    assert (checkout.find(tmp_path).repository / "conf").samefile(plain / "conf")


@pytest.mark.parametrize("name", ["franka_panda/meshes/visual/hand.obj", "calvin_table_D/textures/dark_wood.png"])
def test_a_missing_mesh_or_texture_is_told(calvin_root: Path, tmp_path: Path, name: str) -> None:
    repository = _linked(calvin_root, tmp_path / "calvin_env")
    (repository / "data" / name).unlink()
    assert f"lacks data/{name}" in _complaint(repository)


def test_a_git_lfs_pointer_in_place_of_a_mesh_is_told(calvin_root: Path, tmp_path: Path) -> None:
    repository = _linked(calvin_root, tmp_path / "calvin_env")
    mesh = repository / "data" / "blocks" / "block_red_middle.urdf"
    mesh.unlink()
    mesh.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git-lfs pointer" in _complaint(repository)
    assert "lfs pull" in _complaint(repository)


def test_every_scene_of_the_real_checkout_is_whole(calvin_root: Path) -> None:
    for scene in checkout.SCENES:
        checkout.find(calvin_root).check_files(scene)
    with pytest.raises(SimulatorError, match="no scene 'E'; calvin_env has A, B, C, D"):
        checkout.find(calvin_root).check_files("E")


def test_a_plain_copy_inside_another_repository_has_no_commit(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    (tmp_path / "copy").mkdir()
    assert len(Checkout(tmp_path.resolve()).commit() or "") == 40
    assert Checkout((tmp_path / "copy").resolve()).commit() is None


def test_a_missing_package_is_told_with_the_extra(calvin_root: Path) -> None:
    script = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'hydra': raise ModuleNotFoundError(name)\n"
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'hydra' else found(name, package)\n"
        "from robodual_client.calvin.environment import CalvinEnvironment\n"
        "CalvinEnvironment(sys.argv[1])\n"
    )
    answer = subprocess.run([sys.executable, "-c", script, str(calvin_root)], stderr=subprocess.PIPE)
    last = answer.stderr.decode().strip().splitlines()[-1]
    assert last.endswith("calvin_env needs hydra; install with: pip install 'robodual-client[calvin]'")
