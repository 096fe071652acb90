"""The engine gives the plain path's answers, whatever it shares between steps and requests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from robodual.facts import EngineFacts
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.control import noise
from robodual.specialist.engine import Answer, Features, Frame, Request, SpecialistEngine, load_specialist
from robodual.specialist.policy import Policy

FACTS = EngineFacts("test", "", "cpu", "float32", 0, 0)
SENSORS = {
    "colour": SpecialistConfig.toy(),
    "all": replace(SpecialistConfig.toy(), with_tactile=True),
    "depth": replace(SpecialistConfig.toy(), with_gripper=False),
    "colour only": replace(SpecialistConfig.toy(), with_gripper=False, with_depth=False),
    "unguided": replace(SpecialistConfig.toy(), guidance_scale=1.0, diffusion_steps=3),
}


def frame(seed: int, static: int = 200, gripper: int = 84) -> Frame:
    random = np.random.default_rng(seed)

    def colour(*shape: int) -> np.ndarray:
        return random.integers(0, 256, shape, dtype=np.uint8)

    return Frame(
        rgb_static=colour(static, static, 3),
        rgb_gripper=colour(gripper, gripper, 3),
        depth_static=random.uniform(3.5, 6.2, (static, static)).astype(np.float32),
        depth_gripper=random.uniform(0, 2, (gripper, gripper)).astype(np.float32),
        rgb_tactile=colour(160, 120, 6),
        proprio=random.normal(size=7).astype(np.float32),
    )


def hidden_states(seed: int, length: int, width: int) -> torch.Tensor:
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed))


def request(engine: SpecialistEngine, seed: int, length: int, previous: Features | np.ndarray | None = None) -> Request:
    return Request(
        frame=frame(seed),
        previous=previous,
        conditioning=engine.project(hidden_states(seed, length, engine.width)),
        reference_actions=np.random.default_rng(seed).uniform(-1, 1, (8, 7)).astype(np.float32),
        noise=noise(seed, 0, 0),
    )


def plain(engine: SpecialistEngine, seed: int, length: int, previous: np.ndarray) -> np.ndarray:
    """What the published path answers to `request(engine, seed, length, ...)`."""
    given = request(engine, seed, length)
    chunk = engine.policy.sample(
        engine.preparation.observation(given.frame, previous),
        torch.from_numpy(given.reference_actions)[None],
        hidden_states(seed, length, engine.width)[None],
        torch.tensor(given.noise)[None],
    )
    return chunk[0].numpy()


def distance(answer: Answer, expected: np.ndarray) -> float:
    return float(np.abs(answer.chunk - expected).max())


@pytest.fixture(scope="module")
def engine() -> SpecialistEngine:
    return load_specialist("toy", device="cpu", seed=1)


@pytest.mark.parametrize("config", SENSORS.values(), ids=SENSORS.keys())
def test_fast_path_agrees_with_the_plain_one(config: SpecialistConfig) -> None:
    engine = SpecialistEngine(Policy(config).initialize(3), FACTS)
    [first] = engine.act([request(engine, 1, 40)])
    assert first.chunk.shape == (8, 7)
    assert first.chunk.dtype == np.float32
    assert distance(first, plain(engine, 1, 40, previous=frame(1).rgb_static)) < 1e-4
    [second] = engine.act([request(engine, 2, 33, previous=first.features)])
    assert distance(second, plain(engine, 2, 33, previous=frame(1).rgb_static)) < 1e-4


def test_previous_frame_and_its_features_are_the_same_to_the_engine(engine: SpecialistEngine) -> None:
    [before] = engine.act([request(engine, 1, 20)])
    [kept] = engine.act([request(engine, 2, 20, previous=before.features)])
    [replayed] = engine.act([request(engine, 2, 20, previous=frame(1).rgb_static)])
    assert distance(replayed, kept.chunk) < 1e-5
    [without] = engine.act([request(engine, 2, 20)])
    assert distance(without, kept.chunk) > 1e-4


def test_answers_do_not_depend_on_the_rest_of_the_batch(engine: SpecialistEngine) -> None:
    features = engine.act([request(engine, 9, 12)])[0].features
    requests = [
        request(engine, 1, 30),
        request(engine, 2, 75, previous=features),
        request(engine, 3, 1, previous=frame(8).rgb_static),
        request(engine, 4, 75, previous=frame(7).rgb_static),
        request(engine, 5, 30, previous=features),
        replace(request(engine, 6, 30), frame=frame(6, static=120, gripper=50)),
    ]
    for batch in (requests, requests[::-1], requests[1:4]):
        for given, answer in zip(batch, engine.act(batch)):
            [alone] = engine.act([given])
            assert distance(answer, alone.chunk) < 1e-5
            torch.testing.assert_close(answer.features.latents, alone.features.latents, atol=1e-5, rtol=0)


def test_an_act_is_reproducible_bit_for_bit(engine: SpecialistEngine) -> None:
    given = request(engine, 1, 30)
    assert engine.act([given])[0].chunk.tobytes() == engine.act([given])[0].chunk.tobytes()
    again = load_specialist("toy", device="cpu", seed=1)
    assert again.act([given])[0].chunk.tobytes() == engine.act([given])[0].chunk.tobytes()
    assert again.facts.checkpoint == engine.facts.checkpoint
    assert load_specialist("toy", device="cpu", seed=2).facts.checkpoint != engine.facts.checkpoint


def test_every_sensor_changes_the_answer() -> None:
    engine = SpecialistEngine(Policy(SENSORS["all"]).initialize(3), FACTS)
    given = request(engine, 1, 30)
    [answer] = engine.act([given])
    other = frame(2)
    for name in engine.sensors:
        changed = replace(given, frame=replace(given.frame, **{name: getattr(other, name)}))
        assert distance(engine.act([changed])[0], answer.chunk) > 1e-4, name


def test_unread_sensors_may_be_missing_and_read_ones_are_named(engine: SpecialistEngine) -> None:
    given = request(engine, 1, 30)
    engine.act([replace(given, frame=replace(given.frame, rgb_tactile=None))])
    for name in ("rgb_gripper", "depth_static", "depth_gripper"):
        with pytest.raises(ValueError, match=name):
            engine.act([replace(given, frame=replace(given.frame, **{name: None}))])


def test_read_only_views_of_a_message_are_accepted(engine: SpecialistEngine) -> None:
    given = request(engine, 1, 30)
    views = {
        name: np.frombuffer(value.tobytes(), value.dtype).reshape(value.shape) for name, value in vars(frame(1)).items()
    }
    viewed = replace(given, frame=Frame(**views), previous=views["rgb_static"])
    assert distance(engine.act([viewed])[0], engine.act([given])[0].chunk) < 1e-5


def test_conditioning_of_another_width_is_refused(engine: SpecialistEngine) -> None:
    for shape in ((10, engine.width + 1), (1, 10, engine.width), (0, engine.width)):
        with pytest.raises(ValueError, match="hidden_states"):
            engine.project(torch.zeros(shape))


def test_features_keep_no_batch_alive(engine: SpecialistEngine) -> None:
    answers = engine.act([request(engine, seed, 10) for seed in range(4)])
    for answer in answers:
        latents = answer.features.latents
        assert latents.untyped_storage().nbytes() == latents.numel() * latents.element_size()


@pytest.mark.parametrize(
    ("arguments", "name"), [({"profile": "toys"}, "profile"), ({"profile": "toy", "dtype": "float16"}, "dtype")]
)
def test_unknown_names_are_refused(arguments: dict[str, str], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        load_specialist(**arguments)


def test_bfloat16_stays_near_float32() -> None:
    exact = load_specialist("toy", device="cpu", seed=1)
    short = load_specialist("toy", device="cpu", dtype="bfloat16", seed=1)
    [answer] = exact.act([request(exact, 1, 30)])
    assert distance(short.act([request(short, 1, 30)])[0], answer.chunk) < 0.02
    # The encoders alone: guidance and ten steps would make far more of the denoiser's rounding.
    assert {name.split(".")[0] for name, value in short.policy.named_parameters() if value.dtype == torch.float32} == {
        "model"
    }
    assert short.facts.dtype == "bfloat16"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextmanager
def no_waiting() -> Iterator[None]:
    """What waits for the device raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_step_waits_for_the_device_only_for_its_answer() -> None:
    captured = load_specialist("toy", device="cuda", seed=1)
    requests = [request(captured, seed, 20 * seed) for seed in (1, 2, 3)]
    first, *_ = captured.act(requests)  # captured here, which does wait
    requests[0] = replace(requests[0], previous=first.features)
    requests[1] = replace(requests[1], previous=frame(9).rgb_static)
    expected = captured.act(requests)
    with torch.inference_mode(), no_waiting():
        assert captured._captured is not None
        found = captured._captured(requests, captured._previous(requests))
        assert found is not None
        chunks, _ = found
        with pytest.raises(RuntimeError, match="synchronizing"):
            chunks.cpu()
    for chunk, answer in zip(chunks.cpu().numpy(), expected, strict=True):
        assert np.abs(chunk - answer.chunk).max() < 1e-5


@needs_gpu
def test_engines_on_several_devices_capture_side_by_side(engine: SpecialistEngine) -> None:
    """The second engine is on another device where there is one; its thread's current device is the first."""
    devices = [f"cuda:{number % torch.cuda.device_count()}" for number in range(2)]
    engines = [load_specialist("toy", device=device, seed=1) for device in devices]

    def run(captured: SpecialistEngine) -> list[Answer]:
        return [captured.act([request(captured, seed, 20)] * size)[0] for size in range(1, 5) for seed in range(1, 4)]

    with ThreadPoolExecutor(len(engines)) as threads:
        found = list(threads.map(run, engines))
    expected = run(engine)
    for answers in found:
        for answer, one in zip(answers, expected, strict=True):
            assert distance(answer, one.chunk) < 1e-3


@needs_gpu
def test_captured_steps_agree_with_the_cpu(engine: SpecialistEngine) -> None:
    captured = load_specialist("toy", device="cuda", seed=1)
    for batch in ([1], [2], [1, 2, 3], [3, 1, 2]):
        requests = [request(captured, seed, 20 * seed) for seed in batch]
        for seed, answer in zip(batch, captured.act(requests)):
            assert distance(answer, engine.act([request(engine, seed, 20 * seed)])[0].chunk) < 1e-3
