"""Greedy decoding of one action chunk per frame, with a key-value cache and lossless speculation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from robodual.generalist.greedy import chunk_layout, greedy, standing_still
from robodual.generalist.model import Generalist
from robodual.generalist.stepping import Stepper
from robodual.generalist.tokens import ACTION, GENERATED, ROW


@dataclass(frozen=True)
class Decoded:
    """tokens: int64 [B, 64]; hidden: one [L, D] per frame; forwards: passes through the Llama, prefill included."""

    tokens: Tensor
    hidden: list[Tensor]
    forwards: int


class _Sequence:
    """A batch of sequences inside the Llama: its cache, mask and positions, one longer with every token."""

    def __init__(self, model: Generalist, embeddings: Tensor, mask: Tensor | None, positions: Tensor) -> None:
        """Of prompts; positions: int64 [B, T]."""
        self.model = model
        self.cache = DynamicCache(config=model.language_model.config)
        self.mask = mask
        self.position = positions[:, -1:] + 1  # [B, 1], of the next token
        self.prefill = model.read(embeddings, positions, mask, self.cache)

    def append(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] -> their last hidden states [B, N, D], after the final norm."""
        count = tokens.shape[1]
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, count), value=True)
        positions = self.position + torch.arange(count, device=tokens.device)
        self.position = self.position + count
        return self.model.read(
            self.model.language_model.get_input_embeddings()(tokens), positions, self.mask, self.cache
        )

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
    guessing: bool = False,
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
    window - 1 guesses in the same forward, and keeps the part that the network then says itself. Separators are guessed
    where they belong, so that they cost no forward of their own. Everything else is guessed too with `drafts`, int64
    [B, 64], the tokens that the caller expects, or with `guessing`: at first as in the row before (consecutive actions
    are alike), then as the network itself said in the last forward, after guesses that may have been wrong (Jacobi
    decoding, arXiv 2305.10427; of action chunks, arXiv 2503.02310).

    stepper: the model's, for steps on a static cache; without, or where the device has no memory for them, the cache is
    dynamic. Window 1 without a stepper is the plain way, whose tokens all others give.
    """
    images = model.see(pixels) if stepper is None else stepper.see(pixels)
    embeddings, mask = model.embed(images, prompts)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    # Without padding no mask is needed, and attention takes its fastest kernel.
    seen = mask if len({len(prompt) for prompt in prompts}) > 1 else None
    prefill = None if stepper is None else stepper.read(embeddings, positions, seen)
    sequence = None
    if prefill is None:
        sequence = _Sequence(model, embeddings, seen, positions)
        prefill = sequence.prefill
    ids = model.config.tokens
    layout = chunk_layout(ids, model.device)
    pace = _Pace(window, constrained, guessing or drafts is not None)
    guesses = layout  # -1 where nothing is guessed
    if pace.guessing:
        guesses = torch.where(layout < 0, standing_still(ids, model.device) if drafts is None else drafts, layout)
    guesses = guesses.expand(len(prompts), -1).clone()
    refining = pace.guessing and drafts is None
    first = greedy(model, prefill[:, -1:], layout[:1], constrained)  # [B, 1]
    if sequence is None:
        assert stepper is not None
        # Separators alone are one guess.
        most = window if pace.guessing else min(window, 2)
        stepper.start(first, guesses, constrained=constrained, refining=refining, window=most)
        tokens, hidden = _static(stepper, pace)
    else:
        tokens, hidden = _dynamic(sequence, pace, first, guesses, refining)
    states = torch.cat([prefill, hidden], dim=1)  # [B, T + 63, D], padding in front
    lengths = [len(prompt) + GENERATED - 1 for prompt in prompts]
    return Decoded(tokens, [row[-length:] for row, length in zip(states, lengths)], 1 + pace.steps)


@dataclass
class _Pace:
    """How many guesses each step feeds, and how many steps there were."""

    window: int
    constrained: bool
    guessing: bool  # of actions too
    steps: int = 0

    def ahead(self, sure: int) -> int:
        """The guesses to feed with the last of `sure` tokens."""
        self.steps += 1
        most = min(self.window - 1, GENERATED - 1 - sure)
        return most if self.guessing else min(most, int(sure % ROW == ACTION))

    def certain(self, ahead: int) -> bool:
        """Whether the guesses are right without a look, which would wait for the device: none, or a forced token."""
        return not ahead or (self.constrained and not self.guessing)


def _static(stepper: Stepper, pace: _Pace) -> tuple[Tensor, Tensor]:
    """Tokens [B, 64] and hidden states [B, 63, D], after the stepper's start."""
    sure = 1
    while sure < GENERATED:
        ahead = pace.ahead(sure)
        stepper.step(ahead + 1)
        sure = sure + ahead + 1 if pace.certain(ahead) else stepper.sure()
    return stepper.results()


def _dynamic(sequence: _Sequence, pace: _Pace, first: Tensor, guesses: Tensor, refining: bool) -> tuple[Tensor, Tensor]:
    """The same after the first tokens [B, 1], with a sequence's cache."""
    model, layout = sequence.model, chunk_layout(sequence.model.config.tokens, sequence.model.device)
    hidden, tokens = [], first  # [B, sure]
    while (sure := tokens.shape[1]) < GENERATED:
        ahead = pace.ahead(sure)
        guess = guesses[:, sure : sure + ahead]
        states = sequence.append(torch.cat([tokens[:, -1:], guess], dim=1))
        answers = greedy(model, states, layout[sure : sure + ahead + 1], pace.constrained)
        right = ahead
        if not pace.certain(ahead):
            agree = (answers[:, :ahead] == guess).all(dim=0)
            right = int(agree.cumprod(dim=0).sum())
        sequence.drop(ahead - right)
        hidden.append(states[:, : right + 1])
        tokens = torch.cat([tokens, answers[:, : right + 1]], dim=1)
        if refining:
            _guess(guesses, sure + ROW, answers, layout)
            _guess(guesses, sure, answers, layout)
    return tokens, torch.cat(hidden, dim=1)


def _guess(guesses: Tensor, start: int, answers: Tensor, layout: Tensor) -> None:
    """Puts answers [B, N] from `start` on in the place of guesses [B, 64], but for the separators and the end."""
    there = slice(start, min(start + answers.shape[1], GENERATED))
    answers = answers[:, : max(0, GENERATED - start)]
    guesses[:, there] = torch.where(layout[there] < 0, answers, guesses[:, there])
