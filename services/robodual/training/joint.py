"""Trains both systems at once: the specialist's loss reaches the generalist through its hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from robodual.specialist.policy import Policy
from robodual.training.conditioner import Conditioning, chunks
from robodual.training.generalist import GeneralistLearner
from robodual.training.loop import Learner
from robodual.training.prompting import best_tokens, force
from robodual.training.specialist import SpecialistBatch, export_policy, specialist_loss


class JointLearner(Learner[SpecialistBatch]):
    """The sum of both losses. The generalist reads the demonstrated tokens, as its own loss needs.

    A checkpoint holds what either training's would: the specialist's averaged weights, and the generalist's adapter or
    whole folder as they are.
    """

    averaged = True

    def __init__(self, policy: Policy, generalist: GeneralistLearner) -> None:
        super().__init__()
        self.policy = policy
        self.generalist = generalist

    def forward(self, batch: SpecialistBatch) -> tuple[Tensor, dict[str, Tensor]]:
        if batch.prompts is None:
            raise ValueError("joint training computes its conditioning itself: a batch needs prompts")
        model = self.generalist.model
        forced = force(model, batch.prompts)
        tokens_loss, metrics = self.generalist.token_loss(forced.logits, batch.prompts.targets)
        tokens = best_tokens(forced.logits, model, constrained=self.generalist.constrained)
        conditioning = Conditioning(forced.hidden, forced.mask, chunks(tokens, model.config.tokens))
        loss, shown = specialist_loss(self.policy, batch, conditioning)
        return loss + tokens_loss, {"specialist_loss": loss, "token_loss": tokens_loss, **shown, **metrics}

    def export(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        export_policy(self.policy, folder, trained)
        self.generalist.export(folder, {})
