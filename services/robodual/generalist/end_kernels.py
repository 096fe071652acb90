"""The two ends of a decoding step as Triton kernels: what stands before its layers, and what follows its answers.

stepping.py's `_step` says the same in PyTorch's operations, some sixty small ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def begin(
    tokens,  # int64 [B, ALL]
    place,  # int64 [B], the last sure token's in the chunk
    length,  # int64 [1], slots of the prompt
    padding,  # int64 [B], slots in front that do not count
    table,  # [V, D], of embeddings
    frequencies,  # float32 [HALF], of the rotation
    norm,  # [D], the first layer's
    x,  # [R, D], embedded
    normed,  # [R, D], times the norm's weight
    squares,  # float32 [R], sums of squares
    cos,  # [R, HALF]
    sin,  # [R, HALF]
    slots,  # int64 [R]
    COUNT: tl.constexpr,  # new tokens of a sequence
    ALL: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    MOST: tl.constexpr,  # a power of two that holds D
    HALF: tl.constexpr,
):
    """One new token a program."""
    row = tl.program_id(0)
    sequence = row // COUNT
    own = tl.minimum(tl.load(place + sequence) + row % COUNT, LAST)
    slot = tl.load(length) + own
    tl.store(slots + row, slot)
    channel = tl.arange(0, HALF)
    angles = (slot - tl.load(padding + sequence)).to(tl.float32) * tl.load(frequencies + channel)
    tl.store(cos + row * HALF + channel, tl.cos(angles).to(cos.dtype.element_ty))
    tl.store(sin + row * HALF + channel, tl.sin(angles).to(sin.dtype.element_ty))
    token = tl.maximum(tl.load(tokens + sequence * ALL + own), 0)
    column = tl.arange(0, MOST)
    values = tl.load(table + token * D + column, mask=column < D, other=0.0)
    weight = tl.load(norm + column, mask=column < D, other=0.0)
    tl.store(x + row * D + column, values, mask=column < D)
    tl.store(normed + row * D + column, values * weight, mask=column < D)
    wide = values.to(tl.float32)
    tl.store(squares + row, tl.sum(wide * wide, axis=0))


@triton.jit
def conclude(
    best,  # int64 [B, COUNT], the best tokens after those that were fed, or of the actions' where CONSTRAINED
    tokens,  # int64 [B, ALL]
    place,  # int64 [B]
    limit,  # int64 [1], guesses that may count
    layout,  # int64 [LAST + 1]
    COUNT: tl.constexpr,
    MOST: tl.constexpr,  # a power of two that holds it
    ALL: tl.constexpr,
    LAST: tl.constexpr,
    ROW: tl.constexpr,
    FIRST_ACTION: tl.constexpr,
    CONSTRAINED: tl.constexpr,
    REFINING: tl.constexpr,
):
    """Keeps the guesses of one sequence that are right, and one answer more."""
    sequence = tl.program_id(0)
    number = tl.arange(0, MOST)
    real = number < COUNT
    before = tl.load(place + sequence)
    own = tokens + sequence * ALL
    following = before + 1 + number
    rule = tl.load(layout + tl.minimum(following, LAST))
    answer = tl.load(best + sequence * COUNT + number, mask=real, other=0)
    if CONSTRAINED:
        answer = tl.where(rule < 0, answer + FIRST_ACTION, rule)
    target = tl.minimum(following, LAST + 1)
    guess = tl.load(own + target)
    beyond = tl.minimum(following + ROW, LAST + 1)
    there = tl.load(own + beyond)
    rule_there = tl.load(layout + tl.minimum(beyond, LAST))
    wrong = tl.where((answer == guess) & (number < tl.load(limit)), 0, 1)
    kept = real & (tl.cumsum(wrong, axis=0) - wrong == 0)
    better = kept
    tl.debug_barrier()  # all has been read
    if REFINING:
        tl.store(own + beyond, tl.where(rule_there < 0, answer, there), mask=real)
        better = better | (rule < 0)
        tl.debug_barrier()
    tl.store(own + target, tl.where(better, answer, guess), mask=real)
    tl.store(place + sequence, tl.minimum(before + tl.sum(kept.to(tl.int64), axis=0), LAST))
