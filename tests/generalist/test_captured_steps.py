"""Which steps are captured, kept and replayed, with graphs that a CPU can replay (replay.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from replay import Cuda
from structlog.testing import capture_logs
from torch import Tensor

from robodual.generalist import service, stepping
from robodual.generalist.decoding import decode
from robodual.generalist.engine import GeneralistEngine, _captured, load_generalist
from robodual.generalist.processor import DevicePixels
from robodual.generalist.stepping import Stepper
from robodual.generalist.tokens import ROW

SHORT, LONG = "lift it", "push the sliding door to the left side, and mind the " + "very " * 20 + "red block"


@pytest.fixture(scope="module")
def engine() -> GeneralistEngine:
    return load_generalist("toy", device="cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def inputs(engine: GeneralistEngine, instructions: Sequence[str], seed: int) -> tuple[Tensor, list[Tensor]]:
    pixels = torch.randn((len(instructions), 6, 224, 224), generator=torch.Generator().manual_seed(seed))
    return pixels, [torch.tensor(engine.processor.prompt(instruction)) for instruction in instructions]


def agrees(
    engine: GeneralistEngine, stepper: Stepper, instructions: Sequence[str], seed: int, drafted: int = 0
) -> bool:
    """Whether the stepper gives the plain way's tokens and hidden states, with a draft in windows of `drafted` too."""
    given = engine.model, *inputs(engine, instructions, seed)
    plain = decode(*given, constrained=True, window=1)
    found = decode(*given, constrained=True, stepper=stepper)
    if drafted:
        draft = plain.tokens.clone()
        draft[:, 20::9] += 1
        arguments: dict[str, Any] = {"constrained": True, "drafts": draft, "window": drafted}
        found = decode(*given, **arguments, stepper=stepper)
        assert found.forwards == decode(*given, **arguments).forwards
    states = zip(found.hidden, plain.hidden, strict=True)
    return torch.equal(found.tokens, plain.tokens) and all(
        bool((mine - other).abs().max() <= 1e-5 * other.abs().max()) for mine, other in states
    )


def test_a_step_captured_at_one_place_is_right_at_every_other(engine: GeneralistEngine, cuda: Cuda) -> None:
    stepper = Stepper(engine.model, captures=True)
    for seed in range(3):
        assert agrees(engine, stepper, [SHORT, "open it"], seed)
        assert agrees(engine, stepper, [LONG], seed)
    assert cuda.captures == 2 * 3, "frames, prompts and steps, for each batch"
    assert cuda.graphs.replays == 6 * (2 + 56)


def test_prompts_of_different_lengths_are_read_without_a_graph(engine: GeneralistEngine, cuda: Cuda) -> None:
    stepper = Stepper(engine.model, captures=True)
    for seed in range(2):
        assert agrees(engine, stepper, [SHORT, LONG], seed)
        assert agrees(engine, stepper, [LONG, LONG], seed)
    assert cuda.captures == 1 + 1 + 1, "frames of both, prompts of the one, steps of both"


def test_prompts_that_cannot_be_captured_leave_the_steps_captured(
    engine: GeneralistEngine, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Stepper._read

    def looking(stepper: Stepper, state: Any, embeddings: Any, positions: Any, mask: Any) -> None:
        if embeddings.data_ptr() == state.prompts.data_ptr():
            raise RuntimeError("operation not permitted when stream is capturing")
        read(stepper, state, embeddings, positions, mask)

    monkeypatch.setattr(Stepper, "_read", looking)
    stepper = Stepper(engine.model, captures=True)
    with capture_logs() as logs:
        for seed in range(2):
            assert agrees(engine, stepper, [LONG], seed)
    assert [entry["event"] for entry in logs] == ["prompts are read without CUDA graphs"]
    assert (cuda.captures, stepper.captures) == (2, True)
    assert cuda.graphs.replays == 2 * 57


def test_prompts_with_flash_attention_2_are_never_captured(
    engine: GeneralistEngine, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its wrapper in Transformers looks at the positions of a batch of one."""
    with monkeypatch.context() as patch:
        patch.setattr(engine.model.language_model.config, "_attn_implementation", "flash_attention_2")
        stepper = Stepper(engine.model, captures=True)
    with capture_logs() as logs:
        assert agrees(engine, stepper, [LONG], seed=0)
    assert not logs
    assert cuda.captures == 2, "frames and steps"


def test_guesses_take_one_shape_and_the_same_forwards(engine: GeneralistEngine, cuda: Cuda) -> None:
    stepper = Stepper(engine.model, captures=True)
    for seed in range(4):
        given = engine.model, *inputs(engine, [SHORT], seed)
        plain = decode(*given, constrained=True, window=1)
        found = decode(*given, constrained=True, guessing=True, window=ROW, stepper=stepper)
        assert torch.equal(found.tokens, plain.tokens)
        assert found.forwards == decode(*given, constrained=True, guessing=True, window=ROW).forwards
    assert cuda.captures == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_guesses_change_no_bit_of_captured_steps(cuda: Cuda, dtype: str) -> None:
    """Steps of one shape round alike, so that in 16 bits too no token hangs on what was guessed."""
    engine = load_generalist("toy", device="cpu", dtype=dtype)
    stepper = Stepper(engine.model, captures=True)
    for seed in range(2):
        pixels, prompts = inputs(engine, [SHORT, LONG][: 1 + seed], seed)
        given = engine.model, pixels.to(engine.model.dtype), prompts
        ways: list[dict[str, Any]] = [{"window": 1}, {}, {"guessing": True, "window": ROW}]
        constrained = seed % 2 == 0
        one, separators, guessed = (decode(*given, constrained=constrained, stepper=stepper, **way) for way in ways)
        assert guessed.forwards <= one.forwards - 7 * constrained
        for other in (separators, guessed):
            assert torch.equal(other.tokens, one.tokens)
            assert all(map(torch.equal, other.hidden, one.hidden))


def test_drafts_take_few_shapes_and_the_same_forwards(engine: GeneralistEngine, cuda: Cuda) -> None:
    stepper = Stepper(engine.model, captures=True)
    for seed, window in enumerate([64, 3, 6, 64]):
        assert agrees(engine, stepper, [SHORT], seed, drafted=window)
    assert cuda.captures == 2 + 1 + 1, "frames and prompts, steps of a row and of a chunk"


def test_shapes_beyond_those_that_are_kept_run_without_a_graph(
    engine: GeneralistEngine, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "MOST", 1)
    stepper = Stepper(engine.model, captures=True)
    for seed in range(2):
        assert agrees(engine, stepper, [SHORT] * 2, seed)
        assert agrees(engine, stepper, [SHORT], seed)
    assert cuda.captures == 2 * 2 + 1, "frames and prompts of both, steps of the first"
    assert cuda.graphs.replays == 2 * (2 + 56 + 2)


def test_a_step_that_cannot_be_captured_runs_without_and_is_not_tried_again(
    engine: GeneralistEngine, cuda: Cuda
) -> None:
    cuda.capturable = False
    stepper = Stepper(engine.model, captures=True)
    with capture_logs() as logs:
        assert all(agrees(engine, stepper, [SHORT] * count, seed=count) for count in (1, 2))
    assert [entry["event"] for entry in logs] == [
        f"{what} without CUDA graphs" for what in ("frames are seen", "prompts are read", "decoding runs")
    ]
    assert (cuda.captures, cuda.graphs.replays) == (3, 0)
    assert not stepper.captures


def test_frames_that_travel_as_bytes_are_the_same_frames(
    engine: GeneralistEngine, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: values)
    random = np.random.default_rng(0)
    frames = [random.integers(0, 256, (side, 200, 3), dtype=np.uint8) for side in (200, 200, 84)]
    device = engine.model.device
    kinds = (torch.float32, torch.bfloat16)
    graphs = [_captured(DevicePixels(engine.processor.image, device, kind), device) for kind in kinds]
    other = GeneralistEngine(engine.model, engine.processor, engine.facts, constrained=True)
    for batch in (frames[:1], frames[:2], frames, frames[1:2]):
        for prepare in graphs:
            other._on_gpu = prepare
            found = other._pixels(batch)
            assert torch.equal(found, engine._pixels(batch).to(found.dtype))
    assert cuda.captures == 3 * len(graphs), "one frame and two, and one of another shape"


def test_a_larger_batch_moves_the_cache_and_its_graphs_are_captured_again(engine: GeneralistEngine, cuda: Cuda) -> None:
    stepper = Stepper(engine.model, captures=True)
    for count, captures in ((2, 3), (1, 6), (3, 9), (2, 11), (1, 13), (3, 13)):
        assert agrees(engine, stepper, [SHORT] * count, seed=count)
        assert cuda.captures == captures, "what sees frames keeps its graphs"
        assert len({state.keys.untyped_storage().data_ptr() for state in stepper._states.values()}) == 1


def test_without_memory_for_a_static_cache_decoding_takes_a_dynamic_one(
    engine: GeneralistEngine, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper = Stepper(engine.model, captures=True)
    assert agrees(engine, stepper, [SHORT], seed=0)
    replays, asked = cuda.graphs.replays, []
    assert replays == 2 + 56

    def full(tensor: Tensor, size: int) -> Any:
        asked.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(torch.Tensor, "new_zeros", full)
        assert all(agrees(engine, stepper, [SHORT] * count, seed=count) for count in (2, 2, 3))
        assert cuda.graphs.replays == replays + 3, "frames alone"
        assert agrees(engine, stepper, [SHORT], seed=1), "what has its memory keeps its graphs"
        assert cuda.graphs.replays == 2 * replays + 3
    assert [entry["event"] for entry in logs] == ["no memory for a static key-value cache of this size"]
    assert len(asked) == 1


def capturing(engine: GeneralistEngine) -> GeneralistEngine:
    stepper = Stepper(engine.model, captures=True)
    return GeneralistEngine(engine.model, engine.processor, engine.facts, constrained=True, stepper=stepper)


def test_a_service_that_has_warmed_up_captures_nothing_more_for_usual_prompts(
    engine: GeneralistEngine, cuda: Cuda
) -> None:
    own = capturing(engine)
    service._warm_up(own, 3)
    captures = cuda.captures
    assert captures == 3 * 3, "frames, prompts and steps of each size of a batch"
    for count in (1, 2, 3):
        given = [np.full((200, 200, 3), 7, np.uint8)] * count, ["warm up"] * count
        for mine, other in zip(own.think(*given), engine.think(*given), strict=True):
            np.testing.assert_array_equal(mine.reference_actions, other.reference_actions)
    assert cuda.captures == captures
    own.think([np.full((200, 200, 3), 7, np.uint8)], ["lift"])
    assert cuda.captures == captures + 1, "prompts of another length"


def test_a_batch_without_memory_does_not_keep_a_service_from_starting(
    engine: GeneralistEngine, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, most = capturing(engine), 2
    think = own.think

    def tight(frames: Sequence[Any], *arguments: Any) -> Any:
        if len(frames) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return think(frames, *arguments)

    monkeypatch.setattr(own, "think", tight)
    with capture_logs() as logs:
        service._warm_up(own, 3)
    assert [(entry["log_level"], entry["size"]) for entry in logs] == [("warning", 3)]
    assert cuda.captures == 2 * 3, "of batches of two and of one"
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        service._warm_up(own, 3)
