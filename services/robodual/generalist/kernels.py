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

from robodual.chained import wait

HIDDEN = tl.constexpr(-1e30)  # the score of what must not be seen: finite, so that no difference of two is NaN


@triton.jit
def _bring(pointers):
    """Has what lies there brought to the second-level cache, without waiting for it."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


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
    EACH: tl.constexpr,  # columns of one program
    COLUMNS: tl.constexpr,  # a power of two that holds them
    PART: tl.constexpr,  # of the depth, at once
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
    AHEAD: tl.constexpr,  # parts of the weight that are brought near before the kernel before has ended
    LINE: tl.constexpr,  # values that are brought at once
):
    number = tl.arange(0, COLUMNS)
    column = tl.program_id(0) * EACH + number
    own = column < columns
    if EACH < COLUMNS:
        own = own & (number < EACH)
    row = tl.arange(0, ROWS)
    depth = tl.arange(0, PART)
    sources = x + row[:, None] * DEPTH + depth[None, :]
    weights = weight + column[:, None].to(tl.int64) * DEPTH + depth[None, :]
    others = weights + columns.to(tl.int64) * DEPTH
    if AHEAD > 0:
        line = tl.arange(0, PART // LINE) * LINE
        starts = weight + tl.where(own, column, 0)[:, None].to(tl.int64) * DEPTH + line[None, :]
        for part in tl.static_range(AHEAD):
            _bring(starts + part * PART)
            if GATED:
                _bring(starts + columns.to(tl.int64) * DEPTH + part * PART)
    places = column[:, None] + row[None, :] * columns
    inside = own[:, None] & (row < rows)[None, :]
    if ADDED:  # older than the kernel before; not from a first-level cache, which forgets at the wait
        added = tl.load(residual + places, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        factor = tl.load(norm + column, mask=own, other=0.0)[:, None]
    if SCALED:
        scales = tl.load(scale + column, mask=own, other=0.0).to(tl.float32)[:, None]
        if GATED:
            other_scales = tl.load(scale + columns + column, mask=own, other=0.0).to(tl.float32)[:, None]

    wait(CHAINED)
    if NORMED:
        each = tl.arange(0, MOST_SUMS)[None, :]
        there = (row < rows)[:, None] & (each < SUMS)
        parts = tl.load(squares + row[:, None] * SUMS + each, mask=there, other=0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(parts, axis=1) / DEPTH + epsilon)
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    other = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in tl.range(0, DEPTH, PART, num_stages=STAGES):
        near = tl.load(weights + start, mask=own[:, None], other=0.0)
        values = tl.load(sources + start, mask=(row < rows)[:, None], other=0.0).T
        total = tl.dot(near.to(values.dtype), values, total, input_precision="ieee")
        if GATED:
            second = tl.load(others + start, mask=own[:, None], other=0.0)
            other = tl.dot(second.to(values.dtype), values, other, input_precision="ieee")
    if SCALED:
        total *= scales
        if GATED:
            other *= other_scales
    if NORMED:
        total *= inverse[None, :]
        other *= inverse[None, :]
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * other
    if ADDED:
        total += added
    stored = total.to(out.dtype.element_ty)
    tl.store(out + places, stored, mask=inside)
    if ADDED:
        tl.store(following + places, stored * factor, mask=inside)
        wide = tl.where(own[:, None], stored.to(tl.float32), 0.0)
        target = sums + row * tl.num_programs(0) + tl.program_id(0)
        tl.store(target, tl.sum(wide * wide, axis=0), mask=row < rows)


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
def _sum_up(
    mixtures,
    weights,
    out,
    pair,
    row,
    head,
    counts,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    PARTS: tl.constexpr,
    MOST_PARTS: tl.constexpr,
):
    """Of one sequence and key-value head, what `attention` left of the parts: into `out`."""
    query, channel = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    parts = tl.arange(0, MOST_PARTS)[:, None]
    highest = weights + (pair * PARTS + parts) * 2 * QUERIES + query[None, :]
    most = tl.max(tl.load(highest, mask=parts < PARTS, other=HIDDEN, cache_modifier=".cg"), axis=0)
    sums = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, WIDTH), tl.float32)
    for part in tl.static_range(PARTS):
        base = (pair * PARTS + part) * QUERIES
        share = tl.exp(tl.load(weights + base * 2 + query, cache_modifier=".cg") - most)
        sums += share * tl.load(weights + base * 2 + QUERIES + query, cache_modifier=".cg")
        source = mixtures + (base + query).to(tl.int64)[:, None] * WIDTH + channel[None, :]
        mixed += share[:, None] * tl.load(source, cache_modifier=".cg")
    target = out + row[:, None] * (HEADS * WIDTH) + head[:, None] * WIDTH + channel[None, :]
    tl.store(target, (mixed / sums[:, None]).to(out.dtype.element_ty), mask=counts[:, None])


@triton.jit
def attention(
    qkv,  # [R, (H + 2 K) * W]
    keys,  # [B, K, M, W], to which it writes the new ones; what is beyond them is not read
    values,  # the same
    cos,  # [R, W / 2]
    sin,  # [R, W / 2]
    slots,  # int64 [R], of the new tokens, rising
    padding,  # int64 [B], slots in front that do not count
    mixtures,  # float32 [B * K, PARTS, QUERIES, W], of each part of the slots
    weights,  # float32 [B * K, PARTS, 2, QUERIES], their highest scores and sums of shares
    ended,  # int32 [B * K], how many parts of a head have ended: 0, and left so
    out,  # [R, H * W]
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    COUNT: tl.constexpr,  # new tokens of a sequence
    QUERIES: tl.constexpr,  # at least COUNT times the heads of a group
    NEW: tl.constexpr,  # at least COUNT
    PART: tl.constexpr,  # slots of one program
    PARTS: tl.constexpr,
    MOST_PARTS: tl.constexpr,  # a power of two that holds them
    CHAINED: tl.constexpr,
):
    """Of one sequence and key-value head, and one part of the slots, a program, [B * K, PARTS]: rotates queries and
    keys, keeps those keys and values whose slots are in its part, attends to it. A head's last program to end sums up.

    A slot is always in the same place of the same part, and parts are summed in their order, so that a token's bits do
    not depend on how many were fed with it.
    """
    pair, part = tl.program_id(0), tl.program_id(1)
    sequence, group = pair // GROUPS, pair % GROUPS
    half: tl.constexpr = WIDTH // 2
    stride: tl.constexpr = (HEADS + 2 * GROUPS) * WIDTH
    low, channel = tl.arange(0, half), tl.arange(0, WIDTH)

    # What there was before the kernel before; what steps write is not taken from a first-level cache.
    query = tl.arange(0, QUERIES)  # the heads of the group, a row of new tokens each
    counts = query < COUNT * (HEADS // GROUPS)
    row = sequence * COUNT + query % COUNT
    head = group * (HEADS // GROUPS) + query // COUNT
    cq = tl.load(cos + row[:, None] * half + low[None, :], mask=counts[:, None], other=0.0).to(tl.float32)
    sq = tl.load(sin + row[:, None] * half + low[None, :], mask=counts[:, None], other=0.0).to(tl.float32)
    # What is no query sees all.
    place = tl.load(slots + row, mask=counts, other=SLOTS)
    new = tl.arange(0, NEW)
    new_row = sequence * COUNT + new
    slot = tl.load(slots + new_row, mask=new < COUNT, other=SLOTS)
    there = (slot // PART == part)[:, None]  # the others are kept by other programs
    ck = tl.load(cos + new_row[:, None] * half + low[None, :], mask=there, other=0.0).to(tl.float32)
    sk = tl.load(sin + new_row[:, None] * half + low[None, :], mask=there, other=0.0).to(tl.float32)
    first, last = tl.load(slots + sequence * COUNT), tl.load(slots + sequence * COUNT + COUNT - 1)
    in_front = tl.load(padding + sequence)
    cache = pair.to(tl.int64) * SLOTS * WIDTH
    here = part * PART + tl.arange(0, PART)
    old = ((here < first) & (here >= in_front))[:, None]
    near = cache + here[:, None] * WIDTH
    old1 = tl.load(keys + near + low[None, :], mask=old, other=0.0, cache_modifier=".cg")
    old2 = tl.load(keys + near + half + low[None, :], mask=old, other=0.0, cache_modifier=".cg")
    old_v = tl.load(values + near + channel[None, :], mask=old, other=0.0, cache_modifier=".cg")

    wait(CHAINED)
    own = qkv + row[:, None] * stride + head[:, None] * WIDTH + low[None, :]
    q1 = tl.load(own, mask=counts[:, None], other=0.0).to(tl.float32)
    q2 = tl.load(own + half, mask=counts[:, None], other=0.0).to(tl.float32)
    own = qkv + new_row[:, None] * stride + (HEADS + group) * WIDTH + low[None, :]
    k1 = tl.load(own, mask=there, other=0.0).to(tl.float32)
    k2 = tl.load(own + half, mask=there, other=0.0).to(tl.float32)
    source = qkv + new_row[:, None] * stride + (HEADS + GROUPS + group) * WIDTH + channel[None, :]
    v = tl.load(source, mask=there, other=0.0)
    kind = qkv.dtype.element_ty
    target = keys + cache + slot[:, None] * WIDTH + low[None, :]
    tl.store(target, (k1 * ck - k2 * sk).to(kind), mask=there)
    tl.store(target + half, (k2 * ck + k1 * sk).to(kind), mask=there)
    tl.store(values + cache + slot[:, None] * WIDTH + channel[None, :], v, mask=there)
    turned1, turned2 = (q1 * cq - q2 * sq).to(kind), (q2 * cq + q1 * sq).to(kind)
    tl.debug_barrier()
    added = ((here >= first) & (here <= last))[:, None]
    part1 = tl.where(added, tl.load(keys + near + low[None, :], mask=added, other=0.0), old1)
    part2 = tl.where(added, tl.load(keys + near + half + low[None, :], mask=added, other=0.0), old2)
    part_v = tl.where(added, tl.load(values + near + channel[None, :], mask=added, other=0.0), old_v)

    scores = tl.dot(part1, turned1.T, input_precision="ieee")  # [PART, QUERIES]
    scores = tl.dot(part2, turned2.T, scores, input_precision="ieee") * scale
    seen = (here >= in_front)[:, None] & (here[:, None] <= place[None, :])
    scores = tl.where(seen, scores, HIDDEN)
    most = tl.max(scores, axis=0)
    shares = tl.where(seen, tl.exp(scores - most[None, :]), 0.0)
    mixed = tl.dot(part_v.T, shares.to(kind), input_precision="ieee")  # [W, QUERIES]
    base = (pair * PARTS + part) * QUERIES
    tl.store(mixtures + (base + query).to(tl.int64)[None, :] * WIDTH + channel[:, None], mixed)
    tl.store(weights + base * 2 + query, most)
    tl.store(weights + base * 2 + QUERIES + query, tl.sum(shares, axis=0))
    tl.debug_barrier()  # all of it is written before it is said to be
    if tl.atomic_add(ended + pair, 1) == PARTS - 1:
        tl.store(ended + pair, 0)
        _sum_up(mixtures, weights, out, pair, row, head, counts, HEADS, WIDTH, QUERIES, PARTS, MOST_PARTS)
