"""Two processes under torchrun train as one does with the same global batch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from calvin_data import write_split
from safetensors.torch import load_file
from tiny import TINY
from torchrun import train

from robodual.generalist.engine import load_generalist

assert TINY  # importing its module registers the profile


@pytest.mark.slow
@pytest.mark.parametrize("model", ["specialist", "generalist"])
def test_two_processes_train_as_one(model: str, tmp_path: Path) -> None:
    folder = write_split(tmp_path / "training", lengths=[20, 18])
    alone = train(model, 1, folder, tmp_path / "one")
    together = train(model, 2, folder, tmp_path / "two")
    assert len(alone) == 4
    assert together == pytest.approx(alone, rel=1e-4)
    states = [
        load_file(tmp_path / run / "checkpoints" / "step-00000004" / "state.safetensors") for run in ("one", "two")
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if name.startswith("parameter."):
            torch.testing.assert_close(states[1][name], value, atol=2e-3, rtol=1e-2, msg=name)


@pytest.mark.slow
def test_weights_spread_over_processes_train_resume_and_are_saved_as_whole_ones(tmp_path: Path) -> None:
    folder = write_split(tmp_path / "training", lengths=[20, 18])
    alone = train("all weights", 1, folder, tmp_path / "one")
    together = train("fsdp", 2, folder, tmp_path / "two")
    assert together == pytest.approx(alone, rel=1e-4)
    last = tmp_path / "two" / "checkpoints" / "step-00000004"
    whole = {path.name: path.read_bytes() for path in last.iterdir() if path.is_file()}
    shutil.rmtree(last)
    assert train("fsdp", 2, folder, tmp_path / "two") == together[2:]
    assert {path.name: path.read_bytes() for path in last.iterdir() if path.is_file()} == whole
    ones, twos = (
        load_generalist("tiny", checkpoint=tmp_path / run / "checkpoints" / "step-00000004" / "generalist").model
        for run in ("one", "two")
    )
    for (name, one), two in zip(ones.named_parameters(), twos.parameters()):
        torch.testing.assert_close(two, one, atol=2e-3, rtol=1e-2, msg=name)
