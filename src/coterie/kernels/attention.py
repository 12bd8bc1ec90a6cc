"""Attention over a paged float16 KV cache, with online softmax over tiles fixed by position.

A KV block holds SPAN positions of every layer: keys as [kv head][16 positions][dim][16], so that a lane is a
position and a score's sum never crosses lanes; values as [kv head][position][dim]. A query's softmax state is
(maximum, sum, weighted values), computed for each span from nothing, tile by tile of 64 positions, and merged
over spans in ascending order. Spans and tiles are cut by absolute position, so the bits depend neither on the
chunk nor on the lanes. Query rows are taken four at a time; rows of one key/value head share its loads.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import register_jitable

from coterie.kernels.compiler import kernel
from coterie.kernels.formats import COLUMNS
from coterie.kernels.mathematics import exp
from coterie.kernels.operands import (
    A_DIM,
    A_EPS,
    A_HALF,
    A_HEADS,
    A_KEY_NORM,
    A_KV_HEADS,
    A_LAYER,
    A_OUT,
    A_OUT_ROW,
    A_QKV,
    A_QKV_ROW,
    A_QUERY_NORM,
    A_ROPE,
    A_SCALE,
    A_SCRATCH,
    A_SCRATCH_LANE,
    A_SPANS,
    A_VALUES,
    A_WINDOW,
    MERGE_DIM,
    MERGE_FLOAT_LANE,
    MERGE_FLOAT_OUT,
    MERGE_HEADS,
    MERGE_OUT,
    MERGE_OUT_LANE,
    MERGE_ROWS,
    MERGE_ROWS_LANE,
    MERGE_ROWS_ROW,
    MERGE_SCRATCH,
    MERGE_SCRATCH_LANE,
    MERGE_SPANS,
    MERGE_STATES,
    MERGE_STATES_ROW,
    MERGE_SUBS,
    MERGE_TILE,
    MERGE_TILE_SUBS,
    MERGE_WINDOW,
)
from coterie.kernels.record import CLAIM, LANES_COUNT, LAST, POSITIONS, TABLES, TOKENS
from coterie.kernels.rows import bits_to_float, emit_block, inverse_rms
from coterie.kernels.shapes import HEAD, QUERY_ROWS, QUERY_TOKENS, SPAN, TILE
from coterie.kernels.sync import claim, finish, word
from coterie.kernels.vector import (
    ADDRESS,
    F16,
    F32,
    FLOATS,
    I32,
    I64,
    LANES,
    F32x16,
    add,
    ask_for,
    const,
    div,
    f32_at,
    floats,
    floats_at,
    fma,
    halves_to_floats,
    i32_at,
    i64_at,
    larger,
    largest,
    load,
    mul,
    op,
    set_f32,
    set_float16s,
    set_floats,
    set_i32,
    splat,
    store,
    total,
    vec,
)

RUN_SPANS = 4  # spans of a piece of decode, where there are many
NOTHING = np.float32(-1e30)  # the maximum of no scores


@op(types.void, ADDRESS, types.intp, ADDRESS, types.intp, ADDRESS, ADDRESS)
def scores(b, q, q_row, k, dim, out, ahead):  # type: ignore[no-untyped-def]
    """out[4][64] = q[4][dim] . keys of 64 positions: one fused multiply-add a dimension, ascending. The 64 keys at
    `ahead` are prefetched."""
    groups = TILE // LANES
    sums = [[cgutils.alloca_once_value(b, const(F32x16, 0.0)) for _ in range(groups)] for _ in range(QUERY_ROWS)]
    for row in sums:
        for s in row:
            b.store(const(F32x16, 0.0), s)
    group_bytes = b.mul(dim, const(I64, 2 * LANES))
    with cgutils.for_range(b, dim, intp=I64) as loop:
        at = b.add(k, b.mul(loop.index, const(I64, 2 * LANES)))
        for line in range(0, 2 * TILE, 64):
            ask_for(b, b.add(ahead, b.add(b.mul(loop.index, const(I64, 2 * TILE)), const(I64, line))), near=True)
        keys = [halves_to_floats(b, b.add(at, b.mul(group_bytes, const(I64, g)))) for g in range(groups)]
        for r in range(QUERY_ROWS):
            at_q = b.add(b.add(q, b.mul(q_row, const(I64, r))), b.mul(loop.index, const(I64, 4)))
            query = splat(b, load(b, at_q, F32))
            for g in range(groups):
                b.store(fma(b, query, keys[g], b.load(sums[r][g])), sums[r][g])
    for r in range(QUERY_ROWS):
        for g in range(groups):
            store(b, out, b.load(sums[r][g]), 4 * (TILE * r + LANES * g))


@cache
def weigh_op(vectors: int) -> Any:
    """weigh(p, v, v_row, count, out, out_row, ahead): out[4][16 * vectors] += p[4][count] . v[count], ascending. The
    values at `ahead` are prefetched."""

    @op(types.void, ADDRESS, ADDRESS, types.intp, types.intp, ADDRESS, types.intp, ADDRESS)
    def weigh(b, p, v, v_row, count, out, out_row, ahead):  # type: ignore[no-untyped-def]
        places = [
            [b.add(out, b.add(b.mul(out_row, const(I64, r)), const(I64, 64 * d))) for d in range(vectors)]
            for r in range(QUERY_ROWS)
        ]
        sums = [[cgutils.alloca_once_value(b, const(F32x16, 0.0)) for _ in row] for row in places]
        for row, row_sums in zip(places, sums, strict=True):
            for at, s in zip(row, row_sums, strict=True):
                b.store(load(b, at, F32x16), s)
        with cgutils.for_range(b, count, intp=I64) as loop:
            for line in range(0, 2 * LANES * vectors, 64):
                ask_for(b, b.add(ahead, b.add(b.mul(loop.index, v_row), const(I64, line))), near=True)
            at = b.add(v, b.mul(loop.index, v_row))
            values = [halves_to_floats(b, at, 2 * LANES * d) for d in range(vectors)]
            for r in range(QUERY_ROWS):
                weight = splat(b, load(b, b.add(p, b.mul(loop.index, const(I64, 4))), F32, 4 * TILE * r))
                for d in range(vectors):
                    b.store(fma(b, weight, values[d], b.load(sums[r][d])), sums[r][d])
        for row, row_sums in zip(places, sums, strict=True):
            for at, s in zip(row, row_sums, strict=True):
                store(b, at, b.load(s))

    return weigh


weigh_wide, weigh_narrow = weigh_op(4), weigh_op(1)


@op(FLOATS, FLOATS, types.intp, types.intp, types.intp)
def masked(b, v, first, low, high):  # type: ignore[no-untyped-def]
    """Scores of positions first..first+15, minus infinity outside low..high-1."""
    lanes = ir.Constant(vec(I32, LANES), list(range(LANES)))
    positions = b.add(splat(b, b.trunc(first, I32)), lanes)
    inside = b.and_(
        b.icmp_signed(">=", positions, splat(b, b.trunc(low, I32))),
        b.icmp_signed("<", positions, splat(b, b.trunc(high, I32))),
    )
    return b.select(inside, v, const(F32x16, float("-inf")))


@op(types.void, ADDRESS, types.float32)
def set_float16(b, address, value):  # type: ignore[no-untyped-def]
    """One finite float16."""
    limit = const(F32, 65504.0)
    value = b.select(b.fcmp_ordered("<", value, limit), value, limit)
    low = const(F32, -65504.0)
    store(b, address, b.fptrunc(b.select(b.fcmp_ordered(">", value, low), value, low), F16))


@op(types.void, ADDRESS, ADDRESS, ADDRESS, types.intp, types.float32)
def rotate(b, low, high, table, half, scale):  # type: ignore[no-untyped-def]
    """Turn 8 pairs in place: (x, y) -> (x cos - y sin, x sin + y cos) * scale; table is [cos half][sin half]."""
    ty = vec(F32, 8)
    x, y, cos = (load(b, at, ty) for at in (low, high, table))
    sin = load(b, b.add(table, b.mul(half, const(I64, 4))), ty)
    factor = splat(b, scale, 8)
    store(b, low, b.fmul(b.fsub(b.fmul(x, cos), b.fmul(y, sin)), factor))
    store(b, high, b.fmul(b.fadd(b.fmul(x, sin), b.fmul(y, cos)), factor))


@register_jitable
def rope_head(source, out, dim, half, table, norm, eps, scale):  # type: ignore[no-untyped-def]
    """One head: optional RMS norm, rotation of its first 2 * half dimensions, scale."""
    if norm != 0:
        factor = floats(inverse_rms(source, dim, dim, eps))
        for c in range(0, 4 * dim, 64):
            set_floats(out + c, mul(mul(floats_at(source + c), factor), floats_at(norm + c)))
    else:
        for c in range(0, 4 * dim, 64):
            set_floats(out + c, floats_at(source + c))
    for c in range(0, 4 * half, 32):
        rotate(out + c, out + 4 * half + c, table + c, half, scale)
    for c in range(8 * half, 4 * dim, 4):
        set_f32(out + c, f32_at(out + c) * scale)


@register_jitable
def store_kv(k, v, keys, values, slot, dim):  # type: ignore[no-untyped-def]
    """Put one position's key and value into a head's part of a KV block."""
    at = keys + (slot // LANES) * dim * 2 * LANES + 2 * (slot % LANES)
    for d in range(dim):
        set_float16(at + 2 * LANES * d, f32_at(k + 4 * d))
    for c in range(0, dim, LANES):
        set_float16s(values + 2 * (slot * dim + c), floats_at(v + 4 * c))


@register_jitable
def attend_span(q, rows, bounds, keys, values, dim, first, state, weights, next_keys, next_values):  # type: ignore[no-untyped-def]
    """Softmax states of `rows` (a multiple of 4) queries over one span, from nothing.

    q: float32[rows][dim]; bounds: int32[rows][2], the positions each row may see; keys, values: the head's part
    of the block whose first position is `first`; state: [rows](HEAD bytes, float32[dim]); weights: scratch of
    float32[rows][64]; next_keys, next_values: what is read after this span, to be prefetched.
    """
    stride = HEAD + 4 * dim
    begin, end = np.int64(i32_at(bounds)), np.int64(i32_at(bounds + 4))
    for r in range(rows):
        begin = min(begin, np.int64(i32_at(bounds + 8 * r)))
        end = max(end, np.int64(i32_at(bounds + 8 * r + 4)))
        set_f32(state + r * stride, NOTHING)
        set_f32(state + r * stride + 4, np.float32(0))
        for c in range(HEAD, stride, 64):
            set_floats(state + r * stride + c, floats(np.float32(0)))
    for base in range(first, first + SPAN, TILE):
        if base >= end:
            break
        if base + TILE <= begin:
            continue
        slot = base - first
        ahead_keys, ahead_values = keys + (slot + TILE) * 2 * dim, values + (slot + TILE) * 2 * dim
        if slot + TILE >= SPAN or base + TILE >= end:
            ahead_keys, ahead_values = next_keys, next_values
        for r in range(0, rows, QUERY_ROWS):
            scores(q + r * 4 * dim, 4 * dim, keys + slot * 2 * dim, dim, weights + r * 4 * TILE, ahead_keys)
        for r in range(rows):
            soften(weights + r * 4 * TILE, base, bounds + 8 * r, state + r * stride, stride)
        count = min(TILE, end - base)
        for r in range(0, rows, QUERY_ROWS):
            out, p = state + r * stride + HEAD, weights + r * 4 * TILE
            v = values + slot * 2 * dim
            c = 0
            while c + 4 * LANES <= dim:
                weigh_wide(p, v + 2 * c, 2 * dim, count, out + 4 * c, stride, ahead_values + 2 * c)
                c += 4 * LANES
            while c < dim:
                weigh_narrow(p, v + 2 * c, 2 * dim, count, out + 4 * c, stride, ahead_values + 2 * c)
                c += LANES


@register_jitable
def soften(s, base, bounds, state, stride):  # type: ignore[no-untyped-def]
    """Turn a row's 64 scores into weights under the new maximum, and rescale its state to it."""
    low, high = np.int64(i32_at(bounds)), np.int64(i32_at(bounds + 4))
    if high <= base or low >= base + TILE:
        for c in range(0, 4 * TILE, 64):
            set_floats(s + c, floats(np.float32(0)))
        return
    v0, v1, v2, v3 = floats_at(s), floats_at(s + 64), floats_at(s + 128), floats_at(s + 192)
    if base < low or base + TILE > high:
        v0, v1 = masked(v0, base, low, high), masked(v1, base + 16, low, high)
        v2, v3 = masked(v2, base + 32, low, high), masked(v3, base + 48, low, high)
    old = f32_at(state)
    new = max(old, largest(larger(larger(v0, v1), larger(v2, v3))))
    shift = floats(-new)
    p0, p1, p2, p3 = exp(add(v0, shift)), exp(add(v1, shift)), exp(add(v2, shift)), exp(add(v3, shift))
    set_floats(s, p0)
    set_floats(s + 64, p1)
    set_floats(s + 128, p2)
    set_floats(s + 192, p3)
    mass = total(add(add(p0, p1), add(p2, p3)))
    if new == old:  # exp(0) is 1: nothing to rescale
        set_f32(state + 4, f32_at(state + 4) + mass)
        return
    keep = exp(floats(old - new))
    set_f32(state, new)
    set_f32(state + 4, f32_at(state + 4) * largest(keep) + mass)
    for c in range(HEAD, stride, 64):
        set_floats(state + c, mul(floats_at(state + c), keep))


@register_jitable
def merge_state(into, other, dim):  # type: ignore[no-untyped-def]
    """Merge the next span's softmax state into the running one."""
    new = max(f32_at(into), f32_at(other))
    a, b = exp(floats(f32_at(into) - new)), exp(floats(f32_at(other) - new))
    set_f32(into + 4, f32_at(into + 4) * largest(a) + f32_at(other + 4) * largest(b))
    set_f32(into, new)
    for c in range(HEAD, HEAD + 4 * dim, 64):
        set_floats(into + c, add(mul(floats_at(into + c), a), mul(floats_at(other + c), b)))


@register_jitable
def clear_state(state, dim):  # type: ignore[no-untyped-def]
    set_f32(state, NOTHING)
    set_f32(state + 4, np.float32(0))
    for c in range(HEAD, HEAD + 4 * dim, 64):
        set_floats(state + c, floats(np.float32(0)))


@register_jitable
def first_visible(position, window):  # type: ignore[no-untyped-def]
    """The first position that a query at `position` attends to."""
    return max(np.int64(0), position + 1 - window) if window > 0 else np.int64(0)


@kernel
def rope() -> Callable[..., Any]:
    """Prefill: rotate queries in place, and put rotated keys and values into the KV cache. A piece is a row."""

    def run(record, step, lane):  # type: ignore[no-untyped-def]
        n = word(step, TOKENS)
        heads, kv_heads, dim, half = (
            word(record, A_HEADS),
            word(record, A_KV_HEADS),
            word(record, A_DIM),
            word(record, A_HALF),
        )
        eps = bits_to_float(word(record, A_EPS))
        pieces = 0
        row = claim(record, step, lane, n)
        while row >= 0:
            position = np.int64(i32_at(word(step, POSITIONS) + 4 * row))
            table = word(record, A_ROPE) + position * half * 8
            q = word(record, A_QKV) + row * word(record, A_QKV_ROW)
            k = q + heads * dim * 4
            v = k + kv_heads * dim * 4
            for h in range(heads):
                at = q + h * dim * 4
                rope_head(
                    at, at, dim, half, table, word(record, A_QUERY_NORM), eps,
                    bits_to_float(word(record, A_SCALE)),
                )  # fmt: skip
            blocks = i64_at(word(step, TABLES) + 8 * row)
            block = i64_at(blocks + 8 * (position // SPAN)) + word(record, A_LAYER)
            for h in range(kv_heads):
                at = k + h * dim * 4
                rope_head(at, at, dim, half, table, word(record, A_KEY_NORM), eps, np.float32(1))
                keys = block + h * SPAN * dim * 2
                store_kv(at, v + h * dim * 4, keys, keys + word(record, A_VALUES), position % SPAN, dim)
            pieces += 1
            row = claim(record, step, lane, n)
        return finish(record, step, pieces, n)

    return run


@kernel
def attend() -> Callable[..., Any]:
    """Prefill: a piece is eight rows of one sequence and a key/value head."""

    def run(record, step, lane):  # type: ignore[no-untyped-def]
        n = word(step, TOKENS)
        heads, kv_heads, dim = word(record, A_HEADS), word(record, A_KV_HEADS), word(record, A_DIM)
        share, window = heads // kv_heads, word(record, A_WINDOW)
        stride = HEAD + 4 * dim
        capacity = (QUERY_TOKENS * share + QUERY_ROWS - 1) // QUERY_ROWS * QUERY_ROWS
        q = word(record, A_SCRATCH) + lane * word(record, A_SCRATCH_LANE)
        state = q + capacity * 4 * dim
        running = state + capacity * stride
        weights = running + capacity * stride
        bounds = weights + capacity * 4 * TILE
        tiles = (n + QUERY_TOKENS - 1) // QUERY_TOKENS
        pieces = 0
        piece = claim(record, step, lane, tiles * kv_heads)
        while piece >= 0:
            first, h = piece // kv_heads * QUERY_TOKENS, piece % kv_heads
            count = min(QUERY_TOKENS, n - first)
            rows = (count * share + QUERY_ROWS - 1) // QUERY_ROWS * QUERY_ROWS
            low = high = np.int64(0)
            for r in range(rows):
                t = first + min(r // share, count - 1)  # rows of padding repeat the last token
                position = np.int64(i32_at(word(step, POSITIONS) + 4 * t))
                low = first_visible(position, window) if r == 0 else low
                high = position + 1
                set_i32(bounds + 8 * r, np.int32(first_visible(position, window)))
                set_i32(bounds + 8 * r + 4, np.int32(high))
                source = word(record, A_QKV) + t * word(record, A_QKV_ROW) + (h * share + r % share) * dim * 4
                for c in range(0, 4 * dim, 64):
                    set_floats(q + r * 4 * dim + c, floats_at(source + c))
                clear_state(running + r * stride, dim)
            blocks = i64_at(word(step, TABLES) + 8 * first)
            for span in range(low // SPAN, (high - 1) // SPAN + 1):
                keys = i64_at(blocks + 8 * span) + word(record, A_LAYER) + h * SPAN * dim * 2
                values = keys + word(record, A_VALUES)
                attend_span(q, rows, bounds, keys, values, dim, span * SPAN, state, weights, keys, values)
                for r in range(rows):
                    if i32_at(bounds + 8 * r) < (span + 1) * SPAN and i32_at(bounds + 8 * r + 4) > span * SPAN:
                        merge_state(running + r * stride, state + r * stride, dim)
            for r in range(count * share):
                out = word(record, A_OUT) + (first + r // share) * word(record, A_OUT_ROW)
                out += (h * share + r % share) * dim * 4
                divisor = floats(f32_at(running + r * stride + 4))
                for c in range(0, 4 * dim, 64):
                    set_floats(out + c, div(floats_at(running + r * stride + HEAD + c), divisor))
            pieces += 1
            piece = claim(record, step, lane, tiles * kv_heads)
        return finish(record, step, pieces, tiles * kv_heads)

    return run


@kernel
def attend_one() -> Callable[..., Any]:
    """Decode: rows are last tokens of different sequences; a piece is a row, a key/value head and a run of spans.

    Queries are rotated where they are used; the piece of the last span stores the new key and value. Leaves
    softmax states for `merge`.
    """

    def run(record, step, lane):  # type: ignore[no-untyped-def]
        n = word(step, TOKENS)
        heads, kv_heads, dim = word(record, A_HEADS), word(record, A_KV_HEADS), word(record, A_DIM)
        share, window, half = heads // kv_heads, word(record, A_WINDOW), word(record, A_HALF)
        eps = bits_to_float(word(record, A_EPS))
        stride = HEAD + 4 * dim
        rows = (share + QUERY_ROWS - 1) // QUERY_ROWS * QUERY_ROWS
        q = word(record, A_SCRATCH) + lane * word(record, A_SCRATCH_LANE)
        state = q + rows * 4 * dim
        weights = state + 2 * rows * stride
        bounds = weights + rows * 4 * TILE
        key = bounds + rows * 8
        spans = word(step, LAST) // SPAN + 1  # a row that has fewer leaves pieces with nothing to do
        if window > 0:
            spans = min(spans, (window + SPAN - 2) // SPAN + 1)
        run_spans = min(RUN_SPANS, max(1, spans // (2 * word(step, LANES_COUNT))))
        runs = (spans + run_spans - 1) // run_spans
        pieces, amount = 0, n * kv_heads * runs
        piece = claim(record, step, lane, amount)
        while piece >= 0:
            first, h, row = piece % runs * run_spans, piece // runs % kv_heads, piece // (runs * kv_heads)
            position = np.int64(i32_at(word(step, POSITIONS) + 4 * row))
            low = first_visible(position, window)
            last = min(first + run_spans, position // SPAN - low // SPAN + 1)
            if first < last:
                table = word(record, A_ROPE) + position * half * 8
                source = word(record, A_QKV) + row * word(record, A_QKV_ROW)
                for r in range(rows):
                    at = source + (h * share + min(r, share - 1)) * dim * 4
                    rope_head(
                        at, q + r * 4 * dim, dim, half, table, word(record, A_QUERY_NORM), eps,
                        bits_to_float(word(record, A_SCALE)),
                    )  # fmt: skip
                    set_i32(bounds + 8 * r, np.int32(low))
                    set_i32(bounds + 8 * r + 4, np.int32(position + 1))
            blocks = i64_at(word(step, TABLES) + 8 * row) + 8 * (low // SPAN)
            part = word(record, A_LAYER) + h * SPAN * dim * 2
            for span in range(first, last):
                keys = i64_at(blocks + 8 * span) + part
                values = keys + word(record, A_VALUES)
                start = (low // SPAN + span) * SPAN
                if position < start + SPAN:
                    k = source + (heads + h) * dim * 4
                    rope_head(k, key, dim, half, table, word(record, A_KEY_NORM), eps, np.float32(1))
                    store_kv(key, k + kv_heads * dim * 4, keys, values, position % SPAN, dim)
                next_keys = i64_at(blocks + 8 * (span + 1)) + part if position >= start + SPAN else keys
                next_values = next_keys + word(record, A_VALUES)
                attend_span(q, rows, bounds, keys, values, dim, start, state, weights, next_keys, next_values)
                out = word(record, A_OUT) + row * word(record, A_OUT_ROW)
                for r in range(share):
                    to = out + ((h * share + r) * word(record, A_SPANS) + span) * stride
                    for c in range(0, stride, 64):
                        set_floats(to + c, floats_at(state + r * stride + c))
            pieces += 1
            piece = claim(record, step, lane, amount)
        return finish(record, step, pieces, amount)

    return run


@kernel
def merge() -> Callable[..., Any]:
    """Merge the spans' softmax states, and prepare the output projection's input as tiles."""

    def run(record, step, lane):  # type: ignore[no-untyped-def]
        n = word(step, TOKENS)
        shared = word(record, CLAIM) != 0
        states, dim, heads = word(record, MERGE_STATES), word(record, MERGE_DIM), word(record, MERGE_HEADS)
        stride = HEAD + 4 * dim
        subs, tile_subs = word(record, MERGE_SUBS), word(record, MERGE_TILE_SUBS)
        state = word(record, MERGE_SCRATCH) + lane * word(record, MERGE_SCRATCH_LANE)
        pieces = 0
        row = claim(record, step, lane, n) if shared else 0
        while 0 <= row < n:
            x = word(record, MERGE_ROWS) + lane * word(record, MERGE_ROWS_LANE) + row * word(record, MERGE_ROWS_ROW)
            if states != 0:
                position = np.int64(i32_at(word(step, POSITIONS) + 4 * row))
                spans = position // SPAN - first_visible(position, word(record, MERGE_WINDOW)) // SPAN + 1
                for h in range(heads):
                    at = states + row * word(record, MERGE_STATES_ROW) + h * word(record, MERGE_SPANS) * stride
                    clear_state(state, dim)
                    for s in range(spans):
                        merge_state(state, at + s * stride, dim)
                    divisor = floats(f32_at(state + 4))
                    for c in range(0, 4 * dim, 64):
                        set_floats(x + h * dim * 4 + c, div(floats_at(state + HEAD + c), divisor))
            for sub in range(subs):
                low, high = floats_at(x + sub * 4 * COLUMNS), floats_at(x + sub * 4 * COLUMNS + 64)
                if word(record, MERGE_OUT) != 0:
                    out = word(record, MERGE_OUT) + lane * word(record, MERGE_OUT_LANE)
                    emit_block(low, high, out, word(record, MERGE_TILE), row, sub, tile_subs, False)
                if word(record, MERGE_FLOAT_OUT) != 0:
                    out = word(record, MERGE_FLOAT_OUT) + lane * word(record, MERGE_FLOAT_LANE)
                    emit_block(low, high, out, word(record, MERGE_TILE), row, sub, tile_subs, True)
            pieces += 1
            row = claim(record, step, lane, n) if shared else row + 1
        return finish(record, step, pieces, n) if shared else pieces

    return run
