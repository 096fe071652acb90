"""How fast the generalist's fused layers are on this GPU, by each plan and with other sizes of their programs.

    python -m benchmarks.plans --tune --json plans.json

A step of eight tokens through the Llama's layers of the profile's shapes, with random weights, captured as the engine
captures it, against the time that reading the weights takes at the bandwidth that a sum of 4 GB reaches. The engine
chooses between the plans of generalist/products.py at its start. With --tune each size of each product's programs is
tried in turn, from each plan on, and what is faster is kept: what is printed last is what a plan should say for such a
GPU. --verify checks besides that a token's bits are the same by each plan, and with 64 tokens in the place of eight.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from benchmarks import measurement

from robodual.device import choose, current, milliseconds
from robodual.generalist.fusing import Trial, can_fuse
from robodual.generalist.model import Generalist, build, randomise
from robodual.generalist.tokens import GENERATED, ROW
from robodual.profiles import PROFILES

if TYPE_CHECKING:
    from robodual.generalist.fused import FusedLayers
    from robodual.generalist.products import Plan

PACKAGES = ("torch", "triton", "robodual")
GIGABYTES = 4  # to read, for the bandwidth
ROUNDS = 10
SIZES: dict[str, tuple[int, ...]] = {
    "columns": (16, 32, 64, 128),
    "part": (64, 128, 256, 512),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5, 6),
    "ahead": (0, 1, 2, 4),
}


def bandwidth(device: torch.device) -> float:
    """Bytes a millisecond."""
    memory = torch.ones(GIGABYTES << 28, device=device)
    return memory.nbytes / statistics.median(milliseconds(memory.sum) for _ in range(ROUNDS))


def weight_bytes(model: Generalist) -> int:
    """Of the linear layers, all of which a step reads."""
    return sum(p.nbytes for p in model.language_model.model.layers.parameters() if p.dim() == 2)


def tuned(plan: Plan, measure: Callable[[Plan], float]) -> Plan:
    """The fastest plan that is found from one on, a change at a time."""
    best = measure(plan)
    for name in ("gate_up", "qkv", "down", "out"):
        for size, values in SIZES.items():
            for value in values if size != "ahead" or plan.chained else ():
                change: dict[str, Any] = {size: value}
                tile = replace(plan.tiles[name], **change)
                other = replace(plan, tiles={**plan.tiles, name: tile})
                if tile != plan.tiles[name] and (found := measure(other)) < best:
                    best, plan = found, other
    return plan


def differing(trial: Trial, fused: FusedLayers, layers: int, plans: Sequence[Plan]) -> list[int]:
    """In how many values a row of tokens is another by another plan, or among 64 tokens."""
    found = []
    for plan in plans:
        fused.plan = plan
        found += [trial.run(fused, layers, tokens)[0, :ROW] for tokens in (ROW, GENERATED)]
    return [int((values != found[0]).sum()) for values in found[1:]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 where there are no kernels, a ratio has fallen or bits differ."""
    parser = argparse.ArgumentParser(prog="benchmarks.plans", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="robodual-7b", choices=sorted(PROFILES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tune", action="store_true", help="try other sizes of programs too")
    parser.add_argument("--verify", action="store_true", help="compare bits")
    measurement.add_outputs(parser)
    options = parser.parse_args(argv)
    device = choose(options.device)
    if device.type != "cuda":
        print("plans: the fused layers run on a GPU, and this machine has none that PyTorch can use", file=sys.stderr)
        return 1
    model = build(PROFILES[options.profile].generalist, attention="sdpa", dtype=torch.bfloat16)
    with current(device):
        speed = bandwidth(device)
        randomise(model, device, seed=0)
        if not can_fuse(model):
            print("plans: Triton is missing, or the profile's shapes are not for the kernels", file=sys.stderr)
            return 1
        return measured(options, model, speed)


def measured(options: argparse.Namespace, model: Generalist, speed: float) -> int:
    from robodual.generalist.fused import FusedLayers
    from robodual.generalist.products import plans

    fused, trial, device = FusedLayers(model), Trial(model), model.device
    bound = weight_bytes(model) / speed
    print(f"{torch.cuda.get_device_name(device)}: {speed / 1e9:.2f} TB/s, so {bound:.2f} ms for the weights")

    def measure(plan: Plan) -> float:
        fused.plan = plan
        try:
            found = trial.repeat(fused)[0]
        except Exception as error:  # too large for this GPU, which is an answer too
            print(f"{type(error).__name__}: {str(error).splitlines()[0]}: {plan.tiles}", flush=True)
            return float("inf")
        print(f"{found:.3f} ms: {plan.tiles}", flush=True)
        return found

    contenders = dict(plans(device))
    if options.tune:
        contenders |= {f"{name}, tuned": tuned(plan, measure) for name, plan in plans(device).items()}
    times: dict[str, list[float]] = {"the weights": [bound] * ROUNDS, **{name: [] for name in contenders}}
    for _ in range(ROUNDS):
        for name, plan in contenders.items():
            fused.plan = plan
            times[name].append(trial.repeat(fused)[0])
    rows = measurement.paired(times)
    cells = [(row.name, f"{row.median:.3f}", f"{row.p99:.3f}", f"{row.median / bound:.3f}") for row in rows]
    measurement.markdown(*cells, header=("plan", "median ms", "p99 ms", "times the weights"))
    for name, plan in contenders.items():
        print(name, *plan.tiles.items(), sep="\n  ")
    differ = differing(trial, fused, model.config.language.layers, list(contenders.values())) if options.verify else []
    if options.verify:
        print(f"values that another plan, or more tokens, change: {differ}")
    facts = {"gpu": torch.cuda.get_device_name(device), "bytes_per_ms": speed, "differing": differ}
    tiles = {name: {key: asdict(tile) for key, tile in plan.tiles.items()} for name, plan in contenders.items()}
    status = measurement.conclude(options, "plans", "a step's layers by kernels", rows, PACKAGES, plans=tiles, **facts)
    return 1 if any(differ) else status


if __name__ == "__main__":
    sys.exit(main())
