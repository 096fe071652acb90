"""Where the specialist's Triton kernels are chosen, and what the log says where they are not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch
from structlog.testing import CapturingLogger

from robodual.profiles import PROFILES
from robodual.specialist import engine, fusing, step
from robodual.specialist.packing import LEAST, Linear
from robodual.specialist.policy import Policy
from robodual.specialist.sampler import Sampler
from robodual.specialist.step import Step

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    fusing.can_launch.cache_clear()
    yield
    fusing.can_launch.cache_clear()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    captured = CapturingLogger()
    monkeypatch.setattr(fusing, "logger", captured)
    monkeypatch.setattr(step, "logger", captured)
    return captured


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU that runs them, with Triton."""
    found = importlib.util.find_spec
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fusing, "_try", lambda device: "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: ModuleSpec(n, None) if n == "triton" else found(n))
    return monkeypatch


def test_a_gpu_that_can(able: pytest.MonkeyPatch, log: CapturingLogger) -> None:
    assert fusing.can_launch(GPU)
    for profile in PROFILES.values():
        assert fusing.fuses(profile.specialist, GPU)
    assert not fusing.fuses(replace(PROFILES["robodual-7b"].specialist, width=1024, heads=32), GPU)
    assert not fusing.fuses(replace(PROFILES["robodual-7b"].specialist, heads=4), GPU)
    assert not fusing.can_launch(torch.device("cpu"))
    assert not log.calls


@pytest.mark.parametrize("lack", ["CUDA", "triton", "TF32", "C compiler"])
def test_what_a_gpu_lacks_is_logged_once(lack: str, able: pytest.MonkeyPatch, log: CapturingLogger) -> None:
    if lack == "CUDA":
        able.setattr(torch.version, "cuda", None)
    elif lack == "triton":
        able.setattr(importlib.util, "find_spec", lambda name: None)
    elif lack == "C compiler":
        able.setattr(fusing, "_try", lambda device: "Failed to find C compiler")
    else:
        able.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not fusing.can_launch(GPU)
    assert not fusing.fuses(PROFILES["toy"].specialist, GPU)
    assert [(call.method_name, call.kwargs["device"]) for call in log.calls] == [("info", "cuda:0")]
    assert lack in log.calls[0].kwargs["reason"]


def test_the_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from robodual.specialist import products

    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert fusing._try(place) == ""
    monkeypatch.setattr(products, "linear", lambda x, weight: x + weight)
    assert "gave 512.0, not 4096" in fusing._try(place)

    def fail(x: torch.Tensor, weight: torch.Tensor) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(products, "linear", fail)
    assert "RuntimeError: Failed to find C compiler" in fusing._try(place)
    monkeypatch.setitem(sys.modules, "robodual.specialist.products", None)  # as if its imports failed
    assert "Triton's first kernel failed: ModuleNotFoundError" in fusing._try(place)


def test_a_cpu_has_none() -> None:
    facts = engine.load_specialist("toy", device="cpu").facts
    assert "denoiser" not in facts.details
    assert type(Step(Policy(PROFILES["toy"].specialist))._sampler) is Sampler


def test_what_is_chosen_where_they_run(monkeypatch: pytest.MonkeyPatch, log: CapturingLogger) -> None:
    pytest.importorskip("triton")
    from robodual.specialist import products
    from robodual.specialist.fused import FusedSampler

    monkeypatch.setattr(fusing, "can_launch", lambda device: True)
    policy = Policy(PROFILES["toy"].specialist).eval()
    with torch.inference_mode():
        chosen, plain = Step(policy), Step(policy, fuse=False)
        assert (type(chosen._sampler), chosen.is_fused) == (FusedSampler, True)
        assert (type(plain._sampler), plain.is_fused) == (Sampler, False)

        def failing(sampler: FusedSampler, *inputs: object) -> None:
            raise RuntimeError("out of resource: shared memory")

        with monkeypatch.context() as patch:
            patch.setattr(FusedSampler, "denoise", failing)
            assert not Step(policy).is_fused
        assert [(call.args[0], call.kwargs["reason"]) for call in log.calls] == [
            ("the specialist denoises without fused kernels", "RuntimeError: out of resource: shared memory")
        ]

    used: list[int] = []

    def linear(x: torch.Tensor, weight: torch.Tensor, *others: object, **named: object) -> torch.Tensor:
        used.append(len(x))
        return x @ weight.T

    monkeypatch.setattr(products, "linear", linear)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weight = torch.zeros(4, 4)
    x, few = torch.zeros(LEAST, 4), torch.zeros(LEAST - 1, 4)
    for layer in (Linear(weight, triton=True), Linear(weight), Linear(weight.bfloat16(), triton=True)):
        for rows in (x, few):
            layer(rows.to(layer._weight.dtype))
            layer.add(rows.to(layer._weight.dtype), rows.to(layer._weight.dtype))
    assert used == [LEAST, LEAST], "of the first layer, the many rows"
