"""A decoding step's layers as five Triton kernels each, for a GPU that would else wait for launches between small ones.

A step of a few tokens costs what reading its weights costs. Each kernel here reads its part of them in one stream, and
does the small things before and after the product where they cost nothing. A norm is spread over two: the kernel that
adds to the residual stream also leaves the sums of its squares and the values times the norm's weight, and the next one
scales what it has multiplied.

Tensor names: R rows (sequences times new tokens), D the width, H heads of width W, K key-value heads, M slots, S sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)  # the score of what must not be seen: finite, so that no difference of two is NaN


@triton.jit
def linear(
    x,  # [R, DEPTH]
    weight,  # [columns, DEPTH]; GATED: [2 * columns, DEPTH], the gates' rows first
    scale,  # float8 weights' [columns] or [2 * columns]
    squares,  # float32 [R, SUMS], NORMED: of x before its norm's weight
    residual,  # [R, columns]
    norm,  # [columns], ADDED: the weight of the norm that follows
    out,  # [R, columns]
    following,  # [R, columns], ADDED: `out` times `norm`
    sums,  # float32 [R, programs], ADDED: of the squares of `out`
    rows,
    columns,
    epsilon,
    DEPTH: tl.constexpr,
    NORMED: tl.constexpr,  # the products are divided by the root mean square of x
    SUMS: tl.constexpr,
    MOST_SUMS: tl.constexpr,  # a power of two that holds them
    GATED: tl.constexpr,  # the SiLU of one product times another
    ADDED: tl.constexpr,  # the residual is added
    SCALED: tl.constexpr,  # the weight is float8
    ROWS: tl.constexpr,  # at least R
    COLUMNS: tl.constexpr,  # of one program
    PART: tl.constexpr,  # of the depth, at once
    STAGES: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    depth = tl.arange(0, PART)
    inside = row[:, None] < rows
    sources = x + row[:, None] * DEPTH + depth[None, :]
    weights = weight + column[:, None].to(tl.int64) * DEPTH + depth[None, :]
    others = weights + columns.to(tl.int64) * DEPTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    other = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, DEPTH, PART, num_stages=STAGES):
        values = tl.load(sources + start, mask=inside, other=0.0)
        own = tl.load(weights + start)
        total = tl.dot(values, own.to(values.dtype).T, total, input_precision="ieee")
        if GATED:
            second = tl.load(others + start)
            other = tl.dot(values, second.to(values.dtype).T, other, input_precision="ieee")
    if SCALED:
        total *= tl.load(scale + column).to(tl.float32)[None, :]
        if GATED:
            other *= tl.load(scale + columns + column).to(tl.float32)[None, :]
    if NORMED:
        each = tl.arange(0, MOST_SUMS)[None, :]
        parts = tl.load(squares + row[:, None] * SUMS + each, mask=inside & (each < SUMS), other=0.0)
        square = tl.sum(parts, axis=1)
        inverse = 1.0 / tl.sqrt(square / DEPTH + epsilon)
        total *= inverse[:, None]
        other *= inverse[:, None]
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * other
    places = row[:, None] * columns + column[None, :]
    if ADDED:
        total += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    stored = total.to(out.dtype.element_ty)
    tl.store(out + places, stored, mask=inside)
    if ADDED:
        tl.store(following + places, stored * tl.load(norm + column)[None, :], mask=inside)
        wide = stored.to(tl.float32)
        target = sums + row * tl.num_programs(0) + tl.program_id(0)
        tl.store(target, tl.sum(wide * wide, axis=1), mask=row < rows)


@triton.jit
def rotate(
    qkv,  # [B * T, (H + 2 K) * W]
    cos,  # [B * T, W / 2]
    sin,  # [B * T, W / 2]
    queries,  # [B, H, T, W]
    keys,  # [B, K, M, W]
    values,  # [B, K, M, W]
    count,  # T
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Of one sequence, one head and PART tokens of a prompt a program: rotates what is to be, and puts it in its place.

    Keys and values go to the first T slots.
    """
    sequence, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = WIDTH // 2
    token = tl.program_id(2) * PART + tl.arange(0, PART)
    channel = tl.arange(0, half)
    inside = (token < count)[:, None]
    row = sequence * count + token
    source = qkv + row[:, None] * ((HEADS + 2 * GROUPS) * WIDTH) + head * WIDTH + channel[None, :]
    x1 = tl.load(source, mask=inside, other=0.0)
    x2 = tl.load(source + half, mask=inside, other=0.0)
    kind = x1.dtype
    angles = row[:, None] * half + channel[None, :]
    if head < HEADS + GROUPS:
        c = tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)
        turned = (x1.to(tl.float32) * c - x2.to(tl.float32) * s).to(kind)
        x2 = (x2.to(tl.float32) * c + x1.to(tl.float32) * s).to(kind)
        x1 = turned
    places = token[:, None] * WIDTH + channel[None, :]
    if head < HEADS:
        target = queries + (sequence * HEADS + head).to(tl.int64) * count * WIDTH + places
        tl.store(target, x1, mask=inside)
        tl.store(target + half, x2, mask=inside)
    elif head < HEADS + GROUPS:
        target = keys + (sequence * GROUPS + head - HEADS).to(tl.int64) * SLOTS * WIDTH + places
        tl.store(target, x1, mask=inside)
        tl.store(target + half, x2, mask=inside)
    else:
        target = values + (sequence * GROUPS + head - HEADS - GROUPS).to(tl.int64) * SLOTS * WIDTH + places
        tl.store(target, x1, mask=inside)
        tl.store(target + half, x2, mask=inside)


@triton.jit
def gate(
    both,  # [R, 2 * COLUMNS], the gates first
    out,  # [R, COLUMNS]
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """The SiLU of the gates times the rest: PART columns of one row a program."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART + tl.arange(0, PART)
    inside = column < COLUMNS
    x = tl.load(both + row * (2 * COLUMNS) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * (2 * COLUMNS) + COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * COLUMNS + column, (x / (1.0 + tl.exp(-x)) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def attention(
    qkv,  # [R, (H + 2 K) * W]
    keys,  # [B, K, M, W], to which it writes the new ones; what is beyond them is not read
    values,  # the same
    cos,  # [R, W / 2]
    sin,  # [R, W / 2]
    slots,  # int64 [R], of the new tokens; a sequence's last is its largest
    padding,  # int64 [B], slots in front that do not count
    out,  # [R, H * W]
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    COUNT: tl.constexpr,  # new tokens of a sequence
    QUERIES: tl.constexpr,  # at least COUNT times the heads of a group
    NEW: tl.constexpr,  # at least COUNT
    PART: tl.constexpr,  # slots at once
    STAGES: tl.constexpr,
):
    """Of one sequence and key-value head a program: rotates queries and keys, keeps keys and values, attends.

    New keys and values are read back from their slots with the old ones, in the same parts and order whichever token is
    the first: so that a token's bits do not depend on how many were fed with it.
    """
    sequence, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    half: tl.constexpr = WIDTH // 2
    stride: tl.constexpr = (HEADS + 2 * GROUPS) * WIDTH
    low, channel = tl.arange(0, half), tl.arange(0, WIDTH)

    query = tl.arange(0, QUERIES)  # the heads of the group, a row of new tokens each
    counts = query < COUNT * (HEADS // GROUPS)
    row = sequence * COUNT + query % COUNT
    head = group * (HEADS // GROUPS) + query // COUNT
    own = qkv + row[:, None] * stride + head[:, None] * WIDTH + low[None, :]
    q1 = tl.load(own, mask=counts[:, None], other=0.0).to(tl.float32)
    q2 = tl.load(own + half, mask=counts[:, None], other=0.0).to(tl.float32)
    c = tl.load(cos + row[:, None] * half + low[None, :], mask=counts[:, None], other=0.0).to(tl.float32)
    s = tl.load(sin + row[:, None] * half + low[None, :], mask=counts[:, None], other=0.0).to(tl.float32)
    kind = qkv.dtype.element_ty
    turned1, turned2 = (q1 * c - q2 * s).to(kind), (q2 * c + q1 * s).to(kind)
    # What is no query sees all, so that nothing is divided by zero.
    place = tl.load(slots + row, mask=counts, other=SLOTS)

    new = tl.arange(0, NEW)
    there = new < COUNT
    new_row = sequence * COUNT + new
    own = qkv + new_row[:, None] * stride + (HEADS + group) * WIDTH + low[None, :]
    k1 = tl.load(own, mask=there[:, None], other=0.0).to(tl.float32)
    k2 = tl.load(own + half, mask=there[:, None], other=0.0).to(tl.float32)
    c = tl.load(cos + new_row[:, None] * half + low[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    s = tl.load(sin + new_row[:, None] * half + low[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    kept1, kept2 = (k1 * c - k2 * s).to(kind), (k2 * c + k1 * s).to(kind)
    source = qkv + new_row[:, None] * stride + (HEADS + GROUPS + group) * WIDTH + channel[None, :]
    v = tl.load(source, mask=there[:, None], other=0.0)
    slot = tl.load(slots + new_row, mask=there, other=0)
    cache = (sequence * GROUPS + group).to(tl.int64) * SLOTS * WIDTH
    target = keys + cache + slot[:, None] * WIDTH + low[None, :]
    tl.store(target, kept1, mask=there[:, None])
    tl.store(target + half, kept2, mask=there[:, None])
    tl.store(values + cache + slot[:, None] * WIDTH + channel[None, :], v, mask=there[:, None])

    tl.debug_barrier()

    most = tl.full((QUERIES,), HIDDEN, tl.float32)
    sums = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, WIDTH), tl.float32)
    last, in_front = tl.load(slots + sequence * COUNT + COUNT - 1), tl.load(padding + sequence)
    for start in tl.range(0, SLOTS, PART, num_stages=STAGES):
        here = start + tl.arange(0, PART)
        filled = (here <= last) & (here >= in_front)
        near = keys + cache + here[:, None] * WIDTH + low[None, :]
        part1 = tl.load(near, mask=filled[:, None], other=0.0)
        part2 = tl.load(near + half, mask=filled[:, None], other=0.0)
        part_v = tl.load(values + cache + here[:, None] * WIDTH + channel[None, :], mask=filled[:, None], other=0.0)
        scores = tl.dot(turned1, part1.T, input_precision="ieee")
        scores = tl.dot(turned2, part2.T, scores, input_precision="ieee") * scale
        scores = tl.where(filled[None, :] & (here[None, :] <= place[:, None]), scores, HIDDEN)
        higher = tl.maximum(most, tl.max(scores, axis=1))
        shares, fading = tl.exp(scores - higher[:, None]), tl.exp(most - higher)
        sums = sums * fading + tl.sum(shares, axis=1)
        mixed = tl.dot(shares.to(kind), part_v, mixed * fading[:, None], input_precision="ieee")
        most = higher
    mixed = mixed / sums[:, None]
    target = out + row[:, None] * (HEADS * WIDTH) + head[:, None] * WIDTH + channel[None, :]
    tl.store(target, mixed.to(kind), mask=counts[:, None])
