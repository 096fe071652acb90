"""Whether a decoding step's layers run by Triton's kernels, and by which plan; without importing Triton."""

from __future__ import annotations

import importlib.util
import statistics
from typing import TYPE_CHECKING

import structlog
import torch
from torch import Tensor, nn

from robodual.capture import Recorder
from robodual.device import current, milliseconds
from robodual.generalist import layers
from robodual.generalist.joined import layers_of, linears
from robodual.generalist.model import Generalist
from robodual.generalist.quantisation import Float8Linear
from robodual.generalist.tokens import GENERATED, ROW

if TYPE_CHECKING:
    from robodual.generalist.fused import FusedLayers

logger = structlog.get_logger(__name__)

WHOLE = 128  # what every size must be a multiple of
DISTANCE = 0.05  # of what kernels give from what the operations give, at most; in bfloat16 it is 0.01
RUNS = 9  # of which the median is a plan's time
SLOTS = 384  # of the cache that plans are tried with, a usual prompt's


def fuse(model: Generalist) -> FusedLayers | None:
    """The model's layers by kernels, where that can be and gives what the operations give; by the fastest plan."""
    if not can_fuse(model):
        return None
    with current(model.device):
        try:
            from robodual.generalist.fused import FusedLayers  # it imports Triton
            from robodual.generalist.products import plans

            fused = FusedLayers(model)
            fused.try_ends()
        except Exception as error:  # a compiler, a cache folder, a driver: PyTorch's operations need none of them
            logger.warning("decoding runs without fused kernels", reason=_told(error))
            return None
        times, trial, expected, every = {}, Trial(model), None, plans(model.device)
        for name, plan in every.items():
            fused.plan = plan
            try:
                if not (apart := trial.distance(fused)) <= DISTANCE:
                    raise ArithmeticError(f"the kernels' values are {apart:.2g} of their norm from the operations'")
                median, values = trial.repeat(fused)
                expected = values if expected is None else expected
                if not torch.equal(values, expected):
                    raise ArithmeticError("the kernels' values are not those of the plan before, bit for bit")
                times[name] = median
            except Exception as error:
                logger.warning("decoding does without a plan for fused kernels", plan=name, reason=_told(error))
        if not times:
            return None
        chosen = min(times, key=times.__getitem__)
        fused.plan = every[chosen]
    logger.info("decoding runs by fused kernels", plan=chosen, ms={name: round(ms, 3) for name, ms in times.items()})
    return fused


def can_fuse(model: Generalist) -> bool:
    """Whether the model's layers are such as the kernels read: on a GPU, in bfloat16, plain or float8, with Triton."""
    config = model.config.language
    sizes = config.width, config.mlp_width, config.key_value_heads * (config.width // config.heads)
    kinds = {type(module) for layer in layers_of(model) for module in linears(layer)}
    return (
        model.device.type == "cuda"
        and model.dtype == torch.bfloat16
        and all(size % WHOLE == 0 for size in sizes)
        and config.width // config.heads in (32, 64, 128, 256)
        and (kinds == {nn.Linear} or kinds == {Float8Linear})
        and importlib.util.find_spec("triton") is not None
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class Trial:
    """A usual step to try kernels with: tokens after a prompt, with random values."""

    def __init__(self, model: Generalist) -> None:
        self._model = model
        config, device = model.config.language, model.device
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(model.dtype)

        self._x = random(1, GENERATED, config.width)
        self._cache = random(2, 1, 1, config.key_value_heads, SLOTS, config.width // config.heads)  # of one layer
        self._slots = SLOTS - GENERATED + torch.arange(GENERATED, device=device).unsqueeze(0)
        self._padding = self._slots.new_zeros(1, 1)
        self._angles = model.language_model.model.rotary_emb(self._x, self._slots)

    def distance(self, fused: FusedLayers) -> float:
        """How far a row's values after the first layer by kernels are from PyTorch's operations', of their norm."""
        cos, sin = (angle[:, :ROW] for angle in self._angles)
        x, slots, cache = self._x[:, :ROW], self._slots[:, :ROW], self._cache.clone()
        expected = layers.step(self._model, x, (cos, sin), slots, self._padding, *cache)
        return float((self.run(fused, 1) - expected).norm() / expected.norm())

    def run(self, fused: FusedLayers, count: int, tokens: int = ROW) -> Tensor:
        """The values [1, tokens, D] after `count` layers by kernels, which share their keys and values."""
        cos, sin = (angle[:, :tokens, : angle.shape[-1] // 2].contiguous() for angle in self._angles)
        cache = self._cache.expand(-1, count, *self._cache.shape[2:])
        stream, slots = fused.stream(self._x[0, :tokens].clone()), self._slots[:, :tokens].contiguous()
        return fused(stream, (cos, sin), slots, self._padding, *cache)

    def repeat(self, fused: FusedLayers) -> tuple[float, Tensor]:
        """The median time in milliseconds of all layers by kernels, captured as steps are, and their values of some
        tokens, others each time: [runs, 1, 8, D]. Where there is no GPU, 0 and one run.
        """
        count = self._model.config.language.layers
        if self._model.device.type != "cuda":
            return 0.0, self.run(fused, count).unsqueeze(0)
        graph, values = Recorder(self._model.device)(lambda: self.run(fused, count))
        times: list[float] = []
        found: list[Tensor] = []
        for _ in range(RUNS):
            self._x.copy_(self._x.roll(1, dims=-1))
            times.append(milliseconds(graph.replay))
            found.append(values.clone())
        self._x.copy_(self._x.roll(-RUNS, dims=-1))
        return statistics.median(times), torch.stack(found)
