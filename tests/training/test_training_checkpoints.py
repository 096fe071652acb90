"""A checkpoint is whole or not there; the last few are kept, and a full disk costs none of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from robodual.facts import CheckpointError
from robodual.training.average import Average
from robodual.training.checkpoint import STATE, Folder, Progress


def trained(seed: int, steps: int = 3) -> Progress:
    torch.manual_seed(seed)
    layer = nn.Linear(64, 64)
    parameters = dict(layer.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values())
    average = Average(parameters)
    for step in range(steps):
        layer(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(parameters, step + 1)
    return Progress(parameters, optimizer, average)


def test_what_is_saved_is_restored_to_the_bit(tmp_path: Path) -> None:
    before, after = trained(0), trained(1, steps=0)
    path = Folder(tmp_path, keep=2).save(3, before.tensors(), {"a": 1}, lambda folder: None)
    after.restore(path / STATE)
    expected = before.tensors()
    assert after.tensors().keys() == expected.keys()
    for name, value in after.tensors().items():
        assert torch.equal(value, expected[name]), name


def test_the_last_few_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "checkpoints", keep=2)
    assert folder.latest() is None
    for step in (1, 2, 30):
        folder.save(step, trained(step).tensors(), {}, lambda path: (path / "weights").write_text("x") and None)
    assert [path.name for path in folder.checkpoints()] == ["step-00000002", "step-00000030"]
    assert folder.latest() == (30, tmp_path / "checkpoints" / "step-00000030")
    assert (folder.checkpoints()[0] / "weights").read_text() == "x"
    (tmp_path / "checkpoints" / ".step-00000031.partial").mkdir()  # a process that was killed
    assert folder.latest() == (30, tmp_path / "checkpoints" / "step-00000030")


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_training_checkpoints import trained
from robodual.facts import CheckpointError
from robodual.training.checkpoint import STATE, Folder
folder = Folder(Path(sys.argv[1]), keep=1)
folder.save(1, trained(0).tensors(), {}, lambda path: None)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    folder.save(2, trained(0).tensors(), {}, lambda path: None)
except CheckpointError as error:
    print(error)
"""


def test_a_checkpoint_that_cannot_be_written_leaves_those_before_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "checkpoints"), str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "step-00000002: could not be written" in result.stdout
    assert "free some space, nothing was lost" in result.stdout
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    trained(3, steps=0).restore(tmp_path / "checkpoints" / "step-00000001" / STATE)


def test_an_export_that_fails_leaves_those_before_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path, keep=1)
    folder.save(1, trained(0).tensors(), {}, lambda path: None)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        folder.save(2, trained(0).tensors(), {}, full)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = Folder(tmp_path, keep=1).save(1, trained(0).tensors(), {}, lambda folder: None) / STATE
    other = nn.Linear(8, 8)
    parameters = dict(other.named_parameters())
    progress = Progress(parameters, torch.optim.AdamW(parameters.values()), None)
    with pytest.raises(CheckpointError, match="of another model or other settings"):
        progress.restore(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        trained(0).restore(path)
