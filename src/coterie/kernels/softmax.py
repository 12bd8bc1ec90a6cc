"""Online softmax over tiles of the KV cache: what the attention kernels are made of (see attention.py)."""

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import register_jitable

from coterie.kernels.mathematics import exp
from coterie.kernels.rows import inverse_rms
from coterie.kernels.shapes import HEAD, QUERY_ROWS, SPAN, TILE
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
    f32_at,
    floats,
    floats_at,
    fma,
    halves_to_floats,
    i32_at,
    larger,
    largest,
    load,
    mul,
    op,
    set_f32,
    set_float16s,
    set_floats,
    splat,
    store,
    total,
    vec,
)

NOTHING = np.float32(-1e30)  # the maximum of no scores


@op(types.void, ADDRESS, types.intp, ADDRESS, types.intp, ADDRESS, ADDRESS)
def scores(b, q, q_row, k, dim, out, ahead):
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
    def weigh(b, p, v, v_row, count, out, out_row, ahead):
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
def masked(b, v, first, low, high):
    """Scores of positions first..first+15, minus infinity outside low..high-1."""
    lanes = ir.Constant(vec(I32, LANES), list(range(LANES)))
    positions = b.add(splat(b, b.trunc(first, I32)), lanes)
    inside = b.and_(
        b.icmp_signed(">=", positions, splat(b, b.trunc(low, I32))),
        b.icmp_signed("<", positions, splat(b, b.trunc(high, I32))),
    )
    return b.select(inside, v, const(F32x16, float("-inf")))


@op(types.void, ADDRESS, types.float32)
def set_float16(b, address, value):
    """One finite float16."""
    limit = const(F32, 65504.0)
    value = b.select(b.fcmp_ordered("<", value, limit), value, limit)
    low = const(F32, -65504.0)
    store(b, address, b.fptrunc(b.select(b.fcmp_ordered(">", value, low), value, low), F16))


@op(types.void, ADDRESS, ADDRESS, ADDRESS, types.intp, types.float32)
def rotate(b, low, high, table, half, scale):
    """Turn 8 pairs in place: (x, y) -> (x cos - y sin, x sin + y cos) * scale; table is [cos half][sin half]."""
    ty = vec(F32, 8)
    x, y, cos = (load(b, at, ty) for at in (low, high, table))
    sin = load(b, b.add(table, b.mul(half, const(I64, 4))), ty)
    factor = splat(b, scale, 8)
    store(b, low, b.fmul(b.fsub(b.fmul(x, cos), b.fmul(y, sin)), factor))
    store(b, high, b.fmul(b.fadd(b.fmul(x, sin), b.fmul(y, cos)), factor))


@register_jitable
def rope_head(source, out, dim, half, table, norm, eps, scale):
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
def store_kv(k, v, keys, values, slot, dim):
    """Put one position's key and value into a head's part of a KV block."""
    at = keys + (slot // LANES) * dim * 2 * LANES + 2 * (slot % LANES)
    for d in range(dim):
        set_float16(at + 2 * LANES * d, f32_at(k + 4 * d))
    for c in range(0, dim, LANES):
        set_float16s(values + 2 * (slot * dim + c), floats_at(v + 4 * c))


@register_jitable
def attend_span(q, rows, bounds, keys, values, dim, first, state, weights, next_keys, next_values):
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
def soften(s, base, bounds, state, stride):
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
def merge_state(into, other, dim):
    """Merge the next span's softmax state into the running one."""
    new = max(f32_at(into), f32_at(other))
    a, b = exp(floats(f32_at(into) - new)), exp(floats(f32_at(other) - new))
    set_f32(into + 4, f32_at(into + 4) * largest(a) + f32_at(other + 4) * largest(b))
    set_f32(into, new)
    for c in range(HEAD, HEAD + 4 * dim, 64):
        set_floats(into + c, add(mul(floats_at(into + c), a), mul(floats_at(other + c), b)))


@register_jitable
def clear_state(state, dim):
    set_f32(state, NOTHING)
    set_f32(state + 4, np.float32(0))
    for c in range(HEAD, HEAD + 4 * dim, 64):
        set_floats(state + c, floats(np.float32(0)))
