"""How near each stage comes to what the machine allows: arithmetic, bytes, the bound of the two, the time.

    python -m benchmarks.roofline --rounds 20 --json roofline.json --trace step.json

The machine's own rates are measured beside the stages: float arithmetic by the best of some matrix products, in the
stages' dtype, and bandwidth by reading memory that no cache holds. A stage's arithmetic is counted by PyTorch's
formulas as it runs; its bytes are those of what its products and attentions read and write, each every time. A stage
whose weights stay in a cache can so be faster than its bound by bytes. --trace writes one step of the specialist as a
trace for chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks import identity, measurement, specialist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from robodual.generalist.decoding import decode
from robodual.generalist.engine import GeneralistEngine, load_generalist
from robodual.generalist.stepping import Stepper
from robodual.generalist.tokens import ROW
from robodual.profiles import PROFILES, shipped
from robodual.specialist.encoder import Encoder
from robodual.specialist.engine import SpecialistEngine, load_specialist
from robodual.specialist.latents import ColourLatents, MapLatents
from robodual.specialist.packing import Linear
from robodual.specialist.policy import needed
from robodual.specialist.sampler import Sampler
from robodual.specialist.step import Step, choose_sampler

PACKAGES = ("torch", "transformers", "robodual")
PRODUCTS = ((512, 1024, 1024), (512, 1024, 4096), (512, 4096, 1024), (2048, 2048, 2048))  # rows, in, out
GPU_PRODUCTS = ((4096, 4096, 4096), (8192, 8192, 8192))
MEGABYTES = {"cpu": 512, "cuda": 4096}  # to read, for the bandwidth
# What PyTorch has no formula for.
PACKED = torch.ops.mkldnn._linear_pointwise
PACKED_BY_MKL = getattr(torch.ops.mkl, "_mkl_linear", None)  # of the weight twice, as packed and as it was
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

Runs = dict[str, Callable[[], Any]]


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the arithmetic of products, convolutions and attentions, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.bytes = 0, 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        packet = operation._overloadpacket
        if packet not in (PACKED, PACKED_BY_MKL, ATTENTION) and packet not in flop_registry:
            with self:  # an operator made of others, which inference mode does not take apart by itself
                result = operation.decompose(*arguments, **(named or {}))
            if result is not NotImplemented:
                return result
        result = operation(*arguments, **(named or {}))
        if packet in (PACKED, PACKED_BY_MKL):
            self.flops += 2 * arguments[0].numel() * result.shape[-1]
        elif packet is ATTENTION:
            query, key = arguments[:2]  # [B, heads, N, C] each
            self.flops += 4 * query.numel() * key.shape[-2]
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*arguments, **(named or {}), out_val=result)
        else:
            return result
        if packet is PACKED_BY_MKL:
            arguments = (*arguments[:1], *arguments[2:])
        outputs = result if isinstance(result, (tuple, list)) else [result]
        self.bytes += sum(t.numel() * t.element_size() for t in [*arguments, *outputs] if isinstance(t, Tensor))
        return result


@dataclass(frozen=True)
class Stage:
    """`bound` and `median` in milliseconds; `near` is the bound's share of the median."""

    name: str
    gigaflops: float
    megabytes: float
    bound: float
    bound_by: str
    median: float
    p99: float
    near: float


def numbers(stage: Stage) -> tuple[float, ...]:
    """In the order of the table."""
    return stage.gigaflops, stage.megabytes, stage.bound, stage.median, stage.p99, stage.near


def specialist_stages(engine: SpecialistEngine, context_length: int) -> tuple[Runs, Runs]:
    """One step's parts, of all sensors but the tactile one, and the whole step last.

    Also what is counted in the place of a stage: a graph that is replayed shows no operations, nor do Triton's kernels.
    """
    _, request = specialist.steps(engine, context_length)
    policy, preparation, model = engine.policy, engine.preparation, engine.policy.model
    frames = [request.frame]

    def prepare() -> tuple[Tensor, Tensor]:
        colour = torch.cat([preparation.static(frames), preparation.gripper(frames)])
        return colour, torch.cat([preparation.static_depth(frames), preparation.gripper_depth(frames)])

    pixels, maps = prepare()
    encoders = policy.vision_encoder, needed(policy.depth_encoder, "depth encoder")
    see, feel = (Encoder(encoder, images=2) for encoder in encoders)
    sampler = choose_sampler(model, policy.config)
    adapters = [ColourLatents(needed(m, "adapter")) for m in (model.visual_adapter, model.gripper_visual_adapter)]
    map_adapters = [MapLatents(needed(m, "adapter")) for m in (model.depth_adapter, model.gripper_depth_adapter)]
    seen, felt = see(pixels), feel(maps)

    def adapt() -> Tensor:
        parts = [adapter(rows)[:, 0] for adapter, rows in zip(adapters, seen[:, None])]
        return torch.cat([*parts, *(adapter(rows) for adapter, rows in zip(map_adapters, felt[:, None]))], dim=1)

    latents = adapt()
    latents = torch.cat((latents[:, : policy.config.latents], latents), dim=1)  # the previous frame's stand first
    context = torch.cat((sampler.keys_values(latents), request.conditioning.keys_values[None]), dim=1)
    start = preparation.vectors([request.noise])
    reference = preparation.vectors([request.reference_actions])
    conditioning = request.conditioning.mean[None]
    stages: Runs = {
        "frames to the encoders": prepare,
        "vision encoder": partial(see, pixels),
        "depth encoder": partial(feel, maps),
        "adapters": adapt,
        "context, keys and values": partial(sampler.keys_values, latents),
        "denoising": partial(sampler, start, reference, conditioning, context),
        "a step": partial(engine.act, [request]),
    }
    if not engine.captures:
        return stages, {}
    plain_see, plain_feel = (Encoder(encoder, images=2, triton=False) for encoder in encoders)
    plain_step = Step(policy, fuse=False, products=False)
    return stages, {
        "vision encoder": partial(plain_see, pixels),
        "depth encoder": partial(plain_feel, maps),
        "denoising": partial(Sampler(model, policy.config), start, reference, conditioning, context),
        "a step": lambda: plain_step(engine._gather([request])),
    }


def generalist_stages(engine: GeneralistEngine) -> tuple[Runs, Runs]:
    """Vision with the projector; a conditioning on either cache.

    Also what is counted in the place of a stage: a graph that is replayed shows no operations, nor do Triton's kernels.
    """
    pixels, prompts = identity.inputs(engine, *identity.glances(engine.facts.profile, 1))
    conditioning = partial(decode, engine.model, pixels, prompts, constrained=True)
    stages: Runs = {"vision and projector": partial(engine.model.see, pixels)}
    stages["a conditioning, dynamic cache"] = conditioning
    if engine.stepper is None:
        return stages, {}
    counted: Runs = {}
    uncaptured = Stepper(engine.model, captures=False, fuses=False)
    for how, way in {"": conditioning, ", speculation": partial(conditioning, guessing=True, window=ROW)}.items():
        name = f"a conditioning, static cache{', captured' if engine.captures else ''}{how}"
        stages[name] = partial(way, stepper=engine.stepper)
        counted[name] = partial(way, stepper=uncaptured)
    return stages, counted


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], float]]:
    """What measures the machine: a function, and how many FLOPs or bytes it is."""
    products = GPU_PRODUCTS if device.type == "cuda" else PRODUCTS
    found: dict[str, tuple[Callable[[], Any], float]] = {}
    for rows, width, out in products:
        x, weight = torch.randn(rows, width, device=device, dtype=dtype), torch.randn(out, width, device=device)
        layer = Linear(weight.to(dtype))
        found[f"product {rows}x{width}x{out}"] = partial(layer, x), 2.0 * rows * width * out
    size = MEGABYTES[device.type] << 20
    found["read"] = torch.ones(size // 4, device=device).sum, float(size)
    return found


def synchronised(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """On CUDA, waits for the end."""
    if device.type != "cuda":
        return run

    def wait() -> None:
        run()
        torch.cuda.synchronize(device)

    return wait


def measured(
    stages: Mapping[str, Callable[[], Any]],
    counted: Mapping[str, Callable[[], Any]],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> tuple[list[Stage], float, float]:
    """The stages, and the machine's rates: FLOPs and bytes a second. `counted`: what is counted for some of them."""
    counters = {}
    for name, run in stages.items():
        with Counter() as counters[name]:
            counted.get(name, run)()
    machine = rates(device, dtype)
    runs = {**stages, **{name: run for name, (run, _) in machine.items()}}
    timed = {name: synchronised(run, device) for name, run in runs.items()}
    rows = {row.name: row for row in measurement.interleave(timed, rounds)}
    arithmetic = max(amount / rows[name].median for name, (_, amount) in machine.items() if name != "read") * 1e3
    bandwidth = machine["read"][1] / rows["read"].median * 1e3
    found = []
    for name, counter in counters.items():
        by = {"arithmetic": counter.flops / arithmetic * 1e3, "bandwidth": counter.bytes / bandwidth * 1e3}
        which = max(by, key=by.__getitem__)
        row = rows[name]
        near = by[which] / row.median
        found.append(
            Stage(name, counter.flops / 1e9, counter.bytes / 2**20, by[which], which, row.median, row.p99, near)
        )
    return found, arithmetic, bandwidth


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if `--compare` finds a stage farther from its bound than before."""
    parser = argparse.ArgumentParser(prog="benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--system", default="specialist", choices=("specialist", "generalist"))
    parser.add_argument("--profile", default="robodual-7b", choices=sorted(PROFILES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--context-length", type=int, default=90, help="the generalist's tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--trace", type=Path, help="where to write one step as a trace")
    measurement.add_outputs(parser)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        if options.system == "specialist":
            engine = load_specialist(options.profile, device=options.device, dtype=options.dtype)
            device, dtype = engine.preparation.device, engine.preparation.dtype
            stages, counted = specialist_stages(engine, options.context_length)
        else:
            weights = shipped(options.profile, "generalist")
            thinker = load_generalist(
                options.profile, checkpoint=weights, device=options.device, dtype=options.dtype, constrained=True
            )
            device, dtype = thinker.model.device, thinker.model.dtype
            stages, counted = generalist_stages(thinker)
        found, arithmetic, bandwidth = measured(stages, counted, device, dtype, options.rounds)
        if options.trace:
            trace(options.trace, list(stages.values())[-1], device)
    title = f"{options.system} {options.profile}, {device}, {dtype}, {options.threads} threads"
    print(f"{title}: {arithmetic / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    header = ("stage", "bound by", "GFLOP", "MB", "bound ms", "median ms", "p99 ms", "bound / median")
    cells = [[s.name, s.bound_by, *(f"{x:.2f}" for x in numbers(s))] for s in found]
    measurement.markdown(*cells, header=header)
    rows = [measurement.Row(s.name, s.median, s.p99, s.near) for s in found]
    facts = {"flops_per_second": arithmetic, "bytes_per_second": bandwidth, "stages": [vars(s) for s in found]}
    return measurement.conclude(options, "roofline", title, rows, PACKAGES, **facts)


def trace(path: Path, run: Callable[[], Any], device: torch.device) -> None:
    """Writes a Chrome trace of `run`."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    run()
    with torch.profiler.profile(activities=kinds) as profile:
        run()
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))


if __name__ == "__main__":
    sys.exit(main())
