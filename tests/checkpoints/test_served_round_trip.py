"""Published files through `robodual serve`: what the processes answer over gRPC is what the engines give in process."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from robodual.generalist.engine import GeneralistEngine, load_generalist
from robodual.inspection import inspect
from robodual.pair import Options, Pair
from robodual.specialist import checkpoint
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.control import ControlLoop, noise, reference_actions
from robodual.specialist.engine import Frame, Request, SpecialistEngine, load_specialist
from robodual_client import tensors, wire
from robodual_client.wire import rpc

INSTRUCTION = "Push the sliding door to the left side"
STEPS = 9  # conditionings at steps 0 and 7
SEED = 11


def frame(step: int) -> Frame:
    draw = np.random.default_rng(step)
    return Frame(
        rgb_static=draw.integers(0, 256, (200, 200, 3), np.uint8),
        rgb_gripper=draw.integers(0, 256, (84, 84, 3), np.uint8),
        depth_static=draw.uniform(3.5, 6.2, (200, 200)).astype(np.float32),
        depth_gripper=draw.uniform(0, 2, (84, 84)).astype(np.float32),
        rgb_tactile=None,
        proprio=draw.normal(size=7).astype(np.float32),
    )


def in_process(generalist: GeneralistEngine, specialist: SpecialistEngine) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(chunk, action) of each step, by the engines and the control loop alone."""
    control, previous = ControlLoop(), None
    for step in range(STEPS):
        seen = frame(step)
        if step in (0, 7):
            (thought,) = generalist.think([seen.rgb_static], [INSTRUCTION])
            projected, thought_at = specialist.project(thought.hidden_states), step
        reference = reference_actions(
            thought.reference_actions, conditioning_step=thought_at, step=step, window="published"
        )
        (answer,) = specialist.act([Request(seen, previous, projected, reference, noise(SEED, 1, step))])
        previous = answer.features
        yield answer.chunk, control.advance(step, answer.chunk)


def served(pair: Pair) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same over gRPC."""
    with (
        grpc.insecure_channel(pair.addresses["generalist"]) as first,
        grpc.insecure_channel(pair.addresses["specialist"]) as second,
    ):
        generalist, specialist = rpc.Stub(first, rpc.GENERALIST), rpc.Stub(second, rpc.SPECIALIST)
        specialist.Reset(wire.ResetRequest(session_id="robot", episode=1, seed=SEED))
        for step in range(STEPS):
            seen = frame(step)
            image = tensors.encode_image(seen.rgb_static)
            if step in (0, 7):
                request = wire.ConditionRequest(
                    session_id="robot", episode=1, step=step, rgb_static=image, instruction=INSTRUCTION
                )
                version = generalist.Condition(request, timeout=120).version
            assert seen.rgb_gripper is not None
            assert seen.depth_static is not None
            assert seen.depth_gripper is not None
            observation = wire.Observation(
                rgb_static=image,
                rgb_gripper=tensors.encode_image(seen.rgb_gripper),
                depth_static=tensors.encode(seen.depth_static),
                depth_gripper=tensors.encode(seen.depth_gripper),
                proprio=tensors.encode(seen.proprio),
            )
            answer = specialist.Act(
                wire.ActRequest(
                    session_id="robot", episode=1, step=step, observation=observation, min_conditioning=version
                ),
                timeout=120,
            )
            yield (
                tensors.decode(answer.chunk, field="chunk", dtype=np.float32, shape=(8, 7)),
                tensors.decode(answer.action, field="action", dtype=np.float32, shape=(7,)),
            )


def info(pair: Pair, service: str) -> wire.InfoResponse:
    with grpc.insecure_channel(pair.addresses[service]) as channel:
        name = rpc.GENERALIST if service == "generalist" else rpc.SPECIALIST
        answer: wire.InfoResponse = rpc.Stub(channel, name).GetInfo(wire.InfoRequest(), timeout=30)
        return answer


def page(pair: Pair, service: str, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{pair.http_ports[service]}{path}", timeout=30) as answer:
        text: str = answer.read().decode()
        return text


@contextmanager
def running(folder: Path, specialist: str, **settings: str) -> Iterator[Pair]:
    checkpoints = {"generalist": folder / "generalist", "specialist": folder / specialist}
    # One thread each: more of them wait for one another while other tests keep the cores busy.
    environment = {"OMP_NUM_THREADS": "1", **settings}
    with Pair(Options(device="cpu", checkpoints=checkpoints, settings=environment)) as pair:
        yield pair


def assert_served_equals(pair: Pair, generalist: GeneralistEngine, specialist: SpecialistEngine) -> None:
    expected = list(in_process(generalist, specialist))
    for step, ((chunk, action), (own_chunk, own_action)) in enumerate(zip(served(pair), expected, strict=True)):
        np.testing.assert_allclose(chunk, own_chunk, rtol=0, atol=1e-5, err_msg=f"chunk of step {step}")
        np.testing.assert_allclose(action, own_action, rtol=0, atol=1e-5, err_msg=f"action of step {step}")
    assert np.ptp([chunk for chunk, _ in expected]) > 0.1  # the networks say something


@pytest.mark.slow
def test_published_files_are_served_as_they_run_in_process(published: Path) -> None:
    generalist = load_generalist("toy", checkpoint=published / "generalist", device="cpu")
    specialist = load_specialist("toy", checkpoint=published / "specialist.pt", device="cpu")

    with running(published, "specialist.pt") as pair:
        assert_served_equals(pair, generalist, specialist)
        for service, facts in (("generalist", generalist.facts), ("specialist", specialist.facts)):
            answer = info(pair, service)
            assert (answer.checkpoint, answer.parameters) == (facts.checkpoint, facts.parameters)
            assert answer.weight_bytes == facts.weight_bytes
            assert dict(answer.details).items() >= facts.details.items()
            assert json.loads(page(pair, service, "/info"))["checkpoint"] == facts.checkpoint
        assert info(pair, "generalist").checkpoint == inspect(published / "generalist").checkpoint
        assert info(pair, "specialist").checkpoint == inspect(published / "specialist.pt").checkpoint


@pytest.mark.slow
def test_adapters_free_decoding_and_sampling_are_served_as_they_run_in_process(published: Path, tmp_path: Path) -> None:
    ours = published / "specialist.safetensors"
    checkpoint.convert(published / "specialist.pt", ours, SpecialistConfig.toy())
    adapters = [published / "adapter", published / "second"]
    generalist = load_generalist(
        "toy", checkpoint=published / "generalist", adapters=adapters, device="cpu", constrained=False
    )
    specialist = load_specialist(
        "toy", checkpoint=ours, device="cpu", strategy="letterbox", diffusion_steps=4, guidance_scale=1.5
    )
    settings = {
        "ROBODUAL_GENERALIST_ADAPTERS": ",".join(map(str, adapters)),
        "ROBODUAL_GENERALIST_CONSTRAINED": "false",
        "ROBODUAL_GENERALIST_ATTENTION": "sdpa",
        "ROBODUAL_SPECIALIST_IMAGE_STRATEGY": "letterbox",
        "ROBODUAL_SPECIALIST_DIFFUSION_STEPS": "4",
        "ROBODUAL_SPECIALIST_GUIDANCE_SCALE": "1.5",
    }
    with running(published, ours.name, **settings) as pair:
        assert_served_equals(pair, generalist, specialist)
        assert (
            dict(info(pair, "generalist").details).items()
            >= {
                "attention": "sdpa",
                "decoding": "free",
                "quantisation": "none",
                "adapters": "adapter, second",
                "image_resize_strategy": "resize-naive",
            }.items()
        )
        assert (
            dict(info(pair, "specialist").details).items()
            >= {
                "diffusion_steps": "4",
                "guidance_scale": "1.5",
                "image_resize_strategy": "letterbox",
            }.items()
        )
        found = inspect(published / "generalist", adapters=adapters)
        assert info(pair, "generalist").checkpoint == found.checkpoint == generalist.facts.checkpoint
        # Random weights break the layout when they decode freely, and each broken token is counted.
        counted = re.search(r"^robodual_malformed_tokens_total (\S+)", page(pair, "generalist", "/metrics"), re.M)
        assert counted
        assert float(counted[1]) > 0
