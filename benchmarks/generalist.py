"""Memory and time of a conditioning: the generalist in bfloat16, int8 and nf4, with each attention.

    python -m benchmarks.generalist --rounds 20 --json generalist.json

Loads the profile with random weights (or a checkpoint) once for each pair of quantisation and attention, and times
whole conditionings: frame and instruction in, reference chunk and hidden states out. Decoding is constrained, so that
random weights take as many forwards as trained ones, whose free decoding keeps to the layout by itself. What the
machine cannot do is listed with the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from benchmarks import measurement

from robodual.generalist.decoding import decode
from robodual.generalist.engine import ATTENTIONS, GeneralistEngine, load_generalist
from robodual.generalist.quantisation import QUANTISATIONS
from robodual.profiles import PROFILES

PACKAGES = ("torch", "transformers", "robodual")
INSTRUCTION = "push the sliding door to the left side"
GB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One way to run the model: memory in bytes, times in milliseconds, forwards through the Llama of one conditioning.

    `peak_bytes` is the device's allocated memory at most while conditioning, on CUDA; `reason` says why a row is empty.
    """

    quantisation: str
    attention: str
    dtype: str = ""
    weight_bytes: int = 0
    peak_bytes: int | None = None
    median: float = 0.0
    p99: float = 0.0
    forwards: int = 0
    seconds_to_load: float = 0.0
    reason: str = ""

    def cells(self) -> list[str]:
        if self.reason:
            return [self.quantisation, self.attention, f"not measured: {self.reason}", "", "", "", "", "", ""]
        peak = "" if self.peak_bytes is None else f"{self.peak_bytes / GB:.3f}"
        times = [f"{self.median:.1f}", f"{self.p99:.1f}", str(self.forwards), f"{self.seconds_to_load:.1f}"]
        return [self.quantisation, self.attention, self.dtype, f"{self.weight_bytes / GB:.3f}", peak, *times]


def frame() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)


def forwards(engine: GeneralistEngine) -> int:
    """Passes through the Llama that one conditioning takes, prefill included."""
    device = engine.model.device
    pixels = engine.processor.pixels([frame()]).to(device, engine.model.dtype)
    prompt = torch.tensor(engine.processor.prompt(INSTRUCTION), device=device)
    return decode(engine.model, pixels, [prompt], constrained=engine.constrained).forwards


def measure(engine: GeneralistEngine, rounds: int, batch: int, warmup: int = 3) -> tuple[list[float], int | None]:
    """Milliseconds of each conditioning of `batch` frames, and the peak of the device's memory meanwhile."""
    device = engine.model.device
    frames, instructions = [frame()] * batch, [INSTRUCTION] * batch
    times = []
    for position in range(-warmup, rounds):
        if position == 0 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        engine.think(frames, instructions)  # ends on the host, so nothing is left to wait for
        if position >= 0:
            times.append((time.perf_counter() - start) * 1e3)
    return times, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def run(options: argparse.Namespace, quantisation: str, attention: str) -> Row:
    try:
        return measured(options, quantisation, attention)
    except ValueError as error:
        return Row(quantisation, attention, reason=str(error))
    except torch.OutOfMemoryError:
        return Row(quantisation, attention, reason="out of device memory")
    finally:
        # The next one needs the memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measured(options: argparse.Namespace, quantisation: str, attention: str) -> Row:
    """Raises ValueError that names what the machine cannot do."""
    start = time.perf_counter()
    engine = load_generalist(
        options.profile,
        checkpoint=options.checkpoint,
        device=options.device,
        dtype=options.dtype,
        attention=attention,
        quantisation=quantisation,
        constrained=True,
    )
    loaded = time.perf_counter() - start
    times, peak = measure(engine, options.rounds, options.batch)
    return Row(
        quantisation,
        attention,
        engine.facts.dtype,
        engine.facts.weight_bytes,
        peak,
        statistics.median(times),
        sorted(times)[min(len(times) - 1, int(0.99 * len(times)))],
        forwards(engine),
        loaded,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if nothing could be measured."""
    parser = argparse.ArgumentParser(prog="benchmarks.generalist", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="robodual-7b", choices=sorted(PROFILES))
    parser.add_argument("--checkpoint", help="a folder or hub id; random weights without it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--quantisation", nargs="+", default=list(QUANTISATIONS), choices=QUANTISATIONS)
    parser.add_argument("--attention", nargs="+", default=["sdpa", "flash_attention_2"], choices=ATTENTIONS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1, help="frames in one conditioning")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where to write the record")
    options = parser.parse_args(argv)

    torch.set_num_threads(options.threads)
    header = "quantisation", "attention", "dtype", "weights GB", "peak GB", "median ms", "p99 ms", "forwards", "load s"
    print(f"| {' | '.join(header)} |")
    print("|---" * len(header) + "|")
    rows = []
    for quantisation, attention in product(options.quantisation, options.attention):
        rows.append(run(options, quantisation, attention))
        print(f"| {' | '.join(rows[-1].cells())} |", flush=True)
    if options.json:
        record = {
            "benchmark": "generalist",
            "profile": options.profile,
            "batch": options.batch,
            "rounds": options.rounds,
            "threads": options.threads,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "machine": measurement.machine(PACKAGES),
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if any(not row.reason for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
