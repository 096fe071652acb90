"""Both systems trained at once: each learns, the specialist's loss reaches the generalist, and both can be served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calvin_data import write_split
from tiny import SOURCE, SPECIALIST, data, settings

from robodual.generalist.engine import load_generalist
from robodual.specialist.engine import load_specialist
from robodual.training.loop import Report
from robodual.training.runs import GeneralistOptions, train_specialist

ALL = GeneralistOptions(use_lora=False)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("joint") / "training", lengths=[24, 20])


@pytest.mark.parametrize("unfreeze", [ALL, GeneralistOptions(lora_rank=4, merged=True)], ids=["all weights", "lora"])
def test_both_learn_and_are_served(split: Path, tmp_path: Path, unfreeze: GeneralistOptions) -> None:
    reports: list[Report] = []
    options = replace(SPECIALIST, unfreeze=unfreeze)
    train_specialist(SOURCE, data(split), options, settings(tmp_path, 12, learning_rate=5e-3), report=reports.append)
    first, last = reports[0], reports[-1]
    assert set(first.metrics) == {"specialist_loss", "token_loss", "reference_l1", "action_accuracy", "action_l1"}
    assert first.loss == pytest.approx(first.metrics["specialist_loss"] + first.metrics["token_loss"])
    assert last.metrics["token_loss"] < first.metrics["token_loss"] - 0.5
    checkpoint = tmp_path / "checkpoints" / "step-00000012"
    generalist = load_generalist("tiny", checkpoint=checkpoint / "generalist", device="cpu")
    specialist = load_specialist("tiny", checkpoint=checkpoint / "specialist.safetensors", device="cpu")
    assert generalist.width == specialist.width
    assert (checkpoint / "adapter").exists() == unfreeze.use_lora


def test_the_specialists_loss_moves_the_generalist(split: Path, tmp_path: Path) -> None:
    """After one step from the same weights, the generalist's adapters differ from those of its own training alone."""
    from robodual.training.joint import JointLearner

    steps = []
    plain = JointLearner.forward
    for weight in (1.0, 0.0):

        def forward(self: JointLearner, batch: object, weight: float = weight) -> object:
            _, metrics = plain(self, batch)  # type: ignore[arg-type]
            return weight * metrics["specialist_loss"] + metrics["token_loss"], metrics

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JointLearner, "forward", forward)
            output = tmp_path / str(weight)
            # The specialist's output layer starts at zero: only from its second step on does anything reach back.
            train_specialist(SOURCE, data(split), replace(SPECIALIST, unfreeze=ALL), settings(output, 3))
        found = load_generalist("tiny", checkpoint=output / "checkpoints" / "step-00000003" / "generalist")
        steps.append(found.model.projector.fc1.weight)
    assert not torch.equal(*steps)


def test_what_cannot_be_combined_is_one_line(split: Path, tmp_path: Path) -> None:
    for options in (
        replace(SPECIALIST, unfreeze=ALL, conditioning="generated"),
        replace(SPECIALIST, unfreeze=ALL, cache_conditioning=tmp_path / "cache"),
    ):
        with pytest.raises(ValueError, match="unfreeze_generalist: its conditioning changes with every step"):
            train_specialist(SOURCE, data(split), options, settings(tmp_path, 1))
    with pytest.raises(ValueError, match="fsdp: is for a generalist with all its weights"):
        train_specialist(SOURCE, data(split), SPECIALIST, settings(tmp_path, 1, fsdp=True))
