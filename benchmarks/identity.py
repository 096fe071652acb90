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
from robodual.generalist.tokens import ROW
from robodual.profiles import shipped
from robodual_client.calvin.annotations import load
from robodual_client.calvin.sequences import published

WORDS = [
    *("push", "pull", "lift", "rotate", "place", "the", "red", "blue", "pink", "block"),
    *("drawer", "slider", "door", "lightbulb", "led", "left", "right", "up", "down"),
]
BATCH = 8  # prompts of different lengths in one batch
WRONG = (0.0, 0.05, 0.2, 1.0)  # shares of a draft's tokens


@dataclass
class Check:
    """One way to decode: in how many of `prompts` all tokens are those of one token a forward, and the forwards.

    alike: whether it rounds as what it is compared with, so that every token must be the same
    """

    name: str
    alike: bool = True
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


def glances(profile: str, count: int, seed: int = 0) -> tuple[list[np.ndarray], list[str]]:
    """Frames uint8 [200, 200, 3] and instructions: noise and random words, or for a profile that comes with weights the
    first scenes of CALVIN's published sequences on the playtable, with their first tasks.
    """
    if shipped(profile, "generalist") is None:
        random = np.random.default_rng(seed)
        frames = [random.integers(0, 256, (200, 200, 3), dtype=np.uint8) for _ in range(count)]
        return frames, [" ".join(random.choice(WORDS, random.integers(1, 10))) for _ in range(count)]
    from robodual_client.playtable.environment import PlayTable  # which needs a simulator

    env, instructions, sequences = PlayTable(), load(), published()[:count]
    try:
        scenes = [dict(zip(("robot_obs", "scene_obs"), sequence.observations())) for sequence in sequences]
        frames = [env.reset(**scene)["rgb_obs"]["rgb_static"] for scene in scenes]
    finally:
        env.close()
    return frames, [instructions[sequence.tasks[0]] for sequence in sequences]


def check(engine: GeneralistEngine, count: int, seed: int = 0) -> list[Check]:
    """Decodes `count` frames and prompts (`glances`) in every way, constrained and free, with a dynamic cache and with
    a static one, where the engine takes that.

    A kind's first row is one token a forward with a dynamic cache, the plain way, of which the rest are to give the
    same tokens. In 16 bits, where products of other shapes round otherwise and the better of two nearly equal tokens
    may be another, that is so for the static cache's steps alone, which are of one shape and are compared with one
    token a forward there; drafts and batches are of others.
    """
    exact = engine.model.dtype == torch.float32
    random = np.random.default_rng(seed)
    frames, sentences = glances(engine.facts.profile, count, seed)
    caches = {"": None} if engine.stepper is None else {"": None, "static cache, ": engine.stepper}
    checks: dict[str, Check] = {}

    def add(name: str, decoded: Decoded, expected: Tensor, *, alike: bool = exact) -> None:
        checks.setdefault(name, Check(name, alike)).count(decoded, expected)

    for constrained in (True, False):
        kind = "constrained" if constrained else "free"
        run = partial(decode, engine.model, constrained=constrained)
        guess = partial(run, guessing=True, window=ROW)
        rows = []
        for frame, sentence in zip(frames, sentences):
            given = inputs(engine, [frame], [sentence])
            tokens = run(*given, window=1).tokens
            rows.append(tokens)
            drafts = dict(_drafts(engine, tokens, random))
            for cache, stepper in caches.items():
                one, alike = run(*given, window=1, stepper=stepper), exact or stepper is not None
                add(f"{kind}, {cache}one token a forward", one, tokens)
                expected = tokens if exact else one.tokens
                add(f"{kind}, {cache}separators guessed", run(*given, stepper=stepper), expected, alike=alike)
                add(f"{kind}, {cache}actions guessed", guess(*given, stepper=stepper), expected, alike=alike)
                for share, draft in drafts.items():
                    name = f"draft with {share:.0%} wrong" if share else "draft that is right"
                    add(f"{kind}, {cache}{name}", run(*given, drafts=draft, stepper=stepper), tokens)
        for start in range(0, count, BATCH):
            given = inputs(engine, frames[start : start + BATCH], sentences[start : start + BATCH])
            tokens = torch.cat(rows[start : start + BATCH])
            for cache, stepper in caches.items():
                add(f"{kind}, {cache}batches of {BATCH}", run(*given, stepper=stepper), tokens)
                add(f"{kind}, {cache}batches of {BATCH}, actions guessed", guess(*given, stepper=stepper), tokens)
    return list(checks.values())


def _drafts(engine: GeneralistEngine, tokens: Tensor, random: np.random.Generator) -> Iterator[tuple[float, Tensor]]:
    """Each share of wrong tokens, and the draft [1, 64]."""
    for share in WRONG:
        wrong = torch.from_numpy(random.random(tokens.shape) < share)
        other = torch.from_numpy(random.integers(0, engine.model.config.language.vocabulary, tokens.shape))
        yield share, torch.where(wrong.to(tokens.device), other.to(tokens.device), tokens)
