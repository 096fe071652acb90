"""Compiles Triton's kernels for a GPU that is not there, as the models launch them, and prints what each needs.

    python tests/kernels/compiled.py 90 generalist fp8
    python tests/kernels/compiled.py 80 specialist

It is a program of its own, since a process either interprets kernels or compiles them. A
launch compiles, and computes nothing, so that 7 B parameters can be on the meta device.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from robodual.generalist import products
from robodual.generalist.fused import FusedLayers
from robodual.generalist.model import build
from robodual.generalist.quantisation import quantisable, quantise
from robodual.profiles import PROFILES
from robodual.specialist import fused
from robodual.specialist.attention import attend
from robodual.specialist.policy import Policy
from robodual.specialist.products import linear

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes of a program, at most
PROCESSORS = 132
SLOTS = 384
META = torch.device("meta")


def compile_all(capability: int) -> list[dict[str, Any]]:
    """Has launches compile for a capability from now on; what they have compiled is added to the list it returns."""
    found: list[dict[str, Any]] = []
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: META,
        )
    )
    run = JITFunction.run

    def compiling(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **named)
        found.append({"name": self.fn.__name__, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps})
        return kernel

    JITFunction.run = compiling
    return found


def generalist(capability: int, quantisation: str = "none") -> None:
    """A step of eight tokens, one of 64, and a prompt, by each plan for such a GPU."""
    model = build(PROFILES["robodual-7b"].generalist, attention="sdpa", dtype=torch.bfloat16)
    if quantisation != "none":
        quantise(model, quantisable(model), quantisation, META)
    model.language_model.model.layers = model.language_model.model.layers[:1]
    with META:
        layers = FusedLayers(model)
    made = layers._products
    made._processors, made._shared = PROCESSORS, SHARED[capability] - 4096
    config = model.config.language
    shape = 2, 1, 1, config.key_value_heads, SLOTS, config.width // config.heads
    cache = torch.empty(shape, dtype=model.dtype, device=META)
    one = torch.zeros(1, 1, dtype=torch.int64, device=META)
    for plan in [products.APART, products.CHAINED] if capability >= 90 else [products.APART]:
        layers.plan = plan
        for count in [count for count in (8, 64) if layers.takes(count)]:
            tokens = one.expand(1, 65)
            stream, rotation, slots = layers.begin(tokens, one, one[0], one, count)
            hidden = layers(stream, rotation, slots, one, *cache)
            best = layers.best(hidden, constrained=True)
            layers.conclude(best, tokens, one, one[0], one[0], 0, True)
    if layers.reads:
        x = torch.empty(1, 318, config.width, dtype=model.dtype, device=META)
        angles = x[..., : config.width // config.heads // 2]
        layers.read(x, (angles, angles), None, *cache)


def specialist(capability: int) -> None:
    """The denoiser's steps, guided, and the encoders' products and attention."""
    config = PROFILES["robodual-7b"].specialist
    fused.can_chain = lambda device: capability >= 90
    with torch.inference_mode():
        sampler = fused.FusedSampler(Policy(config).eval().model, config)
        noise, reference = torch.zeros(2, 1, 8, 7).unbind()
        context = noise.new_zeros(1, 90, 2 * config.width * len(sampler.blocks))
        mask = torch.ones(1, 90, dtype=torch.bool)
        sampler(noise, reference, noise.new_zeros(1, config.width), context, mask)
        for width, heads, size in (
            (config.vision_width, config.vision_heads, config.vision_width // config.vision_heads),
            (config.depth_width, config.depth_heads, config.depth_head_width),
        ):
            x = torch.zeros(2 * 257, width)
            attend(torch.zeros(2 * 257, 3 * heads * size), 2, heads)
            for gelu, columns in ((None, 3 * heads * size), ("none", 4 * width), ("tanh", width)):
                for rows in (64, len(x)):
                    bias = torch.zeros(columns)
                    linear(
                        x[:rows], torch.zeros(columns, width), bias, gelu, None if gelu else x.new_zeros(rows, columns)
                    )


if __name__ == "__main__":
    capability, model, *quantisation = sys.argv[1:]
    kernels = compile_all(int(capability))
    if model == "generalist":
        generalist(int(capability), *quantisation)
    else:
        specialist(int(capability))
    print(json.dumps(kernels))
