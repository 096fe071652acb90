"""The engine of the toy profile: batches, formats, seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robodual.generalist.decoding import Decoded, decode
from robodual.generalist.engine import GeneralistEngine, load_generalist

INSTRUCTIONS = ["push the sliding door to the left side", "lift it", "Turn on the LED", "rotate the red block, please"]


@pytest.fixture(scope="module")
def engine() -> GeneralistEngine:
    return load_generalist("toy", device="cpu")


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (side, 200, 3), dtype=np.uint8) for side in (200, 84, 200, 321)]


def decoded(engine: GeneralistEngine, frames: list[np.ndarray], instructions: list[str], constrained: bool) -> Decoded:
    prompts = [torch.tensor(engine.processor.prompt(instruction)) for instruction in instructions]
    return decode(engine.model, engine.processor.pixels(frames), prompts, constrained=constrained)


@pytest.mark.parametrize("constrained", [True, False])
def test_item_of_a_mixed_batch_equals_the_item_alone(
    engine: GeneralistEngine, frames: list[np.ndarray], constrained: bool
) -> None:
    batch = decoded(engine, frames, INSTRUCTIONS, constrained)
    for item, (frame, instruction) in enumerate(zip(frames, INSTRUCTIONS)):
        alone = decoded(engine, [frame], [instruction], constrained)
        assert batch.tokens[item].tolist() == alone.tokens[0].tolist()
        torch.testing.assert_close(batch.hidden[item], alone.hidden[0], rtol=0, atol=1e-4)


def test_thought_has_the_documented_shapes(engine: GeneralistEngine, frames: list[np.ndarray]) -> None:
    thought = engine.think(frames[:1], INSTRUCTIONS[:1])[0]
    assert thought.reference_actions.shape == (8, 7)
    assert thought.reference_actions.dtype == np.float32
    assert np.abs(thought.reference_actions).max() <= 1
    prompt = engine.processor.prompt(INSTRUCTIONS[0])
    assert thought.hidden_states.shape == (len(prompt) + 63, engine.width)
    assert thought.hidden_states.dtype == torch.bfloat16
    assert thought.malformed_tokens == 0


def test_speculation_saves_forwards_and_changes_nothing(engine: GeneralistEngine, frames: list[np.ndarray]) -> None:
    single = load_generalist("toy", device="cpu", speculation=False)
    assert (engine.facts.details["speculation"], single.facts.details["speculation"]) == ("on", "off")
    (plain,), (guessed,) = single.think(frames[:1], INSTRUCTIONS[:1]), engine.think(frames[:1], INSTRUCTIONS[:1])
    np.testing.assert_array_equal(guessed.reference_actions, plain.reference_actions)
    torch.testing.assert_close(guessed.hidden_states, plain.hidden_states, rtol=0, atol=1e-2)
    assert guessed.forwards < plain.forwards == 57
    # The same frame gives the same record, bit for bit, whatever was asked before.
    engine.think(frames[1:3], INSTRUCTIONS[1:3])
    (again,) = engine.think(frames[:1], INSTRUCTIONS[:1])
    assert torch.equal(again.hidden_states, guessed.hidden_states)


def test_actions_depend_on_frame_and_instruction(engine: GeneralistEngine, frames: list[np.ndarray]) -> None:
    same, other_frame, other_words = engine.think([frames[0], frames[1], frames[0]], ["a", "a", "open the drawer"])
    assert not np.array_equal(same.reference_actions, other_frame.reference_actions)
    assert not np.array_equal(same.reference_actions, other_words.reference_actions)


def test_free_decoding_of_random_weights_counts_malformed_tokens_and_never_fails(frames: list[np.ndarray]) -> None:
    engine = load_generalist("toy", device="cpu", constrained=False)
    thought = engine.think(frames[:1], INSTRUCTIONS[:1])[0]
    assert thought.malformed_tokens > 0
    assert np.abs(thought.reference_actions).max() <= 1


def test_weights_follow_from_the_seed_alone(engine: GeneralistEngine) -> None:
    assert load_generalist("toy", device="cpu").facts == engine.facts
    assert load_generalist("toy", device="cpu", seed=1).facts.checkpoint != engine.facts.checkpoint
    # Computed once: another machine or generator must give the same.
    weight = engine.model.language_model.lm_head.weight
    assert weight[0, :3].tolist() == pytest.approx([-0.006398, 0.096502, -0.057048], abs=1e-5)


def test_batch_of_unequal_lengths_is_refused(engine: GeneralistEngine, frames: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="instructions: expected 2"):
        engine.think(frames[:2], ["lift it"])


def test_frame_of_another_type_is_refused_by_name(engine: GeneralistEngine) -> None:
    with pytest.raises(ValueError, match=r"rgb_static: expected uint8 \[H, W, 3\], got float32 \[8, 8, 3\]"):
        engine.think([np.zeros((8, 8, 3), np.float32)], ["lift it"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device: expected auto, cpu"),
        ({"dtype": "int4"}, "dtype: expected auto or one of"),
        ({"attention": "flash_attention_2", "device": "cpu"}, "attention: flash_attention_2 needs"),
        ({"attention": "fast"}, "attention: expected one of"),
        ({"quantisation": "nf4", "device": "cpu"}, "quantisation: nf4 needs a CUDA device, not cpu"),
        ({"quantisation": "int2"}, "quantisation: expected one of"),
        ({"device": "cuda:97"}, "device: cuda:97 is not there"),
    ],
)
def test_unusable_argument_is_refused_by_name(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_generalist("toy", **arguments)


def test_prompts_of_one_length_are_embedded_as_those_of_several(engine: GeneralistEngine) -> None:
    model = engine.model
    prompts = [torch.tensor(engine.processor.prompt(words)) for words in ("lift it", "push it", "turn it on")]
    prompts[1] = prompts[1][: len(prompts[0])]
    images = torch.randn(3, 5, model.config.language.width)
    together, every = model.embed(images[:2], prompts[:2])
    padded, mask = model.embed(images, prompts)
    assert torch.equal(padded[:2][mask[:2]], together.flatten(0, 1))
    assert every.all()
    assert every.shape == together.shape[:2]
