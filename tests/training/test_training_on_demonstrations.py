"""From nothing to a served pair, as a user types it: 200 demonstrations of the play table, both trainings, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from robodual.generalist.engine import load_generalist
from robodual.specialist.engine import load_specialist

DEMONSTRATIONS = 200
UNTRAINED = 1.0  # the mean square of the noise: what a specialist that predicts none has
TRAINED = 0.3


def robodual(*arguments: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "robodual", *arguments],
        cwd=folder,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_systems_learn_from_two_hundred_demonstrations(tmp_path: Path) -> None:
    collect = ["data", "collect", "table/training", "--demonstrations", str(DEMONSTRATIONS), "--chain", "1"]
    assert f"{DEMONSTRATIONS} demonstrations" in robodual(*collect, "--noise", "0.1", folder=tmp_path)
    assert "annotated spans" in robodual("data", "check", "table/training", "--steps", "50", folder=tmp_path)
    robodual("data", "cache", "table/training", "frames", folder=tmp_path)

    shared = ["--frames", "frames", "--profile", "toy", "--device", "cpu", "--num_workers", "0", "--log_steps", "10"]
    generalist = ["--full", "--batch_size", "16", "--grad_accumulation_steps", "1", "--learning_rate", "1e-3"]
    robodual(
        "train", "generalist", "table", *shared, *generalist, "--max_steps", "60", "--output", "generalist",
        folder=tmp_path,
    )  # fmt: skip
    weights = "generalist/checkpoints/step-00000060/generalist"
    specialist = ["--train_vision", "--batch_size", "16", "--noise_draws", "4", "--learning_rate", "1e-3"]
    robodual(
        "train", "specialist", "table", *shared, *specialist, "--generalist", weights, "--warmup_steps", "20",
        "--max_steps", "150", "--output", "specialist", folder=tmp_path,
    )  # fmt: skip

    first, last = log(tmp_path / "generalist")[0], log(tmp_path / "generalist")[-1]
    assert last["loss"] < first["loss"] - 1
    losses = [line["loss"] for line in log(tmp_path / "specialist")]
    assert losses[0] == pytest.approx(UNTRAINED, abs=0.1)
    assert losses[-1] < TRAINED
    thinks = load_generalist("toy", checkpoint=tmp_path / weights, device="cpu")
    file = tmp_path / "specialist" / "checkpoints" / "step-00000150" / "specialist.safetensors"
    assert load_specialist("toy", checkpoint=file, device="cpu").width == thinks.width
