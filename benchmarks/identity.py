"""Whether decoding gives the same tokens in every way that there is, and how many forwards each takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from robodual.generalist.decoding import Decoded, decode
from robodual.generalist.engine import GeneralistEngine

WORDS = [
    *("push", "pull", "lift", "rotate", "place", "the", "red", "blue", "pink", "block"),
    *("drawer", "slider", "door", "lightbulb", "led", "left", "right", "up", "down"),
]
BATCH = 8  # prompts of different lengths in one batch
WRONG = (0.0, 0.05, 0.2, 1.0)  # shares of a draft's tokens


@dataclass
class Check:
    """One way to decode: in how many of `prompts` all tokens are those of one token a forward, and the forwards."""

    name: str
    prompts: int = 0
    identical: int = 0
    forwards: int = 0

    def count(self, decoded: Decoded, expected: Tensor) -> None:
        self.prompts += len(expected)
        self.identical += int((decoded.tokens == expected).all(dim=1).sum())
        self.forwards += decoded.forwards * len(expected)


def inputs(
    engine: GeneralistEngine, frames: Sequence[np.ndarray], instructions: Sequence[str]
) -> tuple[Tensor, list[Tensor]]:
    """Pixels and prompts on the model's device."""
    device = engine.model.device
    prompts = [torch.tensor(engine.processor.prompt(instruction), device=device) for instruction in instructions]
    return engine.processor.pixels(frames).to(device, engine.model.dtype), prompts


def check(engine: GeneralistEngine, count: int, seed: int = 0) -> list[Check]:
    """Decodes `count` random frames and prompts in every way, constrained and free, with a dynamic cache and, where
    the engine takes one, with a static.

    A kind's first row is one token a forward with a dynamic cache, the plain way, of which the rest are to give the
    same tokens.
    """
    random = np.random.default_rng(seed)
    frames = [random.integers(0, 256, (200, 200, 3), dtype=np.uint8) for _ in range(count)]
    sentences = [" ".join(random.choice(WORDS, random.integers(1, 10))) for _ in range(count)]
    caches = {"": None} if engine.stepper is None else {"": None, "static cache, ": engine.stepper}
    checks: dict[str, Check] = {}

    def add(name: str, decoded: Decoded, expected: Tensor) -> None:
        checks.setdefault(name, Check(name)).count(decoded, expected)

    for constrained in (True, False):
        kind = "constrained" if constrained else "free"
        run = partial(decode, engine.model, constrained=constrained)
        rows = []
        for frame, sentence in zip(frames, sentences):
            given = inputs(engine, [frame], [sentence])
            tokens = run(*given, window=1).tokens
            rows.append(tokens)
            drafts = dict(_drafts(engine, tokens, random))
            for cache, stepper in caches.items():
                add(f"{kind}, {cache}one token a forward", run(*given, window=1, stepper=stepper), tokens)
                add(f"{kind}, {cache}separators guessed", run(*given, stepper=stepper), tokens)
                for share, draft in drafts.items():
                    name = f"draft with {share:.0%} wrong" if share else "draft that is right"
                    add(f"{kind}, {cache}{name}", run(*given, drafts=draft, stepper=stepper), tokens)
        for start in range(0, count, BATCH):
            given = inputs(engine, frames[start : start + BATCH], sentences[start : start + BATCH])
            tokens = torch.cat(rows[start : start + BATCH])
            for cache, stepper in caches.items():
                add(f"{kind}, {cache}batches of {BATCH}", run(*given, stepper=stepper), tokens)
    return list(checks.values())


def _drafts(engine: GeneralistEngine, tokens: Tensor, random: np.random.Generator) -> Iterator[tuple[float, Tensor]]:
    """Each share of wrong tokens, and the draft [1, 64]."""
    for share in WRONG:
        wrong = torch.from_numpy(random.random(tokens.shape) < share)
        other = torch.from_numpy(random.integers(0, engine.model.config.language.vocabulary, tokens.shape))
        yield share, torch.where(wrong.to(tokens.device), other.to(tokens.device), tokens)
