"""Two processes under torchrun train as one does with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calvin_data import write_split
from safetensors.torch import load_file

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
    train_generalist(SOURCE, folder, GeneralistOptions(lora_rank=4), values, report=report)
if losses:
    (output / "losses.json").write_text(json.dumps(losses))
"""


def train(model: str, processes: int, folder: Path, output: Path) -> list[float]:
    output.mkdir()
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
