"""Trainings on a GPU, and on two, start, save, go on and can be served. What they compute is tested on a CPU."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calvin_data import write_split
from tiny import SOURCE, SPECIALIST, data, settings
from torchrun import train

from robodual.generalist.checkpoint import save_checkpoint
from robodual.generalist.engine import load_generalist
from robodual.specialist.engine import load_specialist
from robodual.training.loop import Report
from robodual.training.runs import GeneralistOptions, train_generalist, train_specialist

DEVICE = "cuda"
LORA = GeneralistOptions(lora_rank=4, gradient_checkpointing=True)
ALL = GeneralistOptions(use_lora=False)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

FAILING = """
import os, sys
import torch
from robodual.training.group import joined
with joined(sys.argv[1]) as group:
    for step in range(100):
        group.mean(torch.ones(3, device=group.device))
        if group.rank == 0 and step == 5:
            sys.exit("a step that this process alone cannot read")
"""


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("data") / "training", lengths=[24, 20])


@needs_gpu
@pytest.mark.parametrize("conditioning", ["forced", "generated", "cached", "trained", "all trained"])
def test_a_specialist_is_trained_and_goes_on(split: Path, tmp_path: Path, conditioning: str) -> None:
    ways = {
        "forced": SPECIALIST,
        "generated": replace(SPECIALIST, conditioning="generated", whiten_inputs=True, min_snr_gamma=0.05),
        "cached": replace(SPECIALIST, cache_conditioning=tmp_path / "cache", scene_weight=0.1, noise_draws=2),
        "trained": replace(SPECIALIST, unfreeze=LORA),
        "all trained": replace(SPECIALIST, unfreeze=ALL),
    }
    reports: list[Report] = []
    source, run = replace(SOURCE, device=DEVICE), settings(tmp_path, 4, save_steps=2, num_workers=1)
    train_specialist(source, data(split), ways[conditioning], run, report=reports.append)
    shutil.rmtree(newest(tmp_path))
    train_specialist(source, data(split), ways[conditioning], run, resume=True, report=reports.append)
    check(reports)
    load_specialist("tiny", checkpoint=newest(tmp_path) / "specialist.safetensors", device=DEVICE)


@needs_gpu
@pytest.mark.parametrize("kind", ["none", "int8", "nf4", "all weights"])
def test_a_generalist_is_trained_and_goes_on(split: Path, tmp_path: Path, kind: str) -> None:
    base = load_generalist("tiny", device="cpu", seed=3)
    save_checkpoint(tmp_path / "base", base.model, base.processor.tokenizer)
    quantisation = "none" if kind == "all weights" else kind
    source = replace(SOURCE, checkpoint=str(tmp_path / "base"), device=DEVICE, quantisation=quantisation)
    options = ALL if kind == "all weights" else replace(LORA, merged=kind == "none")
    reports: list[Report] = []
    run = settings(tmp_path, 4, save_steps=2, num_workers=1)
    train_generalist(source, data(split), options, run, report=reports.append)
    shutil.rmtree(newest(tmp_path))
    train_generalist(source, data(split), options, run, resume=True, report=reports.append)
    check(reports)
    if options.merged or not options.use_lora:
        load_generalist("tiny", checkpoint=newest(tmp_path) / "generalist", device=DEVICE)
    if options.use_lora:
        load_generalist(
            "tiny",
            checkpoint=tmp_path / "base",
            adapters=[newest(tmp_path) / "adapter"],
            merge_adapters=False,
            device=DEVICE,
            quantisation=quantisation,
        )


@needs_two
@pytest.mark.slow
@pytest.mark.parametrize("model", ["specialist", "generalist", "fsdp"])
def test_two_gpus_train_and_go_on(split: Path, tmp_path: Path, model: str) -> None:
    losses = train(model, 2, split, tmp_path, DEVICE)
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    if model == "specialist":
        load_specialist("tiny", checkpoint=newest(tmp_path) / "specialist.safetensors", device=DEVICE)
        return
    shutil.rmtree(newest(tmp_path))
    assert len(train(model, 2, split, tmp_path, DEVICE)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_two)])
def test_a_process_that_fails_alone_ends_the_training(tmp_path: Path, device: str) -> None:
    """Though the other waits for it, and NCCL's communicators end together."""
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), device]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "a step that this process alone cannot read" in result.stderr


def check(reports: list[Report]) -> None:
    assert [shown.step for shown in reports] == [1, 2, 3, 4, 3, 4]
    assert all(math.isfinite(shown.loss) and math.isfinite(shown.gradient_norm) for shown in reports)


def newest(output: Path) -> Path:
    return sorted((output / "checkpoints").iterdir())[-1]
