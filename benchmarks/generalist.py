"""Memory and time of a conditioning: the generalist in bfloat16, int8 and nf4, with each attention.

    python -m benchmarks.generalist --rounds 20 --json generalist.json
    python -m benchmarks.generalist --profile toy --identity 200

Loads the profile with its own weights, a checkpoint or random ones once for each pair of quantisation and attention,
and times whole conditionings: frame and instruction in, reference chunk and hidden states out. The plain way, one token
a forward on a dynamic cache, the engine without speculation, the engine on a dynamic cache, the engine, and the engine
with a draft that is right (the best case) take turns. Decoding is constrained, so that random weights keep to the
layout; their chunks are noise, in which hardly any guess is right, and those of trained ones are not. What the machine
cannot do is listed with the reason. With --identity it checks the tokens instead (identity.py).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from benchmarks import identity, measurement
from torch import Tensor

from robodual.generalist.decoding import decode
from robodual.generalist.engine import ATTENTIONS, GeneralistEngine, load_generalist
from robodual.generalist.quantisation import QUANTISATIONS
from robodual.generalist.tokens import ROW, decode_actions
from robodual.profiles import PROFILES, shipped

PACKAGES = ("torch", "transformers", "robodual")
FRAMES = 20  # that forwards are counted of
GB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One way to run the model: memory in bytes, times in milliseconds, forwards through the Llama of one conditioning.

    `ratio` is the plain way's time by this one's; `single` the median without speculation, `dynamic` that on a dynamic
    cache, `drafted` that with a draft that is right. `forwards` is a mean over some frames, one at a time. `peak_bytes`
    is the device's allocated memory at most while conditioning, on CUDA; `reason` says why a row is empty.
    """

    quantisation: str
    attention: str
    name: str
    dtype: str = ""
    weight_bytes: int = 0
    peak_bytes: int | None = None
    plain: float = 0.0
    single: float = 0.0
    dynamic: float = 0.0
    median: float = 0.0
    p99: float = 0.0
    ratio: float = 0.0
    forwards: float = 0.0
    drafted: float = 0.0
    seconds_to_load: float = 0.0
    reason: str = ""

    def cells(self) -> list[str]:
        if self.reason:
            return [self.quantisation, self.attention, f"not measured: {self.reason}", *[""] * (len(HEADER) - 3)]
        peak = "" if self.peak_bytes is None else f"{self.peak_bytes / GB:.3f}"
        times = [f"{value:.1f}" for value in (self.plain, self.single, self.dynamic, self.median, self.p99)]
        rest = [f"{self.ratio:.2f}", f"{self.forwards:.1f}", f"{self.drafted:.1f}", f"{self.seconds_to_load:.1f}"]
        return [self.quantisation, self.attention, self.dtype, f"{self.weight_bytes / GB:.3f}", peak, *times, *rest]


HEADER = (
    *("quantisation", "attention", "dtype", "weights GB", "peak GB", "plain ms", "no speculation ms"),
    *("dynamic ms", "median ms", "p99 ms", "times faster", "forwards", "right draft ms", "load s"),
)


def forwards(engine: GeneralistEngine) -> float:
    """Passes through the Llama that a conditioning takes, prefill included: the mean over some frames."""
    way = partial(decode, engine.model, constrained=True, guessing=True, window=ROW)
    frames, instructions = identity.glances(engine.facts.profile, FRAMES)
    taken = [way(*identity.inputs(engine, [f], [i])).forwards for f, i in zip(frames, instructions)]
    return statistics.mean(taken)


def contenders(engine: GeneralistEngine, batch: int) -> dict[str, Callable[[], object]]:
    """Conditionings of `batch` frames; each ends on the host, so that nothing is left to wait for."""
    frames, instructions = identity.glances(engine.facts.profile, batch)

    def plain() -> tuple[np.ndarray, list[Tensor]]:
        decoded = decode(engine.model, *identity.inputs(engine, frames, instructions), constrained=True, window=1)
        actions = [decode_actions(ids, engine.model.config.tokens)[0] for ids in decoded.tokens.cpu().numpy()]
        return np.stack(actions), [hidden.to("cpu", torch.bfloat16) for hidden in decoded.hidden]

    drafts = [thought.reference_actions for thought in engine.think(frames, instructions)]
    like = partial(GeneralistEngine, engine.model, engine.processor, engine.facts, constrained=True)
    dynamic, single = like(), like(stepper=engine.stepper, speculation=False)
    return {
        "plain": plain,
        "single": partial(single.think, frames, instructions),
        "dynamic": partial(dynamic.think, frames, instructions),
        "engine": partial(engine.think, frames, instructions),
        "drafted": partial(engine.think, frames, instructions, drafts),
    }


def run(options: argparse.Namespace, quantisation: str, attention: str) -> Row:
    name = f"{quantisation}, {attention}"
    try:
        return measured(options, quantisation, attention, name)
    except ValueError as error:
        return Row(quantisation, attention, name, reason=str(error))
    except torch.OutOfMemoryError:
        return Row(quantisation, attention, name, reason="out of device memory")
    finally:
        # The next one needs the memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measured(options: argparse.Namespace, quantisation: str, attention: str, name: str) -> Row:
    """Raises ValueError that names what the machine cannot do."""
    start = time.perf_counter()
    engine = load(options, quantisation, attention)
    loaded = time.perf_counter() - start
    ways = contenders(engine, options.batch)
    peak = None
    if engine.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.model.device)
        ways["engine"]()
        peak = torch.cuda.max_memory_allocated(engine.model.device)
    plain, single, dynamic, own, drafted = measurement.interleave(ways, options.rounds)
    return Row(
        quantisation,
        attention,
        name,
        engine.facts.dtype,
        engine.facts.weight_bytes,
        peak,
        plain.median,
        single.median,
        dynamic.median,
        own.median,
        own.p99,
        own.ratio,
        forwards(engine),
        drafted.median,
        loaded,
    )


def load(options: argparse.Namespace, quantisation: str, attention: str) -> GeneralistEngine:
    return load_generalist(
        options.profile,
        checkpoint=options.checkpoint or shipped(options.profile, "generalist"),
        device=options.device,
        dtype=options.dtype,
        attention=attention,
        quantisation=quantisation,
        constrained=True,
    )


def verify(options: argparse.Namespace) -> int:
    """Prints the check of the tokens; returns 1 if one differs that must not."""
    engine = load(options, options.quantisation[0], options.attention[0])
    checks = identity.check(engine, options.identity)
    for decoding, alike in (("decoding", True), ("decoding that rounds otherwise", False)):
        rows = [(c.name, str(c.prompts), str(c.identical), f"{c.forwards / c.prompts:.1f}") for c in checks
                if c.alike == alike]  # fmt: skip
        if rows:
            measurement.markdown(*rows, header=(decoding, "prompts", "identical", "forwards per 64 tokens"))
    if options.json:
        measurement.write(options.json, "identity", checks, machine=measurement.machine(PACKAGES))
    return 0 if all(check.identical == check.prompts for check in checks if check.alike) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if nothing could be measured, a ratio has fallen or a token differs."""
    parser = argparse.ArgumentParser(prog="benchmarks.generalist", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="robodual-7b", choices=sorted(PROFILES))
    parser.add_argument("--checkpoint", help="a folder or hub id; without it the profile's own weights, or random ones")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--quantisation", nargs="+", default=list(QUANTISATIONS), choices=QUANTISATIONS)
    parser.add_argument("--attention", nargs="+", default=["sdpa", "flash_attention_2"], choices=ATTENTIONS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1, help="frames in one conditioning")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--identity",
        type=int,
        metavar="PROMPTS",
        help="instead: check the tokens of so many prompts, with the first quantisation and attention",
    )
    measurement.add_outputs(parser)
    options = parser.parse_args(argv)

    torch.set_num_threads(options.threads)
    if options.identity:
        return verify(options)
    measurement.markdown(header=HEADER)
    rows = []
    for quantisation, attention in product(options.quantisation, options.attention):
        rows.append(run(options, quantisation, attention))
        measurement.markdown(rows[-1].cells())
    facts = {
        "profile": options.profile,
        "batch": options.batch,
        "rounds": options.rounds,
        "threads": options.threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    title = f"generalist {options.profile}, a conditioning of {options.batch}"
    status = measurement.conclude(options, "generalist", title, rows, PACKAGES, **facts)
    return status if any(not row.reason for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
