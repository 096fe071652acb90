"""Batches for the generalist: frames, prompts and the 64 tokens that should follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robodual.generalist.greedy import chunk_layout
from robodual.generalist.model import Generalist
from robodual.generalist.processor import Processor
from robodual.generalist.tokens import ACTION, CHUNK, GENERATED, ROW, encode_actions
from robodual.training.dataset import Sample


@dataclass(frozen=True)
class Prompts:
    """pixels: float32 [B, 6, S, S]; prompts: B vectors of ids, BOS first; targets: int64 [B, 64]."""

    pixels: Tensor
    prompts: list[Tensor]
    targets: Tensor

    @classmethod
    def collate(cls, samples: Sequence[Sample], processor: Processor) -> Prompts:
        targets = np.stack([encode_actions(sample.first_actions, processor.tokens) for sample in samples])
        return cls(
            processor.pixels([sample.first_frame for sample in samples]),
            [torch.tensor(processor.prompt(sample.instruction)) for sample in samples],
            torch.from_numpy(targets),
        )

    def to(self, device: torch.device) -> Prompts:
        return Prompts(self.pixels.to(device), [prompt.to(device) for prompt in self.prompts], self.targets.to(device))


@dataclass(frozen=True)
class Forced:
    """What the generalist makes of prompts that the true tokens follow (teacher forcing).

    logits: [B, 64, vocabulary], of the targets. hidden: [B, L, D], the last layer's states after the final norm from
    position num_patches on, L = the longest prompt + 64; mask: bool [B, L], False where a shorter one is padded, in
    front. A token more than decoding leaves: the end token is fed too, as in the published training.
    """

    logits: Tensor
    hidden: Tensor
    mask: Tensor


def force(model: Generalist, batch: Prompts) -> Forced:
    """One forward pass over prompts and targets."""
    rows = [torch.cat((prompt, target)) for prompt, target in zip(batch.prompts, batch.targets)]
    embeddings, mask = model.embed(model.see(batch.pixels.to(model.dtype)), rows)
    output = model.language_model.model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
    )
    states: Tensor = output.last_hidden_state
    logits = model.language_model.lm_head(states[:, -GENERATED - 1 : -1])
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    missing = torch.tensor([longest - length for length in lengths], device=states.device)
    return Forced(logits, states[:, -longest:], torch.arange(longest, device=states.device) >= missing[:, None])


def action_tokens(tokens: Tensor) -> Tensor:
    """The action tokens [B, 8, 7] among the 64 [B, 64], the others being separators and the end."""
    return tokens.view(-1, CHUNK, ROW)[..., :ACTION]


def best_tokens(logits: Tensor, model: Generalist, *, constrained: bool) -> Tensor:
    """The most likely ids [B, 64]; where decoding is constrained, of the action tokens in an action's place."""
    if not constrained:
        return logits.argmax(dim=-1)
    ids = model.config.tokens
    tokens = logits[..., ids.action_start : ids.action_end].argmax(dim=-1) + ids.action_start
    layout = chunk_layout(ids, logits.device)
    return torch.where(layout < 0, tokens, layout)
