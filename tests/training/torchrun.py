"""Trainings of one process or several, started as on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny import SOURCE, SPECIALIST, data, settings
from dataclasses import replace
from robodual.training.runs import GeneralistOptions, train_generalist, train_specialist

model, folder, output, batch = sys.argv[2], data(Path(sys.argv[3])), Path(sys.argv[4]), int(sys.argv[5])
source = replace(SOURCE, device=sys.argv[6])
losses = []
values = settings(output, 4, batch_size=batch, save_steps=2)
def report(shown):
    losses.append(shown.loss)
if model == "specialist":
    options = replace(SPECIALIST, attention_dropout=0.0)  # its random numbers belong to the process
    train_specialist(source, folder, options, values, report=report)
else:
    options = GeneralistOptions(lora_rank=4) if model == "generalist" else GeneralistOptions(use_lora=False)
    values = replace(values, fsdp=model == "fsdp")
    train_generalist(source, folder, options, values, resume=(output / "checkpoints").exists(), report=report)
if losses:
    (output / "losses.json").write_text(json.dumps(losses))
"""


def train(model: str, processes: int, folder: Path, output: Path, device: str = "cpu") -> list[float]:
    """The losses of its steps: all four, or from the newest checkpoint on."""
    output.mkdir(exist_ok=True)
    script = output / "script.py"
    script.write_text(SCRIPT)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [str(script), str(Path(__file__).parent), model, str(folder), str(output), str(4 // processes), device]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*start, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    losses: list[float] = json.loads((output / "losses.json").read_text())
    return losses
