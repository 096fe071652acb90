"""Both models learn one batch by heart: the actions that they then give are the demonstrated ones."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calvin_data import write_split
from tiny import TINY, data
from torch import Tensor

from robodual.generalist.engine import load_generalist
from robodual.specialist.frames import Preparation
from robodual.specialist.policy import Observation
from robodual.training.conditioner import Conditioner, Conditioning
from robodual.training.generalist import GeneralistCollate, GeneralistLearner, Lora
from robodual.training.prompting import Prompts
from robodual.training.specialist import SpecialistCollate, SpecialistLearner, cut
from robodual.training.starting_weights import starting_policy

COPIES = 8  # of the batch in each step, with noise of their own


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("overfit") / "training", lengths=[18])


def repeated(value: Tensor) -> Tensor:
    return value.repeat_interleave(COPIES, 0)


@pytest.mark.slow
def test_the_specialist_learns_a_batch_by_heart(split: Path) -> None:
    config = replace(TINY.specialist, width=48, blocks=2, heads=4, with_gripper=False, with_depth=False, image_size=16)
    engine = load_generalist("tiny", device="cpu")
    policy = starting_policy(config, seed=0)
    dataset = data(split).open(0, config.sensors, 8)
    preparation = Preparation(config, "resize-naive", torch.device("cpu"), torch.float32)
    batch = SpecialistCollate(preparation, engine.processor, 0, 0.1)([dataset[0, 0], dataset[0, 1]])
    assert batch.prompts is not None
    known = Conditioner(engine.model, constrained=engine.constrained)(batch.prompts)
    seen = {field.name: getattr(batch.observation, field.name) for field in fields(Observation)}
    copies = replace(
        batch,
        observation=Observation(**{name: None if value is None else repeated(value) for name, value in seen.items()}),
        actions=repeated(batch.actions),
        left=repeated(batch.left),
        conditioning=Conditioning(repeated(known.hidden), repeated(known.mask), repeated(known.chunk)),
    )
    learner = SpecialistLearner(policy, None).eval()  # without dropout
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    count, steps = len(copies.actions), 600
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        drawn = replace(
            copies,
            noise=torch.randn(count, 8, 7, generator=generator),
            timesteps=torch.randint(0, 100, (count,), generator=generator),
            keep=(torch.rand(count, generator=generator) > 0.1).float(),
        )
        learner(drawn)[0].backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    noise = torch.randn(2, 8, 7, generator=generator)
    actions = policy.sample(batch.observation, cut(known.chunk, batch.left), known.hidden, noise)
    assert (actions - batch.actions).abs().mean() < 0.06 < 0.4 < (known.chunk - batch.actions).abs().mean()


@pytest.mark.parametrize("lora", [None, Lora(rank=16)], ids=["all weights", "lora"])
def test_the_generalist_learns_a_batch_by_heart(split: Path, lora: Lora | None) -> None:
    engine = load_generalist("tiny", device="cpu")
    dataset = data(split).open(0, ("rgb_static",), 0)
    samples = [dataset[0, 0], dataset[0, 9]]
    batch: Prompts = GeneralistCollate(engine.processor)(samples)
    torch.manual_seed(0)
    learner = GeneralistLearner(
        engine.model, engine.processor.tokenizer, lora=lora, constrained=True, gradient_checkpointing=lora is not None
    )
    learner.train()
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=1e-2 if lora else 5e-3)
    accuracies = []
    for _ in range(120):
        loss, metrics = learner(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accuracies.append(metrics["action_accuracy"].item())
    assert accuracies[0] < 0.1
    assert accuracies[-1] == 1
    assert metrics["action_l1"] == 0
    learner.eval()
    thoughts = engine.think([sample.first_frame for sample in samples], [sample.instruction for sample in samples])
    for thought, sample in zip(thoughts, samples):
        assert np.abs(thought.reference_actions - np.clip(sample.first_actions, -1, 1)).max() <= 1 / 255
