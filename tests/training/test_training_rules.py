"""Moving average, learning rate, starting weights and the generalist's forward pass are the published ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import TINY, data
from torch import Tensor

from robodual.generalist.decoding import decode
from robodual.generalist.engine import load_generalist
from robodual.specialist.config import SpecialistConfig
from robodual.specialist.policy import Observation, Policy
from robodual.training.average import Average, decay
from robodual.training.conditioner import Conditioner
from robodual.training.prompting import Prompts, best_tokens, force
from robodual.training.schedule import Schedule
from robodual.training.specialist import cut
from robodual.training.starting_weights import starting_policy
from robodual.training.window import Window

assert data  # the tiny profile is registered by importing its module


def test_the_average_is_ema_pytorchs() -> None:
    """ema_pytorch.EMA(power=0.75, beta=0.9999, update_every=1), stated again as its update() reads."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters: dict[str, Tensor] = {"w": torch.zeros((), dtype=torch.float64)}
    average = Average(parameters)
    expected, update_after_step, step = 0.0, 100, 0
    for number, value in enumerate(values, start=1):
        parameters["w"] = value
        average.update(parameters, number)
        before, step = step, step + 1
        if before <= update_after_step:
            expected = value.item()
        else:
            epoch = max(step - update_after_step - 1, 0)
            kept = 0.0 if epoch <= 0 else min(1 - (1 + epoch) ** -0.75, 0.9999)
            expected += (1 - kept) * (value.item() - expected)
        assert average.values["w"].item() == pytest.approx(expected, abs=1e-12)
    assert decay(10_101) == pytest.approx(0.999, abs=1e-4)
    assert decay(10**7) == 0.9999


def test_the_learning_rate_warms_up_and_follows_part_of_a_cosine() -> None:
    rate = Schedule(1e-4, steps=100_000, warmup=1000, cycles=0.4)
    assert [rate(0), rate(500), rate(1000)] == pytest.approx([0, 5e-5, 1e-4])
    half = 0.5 * (1 + math.cos(math.pi * 0.4 * 2 * 0.5))
    assert rate(50_500) == pytest.approx(1e-4 * half)
    assert rate(100_000) == pytest.approx(1e-4 * 0.5 * (1 + math.cos(0.8 * math.pi)))
    assert {Schedule(2e-5, 10)(step) for step in range(10)} == {2e-5}


def test_the_reference_of_a_batch_is_cut_as_each_window_cuts_it() -> None:
    chunks = torch.arange(1, 8 * 56 + 1).float().reshape(8, 8, 7)
    together = cut(chunks, torch.tensor([8 - shift for shift in range(8)]))
    for shift in range(8):
        np.testing.assert_array_equal(together[shift].numpy(), Window(0, shift).reference(chunks[shift].numpy()))


def test_a_fresh_specialist_predicts_no_noise_and_depends_on_its_seed_alone() -> None:
    first, again, other = (starting_policy(SpecialistConfig.toy(), seed) for seed in (1, 1, 2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.model.x_embedder.weight, other.model.x_embedder.weight)
    assert not any(value.any() for value in first.model.final_layer.parameters())
    for name, value in first.named_parameters():
        assert value.isfinite().all(), name
    assert first.model.blocks[0].cross_attn.gamma_v.unique().tolist() == pytest.approx([1e-4])


def prompts(count: int) -> tuple[Prompts, object]:
    engine = load_generalist("tiny", device="cpu")
    random = np.random.default_rng(0)
    frames = [random.integers(0, 256, (20, 20, 3), dtype=np.uint8) for _ in range(count)]
    texts = ["open the drawer", "lift", "turn on the light bulb"][:count]
    vectors = [torch.tensor(engine.processor.prompt(text)) for text in texts]
    return Prompts(engine.processor.pixels(frames), vectors, torch.zeros(count, 64, dtype=torch.int64)), engine


@pytest.mark.parametrize("constrained", [False, True])
def test_teacher_forcing_with_the_models_own_tokens_is_what_decoding_leaves(constrained: bool) -> None:
    batch, engine = prompts(3)
    decoded = decode(engine.model, batch.pixels, batch.prompts, constrained=constrained)
    with torch.no_grad():
        forced = force(engine.model, Prompts(batch.pixels, batch.prompts, decoded.tokens))
    assert torch.equal(best_tokens(forced.logits, engine.model, constrained=constrained), decoded.tokens)
    for states, mask, expected, prompt in zip(forced.hidden, forced.mask, decoded.hidden, batch.prompts):
        own = states[mask]
        assert len(own) == len(prompt) + 64 == len(expected) + 1  # the end token is fed too
        torch.testing.assert_close(own[:-1], expected, atol=1e-4, rtol=0)


def test_generated_conditioning_is_the_engines_thought() -> None:
    batch, engine = prompts(2)
    random = np.random.default_rng(0)
    frames = [random.integers(0, 256, (20, 20, 3), dtype=np.uint8) for _ in range(2)]
    thoughts = engine.think(frames, ["open the drawer", "lift"])
    conditioning = Conditioner(engine.model, constrained=True, mode="generated")(batch)
    for (hidden, chunk), thought in zip(conditioning.split(), thoughts):
        np.testing.assert_allclose(chunk.numpy(), thought.reference_actions)
        torch.testing.assert_close(hidden.to(torch.bfloat16), thought.hidden_states)


def test_samples_of_several_context_lengths_give_the_loss_of_each_alone() -> None:
    config = TINY.specialist
    policy = Policy(config).initialize(0).eval()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def observation(count: int) -> Observation:
        size = config.image_size
        values = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).expand(count, -1, -1, -1)
        depth = values[:, 0]
        return Observation(values, values, torch.ones(count, 7), depth, values, depth)

    actions, reference, noise = draw(2, 8, 7), draw(2, 8, 7), draw(2, 8, 7)
    hidden = [draw(5, config.context_width), draw(9, config.context_width)]
    timesteps, keep = torch.tensor([10, 70]), torch.ones(2)
    alone = [
        policy.loss(
            observation(1), actions[i : i + 1], reference[i : i + 1], hidden[i][None],
            noise=noise[i : i + 1], timesteps=timesteps[i : i + 1], keep_conditioning=keep[i : i + 1],
        )
        for i in range(2)
    ]  # fmt: skip
    padded = torch.stack([torch.cat([torch.full((4, config.context_width), 50.0), hidden[0]]), hidden[1]])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    together = policy.loss(
        observation(2), actions, reference, padded,
        noise=noise, timesteps=timesteps, keep_conditioning=keep, hidden_mask=mask,
    )  # fmt: skip
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)


def test_several_draws_of_one_observation_give_the_mean_of_their_losses() -> None:
    config = TINY.specialist
    policy = Policy(config).initialize(0).eval()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size, draws = config.image_size, 3
    colour, depth = draw(2, 3, size, size), draw(2, size, size)
    seen = Observation(colour, colour + 1, draw(2, 7), depth, colour - 1, depth + 1)
    actions, reference, hidden = draw(2, 8, 7), draw(2, 8, 7), draw(2, 6, config.context_width)
    noise = draw(2 * draws, 8, 7)
    timesteps = torch.tensor([0, 20, 40, 60, 80, 99])
    keep = torch.tensor([1.0, 0, 1, 1, 1, 0])

    def loss(of_each: slice) -> Tensor:
        chosen = torch.arange(2 * draws).view(2, draws)[:, of_each].flatten()
        return policy.loss(
            seen, actions, reference, hidden,
            noise=noise[chosen], timesteps=timesteps[chosen], keep_conditioning=keep[chosen],
        )  # fmt: skip

    together = loss(slice(draws))
    apart = torch.stack([loss(slice(number, number + 1)) for number in range(draws)])
    torch.testing.assert_close(together, apart.mean())
    assert apart.std() > 0.01
