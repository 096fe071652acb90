"""Greedy decoding of one action chunk per frame, with a key-value cache and lossless speculation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaModel

from robodual.generalist.model import Generalist
from robodual.generalist.tokens import ACTION, CHUNK, GENERATED

# Transformers 5.24 renamed the argument.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class Decoded:
    """tokens: int64 [B, 64]; hidden: one [L, D] per frame; forwards: passes through the Llama, prefill included."""

    tokens: Tensor
    hidden: list[Tensor]
    forwards: int


class _Sequence:
    """A batch of sequences inside the Llama: its cache, mask and positions, one longer with every token."""

    def __init__(self, model: Generalist, embeddings: Tensor, mask: Tensor, *, padded: bool) -> None:
        self.model = model
        self.cache: Cache = DynamicCache(config=model.language_model.config)
        # Without padding no mask is needed, and attention takes its fastest kernel.
        self.mask = mask if padded else None
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
            use_cache=True,
            **{CACHE: self.cache},
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def drop(self, count: int) -> None:
        """Forgets the last `count` tokens."""
        if count:
            self.cache.crop(-count)
            self.position = self.position - count
            if self.mask is not None:
                self.mask = self.mask[:, :-count]


@torch.inference_mode()
def decode(
    model: Generalist,
    pixels: Tensor,
    prompts: Sequence[Tensor],
    *,
    constrained: bool,
    drafts: Tensor | None = None,
    window: int = GENERATED,
) -> Decoded:
    """64 greedy tokens for each frame and prompt, and the hidden states that the specialist is conditioned on.

    pixels: [B, 6, S, S] and prompts: B vectors of ids (BOS first, separator last), on the model's device. Hidden states
    are the last layer's, after the final norm, of the sequence that produced the 64th token, from position P (the
    number of patches) on: since the patches follow BOS, the first of them belongs to the last patch; L = prompt
    length + 63.

    Free decoding takes the best token of the whole vocabulary at every position, and an early end token does not end
    it: the layout is fixed. Constrained decoding restricts actions to the action tokens and puts separators and the end
    where they belong; wherever the free tokens are well-formed both are the same.

    The tokens are those of one token a forward (`window` 1). A larger window feeds, after the last sure token, up to
    window - 1 guesses in the same forward, and keeps the part that the network then says itself: separators are
    guessed where they belong, so that they cost no forward of their own, and everything else from `drafts`, int64
    [B, 64], the tokens that the caller expects (say, the last chunk moved on).
    """
    embeddings, mask = model.embed(pixels, prompts)
    sequence = _Sequence(model, embeddings, mask, padded=len({len(prompt) for prompt in prompts}) > 1)
    layout = _layout(model)
    guesses = torch.where(layout < 0, drafts, layout) if drafts is not None else layout.repeat(len(prompts), 1)
    guessed = [drafts is not None or place % (ACTION + 1) == ACTION for place in range(GENERATED)]

    hidden = [sequence.prefill]
    tokens = _answers(model, sequence.prefill[:, -1:], layout[:1], constrained)  # [B, sure]
    while (sure := tokens.shape[1]) < GENERATED:
        ahead = 0
        while ahead < window - 1 and sure + ahead < GENERATED - 1 and guessed[sure + ahead]:
            ahead += 1
        guess = guesses[:, sure : sure + ahead]
        states = sequence.append(torch.cat([tokens[:, -1:], guess], dim=1))
        answers = _answers(model, states, layout[sure : sure + ahead + 1], constrained)
        right = ahead
        forced = constrained and ahead == 1 and sure % (ACTION + 1) == ACTION
        if ahead and not forced:  # a forced token needs no look, which would wait for the device
            agree = (answers[:, :ahead] == guess).all(dim=0)
            right = int(agree.cumprod(dim=0).sum())
        sequence.drop(ahead - right)
        hidden.append(states[:, : right + 1])
        tokens = torch.cat([tokens, answers[:, : right + 1]], dim=1)

    states = torch.cat(hidden, dim=1)  # [B, T + 63, D], padding in front
    lengths = [len(prompt) + GENERATED - 1 for prompt in prompts]
    return Decoded(tokens, [row[-length:] for row, length in zip(states, lengths)], sequence.forwards)


def _layout(model: Generalist) -> Tensor:
    """int64 [64]: the separators and the end where they belong, -1 in the actions' places."""
    ids = model.config.tokens
    places = torch.full((CHUNK, ACTION + 1), -1, device=model.device)
    places[:, ACTION] = ids.separator
    places[-1, ACTION] = ids.eos
    return places.view(GENERATED)


def _answers(model: Generalist, hidden: Tensor, layout: Tensor, constrained: bool) -> Tensor:
    """The greedy tokens [B, N] after hidden states [B, N, D], for the N places of a chunk that `layout` describes."""
    head = model.language_model.lm_head
    if not constrained:
        best: Tensor = head(hidden).argmax(dim=-1)
        return best
    ids = model.config.tokens
    actions = F.linear(hidden, head.weight[ids.action_start : ids.action_end]).argmax(dim=-1) + ids.action_start
    return torch.where(layout < 0, actions, layout)
