"""`robodual serve` with a checkpoint that cannot be used: one line on standard error, a status, nothing executed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from layouts import write_generalist, write_specialist

SECOND = "model-00002-of-00003.safetensors"
MARK = "executed"


Runs = dict[str, tuple[Path, Future[subprocess.CompletedProcess[str]]]]


class Harmful:
    """Touches a file in the working directory, if it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path(MARK),)


@dataclass(frozen=True)
class Case:
    """A service, its arguments once `spoil` has written into a folder, and what its line must say."""

    service: str
    spoil: Callable[[Path], list[object]]
    says: tuple[str, ...]


def shard_missing(folder: Path) -> list[object]:
    (write_generalist(folder / "generalist") / SECOND).unlink()
    return ["--checkpoint", folder / "generalist"]


def shard_truncated(folder: Path) -> list[object]:
    shard = write_generalist(folder / "generalist") / SECOND
    shard.write_bytes(shard.read_bytes()[:-100])
    return ["--checkpoint", shard.parent]


def weights_pickled(folder: Path) -> list[object]:
    generalist = write_generalist(folder / "generalist")
    for file in generalist.glob("model*"):
        file.unlink()
    torch.save({"projector.fc1.weight": Harmful()}, generalist / "pytorch_model.bin")
    return ["--checkpoint", generalist]


def specialist_to_the_generalist(folder: Path) -> list[object]:
    return ["--checkpoint", write_specialist(folder / "ema.pt")]


def adapter_corrupt(folder: Path) -> list[object]:
    write_generalist(folder / "generalist")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"\xff" * 5000)
    return ["--checkpoint", folder / "generalist", "--adapter", folder / "adapter"]


def specialist_truncated(folder: Path) -> list[object]:
    path = write_specialist(folder / "ema.pt")
    path.write_bytes(path.read_bytes()[:-5000])
    return ["--checkpoint", path]


def specialist_with_objects(folder: Path) -> list[object]:
    torch.save({"ema_model.x": Harmful()}, folder / "ema.pt")
    return ["--checkpoint", folder / "ema.pt"]


def generalist_to_the_specialist(folder: Path) -> list[object]:
    return ["--checkpoint", write_generalist(folder / "generalist")]


def specialist_of_other_sensors(folder: Path) -> list[object]:
    return ["--checkpoint", write_specialist(folder / "ema.pt"), "--with-tactile"]


CASES = {
    case.spoil.__name__: case
    for case in (
        Case("generalist", shard_missing, (f"{SECOND}: missing", "download it again")),
        Case("generalist", shard_truncated, (f"{SECOND}: truncated or not safetensors", "download it again")),
        Case("generalist", weights_pickled, ("pytorch_model.bin: pickled weights are never loaded", "save_pretrained")),
        Case("generalist", specialist_to_the_generalist, ("ema.pt: is a file", "robodual serve specialist")),
        Case("generalist", adapter_corrupt, ("adapter_model.safetensors: truncated or", "save the adapter again")),
        Case("specialist", specialist_truncated, ("ema.pt: truncated or corrupt", "copy it again")),
        Case("specialist", specialist_with_objects, ("ema.pt: not a plain state dict", "never executed", "torch.save")),
        Case("specialist", generalist_to_the_specialist, ("is a folder", "robodual serve generalist")),
        Case("specialist", specialist_of_other_sensors, ("ema.pt: it was trained without tactile", "set with_tactile")),
    )
}


def serve(case: Case, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "robodual", "serve", case.service, "--port", "0", "--http-port", "0"]
    command += ["--device", "cpu", *map(str, case.spoil(folder))]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Every case's process, a few at a time, since each is mostly the imports."""
    with ThreadPoolExecutor(max_workers=3) as pool:
        started = {}
        for name, case in CASES.items():
            folder = tmp_path_factory.mktemp(name)
            started[name] = (folder, pool.submit(serve, case, folder))
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_service_ends_with_one_line_that_names_the_file_and_the_fix(runs: Runs, name: str) -> None:
    folder, future = runs[name]
    done = future.result()
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert str(folder) in line
    for words in CASES[name].says:
        assert words in line
    assert not list(folder.rglob(MARK)), "something in the checkpoint was executed"


def test_the_harmful_object_would_act_if_it_were_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Harmful()}, "object.pt")
    torch.load("object.pt", weights_only=False)  # noqa: TID251 (a file of this test, to show that it would act)
    assert Path(MARK).exists()
