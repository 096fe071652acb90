"""The generalist at published size on a GPU that is pretended: devices, types, shapes, and what a capture permits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pretended
import pytest
import torch
from torch import nn

from robodual.capture import WARMUP, Recorder
from robodual.generalist.decoding import decode
from robodual.generalist.engine import _captured
from robodual.generalist.model import Generalist, build, place_rotary
from robodual.generalist.processor import DevicePixels, ImageProcessor
from robodual.generalist.quantisation import Float8Linear, quantisable
from robodual.generalist.stepping import Stepper
from robodual.generalist.tokens import GENERATED, ROW
from robodual.profiles import PROFILES

pytestmark = pretended.needed

PUBLISHED = PROFILES["robodual-7b"].generalist
# Of its many layers that are alike, two.
CONFIG = replace(
    PUBLISHED,
    language=replace(PUBLISHED.language, layers=2),
    towers=tuple(replace(tower, depth=3) for tower in PUBLISHED.towers),
)
WIDTH = CONFIG.language.width


def generalist(dtype: torch.dtype) -> Generalist:
    """On the meta device."""
    return build(CONFIG, attention="sdpa", dtype=dtype)


def inputs(model: Generalist, *lengths: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    pixels = torch.empty((len(lengths), 6, 224, 224), dtype=model.dtype, device=pretended.DEVICE)
    return pixels, [torch.ones(length, dtype=torch.int64, device=pretended.DEVICE) for length in lengths]


def check(model: Generalist, stepper: Stepper | None, *lengths: int, **ways: Any) -> None:
    found = decode(model, *inputs(model, *lengths), **ways, stepper=stepper)
    assert (found.tokens.shape, found.tokens.device) == ((len(lengths), GENERATED), pretended.DEVICE)
    for hidden, length in zip(found.hidden, lengths, strict=True):
        assert (hidden.shape, hidden.dtype) == ((length + GENERATED - 1, WIDTH), model.dtype)
        assert hidden.device == pretended.DEVICE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("captures", [True, False])
def test_static_steps(dtype: torch.dtype, captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # How many tokens are sure would have to be waited for; here all are, after the first step that guesses.
    monkeypatch.setattr(Stepper, "sure", lambda stepper: GENERATED)
    model = generalist(dtype)
    with pretended.gpu() as gpu:
        pretended.place(model)
        place_rotary(model, pretended.DEVICE)
        stepper = Stepper(model, captures=captures)
        for constrained in (True, False):
            check(model, stepper, 24, 24, constrained=constrained)
            check(model, stepper, 20, constrained=constrained, guessing=True, window=ROW)
            check(model, stepper, 20, 27, constrained=constrained, guessing=True, window=ROW)
        assert stepper.captures is captures
    # Frames and prompts of one and of two, and constrained and free steps: of two with guesses and without, of one.
    assert gpu.captures == (2 + 2 + 2 * 3 if captures else 0)
    assert gpu.replays > gpu.captures or not captures


def test_the_plain_way() -> None:
    model = generalist(torch.bfloat16)
    with pretended.gpu():
        pretended.place(model)
        place_rotary(model, pretended.DEVICE)
        for lengths in ((20,), (20, 27)):
            check(model, None, *lengths, constrained=True, window=1)
            check(model, None, *lengths, constrained=False, window=1)


def test_frames_travel_as_bytes() -> None:
    with pretended.gpu() as gpu:
        pixels = DevicePixels(ImageProcessor(CONFIG.images), pretended.DEVICE, torch.bfloat16)
        prepare = _captured(pixels, pretended.DEVICE)
        for count in (1, 2, 1):
            found = prepare(torch.zeros((count, 200, 200, 3), dtype=torch.uint8, device=pretended.DEVICE))
            assert (found.shape, found.dtype) == ((count, 6, 224, 224), torch.bfloat16)
            assert found.device == pretended.DEVICE
    assert (gpu.captures, gpu.replays) == (2, 3)


def test_weights_in_eight_bits() -> None:
    model = generalist(torch.bfloat16)
    with pretended.gpu() as gpu:
        pretended.place(model)
        place_rotary(model, pretended.DEVICE)
        for weight in sorted(quantisable(model)):
            path = weight.removesuffix(".weight")
            model.set_submodule(path, Float8Linear(model.get_submodule(path).weight.data).eval())
        check(model, Stepper(model, captures=True), 20, constrained=True)
    assert gpu.captures == 3, "frames, prompts and steps"


def test_a_capture_that_reads_a_value_or_the_host_is_seen() -> None:
    runs = []
    with pretended.gpu():
        record = Recorder(pretended.DEVICE)
        here, there = torch.ones(3), torch.ones(3, device=pretended.DEVICE)

        def copying() -> torch.Tensor:
            runs.append(1)
            return there + here.to(pretended.DEVICE)

        with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
            record(copying)
        with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
            record(lambda: there + torch.tensor(1.0, device=pretended.DEVICE))
        record(lambda: there + torch.tensor(1.0))  # which travels with the kernel
        with pytest.raises(RuntimeError, match="device"):
            record(lambda: there + here)
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            record(lambda: there * there.sum().item())
        linear = nn.Linear(3, 3, dtype=torch.bfloat16, device="meta")
        pretended.place(linear)
        with pytest.raises(RuntimeError, match="of one type"):
            record(lambda: linear(there))
    assert len(runs) == WARMUP + 1
