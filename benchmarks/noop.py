"""A service whose model answers zeros at once: what is left of a step is the service's own work.

    python -m benchmarks.noop specialist --port 50052 --http-port 8052

With --real NAME the service of that name is a real one. The generalist's records are as large as the published ones:
hidden states [90, 4096]. Redis and all else come from the environment, as with `robodual serve`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from robodual.facts import EngineFacts
from robodual.generalist import service as generalist
from robodual.generalist.engine import GeneralistEngine, Thought
from robodual.generalist.processor import Processor
from robodual.serving import server
from robodual.serving.settings import GeneralistSettings, SpecialistSettings
from robodual.specialist import service as specialist
from robodual.specialist.engine import Answer, Features, Projected, Request, SpecialistEngine

LENGTH, WIDTH = 90, 4096
FACTS = EngineFacts("noop", "none", "cpu", "float32", 0, 0)


class NoProcessor(Processor):
    def __init__(self) -> None:
        pass

    def prompt(self, instruction: str) -> list[int]:
        return [0]


class NoGeneralist(GeneralistEngine):
    def __init__(self) -> None:
        self.facts, self.width = FACTS, WIDTH
        self.captures = False
        self.processor = NoProcessor()
        states = torch.zeros((LENGTH, WIDTH), dtype=torch.bfloat16)
        self._thought = Thought(np.zeros((8, 7), np.float32), states, malformed_tokens=0, forwards=0)

    def think(
        self,
        frames: Sequence[npt.NDArray[np.uint8]],
        instructions: Sequence[str],
        drafts: Sequence[npt.NDArray[np.floating] | None] = (),
    ) -> list[Thought]:
        return [self._thought] * len(frames)


class NoSpecialist(SpecialistEngine):
    def __init__(self) -> None:
        self.facts, self.width = FACTS, WIDTH
        self.captures = False
        self.sensors = ("rgb_static", "rgb_gripper", "depth_static", "depth_gripper", "proprio")
        self._answer = Answer(np.zeros((8, 7), np.float32), Features(torch.zeros(0)))

    def project(self, hidden_states: torch.Tensor) -> Projected:
        return Projected(hidden_states, hidden_states[0])

    def act(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._answer] * len(requests)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser(prog="benchmarks.noop", description=__doc__.splitlines()[0])
    parser.add_argument("service", choices=["generalist", "specialist"])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--http-port", type=int, default=0)
    parser.add_argument("--real", choices=["generalist", "specialist"])
    parser.add_argument("--profile", default="robodual-7b")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    real = options.real == options.service
    given = {"port": options.port, "http_port": options.http_port, "profile": options.profile, "device": options.device}
    if options.service == "generalist":
        settings = GeneralistSettings(**given)
        server.run(settings, generalist.serving(settings, *(() if real else (NoGeneralist(),))))
    else:
        chosen = SpecialistSettings(**given)
        server.run(chosen, specialist.serving(chosen, *(() if real else (NoSpecialist(),))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
