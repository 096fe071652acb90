"""Static steps against the plain way, a dynamic cache that grows with every token."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robodual.generalist.adapters import Adapted
from robodual.generalist.config import GeneralistConfig
from robodual.generalist.decoding import Decoded, decode
from robodual.generalist.engine import GeneralistEngine, load_generalist
from robodual.generalist.model import Generalist, build, place_rotary, randomise
from robodual.generalist.quantisation import quantisable, quantise
from robodual.generalist.stepping import SLOTS, Stepper, suits
from robodual.generalist.tokens import GENERATED, ROW
from robodual.profiles import shipped
from robodual_client.calvin.annotations import load
from robodual_client.calvin.sequences import published
from robodual_client.playtable.environment import PlayTable

CPU = torch.device("cpu")
SHORT, LONG = "lift it", "push the sliding door to the left side, and mind the " + "very " * 20 + "red block"
BATCHES = {"one": [LONG], "alike": [SHORT] * 3, "different lengths": ["open the drawer", LONG, SHORT]}


@pytest.fixture(scope="module")
def engine() -> GeneralistEngine:
    return load_generalist("toy", device="cpu")


def inputs(engine: GeneralistEngine, instructions: list[str], seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    pixels = torch.randn((len(instructions), 6, 224, 224), generator=torch.Generator().manual_seed(seed))
    return pixels, [torch.tensor(engine.processor.prompt(instruction)) for instruction in instructions]


def same(ours: Decoded, theirs: Decoded) -> None:
    """Tokens identical; hidden states within float32's rounding."""
    assert torch.equal(ours.tokens, theirs.tokens)
    for mine, other in zip(ours.hidden, theirs.hidden, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


def drafts(tokens: Tensor, share: float, vocabulary: int) -> Tensor:
    """`tokens` of which that share has become other ones."""
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(tokens.shape, generator=generator) < share
    return torch.where(wrong, (tokens + 1 + torch.randint(7, tokens.shape, generator=generator)) % vocabulary, tokens)


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_static_steps_give_the_plain_tokens_and_states(engine: GeneralistEngine, batch: str, constrained: bool) -> None:
    pixels, prompts = inputs(engine, BATCHES[batch])
    stepper = Stepper(engine.model)
    plain = decode(engine.model, pixels, prompts, constrained=constrained, window=1)
    for window in (1, GENERATED):
        found = decode(engine.model, pixels, prompts, constrained=constrained, window=window, stepper=stepper)
        same(found, plain)
        assert found.forwards == decode(engine.model, pixels, prompts, constrained=constrained, window=window).forwards


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("window", [4, GENERATED])
def test_drafts_right_and_wrong_cost_no_more_forwards_than_with_a_dynamic_cache(
    engine: GeneralistEngine, batch: str, constrained: bool, share: float, window: int
) -> None:
    pixels, prompts = inputs(engine, BATCHES[batch], seed=1)
    plain = decode(engine.model, pixels, prompts, constrained=constrained, window=1)
    draft = drafts(plain.tokens, share, engine.model.config.language.vocabulary)
    dynamic = decode(engine.model, pixels, prompts, constrained=constrained, drafts=draft, window=window)
    found = decode(
        engine.model,
        pixels,
        prompts,
        constrained=constrained,
        drafts=draft,
        window=window,
        stepper=Stepper(engine.model),
    )
    same(found, plain)
    # With a dynamic cache the sequences of a batch go on from the place of the last.
    assert found.forwards == dynamic.forwards if batch == "one" else found.forwards <= dynamic.forwards
    if constrained and window == GENERATED and not share:  # free, the separators that it does not say are wrong guesses
        assert found.forwards == 2


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("window", [2, ROW, 2 * ROW, GENERATED])
def test_guesses_cost_no_more_forwards_than_with_a_dynamic_cache(
    engine: GeneralistEngine, batch: str, constrained: bool, window: int
) -> None:
    given = engine.model, *inputs(engine, BATCHES[batch], seed=7)
    plain = decode(*given, constrained=constrained, window=1)
    dynamic = decode(*given, constrained=constrained, guessing=True, window=window)
    found = decode(*given, constrained=constrained, guessing=True, window=window, stepper=Stepper(engine.model))
    same(dynamic, plain)
    same(found, plain)
    assert found.forwards <= dynamic.forwards <= plain.forwards
    if batch == "one":
        assert found.forwards == dynamic.forwards


def test_a_sequence_of_a_batch_does_not_wait_for_another(engine: GeneralistEngine) -> None:
    pixels, prompts = inputs(engine, [SHORT] * 2, seed=8)
    plain = decode(engine.model, pixels, prompts, constrained=True, window=1)
    draft = plain.tokens.clone()
    draft[0, 3:30:3] += 1
    draft[1, 33:60:3] += 1
    arguments = {"constrained": True, "drafts": draft, "stepper": Stepper(engine.model)}
    both = decode(engine.model, pixels, prompts, **arguments)
    same(both, plain)
    single = [
        decode(engine.model, pixels[n : n + 1], prompts[:1], **{**arguments, "drafts": draft[n : n + 1]}).forwards
        for n in range(2)
    ]
    assert both.forwards == max(single) < sum(single) - 4


def test_the_shipped_model_takes_about_a_fifth_of_the_forwards() -> None:
    """Of frames of the playtable: a row is like the one before, and most of what follows a wrong guess is right."""
    engine = load_generalist("playtable", checkpoint=shipped("playtable", "generalist"), device="cpu")
    forwards = []
    for sequence in published()[:12]:
        env = PlayTable()
        robot_obs, scene_obs = sequence.observations()
        frame = env.reset(robot_obs=robot_obs, scene_obs=scene_obs)["rgb_obs"]["rgb_static"]
        env.close()
        pixels = engine.processor.pixels([frame])
        given = engine.model, pixels, [torch.tensor(engine.processor.prompt(load()[sequence.tasks[0]]))]
        plain = decode(*given, constrained=engine.constrained, window=1)
        found = decode(*given, constrained=engine.constrained, guessing=True, window=ROW, stepper=engine.stepper)
        same(found, plain)
        forwards.append(found.forwards)
    assert np.mean(forwards) < GENERATED / 4, forwards


def test_a_shorter_prompt_after_a_longer_one_reads_nothing_of_it(engine: GeneralistEngine) -> None:
    """Also if that left no numbers behind: what is masked is multiplied by 0, and 0 times NaN is NaN."""
    stepper = Stepper(engine.model)
    lengths = set()
    for instructions in ([LONG] * 2, [SHORT] * 2, [LONG], [SHORT], [SHORT, LONG]):
        pixels, prompts = inputs(engine, instructions, seed=2)
        broken = decode(engine.model, pixels * torch.nan, prompts, constrained=True, stepper=stepper)
        assert broken.hidden[0].isnan().any()
        short, words = inputs(engine, [SHORT] * len(instructions), seed=3)
        for given in ((pixels, prompts), (short, words)):
            found = decode(engine.model, *given, constrained=True, stepper=stepper)
            same(found, decode(engine.model, *given, constrained=True, window=1))
        lengths.add(len(prompts[0]) // SLOTS)
    assert len(lengths) > 1, "the prompts are of one shape"


def test_an_answer_stays_what_it_was_when_the_buffers_are_used_again(engine: GeneralistEngine) -> None:
    stepper = Stepper(engine.model)
    first = decode(engine.model, *inputs(engine, [SHORT], seed=4), constrained=True, stepper=stepper)
    copy = Decoded(first.tokens.clone(), [states.clone() for states in first.hidden], first.forwards)
    second = decode(engine.model, *inputs(engine, [SHORT], seed=5), constrained=True, stepper=stepper)
    assert not torch.equal(second.tokens, first.tokens)
    same(first, copy)


def other_model(kind: str) -> Generalist:
    config = GeneralistConfig.toy()
    if kind == "shared keys and values":
        config = replace(config, language=replace(config.language, key_value_heads=2))
    model = build(config, attention="sdpa", dtype=torch.float32)
    randomise(model, CPU, seed=0)
    if kind == "fp8":
        quantise(model, quantisable(model), "fp8", CPU)
    if kind == "adapted":
        for layer in model.language_model.model.layers:
            for place in ("q_proj", "v_proj"):
                adapted = Adapted(layer.self_attn.get_submodule(place))
                adapted.low.append(nn.Parameter(torch.randn(4, config.language.width) / 8, requires_grad=False))
                adapted.high.append(nn.Parameter(torch.randn(config.language.width, 4), requires_grad=False))
                layer.self_attn.set_submodule(place, adapted)
    return model


@pytest.mark.parametrize("kind", ["fp8", "adapted", "shared keys and values"])
def test_static_steps_take_the_layers_as_they_are(engine: GeneralistEngine, kind: str) -> None:
    model = other_model(kind)
    pixels, prompts = inputs(engine, BATCHES["different lengths"], seed=6)
    plain = decode(model, pixels, prompts, constrained=False, window=1)
    assert not torch.equal(plain.tokens, decode(engine.model, pixels, prompts, constrained=False, window=1).tokens)
    stepper = Stepper(model)
    same(decode(model, pixels, prompts, constrained=False, stepper=stepper), plain)
    draft = drafts(plain.tokens, 0.1, model.config.language.vocabulary)
    same(decode(model, pixels, prompts, constrained=False, drafts=draft, stepper=stepper), plain)


def test_static_constrained_decoding_reads_nothing_back_before_its_last_token(engine: GeneralistEngine) -> None:
    """The meta device has no values: .item(), .cpu() or a branch on a tensor raises."""
    meta = torch.device("meta")
    model = build(engine.model.config, attention="sdpa", dtype=torch.float32)
    place_rotary(model, meta)
    prompts = [torch.empty(9, dtype=torch.int64, device=meta)] * 2
    given = model, torch.empty((2, 6, 224, 224), device=meta), prompts
    decoded = decode(*given, constrained=True, stepper=Stepper(model))
    assert decoded.tokens.shape == (2, GENERATED)
    assert [states.shape for states in decoded.hidden] == [(9 + 63, model.config.language.width)] * 2
    assert decoded.forwards == 57
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        decode(*given, constrained=False, stepper=Stepper(model))  # free, it must look at each separator


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("constrained", [True, False])
def test_a_gpu_replays_its_steps_and_gives_the_plain_tokens(constrained: bool) -> None:
    engine = load_generalist("toy", device="cuda", attention="sdpa", dtype="float32", constrained=constrained)
    assert engine.captures
    assert engine.facts.details["execution"] == "CUDA graphs"
    stepper, model = engine.stepper, engine.model
    assert stepper is not None
    for seed, batch in enumerate([*BATCHES.values(), *BATCHES.values()]):
        pixels, prompts = inputs(engine, batch, seed=seed)
        given = pixels.cuda(), [prompt.cuda() for prompt in prompts]
        plain = decode(model, *given, constrained=constrained, window=1)
        draft = drafts(plain.tokens.cpu(), 0.1, model.config.language.vocabulary).cuda()
        for way in ({}, {"drafts": draft}, {"guessing": True, "window": ROW}):
            found = decode(model, *given, constrained=constrained, **way, stepper=stepper)
            assert torch.equal(found.tokens, plain.tokens)
            for mine, other in zip(found.hidden, plain.hidden, strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-3)
    assert stepper.captures, "a capture has failed"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_static_steps_wait_for_the_device_only_for_their_answer() -> None:
    engine = load_generalist("toy", device="cuda", attention="sdpa", dtype="float32")
    pixels, (prompt, *_) = inputs(engine, [SHORT] * 2)
    given = pixels.cuda(), [prompt.cuda()] * 2
    expected = decode(engine.model, *given, constrained=True, stepper=engine.stepper)  # captures
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = decode(engine.model, *given, constrained=True, stepper=engine.stepper)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.tokens, expected.tokens)


def test_an_engine_takes_static_steps_unless_attention_is_to_be_eager(engine: GeneralistEngine) -> None:
    eager = load_generalist("toy", device="cpu", attention="eager")
    assert (engine.stepper is None, eager.stepper is None) == (False, True)
    assert engine.facts.details["execution"] == "static cache"
    assert eager.facts.details["execution"] == "dynamic cache"
    assert not engine.captures
    frame = np.full((200, 200, 3), 7, np.uint8)
    mine, other = engine.think([frame], [SHORT])[0], eager.think([frame], [SHORT])[0]
    np.testing.assert_array_equal(mine.reference_actions, other.reference_actions)


def test_layers_that_look_at_values_keep_the_plain_way() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = other_model("fp8")
    assert suits(model)
    mlp = model.language_model.model.layers[-1].mlp
    mlp.set_submodule("down_proj", bitsandbytes.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False))
    assert not suits(model)
