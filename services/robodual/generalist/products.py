"""How the products of a decoding step are divided among a GPU's processors, and launched. It imports Triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robodual.chained import chaining
from robodual.device import can_chain, padded
from robodual.generalist import kernels
from robodual.generalist.joined import Matrix

MOST_ROWS = 64  # beyond, products are no longer bound by the weights' reading, and cuBLAS is as good
NARROW = 16  # rows up to which the stages are those of the tile
WIDE_STAGES = 3  # and of more
LEAST_STAGES = 2
ALIGNED = 8  # columns that are written at once
LINE = 128  # bytes that a GPU brings near at once
SMALL = 99 * 1024  # bytes that a program can share on the smallest of GPUs from Ampere on
FEW = 5  # processors of what is no GPU


@dataclass(frozen=True)
class Tile:
    """What a program of one kind of product has at once, and how it gets it."""

    columns: int
    part: int  # of the depth
    stages: int
    warps: int
    ahead: int = 0  # parts of the weight that are brought near before the kernel before has ended
    even: bool = False  # fewer columns, so that each processor has as many programs


@dataclass(frozen=True)
class Plan:
    """A way to launch a step: it changes when things are computed, and no bit of them."""

    tiles: Mapping[str, Tile]
    chained: bool = False  # a kernel starts before the one before has ended, with what does not depend on it


# What is added to the residual stream has the same columns in all plans: a norm's sums are theirs. The other layers'
# products have 64 or more, from which on Triton multiplies by instructions of another kind, which may round otherwise.
APART = Plan(
    {
        "qkv": Tile(64, 128, 4, 4),
        "out": Tile(32, 256, 4, 4),
        "gate_up": Tile(64, 128, 3, 4),
        "down": Tile(32, 256, 4, 4),
        "head": Tile(16, 256, 4, 4),
    }
)
# One program a processor, so that all of the next kernel are there before this one's end, one a processor again.
CHAINED = Plan(
    {
        "qkv": Tile(128, 128, 3, 8, ahead=1, even=True),
        "out": Tile(32, 256, 5, 4, ahead=2),
        "gate_up": Tile(128, 64, 3, 8, ahead=2, even=True),
        "down": Tile(32, 256, 5, 4, ahead=2),
        "head": Tile(16, 256, 4, 4),
    },
    chained=True,
)


def plans(device: torch.device) -> dict[str, Plan]:
    """Those that a device can follow."""
    return {"apart": APART, **({"chained": CHAINED} if can_chain(device) else {})}


@dataclass(frozen=True)
class Stream:
    """The residual stream, and what the next norm needs of it."""

    x: Tensor  # [R, D]
    normed: Tensor  # [R, D], times the norm's weight, not yet divided
    squares: Tensor  # float32 [R, S], sums of squares of parts of a row


class Products:
    """The products of one model's steps on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, epsilon: float) -> None:
        """epsilon: the norms'."""
        self.plan = APART
        self._epsilon, self._size = epsilon, dtype.itemsize
        self._processors, self._shared = FEW, 1 << 30
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device)
            self._processors = found.multi_processor_count
            # Less what compilers take for themselves.
            self._shared = int(getattr(found, "shared_memory_per_block_optin", SMALL)) - 4096

    def takes(self, rows: int) -> bool:
        """Whether so many rows are what they are for, and fit what a processor of this GPU shares."""
        return rows <= MOST_ROWS and all(
            self._fitting(rows, tile.columns * (1 + (name == "gate_up")), tile.part) >= LEAST_STAGES
            for name, tile in self.plan.tiles.items()
        )

    def add(self, name: str, x: Tensor, matrix: Matrix, residual: Tensor, norm: Tensor) -> Stream:
        """The residual stream after x [R, K] times a matrix is added, ready for the norm of that weight."""
        rows, columns = residual.shape
        sums = torch.empty(rows, -(-columns // self._each(self.plan.tiles[name], columns)), device=x.device)
        stream = Stream(residual, torch.empty_like(residual), sums)
        self.linear(name, x, matrix, residual, stream=stream, norm=norm)
        return stream

    def linear(
        self,
        name: str,
        x: Tensor,
        matrix: Matrix,
        out: Tensor,
        *,
        squares: Tensor | None = None,
        stream: Stream | None = None,
        norm: Tensor | None = None,
        gated: bool = False,
    ) -> None:
        """x [R, K] times a matrix, to out [R, N]; the rest as in the kernel."""
        (rows, depth), columns, tile = x.shape, out.shape[1], self.plan.tiles[name]
        each, part = self._each(tile, columns), min(tile.part, depth & -depth)
        most = padded(each)
        stages = min(tile.stages if rows <= NARROW else WIDE_STAGES, self._fitting(rows, most * (1 + gated), part))
        kernels.linear[(-(-columns // each),)](
            x,
            matrix.weight,
            matrix.weight if matrix.scale is None else matrix.scale,
            squares,
            out,
            norm,
            out,
            None if stream is None else stream.normed,
            None if stream is None else stream.squares,
            rows,
            columns,
            self._epsilon,
            DEPTH=depth,
            NORMED=squares is not None,
            SUMS=1 if squares is None else squares.shape[1],
            MOST_SUMS=1 if squares is None else padded(squares.shape[1]),
            GATED=gated,
            ADDED=stream is not None,
            SCALED=matrix.scale is not None,
            ROWS=padded(rows),
            EACH=each,
            COLUMNS=most,
            PART=part,
            STAGES=stages,
            AHEAD=min(tile.ahead, depth // part),
            LINE=min(part, LINE // matrix.weight.element_size()),
            num_warps=tile.warps,
            **chaining(self.plan.chained),
        )

    def _each(self, tile: Tile, columns: int) -> int:
        """Columns of a program."""
        programs = -(-columns // tile.columns)
        if tile.even:
            programs = -(-programs // self._processors) * self._processors
        return -(-columns // programs // ALIGNED) * ALIGNED

    def _fitting(self, rows: int, columns: int, part: int) -> int:
        """How many parts of so many rows of x, and rows of a weight, fit the memory that a program's threads share."""
        return self._shared // ((padded(rows) + columns) * part * self._size)
