"""The fused kernels against PyTorch's operations: compiled on a GPU, elsewhere in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are read
pytest.importorskip("triton")

from robodual.generalist import fusing, layers, products, stepping
from robodual.generalist.config import LanguageConfig
from robodual.generalist.decoding import decode
from robodual.generalist.fused import FusedLayers
from robodual.generalist.fusing import Trial, can_fuse, fuse
from robodual.generalist.greedy import best_tokens
from robodual.generalist.model import Generalist, build, randomise
from robodual.generalist.products import Plan, Products, Tile
from robodual.generalist.quantisation import quantisable, quantise
from robodual.generalist.stepping import Stepper
from robodual.generalist.tokens import GENERATED, ROW
from robodual.profiles import PROFILES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS = 128
SHAPES = {
    "heads of their own": LanguageConfig(width=128, mlp_width=384, layers=2, heads=2, key_value_heads=2),
    "heads in groups": LanguageConfig(width=256, mlp_width=128, layers=2, heads=4, key_value_heads=2),
}


def model(language: LanguageConfig, dtype: torch.dtype = torch.float32) -> Generalist:
    made = build(replace(PROFILES["toy"].generalist, language=language), attention="sdpa", dtype=dtype)
    randomise(made, DEVICE, seed=0)
    return made


def differences(
    one: Generalist, batch: int, count: int, *, slots: int = SLOTS, front: int = 0, plan: Plan | None = None
) -> list[float]:
    """How far the kernels of a model are from its operations: hidden states, keys, values (relative norms)."""
    language = one.config.language
    generator = torch.Generator().manual_seed(batch)
    shape = language.layers, batch, language.key_value_heads, slots, language.width // language.heads

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(DEVICE, one.dtype)

    x, keys, values = random(batch, count, language.width), random(*shape), random(*shape)
    padding = torch.arange(batch, device=DEVICE).unsqueeze(1) * 3 + front
    # The last tokens of all are beyond the chunk, at one slot, which nobody reads.
    first = 40 + front
    places = (first - padding + front + torch.arange(count, device=DEVICE)).clamp(max=first + count - 2)
    cos, sin = one.language_model.model.rotary_emb(x, places - padding)
    half = cos.shape[-1] // 2
    expected = keys.clone(), values.clone()
    plain = layers.step(one, x, (cos, sin), places, padding, *expected)
    kernels = FusedLayers(one)
    kernels.plan = plan or kernels.plan
    angles = cos[..., :half].contiguous(), sin[..., :half].contiguous()
    found = kernels(kernels.stream(x.flatten(0, 1).clone()), angles, places, padding, keys, values)
    read = places < places.max()
    beyond = int(places.max())
    for cache in (keys, values, *expected):
        cache[..., beyond, :] = 0
    pairs = [(found[read], plain[read]), *zip((keys, values), expected)]
    return [float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs]


@pytest.mark.parametrize("language", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("batch", "count"), [(1, 8), (3, 8), (1, 64), (2, 1)])
def test_fused_layers_compute_what_the_operations_do(language: LanguageConfig, batch: int, count: int) -> None:
    assert max(differences(model(language), batch, count)) < 1e-5


@pytest.mark.parametrize(("slots", "front"), [(64, 0), (320, 130)])
def test_slots_are_attended_to_in_one_part_or_many_of_which_some_are_padding(slots: int, front: int) -> None:
    assert max(differences(model(SHAPES["heads in groups"]), 2, 8, slots=slots, front=front)) < 1e-5


@pytest.mark.parametrize("language", SHAPES.values(), ids=SHAPES)
def test_programs_of_any_size_compute_the_same(language: LanguageConfig) -> None:
    tiles = {name: replace(tile, ahead=0) for name, tile in products.CHAINED.tiles.items()}
    assert max(differences(model(language), 1, 8, plan=Plan(tiles))) < 1e-5


@pytest.mark.parametrize(("way", "constrained"), [("guesses", True), ("drafts", False), ("batch", True)])
def test_whole_chunks_are_those_of_the_operations(way: str, constrained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":  # fewer programs, which the interpreter runs one after another
        large = Plan(dict.fromkeys(products.APART.tiles, Tile(128, 128, 1, 4)))
        monkeypatch.setattr(products, "APART", large)
    one = model(replace(SHAPES["heads of their own"], layers=1))
    plain, stepper = Stepper(one, captures=False), Stepper(one, captures=False)
    plain._fused, stepper._fused = None, FusedLayers(one)
    generator = torch.Generator().manual_seed(1)
    count = 2 if way == "batch" else 1
    pixels = torch.randn(count, 6, *[one.config.towers[0].image_size] * 2, generator=generator).to(DEVICE)
    prompts = [torch.randint(3, 200, (5 + 2 * i,), generator=generator).to(DEVICE) for i in range(count)]
    options: dict[str, Any] = {"guessing": True, "window": ROW}
    if way == "drafts":
        right = decode(one, pixels, prompts, constrained=constrained, stepper=plain).tokens
        options = {"drafts": torch.where(torch.rand(1, GENERATED, generator=generator).to(DEVICE) < 0.2, 5, right)}
    given = one, pixels, prompts
    expected = decode(*given, constrained=constrained, stepper=plain, **options)
    found = decode(*given, constrained=constrained, stepper=stepper, **options)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.forwards == expected.forwards
    for mine, other in zip(found.hidden, expected.hidden, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_token_has_the_same_bits_whatever_is_fed_with_it(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that guesses change no token in 16 bits either: its sums are of the same parts in the same order."""
    if DEVICE.type == "cpu":  # the interpreter's products round by the place of a row, a GPU's do not
        product = np.matmul

        def exact(a: np.ndarray, b: np.ndarray, **options: Any) -> np.ndarray:
            return product(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)

        monkeypatch.setattr(np, "matmul", exact)
    one = model(SHAPES["heads in groups"], torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    language, kernels = one.config.language, FusedLayers(one)
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(DEVICE, one.dtype)

    x, padding = random(ROW + ahead, language.width), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    shape = language.layers, 1, language.key_value_heads, SLOTS, language.width // language.heads
    cache = random(2, *shape)

    def run(rows: torch.Tensor, first: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        slots = (first + torch.arange(len(rows), device=DEVICE)).unsqueeze(0)
        cos, sin = one.language_model.model.rotary_emb(rows.unsqueeze(0), slots)
        half = cos.shape[-1] // 2
        angles = cos[..., :half].contiguous(), sin[..., :half].contiguous()
        return kernels(kernels.stream(rows.clone()), angles, slots, padding, keys, values)[0]

    early, late = cache.clone(), cache.clone()
    first = 60  # the tokens lie in two of the parts that attention reads
    expected = run(x[:ROW], first, *early)
    run(x[:ROW], first, *late)
    found = run(x[ahead:], first + ahead, *late)
    assert torch.equal(found[: ROW - ahead], expected[ahead:])
    assert torch.equal(late[..., : first + ROW, :], early[..., : first + ROW, :])


@pytest.mark.parametrize("language", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("padded", [False, True])
def test_prompts_are_read_as_the_operations_do(language: LanguageConfig, padded: bool) -> None:
    one, count = model(language), 70
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, count, language.width, generator=generator).to(DEVICE)
    mask = torch.ones(2, count, dtype=torch.bool, device=DEVICE)
    mask[1, :9] = not padded
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    shape = language.layers, 2, language.key_value_heads, SLOTS, language.width // language.heads
    keys, values, more_keys, more_values = torch.zeros(4, *shape, device=DEVICE)
    seen = mask if padded else None
    plain = layers.read(one, x, positions, seen, keys, values)
    cos, sin = one.language_model.model.rotary_emb(x, positions)
    half = cos.shape[-1] // 2
    angles = cos[..., :half], sin[..., :half]
    found = FusedLayers(one).read(x, angles, seen, more_keys, more_values)
    found = layers.normed(one.language_model.model.norm, found)
    torch.testing.assert_close(found[mask], plain[mask], rtol=0, atol=1e-4)
    for mine, other in ((more_keys, keys), (more_values, values)):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("language", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("batch", "count"), [(1, 8), (3, 8), (1, 64)])
def test_in_bfloat16_they_are_as_near_to_float32_as_the_operations(
    language: LanguageConfig, batch: int, count: int
) -> None:
    short = model(language, torch.bfloat16)
    assert can_fuse(short)
    assert fuse(short) is not None
    for plan in products.plans(DEVICE).values():
        assert max(differences(short, batch, count, plan=plan)) < 2e-2


def test_kernels_are_launched_with_the_models_device_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of several may be on another than the first GPU, and Triton launches on the current one."""
    entered: list[torch.device] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.pop()

    def watched(owner: type, name: str) -> Callable[..., object]:
        method = getattr(owner, name)

        def call(*given: object, **named: object) -> object:
            assert entered == [one.device]
            return method(*given, **named)

        return call

    one = model(replace(SHAPES["heads of their own"], layers=1))
    for module in (stepping, fusing):
        monkeypatch.setattr(module, "current", current)
    for owner, name in (
        *((FusedLayers, name) for name in ("begin", "best", "conclude", "read", "_attend")),
        (Products, "linear"),
    ):
        monkeypatch.setattr(owner, name, watched(owner, name))
    monkeypatch.setattr(fusing, "can_fuse", lambda model: True)
    stepper = Stepper(one, captures=False)
    assert stepper.is_fused
    pixels = torch.zeros(1, 6, *[one.config.towers[0].image_size] * 2, device=DEVICE)
    prompts = [torch.full((5,), 9, device=DEVICE)]
    drafts = decode(one, pixels, prompts, constrained=True).tokens
    assert torch.equal(decode(one, pixels, prompts, constrained=True, drafts=drafts, stepper=stepper).tokens, drafts)
    assert not Stepper(one, captures=False, fuses=False).is_fused


def test_weights_move_into_one_tensor_and_stay_what_they_were() -> None:
    language = SHAPES["heads in groups"]
    one = model(language)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    FusedLayers(one)
    after = one.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    attention = one.language_model.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()


def test_float8_weights_are_read_as_they_are() -> None:
    one = model(SHAPES["heads of their own"])
    quantise(one, sorted(quantisable(one)), "fp8", DEVICE)
    assert max(differences(one, 1, 8)) < 1e-5


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("language", SHAPES.values(), ids=SHAPES)
def test_the_best_tokens_are_those_of_the_operations(language: LanguageConfig, constrained: bool) -> None:
    one = model(language)
    hidden = torch.randn(2, 5, language.width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(FusedLayers(one).best(hidden, constrained), best_tokens(one, hidden, constrained))


def test_they_are_for_bfloat16_on_a_gpu_and_for_so_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model(SHAPES["heads of their own"])
    assert not can_fuse(one)
    assert fuse(one) is None
    whole = FusedLayers(one)
    assert whole.takes(64)
    assert not whole.takes(65)
    # A GeForce's programs share 99 kB, an H200's 227.
    short = Products(DEVICE, torch.bfloat16, 1e-5)
    for shared, most in ((99 << 10, 32), (227 << 10, 64)):
        monkeypatch.setattr(short, "_shared", shared - 4096)
        assert [rows for rows in (8, 16, 32, 64) if short.takes(rows)][-1] == most


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where no GPU is needed, what the log says."""
    told: list[str] = []
    monkeypatch.setattr(fusing, "can_fuse", lambda model: True)
    monkeypatch.setattr(fusing.logger, "warning", lambda event, **facts: told.append(f"{event}: {facts}"))
    return told


def test_what_fails_leaves_the_operations(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    def failing(self: FusedLayers) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(FusedLayers, "try_ends", failing)
    assert fuse(model(SHAPES["heads of their own"])) is None
    assert warnings == ["decoding runs without fused kernels: {'reason': 'RuntimeError: no C compiler'}"]


def test_values_that_are_not_the_operations_leave_the_operations(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    add = Products.add

    def wrong(self: Products, name: str, *given: Any) -> Any:
        stream = add(self, name, *given)
        return replace(stream, x=stream.x * 1.1)

    monkeypatch.setattr(Products, "add", wrong)
    assert fuse(model(SHAPES["heads of their own"])) is None
    assert len(warnings) == 1
    assert "ArithmeticError: the kernels' values are 0." in warnings[0]


def test_the_fastest_plan_that_works_is_chosen(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    one = model(replace(SHAPES["heads of their own"], layers=1))
    slow, fast, failing, other = (Plan(products.APART.tiles) for _ in range(4))
    names = {"slow": slow, "failing": failing, "fast": fast, "other": other}
    monkeypatch.setattr(products, "plans", lambda device: names)

    def repeat(trial: Trial, fused: FusedLayers) -> tuple[float, torch.Tensor]:
        if fused.plan is failing:
            raise RuntimeError("cannot be captured")
        values = torch.tensor([1.0, 2.0 if fused.plan is other else 1.0])
        return {id(slow): 2.0, id(fast): 1.0, id(other): 0.5}[id(fused.plan)], values

    monkeypatch.setattr(Trial, "repeat", repeat)
    made = fuse(one)
    assert made is not None
    assert made.plan is fast
    assert [name in line for name, line in zip(("failing", "other"), warnings, strict=True)] == [True, True]
    assert "cannot be captured" in warnings[0]
    assert "not those of the plan before" in warnings[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bits_depend_neither_on_the_plan_nor_on_how_many_rows_there_are() -> None:
    one = model(SHAPES["heads of their own"], torch.bfloat16)
    kernels, trial, found = FusedLayers(one), Trial(one), []
    for plan in products.plans(DEVICE).values():
        kernels.plan = plan
        for tokens in (ROW, GENERATED):
            out = trial.run(kernels, one.config.language.layers, tokens)
            found.append((out[0, :ROW], kernels.best(out, constrained=True)[0, :ROW]))
    for values, best in found[1:]:
        assert torch.equal(values, found[0][0])
        assert torch.equal(best, found[0][1])
