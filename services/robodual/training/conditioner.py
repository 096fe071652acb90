"""What the specialist is conditioned on in training: a frozen generalist's chunk and hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from robodual.generalist.config import TokenConfig
from robodual.generalist.decoding import decode
from robodual.generalist.model import Generalist
from robodual.generalist.tokens import decode_actions
from robodual.training.prompting import Prompts, best_tokens, force

# forced: from the demonstrated actions, as published; generated: from the generalist's own, as in service.
Mode = Literal["forced", "generated"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Conditioning:
    """hidden: [B, L, D]; mask: bool [B, L], False where hidden is padding; chunk: float32 [B, 8, 7], not yet cut."""

    hidden: Tensor
    mask: Tensor
    chunk: Tensor

    @classmethod
    def join(cls, hidden: Sequence[Tensor], chunks: Sequence[Tensor]) -> Conditioning:
        """Of samples' states [L, D], of any lengths, and chunks [8, 7]."""
        ones = [torch.ones(len(states), dtype=torch.bool, device=states.device) for states in hidden]
        return cls(
            pad_sequence(list(hidden), batch_first=True, padding_side="left"),
            pad_sequence(ones, batch_first=True, padding_side="left"),
            torch.stack(list(chunks)),
        )

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """Each sample's states [L, D] without padding, and its chunk [8, 7]."""
        return [(states[mask], chunk) for states, mask, chunk in zip(self.hidden, self.mask, self.chunk)]

    def to(self, device: torch.device) -> Conditioning:
        return Conditioning(self.hidden.to(device), self.mask.to(device), self.chunk.to(device))


class Conditioner:
    """A frozen generalist."""

    def __init__(self, model: Generalist, *, constrained: bool, mode: Mode = "forced") -> None:
        self.model = model.eval().requires_grad_(False)
        self.constrained = constrained
        self.mode = mode

    @torch.no_grad()
    def __call__(self, batch: Prompts) -> Conditioning:
        """On the model's device and in its dtype."""
        if self.mode == "generated":
            pixels = batch.pixels.to(self.model.dtype)
            decoded = decode(self.model, pixels, batch.prompts, constrained=self.constrained)
            return Conditioning.join(decoded.hidden, list(chunks(decoded.tokens, self.model.config.tokens)))
        forced = force(self.model, batch)
        tokens = best_tokens(forced.logits, self.model, constrained=self.constrained)
        return Conditioning(forced.hidden, forced.mask, chunks(tokens, self.model.config.tokens))


def chunks(tokens: Tensor, ids: TokenConfig) -> Tensor:
    """Action chunks float32 [B, 8, 7] of token ids [B, 64]."""
    rows = [decode_actions(row, ids)[0] for row in tokens.cpu().numpy()]
    return torch.from_numpy(np.stack(rows)).to(tokens.device)
