"""Greedy decoding of one action chunk per frame, with a key-value cache and lossless speculation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaModel

from robodual.generalist.greedy import chunk_layout, greedy
from robodual.generalist.model import Generalist
from robodual.generalist.stepping import Stepper
from robodual.generalist.tokens import ACTION, GENERATED

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
        self.cache = DynamicCache(config=model.language_model.config)
        # Without padding no mask is needed, and attention takes its fastest kernel.
        self.mask = mask if padded else None
        self.position = mask.sum(dim=1, keepdim=True)  # [B, 1], of the next token
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
    stepper: Stepper | None = None,
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

    stepper: the model's, for steps on a static cache; without, or where the device has no memory for them, the cache is
    dynamic. Window 1 without a stepper is the plain way, whose tokens all others give.
    """
    embeddings, mask = model.embed(pixels, prompts)
    sequence = _Sequence(model, embeddings, mask, padded=len({len(prompt) for prompt in prompts}) > 1)
    layout = chunk_layout(model.config.tokens, model.device)
    guesses = torch.where(layout < 0, drafts, layout) if drafts is not None else layout.repeat(len(prompts), 1)
    pace = _Pace(window, constrained=constrained, drafted=drafts is not None)
    first = greedy(model, sequence.prefill[:, -1:], layout[:1], constrained)  # [B, 1]
    static = stepper is not None and stepper.start(
        sequence.cache, mask, first, guesses, constrained=constrained, limit=window - 1
    )
    if stepper is not None and static:
        tokens, hidden = _static(stepper, pace)
    else:
        tokens, hidden = _dynamic(sequence, pace, first, guesses)
    states = torch.cat([sequence.prefill, hidden], dim=1)  # [B, T + 63, D], padding in front
    lengths = [len(prompt) + GENERATED - 1 for prompt in prompts]
    return Decoded(tokens, [row[-length:] for row, length in zip(states, lengths)], 1 + pace.steps)


class _Pace:
    """How many guesses each step feeds, and how many steps there were."""

    def __init__(self, window: int, *, constrained: bool, drafted: bool) -> None:
        self.constrained = constrained
        self.steps = 0
        self._window = window
        self._guessed = [drafted or place % (ACTION + 1) == ACTION for place in range(GENERATED)]

    def ahead(self, sure: int) -> int:
        """The guesses to feed with the last of `sure` tokens."""
        self.steps += 1
        ahead = 0
        while ahead < self._window - 1 and sure + ahead < GENERATED - 1 and self._guessed[sure + ahead]:
            ahead += 1
        return ahead

    def certain(self, sure: int, ahead: int) -> bool:
        """Whether the guesses are right without a look, which would wait for the device: none, or a forced token."""
        return not ahead or (self.constrained and ahead == 1 and sure % (ACTION + 1) == ACTION)


def _static(stepper: Stepper, pace: _Pace) -> tuple[Tensor, Tensor]:
    """Tokens [B, 64] and hidden states [B, 63, D], after the stepper's start."""
    sure = 1
    while sure < GENERATED:
        ahead = pace.ahead(sure)
        stepper.step(ahead + 1)
        sure = sure + ahead + 1 if pace.certain(sure, ahead) else stepper.sure()
    return stepper.results()


def _dynamic(sequence: _Sequence, pace: _Pace, first: Tensor, guesses: Tensor) -> tuple[Tensor, Tensor]:
    """The same after the prefill and the first tokens [B, 1], with its cache."""
    model, layout = sequence.model, chunk_layout(sequence.model.config.tokens, sequence.model.device)
    hidden, tokens = [], first  # [B, sure]
    while (sure := tokens.shape[1]) < GENERATED:
        ahead = pace.ahead(sure)
        guess = guesses[:, sure : sure + ahead]
        states = sequence.append(torch.cat([tokens[:, -1:], guess], dim=1))
        answers = greedy(model, states, layout[sure : sure + ahead + 1], pace.constrained)
        right = ahead
        if not pace.certain(sure, ahead):
            agree = (answers[:, :ahead] == guess).all(dim=0)
            right = int(agree.cumprod(dim=0).sum())
        sequence.drop(ahead - right)
        hidden.append(states[:, : right + 1])
        tokens = torch.cat([tokens, answers[:, : right + 1]], dim=1)
    return tokens, torch.cat(hidden, dim=1)
