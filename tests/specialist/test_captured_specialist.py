"""Whole steps captured, with graphs that a CPU can replay (replay.py): the uncaptured engine's answers, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pretended
import pytest
import torch
from replay import Cuda
from structlog.testing import CapturingLogger
from test_specialist_engine import FACTS, SENSORS, frame, request

from robodual import capture
from robodual.specialist import captured
from robodual.specialist.captured import LENGTHS, CapturedSteps
from robodual.specialist.engine import Answer, Features, Request, SpecialistEngine
from robodual.specialist.policy import Policy


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def capturing(sensors: str = "all", dtype: torch.dtype = torch.float32) -> SpecialistEngine:
    policy = Policy(SENSORS[sensors]).initialize(3)
    policy.serve_in(dtype)
    engine = SpecialistEngine(policy, FACTS)
    engine.captures, engine._captured = True, CapturedSteps(engine._step, engine.preparation)
    return engine


@torch.inference_mode()
def agree(engine: SpecialistEngine, requests: Sequence[Request], answers: Sequence[Answer]) -> bool:
    """Whether answers to requests of one shape are the bits of an uncaptured step."""
    chunks, following = engine._step(engine._gather(requests))
    return all(
        np.array_equal(answer.chunk, chunk.numpy()) and torch.equal(answer.features.latents, latents)
        for answer, chunk, latents in zip(answers, chunks, following, strict=True)
    )


@pytest.mark.parametrize("sensors", SENSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_gives_what_an_uncaptured_step_gives(sensors: str, dtype: torch.dtype, cuda: Cuda) -> None:
    engine = capturing(sensors, dtype)
    features = engine.act([request(engine, 1, 40)])[0].features
    batches = [
        [request(engine, 2, 33, previous=features)],
        [request(engine, 3, 64)],
        [request(engine, 4, 70, previous=features), request(engine, 5, 7)],
        [request(engine, 6, 5), request(engine, 7, 90, previous=frame(8).rgb_static)],
        [request(engine, 9, 12, previous=features)],
    ]
    assert all(agree(engine, batch, engine.act(batch)) for batch in batches)
    assert cuda.captures == 2, "one request up to 64 tokens, two up to 128"
    assert cuda.graphs.replays == 1 + len(batches)


def test_frames_of_other_shapes_are_run_apart_and_answered_in_order(cuda: Cuda) -> None:
    engine = capturing()
    small = [replace(request(engine, seed, 20), frame=frame(seed, static=120, gripper=50)) for seed in (1, 2)]
    large = [request(engine, 3, 80), request(engine, 4, 20, previous=frame(5, static=120).rgb_static)]
    answers = engine.act([small[0], large[0], small[1], large[1]])
    assert agree(engine, small, answers[::2])
    assert agree(engine, large, answers[1::2])
    assert cuda.captures == 2


@pytest.mark.parametrize("spoilt", [torch.inf, torch.nan])
def test_nothing_of_another_session_is_left(spoilt: float, cuda: Cuda) -> None:
    engine = capturing()
    broken = request(engine, 1, LENGTHS, previous=Features(torch.full((8, engine.policy.config.width), spoilt)))
    context = broken.conditioning
    broken = replace(broken, conditioning=replace(context, keys_values=torch.full_like(context.keys_values, spoilt)))
    [answer] = engine.act([broken])
    assert not np.isfinite(answer.chunk).all()
    for given in (request(engine, 2, 20), request(engine, 3, 21, previous=frame(4).rgb_static)):
        answers = engine.act([given])
        assert np.isfinite(answers[0].chunk).all()
        assert agree(engine, [given], answers)
    assert cuda.captures == 1


def test_a_step_that_cannot_be_captured_runs_without(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, cuda.capturable = capturing(), False
    log = CapturingLogger()
    monkeypatch.setattr(capture, "logger", log)
    for size in (1, 2, 1):
        given = [request(engine, seed, 20) for seed in range(size)]
        assert agree(engine, given, engine.act(given))
    assert [call.args[0] for call in log.calls] == ["steps run without CUDA graphs"]
    assert not cuda.graphs.replays


def test_shapes_beyond_those_that_are_kept_run_without(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "MOST", 1)
    engine = capturing()
    for size in (1, 2, 2, 1):
        given = [request(engine, seed, 20) for seed in range(size)]
        assert agree(engine, given, engine.act(given))
    assert (cuda.captures, cuda.graphs.replays) == (1, 2)


def test_a_captured_step_names_the_sensor_that_is_missing(cuda: Cuda) -> None:
    engine = capturing()
    given = request(engine, 1, 30)
    for name in engine.sensors:
        with pytest.raises(ValueError, match=name):
            engine.act([given, replace(given, frame=replace(given.frame, **{name: None}))])
    assert engine.act([]) == []


def test_features_keep_no_graphs_memory(cuda: Cuda) -> None:
    engine = capturing()
    answers = [engine.act([request(engine, seed, 10)])[0] for seed in range(2)]
    first, second = (answer.features.latents for answer in answers)
    assert not torch.equal(first, second)
    assert first.untyped_storage().nbytes() == first.numel() * first.element_size()


def test_the_pinned_buffer_is_written_once_its_copy_is_over(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy comes late, as on a GPU: what was written before is what arrives."""
    done: list[str] = []
    monkeypatch.setattr(pretended.Event, "synchronize", lambda event: done.append("waited"))
    monkeypatch.setattr(pretended.Event, "record", lambda event, stream: done.append("sent"))
    engine = capturing()
    given = request(engine, 1, 30)
    fill = captured._fill
    monkeypatch.setattr(captured, "_fill", lambda *inputs: (done.append("fill"), fill(*inputs)))
    for _ in range(2):
        engine.act([given])
    assert done == ["fill", "waited", "sent"] * 2
