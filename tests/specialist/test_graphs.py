"""What a GPU captures: the logic around it with a graph that a CPU can repeat, and that a step never waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from robodual import graphs
from robodual.capture import WARMUP
from robodual.graphs import Graphs
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.policy import Policy
from robodual.specialist.step import Inputs, Step

CPU = torch.device("cpu")


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Cuda:
    """What `Graphs` asks of torch.cuda: a graph is the last call of the function, repeated on the same tensors."""

    def __init__(self) -> None:
        self.default = self.current = Stream()
        self.calls = 0
        self.capturable = True
        self.capturing = False
        self.memory = 8  # of batches of at most so many
        self._last: tuple[Inputs, tuple[Tensor, Tensor]]

    def function(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if self.capturing and not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.capturing and len(inputs.noise) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.calls += 1
        outputs = self._compute(inputs)
        self._last = inputs, outputs
        return outputs

    @staticmethod
    def _compute(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return inputs.noise * 2 + inputs.reference, inputs.previous + 1

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, *, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """As torch's, which leaves its stream current where the capture fails."""
        before, self.current, self.capturing = self.current, stream, True
        try:
            yield
        finally:
            self.capturing = False
        inputs, outputs = self._last

        @torch.inference_mode()  # a replay writes to any tensor
        def replay() -> None:
            for output, value in zip(outputs, self._compute(inputs)):
                output.copy_(value)

        graph.replay, self.current = replay, before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    fakes = {
        "Stream": lambda device: Stream(),
        "graph_pool_handle": object,
        "current_stream": lambda device: cuda.current,
        "device": lambda device: nullcontext(),
        "stream": cuda.stream,
        "CUDAGraph": type("CUDAGraph", (), {}),
        "graph": cuda.graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return cuda


def inputs(batch: int, seed: int, device: str = "cpu", length: int = 4) -> Inputs:
    """Of the toy profile's shapes, all sensors but the tactile one."""
    generator = None if device == "meta" else torch.Generator().manual_seed(seed)
    config = SpecialistConfig.toy()

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    size = config.image_size
    return Inputs(
        pixels=some(2 * batch, 3, size, size),
        maps=some(2 * batch, 1, size, size),
        tactile=None,
        proprio=some(batch, 7),
        previous=some(batch, config.latents, config.width),
        first=some(batch, 1, 1) > 0,
        keys_values=some(batch, length, 2 * config.blocks * config.width),
        mean=some(batch, config.width),
        mask=some(batch, length) > 0,
        reference=some(batch, 8, 7),
        noise=some(batch, 8, 7),
    )


def captured(cuda: Cuda) -> Callable[[Inputs], tuple[Tensor, ...]]:
    run = Graphs(lambda *tensors: cuda.function(Inputs(*tensors)), CPU, "steps run")
    return lambda given: run(*vars(given).values())


def agree(found: tuple[Tensor, ...], given: Inputs) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, Cuda._compute(given)))


def test_a_replay_answers_its_own_inputs_and_its_answers_stay(cuda: Cuda) -> None:
    run = captured(cuda)
    given = [inputs(batch, seed) for seed, batch in enumerate([1, 2, 1, 2, 1])]
    answers = [run(one) for one in given]
    assert cuda.calls == 2 * (WARMUP + 1), "each shape is run for its capture alone"
    assert all(agree(answer, one) for answer, one in zip(answers, given, strict=True))


def test_a_missing_sensor_is_another_shape(cuda: Cuda) -> None:
    run = captured(cuda)
    whole = inputs(1, 0)
    for one in (whole, replace(whole, maps=None, mask=None), replace(inputs(1, 1), maps=None, mask=None)):
        assert agree(run(one), one)
    assert cuda.calls == 2 * (WARMUP + 1)


def test_shapes_beyond_those_that_are_kept_run_without_a_graph(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    run = captured(cuda)
    for seed, batch in enumerate([1, 2, 2, 1]):
        one = inputs(batch, seed)
        assert agree(run(one), one)
    assert cuda.calls == WARMUP + 1 + 2


def test_a_step_that_cannot_be_captured_runs_without_and_on_the_callers_stream(cuda: Cuda) -> None:
    cuda.capturable = False
    run = captured(cuda)
    for seed in range(3):
        one = inputs(1, seed)
        assert agree(run(one), one)
        assert cuda.current is cuda.default
    assert cuda.calls == WARMUP + 3, "a capture that failed is not tried again"


def test_a_shape_without_memory_runs_without_a_graph_and_leaves_the_others_theirs(cuda: Cuda) -> None:
    cuda.memory = 1
    run = captured(cuda)
    for seed, batch in enumerate([2, 1, 2, 1]):
        one = inputs(batch, seed)
        assert agree(run(one), one)
        assert cuda.current is cuda.default
    assert cuda.calls == (WARMUP + 1 + 1) + (WARMUP + 1)


def test_what_was_captured_in_inference_mode_answers_outside_of_it(cuda: Cuda) -> None:
    run = captured(cuda)
    with torch.inference_mode():
        run(inputs(1, 0))
    one = inputs(1, 1)
    assert agree(run(one), one)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_step_reads_nothing_back_from_the_device(guidance_scale: float) -> None:
    """The meta device has no values: .item(), .cpu(), a boolean mask or a branch on a tensor raises."""
    with torch.device("meta"):
        policy = Policy(replace(SpecialistConfig.toy(), guidance_scale=guidance_scale)).eval()
    with torch.inference_mode():
        chunks, following = Step(policy)(inputs(3, 0, device="meta"))
    assert chunks.shape == (3, 8, 7)
    assert following.shape == (3, policy.config.latents, policy.config.width)
