"""Host memory that loading a generalist's checkpoint takes: the peak, against the weights and the largest shard.

    python -m benchmarks.loading --megabytes 400 --shards 4

Writes random bfloat16 weights in the published layout to a temporary folder, loads them in a process of their own on
the CPU, and prints how far its resident memory rose at most (Linux). On a CPU the weights stay in that memory, so the
bound is weights + largest shard + slack; on a GPU they leave it, and the largest shard is what remains. The same for
`robodual inspect`, which keeps no weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from robodual import tensor_file
from robodual.generalist.config import GeneralistConfig, LanguageConfig
from robodual.generalist.engine import load_generalist
from robodual.generalist.model import build
from robodual.generalist.tokenizer import byte_tokenizer
from robodual.inspection import inspect

MB = 1 << 20
SLACK = 64  # MB: allocator, thread pools, what the first use of a library takes
LAYER = 12_587_008  # values of one layer below
BLOCK = np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32)


def shapes(megabytes: int) -> GeneralistConfig:
    """The toy generalist with a Llama of width 1024 that takes about so much in bfloat16."""
    layers = max(2, megabytes * MB // (2 * LAYER))
    language = LanguageConfig(580, 1024, 2730, layers, heads=8, key_value_heads=8, positions=4096)
    return replace(GeneralistConfig.toy(), language=language)


def write(folder: Path, config: GeneralistConfig, shards: int) -> list[Path]:
    """A folder with weights in so many shards, no more than one of which is in memory at a time."""
    model = build(config, attention="sdpa", dtype=torch.bfloat16)
    names = list(model.state_dict())
    files = []
    placed: dict[str, str] = {}
    for number, part in enumerate(np.array_split(np.array(names), shards), start=1):
        path = folder / f"model-{number:05d}-of-{shards:05d}.safetensors"
        sizes = {name: model.state_dict()[name].shape for name in map(str, part)}
        tensor_file.write({name: _draw(shape) for name, shape in sizes.items()}, path, {"format": "pt"})
        placed |= dict.fromkeys(sizes, path.name)
        files.append(path)
    index = {"metadata": {"total_size": sum(file.stat().st_size for file in files)}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config.to_huggingface()))
    (folder / "preprocessor_config.json").write_text(json.dumps(config.images.to_huggingface()))
    byte_tokenizer(config.tokens).save(str(folder / "tokenizer.json"))
    return files


def _draw(shape: torch.Size) -> torch.Tensor:
    values = np.resize(0.02 * BLOCK, shape.numel())
    return torch.from_numpy(values).to(torch.bfloat16).view(shape)


def measure(action: str, folder: Path) -> dict[str, float]:
    """In a fresh process: MB of resident memory that the action added at most, and that it left."""
    # What any first use costs is not what the checkpoint costs.
    load_generalist("toy", device="cpu")
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    if action == "load":
        kept: object = load_generalist("toy", checkpoint=folder, device="cpu", dtype="bfloat16")
    else:
        kept = inspect(folder, dtype="bfloat16")
    found = {"peak": _memory("VmHWM") - before, "after": _memory("VmRSS") - before}
    del kept
    return found


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def results(megabytes: int, shards: int) -> Iterator[dict[str, object]]:
    """For each action: MB of weights, of the largest shard, added at the peak, and the bound."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = [file.stat().st_size / MB for file in write(folder, shapes(megabytes), shards)]
        for action, kept in (("load", sum(sizes)), ("inspect", 0.0)):
            command = [sys.executable, "-m", "benchmarks.loading", "--measure", action, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            figures = json.loads(done.stdout)
            bound = kept + max(sizes) + SLACK
            yield {
                "action": action,
                "weights": sum(sizes),
                "shards": shards,
                "largest_shard": max(sizes),
                **figures,
                "bound": bound,
                "within": figures["peak"] <= bound,
            }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if a peak is above its bound."""
    parser = argparse.ArgumentParser(prog="benchmarks.loading", description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400, help="of weights, about")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--measure", nargs=2, metavar=("ACTION", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return 0
    rows = list(results(options.megabytes, options.shards))
    print("| | weights MB | largest shard MB | peak above baseline MB | left after MB | bound MB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        figures = [f"{row[name]:.0f}" for name in ("weights", "largest_shard", "peak", "after", "bound")]
        print(f"| {row['action']} | {' | '.join(figures)} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
