"""What a training takes of a GPU's memory, computed without a GPU and without the memory.

    python -m benchmarks.footprint --batch-size 1 8 16 --json footprint.json

One optimiser step of each training (`robodual train`) runs on tensors that have shapes and no values, and the memory of
every tensor is counted while it lives: weights, gradients, AdamW's state, and what the forward pass keeps for the
backward pass. On a GPU, cuBLAS and the allocator's own losses come on top, a gigabyte or more. Operators are chosen as
on a CPU, whose fused attention keeps as much as a GPU's.
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks import measurement
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robodual.generalist.greedy import chunk_layout
from robodual.generalist.model import Generalist, build, place_rotary
from robodual.profiles import PROFILES
from robodual.specialist import ddim
from robodual.specialist.policy import Observation, Policy
from robodual.training import conditioner
from robodual.training.conditioner import Conditioner
from robodual.training.generalist import GeneralistLearner, Lora
from robodual.training.loop import Batch, Learner
from robodual.training.prompting import Prompts
from robodual.training.specialist import SpecialistBatch, SpecialistLearner

CPU = torch.device("cpu")
WORDS = 24  # tokens of a usual prompt
Given = Callable[[int], Batch]


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that live, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: dict[int, int] = {}

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, identity: int) -> None:
        self.now -= self._known.pop(identity)

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result


def step(learner: Learner[Batch], model: nn.Module, batch: Batch) -> tuple[float, float]:
    """GB of the weights, and at most during one optimiser step after the first."""
    living = Living()
    for module in (learner, model):
        for tensor in (*module.parameters(), *module.buffers()):
            living.count(tensor)
    weights = living.now
    trained = [value for value in learner.parameters() if value.requires_grad]
    with living:
        # AdamW's state, as after its first step; the step itself, which reads values, takes one more of this size.
        state = [torch.empty_like(value) for value in trained for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = learner(batch)
        loss.backward()
        of_step = [torch.empty_like(value) for value in trained]
        del loss, state, of_step
    return weights / 1e9, living.most / 1e9


@contextmanager
def without_values() -> Iterator[None]:
    """Tensors that are made within have no values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.may_turn_const = lambda t: False  # type: ignore[method-assign]  # nor small ones
    # Tokens become actions by their values, on the host.
    with mode, patch.object(conditioner, "chunks", lambda tokens, ids: torch.empty(len(tokens), 8, 7)):
        yield
    chunk_layout.cache_clear()  # they keep tensors
    ddim.alphas_cumprod.cache_clear()


def materialise(module: nn.Module) -> None:
    """Gives a module tensors in the place of those on the meta device."""
    for part in module.modules():
        holders: tuple[dict[str, Any], ...] = part._parameters, part._buffers
        for held in holders:
            for name, value in held.items():
                if value is not None and value.is_meta:
                    empty = torch.empty(value.shape, dtype=value.dtype)
                    kept = isinstance(value, nn.Parameter)
                    held[name] = nn.Parameter(empty, requires_grad=value.requires_grad) if kept else empty


def prompts(size: int, side: int) -> Prompts:
    words = [torch.ones(WORDS, dtype=torch.int64) for _ in range(size)]
    return Prompts(torch.empty(size, 6, side, side), words, torch.ones(size, 64, dtype=torch.int64))


def observed(size: int, side: int, frames: Prompts) -> SpecialistBatch:
    """Of CALVIN's cameras."""
    picture = (size, 3, side, side)
    return SpecialistBatch(
        Observation(
            rgb_static=torch.empty(picture),
            rgb_static_previous=torch.empty(picture),
            proprio=torch.empty(size, 7),
            depth_static=torch.empty(size, 200, 200),
            rgb_gripper=torch.empty(picture),
            depth_gripper=torch.empty(size, 84, 84),
            rgb_tactile=None,
        ),
        actions=torch.empty(size, 8, 7),
        noise=torch.empty(size, 8, 7),
        timesteps=torch.ones(size, dtype=torch.int64),
        keep=torch.ones(size),
        left=torch.ones(size, dtype=torch.int64),
        prompts=frames,
        conditioning=None,
    )


def trainings(profile: str) -> dict[str, Callable[[], tuple[Learner[Any], Generalist, Given]]]:
    """By name, what makes a learner on the meta device, the generalist in it or beside it, and batches."""
    pair = PROFILES[profile]
    side = pair.generalist.images.size

    def model(dtype: torch.dtype = torch.bfloat16) -> Generalist:
        return build(pair.generalist, attention="sdpa", dtype=dtype)

    def generalist(whole: Generalist, lora: Lora | None, saving: bool) -> tuple[Learner[Any], Generalist, Given]:
        learner = GeneralistLearner(
            whole, pair.tokenizer(pair.generalist.tokens), lora=lora, constrained=True, gradient_checkpointing=saving
        )
        return learner, whole, lambda size: prompts(size, side)

    def specialist() -> tuple[Learner[Any], Generalist, Given]:
        with torch.device("meta"):
            policy = Policy(pair.specialist)
        policy.vision_encoder.requires_grad_(False)
        frozen = model()
        learner = SpecialistLearner(policy, Conditioner(frozen, constrained=True))
        return learner, frozen, lambda size: observed(size, pair.specialist.image_size, prompts(size, side))

    return {
        "generalist, LoRA 32": lambda: generalist(model(), Lora(), saving=False),
        "generalist, LoRA 32, --gradient_checkpointing": lambda: generalist(model(), Lora(), saving=True),
        "generalist, --full, one process": lambda: generalist(model(torch.float32), None, saving=False),
        "generalist, --full --gradient_checkpointing": lambda: generalist(model(torch.float32), None, saving=True),
        "specialist beside the frozen generalist": specialist,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table for docs/training.md."""
    parser = argparse.ArgumentParser(prog="benchmarks.footprint", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="robodual-7b", choices=sorted(PROFILES))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--json", type=Path, help="where to write the record")
    options = parser.parse_args(argv)
    rows = []
    header = ["training", "weights GB", *(f"batch of {size}" for size in options.batch_size)]
    for name, make in trainings(options.profile).items():
        most = []
        for size in options.batch_size:
            learner, model, given = make()
            with without_values():
                materialise(learner)
                materialise(model)
                place_rotary(model, CPU)
                weights, at_most = step(learner.train(), model, given(size))
            most.append(at_most)
        rows.append({"training": name, "weights": weights, "most": dict(zip(options.batch_size, most))})
        measurement.markdown([name, f"{weights:.1f}", *(f"{value:.1f}" for value in most)], header=header)
        header = []
    if options.json:
        record = {"benchmark": "footprint", "profile": options.profile, "rows": rows}
        options.json.write_text(
            json.dumps({**record, "machine": measurement.machine(("torch", "peft"))}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
