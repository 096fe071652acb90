"""One control step of the specialist: the plain published path against the engine, interleaved.

    python -m benchmarks.specialist --rounds 30 --json specialist.json

The steady state is timed: step 1 and later of an episode, on a conditioning that is there already. Both paths start
from camera frames; the plain one gets the previous frame, the engine the features that it kept of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from benchmarks import measurement

from robodual.profiles import PROFILES
from robodual.specialist.control import noise
from robodual.specialist.engine import Frame, Request, SpecialistEngine, load_specialist

PACKAGES = ("torch", "numpy", "pillow", "robodual")


def frame(seed: int) -> Frame:
    """Noise of CALVIN's sizes; what is in a picture changes no time."""
    random = np.random.default_rng(seed)
    return Frame(
        rgb_static=random.integers(0, 256, (200, 200, 3), dtype=np.uint8),
        rgb_gripper=random.integers(0, 256, (84, 84, 3), dtype=np.uint8),
        depth_static=random.uniform(3.5, 6.2, (200, 200)).astype(np.float32),
        depth_gripper=random.uniform(0, 2, (84, 84)).astype(np.float32),
        rgb_tactile=random.integers(0, 256, (160, 120, 6), dtype=np.uint8),
        proprio=random.normal(size=7).astype(np.float32),
    )


def steps(engine: SpecialistEngine, context_length: int) -> tuple[Callable[[], torch.Tensor], Request]:
    """The plain path's step, as a function that gives the chunk [8, 7], and the same step as a request."""
    before, now = frame(0), frame(1)
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(context_length, engine.width, generator=generator)
    reference = np.random.default_rng(2).uniform(-1, 1, (8, 7)).astype(np.float32)
    first = Request(before, None, engine.project(hidden_states), reference, noise(0, 0, 0))
    request = replace(first, frame=now, previous=engine.act([first])[0].features, noise=noise(0, 0, 1))
    preparation = engine.preparation
    on_device = preparation.vectors([reference]), hidden_states[None].to(preparation.device)

    def plain() -> torch.Tensor:
        observation = preparation.observation(now, before.rgb_static)
        start = preparation.vectors([request.noise])
        return engine.policy.sample(observation, *on_device, start)[0].cpu()

    return plain, request


def chunk(engine: SpecialistEngine, requests: Sequence[Request]) -> npt.NDArray[np.float32]:
    """The first request's chunk [8, 7]."""
    return engine.act(requests)[0].chunk


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if `--compare` finds a regression."""
    parser = argparse.ArgumentParser(prog="benchmarks.specialist", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="robodual-7b", choices=sorted(PROFILES))
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of the engine and the plain path: float32, bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--context-length", type=int, default=90, help="the generalist's tokens")
    parser.add_argument("--batch", type=int, default=1, help="requests in the engine's batch, timed as one row")
    parser.add_argument("--diffusion-steps", type=int, nargs="*", default=[], help="also time the engine with fewer")
    parser.add_argument("--bfloat16", action="store_true", help="also time the engine in bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    measurement.add_outputs(parser)
    options = parser.parse_args(argv)

    torch.set_num_threads(options.threads)

    def load(**changes: Any) -> SpecialistEngine:
        arguments = {"checkpoint": options.checkpoint, "device": options.device, "dtype": options.dtype, **changes}
        return load_specialist(options.profile, **arguments)

    engine = load()
    plain, request = steps(engine, options.context_length)
    contenders: dict[str, Callable[[], Any]] = {
        "plain published path": plain,
        "engine": partial(chunk, engine, [request]),
    }
    # Not the same answers: each row's difference says how far off.
    for count in options.diffusion_steps:
        contenders[f"engine, {count} diffusion steps"] = partial(chunk, load(diffusion_steps=count), [request])
    if options.bfloat16:
        narrow = load(dtype="bfloat16")
        _, narrowed = steps(narrow, options.context_length)
        contenders["engine, bfloat16"] = partial(chunk, narrow, [narrowed])
    if options.batch > 1:
        contenders[f"engine, batch of {options.batch}"] = partial(chunk, engine, [request] * options.batch)
    exact = np.asarray(plain())
    differences = {name: float(np.abs(np.asarray(run()) - exact).max()) for name, run in contenders.items()}
    rows = measurement.interleave(contenders, options.rounds)

    facts = {
        "profile": options.profile,
        "device": engine.facts.device,
        "dtype": engine.facts.dtype,
        "threads": options.threads,
        "rounds": options.rounds,
        "context_length": options.context_length,
        "largest_differences": differences,
    }
    title = f"specialist {options.profile}, {engine.facts.device}, {engine.facts.dtype}, {options.threads} threads"
    notes = [f"{name}: {value:.1e} from the plain chunk at most" for name, value in differences.items() if value]
    measurement.show(title, rows, notes)
    return measurement.conclude(options, "specialist", title, rows, PACKAGES, **facts)


if __name__ == "__main__":
    sys.exit(main())
