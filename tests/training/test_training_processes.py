"""Two processes under torchrun train as one does with the same global batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calvin_data import write_split
from safetensors.torch import load_file
from tiny import TINY

from robodual.generalist.engine import load_generalist

assert TINY  # importing its module registers the profile

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny import SOURCE, SPECIALIST, data, settings
from dataclasses import replace
from robodual.training.runs import GeneralistOptions, train_generalist, train_specialist

model, folder, output, batch = sys.argv[2], data(Path(sys.argv[3])), Path(sys.argv[4]), int(sys.argv[5])
losses = []
values = settings(output, 4, batch_size=batch, save_steps=2)
def report(shown):
    losses.append(shown.loss)
if model == "specialist":
    options = replace(SPECIALIST, attention_dropout=0.0)  # its random numbers belong to the process
    train_specialist(SOURCE, folder, options, values, report=report)
else:
    options = GeneralistOptions(lora_rank=4) if model == "generalist" else GeneralistOptions(use_lora=False)
    values = replace(values, fsdp=model == "fsdp")
    train_generalist(SOURCE, folder, options, values, resume=(output / "checkpoints").exists(), report=report)
if losses:
    (output / "losses.json").write_text(json.dumps(losses))
"""


def train(model: str, processes: int, folder: Path, output: Path) -> list[float]:
    output.mkdir(exist_ok=True)
    script = output / "script.py"
    script.write_text(SCRIPT)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [str(script), str(Path(__file__).parent), model, str(folder), str(output), str(4 // processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*start, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    losses: list[float] = json.loads((output / "losses.json").read_text())
    return losses


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
