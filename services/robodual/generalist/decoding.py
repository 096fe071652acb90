"""Greedy decoding of one action chunk per frame, with a key-value cache, one token a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache

from robodual.generalist.model import Generalist
from robodual.generalist.tokens import ACTION, GENERATED


@dataclass(frozen=True)
class Decoded:
    """tokens: int64 [B, 64]; hidden: one [L, D] per frame; forwards: passes through the Llama, prefill included."""

    tokens: Tensor
    hidden: list[Tensor]
    forwards: int


class _Sequence:
    """A batch of sequences inside the Llama: its cache, mask and positions, one longer with every token."""

    def __init__(self, model: Generalist, embeddings: Tensor, mask: Tensor) -> None:
        self.model = model
        self.cache: Cache = DynamicCache(config=model.language_model.config)
        # Without padding no mask is needed, and attention takes its fastest kernel.
        self.mask = None if bool(mask.all()) else mask
        self.position = mask.sum(dim=1, keepdim=True)  # [B, 1], of the next token
        self.forwards = 0
        self.prefill = self._forward(embeddings, (mask.cumsum(dim=1) - 1).clamp(min=0))

    def append(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] -> their last hidden states [B, N, D], after the final norm."""
        count = tokens.shape[1]
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, count), value=True)
        positions = self.position + torch.arange(count, device=tokens.device)
        self.position = self.position + count
        return self._forward(self.model.language_model.get_input_embeddings()(tokens), positions)

    def _forward(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        self.forwards += 1
        output = self.model.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


@torch.inference_mode()
def decode(model: Generalist, pixels: Tensor, prompts: Sequence[Tensor], *, constrained: bool) -> Decoded:
    """64 greedy tokens for each frame and prompt, and the hidden states that the specialist is conditioned on.

    pixels: [B, 6, S, S] and prompts: B vectors of ids (BOS first, separator last), on the model's device. Hidden states
    are the last layer's, after the final norm, of the sequence that produced the 64th token, from position P (the
    number of patches) on: since the patches follow BOS, the first of them belongs to the last patch; L = prompt
    length + 63.

    Free decoding takes the best token of the whole vocabulary at every position, and an early end token does not end
    it: the layout is fixed. Constrained decoding restricts actions to the action tokens and puts separators and the end
    where they belong; wherever the free tokens are well-formed both are the same. A separator never costs a forward of
    its own there: it goes into the cache together with the token before it.
    """
    embeddings, mask = model.embed(pixels, prompts)
    sequence = _Sequence(model, embeddings, mask)
    hidden = [sequence.prefill]
    if constrained:
        tokens = _constrained_tokens(model, sequence, hidden)
    else:
        tokens = _free_tokens(model, sequence, hidden)
    states = torch.cat(hidden, dim=1)  # [B, T + 63, D], padding in front
    lengths = [len(prompt) + GENERATED - 1 for prompt in prompts]
    return Decoded(tokens, [row[-length:] for row, length in zip(states, lengths)], sequence.forwards)


def _free_tokens(model: Generalist, sequence: _Sequence, hidden: list[Tensor]) -> Tensor:
    head = model.language_model.lm_head
    tokens = [head(hidden[-1][:, -1:]).argmax(dim=-1)]  # [B, 1] each
    while len(tokens) < GENERATED:
        hidden.append(sequence.append(tokens[-1]))
        tokens.append(head(hidden[-1]).argmax(dim=-1))
    return torch.cat(tokens, dim=1)


def _constrained_tokens(model: Generalist, sequence: _Sequence, hidden: list[Tensor]) -> Tensor:
    ids = model.config.tokens
    head = model.language_model.lm_head.weight[ids.action_start : ids.action_end]  # [256, D]
    batch = sequence.position.shape[0]
    separator = sequence.position.new_full((batch, 1), ids.separator)
    tokens: list[Tensor] = []
    while True:
        tokens.append(F.linear(hidden[-1][:, -1:], head).argmax(dim=-1) + ids.action_start)
        if len(tokens) == GENERATED - 1:
            hidden.append(sequence.append(tokens[-1]))
            return torch.cat([*tokens, torch.full_like(separator, ids.eos)], dim=1)
        if len(tokens) % (ACTION + 1) == ACTION:
            tokens.append(separator)
            hidden.append(sequence.append(torch.cat(tokens[-2:], dim=1)))
        else:
            hidden.append(sequence.append(tokens[-1]))
