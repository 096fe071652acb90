"""Decoding: constrained against free, speculation against one token a forward."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from robodual.generalist.decoding import Decoded, decode
from robodual.generalist.engine import GeneralistEngine, load_generalist
from robodual.generalist.model import build, place_rotary
from robodual.generalist.tokens import GENERATED, decode_actions, encode_actions

PLAIN = GENERATED  # forwards of one token each: the prefill gives the first of 64
FORCED = 57  # without those of the seven separators


@pytest.fixture(scope="module")
def engine() -> GeneralistEngine:
    return load_generalist("toy", device="cpu")


def inputs(engine: GeneralistEngine, count: int, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Random pixels, and prompts of random words and lengths."""
    generator = np.random.default_rng(seed)
    words = ["push", "the", "red", "block", "lift", "drawer", "open", "left", "turn", "on", "led", "slider"]
    sentences = [" ".join(generator.choice(words, generator.integers(1, 9))) for _ in range(count)]
    pixels = torch.from_numpy(generator.standard_normal((count, 6, 224, 224), dtype=np.float32))
    return pixels, [torch.tensor(engine.processor.prompt(sentence)) for sentence in sentences]


def same(ours: Decoded, theirs: Decoded) -> None:
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    for mine, other in zip(ours.hidden, theirs.hidden):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_speculation_never_changes_a_token_on_200_random_prompts_and_images(engine: GeneralistEngine) -> None:
    generator = torch.Generator().manual_seed(0)
    for batch in range(25):
        constrained = batch % 2 == 0
        pixels, prompts = inputs(engine, 8, seed=batch)
        plain = decode(engine.model, pixels, prompts, constrained=constrained, window=1)
        assert plain.forwards == PLAIN
        noise = torch.rand(plain.tokens.shape, generator=generator) < 0.05 * (batch % 4)
        drafts = torch.where(noise, torch.randint(580, plain.tokens.shape, generator=generator), plain.tokens)
        drafted = decode(engine.model, pixels, prompts, constrained=constrained, drafts=drafts)
        same(drafted, plain)
        if batch % 5 == 0:
            same(decode(engine.model, pixels, prompts, constrained=constrained), plain)
        if batch % 4 == 0:  # everything guessed right
            assert drafted.forwards == 2


def test_separators_and_end_cost_no_forward_of_their_own(engine: GeneralistEngine) -> None:
    pixels, prompts = inputs(engine, 1, seed=0)
    assert decode(engine.model, pixels, prompts, constrained=True).forwards == FORCED


def test_constrained_decoding_reads_nothing_back_before_its_last_token(engine: GeneralistEngine) -> None:
    """The meta device has no values: .item(), .cpu() or a branch on a tensor raises."""
    meta = torch.device("meta")
    model = build(engine.model.config, attention="sdpa", dtype=torch.float32)
    place_rotary(model, meta)
    prompts = [torch.empty(9, dtype=torch.int64, device=meta)] * 2
    decoded = decode(model, torch.empty((2, 6, 224, 224), device=meta), prompts, constrained=True)
    assert decoded.tokens.shape == (2, GENERATED)
    assert decoded.forwards == FORCED


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_constrained_decoding_waits_for_the_device_only_for_its_answer() -> None:
    engine = load_generalist("toy", device="cuda", attention="sdpa", dtype="float32")
    pixels, (prompt, *_) = inputs(engine, 2, seed=0)
    given = pixels.cuda(), [prompt.cuda()] * 2
    expected = decode(engine.model, *given, constrained=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = decode(engine.model, *given, constrained=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(found, expected)


def test_small_window_checks_drafts_too(engine: GeneralistEngine) -> None:
    pixels, prompts = inputs(engine, 2, seed=3)
    plain = decode(engine.model, pixels, prompts, constrained=True, window=1)
    wrong = torch.full_like(plain.tokens, 300)
    same(decode(engine.model, pixels, prompts, constrained=True, drafts=wrong, window=2), plain)


@pytest.fixture(scope="module")
def taught() -> tuple[GeneralistEngine, np.ndarray, np.ndarray]:
    """An engine whose Llama has learnt one frame's chunk by heart, so that it emits the layout by itself."""
    engine = load_generalist("toy", device="cpu", constrained=False)
    generator = np.random.default_rng(0)
    frame = generator.integers(0, 256, (200, 200, 3), dtype=np.uint8)
    actions = generator.uniform(-1, 1, (8, 7))
    target = torch.from_numpy(encode_actions(actions, engine.model.config.tokens))
    llama = engine.model.language_model
    parameters = [parameter.requires_grad_() for parameter in llama.parameters()]
    prompt = torch.tensor(engine.processor.prompt("lift it"))
    with torch.no_grad():
        embeddings, _ = engine.model.embed(engine.model.see(engine.processor.pixels([frame])), [prompt])
    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(150):
        words = llama.get_input_embeddings()(target[None, :-1])
        logits = llama(inputs_embeds=torch.cat([embeddings, words], dim=1), logits_to_keep=GENERATED).logits
        loss = F.cross_entropy(logits[0], target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss < 0.02:
            break
    engine.model.requires_grad_(False)
    return engine, frame, actions


def test_model_that_keeps_the_layout_gives_the_same_free_and_constrained(
    taught: tuple[GeneralistEngine, np.ndarray, np.ndarray],
) -> None:
    engine, frame, actions = taught
    pixels, prompts = engine.processor.pixels([frame]), [torch.tensor(engine.processor.prompt("lift it"))]
    free = decode(engine.model, pixels, prompts, constrained=False)
    decoded, malformed = decode_actions(free.tokens[0].numpy(), engine.model.config.tokens)
    assert malformed == 0
    np.testing.assert_allclose(decoded, actions, atol=0.004)
    assert free.forwards == FORCED
    same(decode(engine.model, pixels, prompts, constrained=True), free)
    same(decode(engine.model, pixels, prompts, constrained=False, window=1), free)


def test_constrained_tokens_equal_the_free_ones_up_to_the_first_break(engine: GeneralistEngine) -> None:
    tokens = engine.model.config.tokens
    pixels, prompts = inputs(engine, 16, seed=7)
    free = decode(engine.model, pixels, prompts, constrained=False).tokens
    constrained = decode(engine.model, pixels, prompts, constrained=True).tokens
    lengths = []
    for mine, theirs in zip(free.tolist(), constrained.tolist()):
        broken = [place for place, token in enumerate(mine) if not tokens.action_start <= token < tokens.action_end]
        lengths.append(min(broken[0], 7))
        assert mine[: lengths[-1]] == theirs[: lengths[-1]]
    assert max(lengths) > 1


def test_draft_chunk_saves_forwards_and_keeps_the_answer(
    taught: tuple[GeneralistEngine, np.ndarray, np.ndarray],
) -> None:
    engine, frame, actions = taught
    plain = engine.think([frame, frame], ["lift it", "push"])
    drafted = engine.think([frame, frame], ["lift it", "push"], [actions, None])
    for mine, theirs in zip(drafted, plain):
        np.testing.assert_array_equal(mine.reference_actions, theirs.reference_actions)
    with pytest.raises(ValueError, match="drafts: expected 2"):
        engine.think([frame, frame], ["lift it", "push"], [actions])
