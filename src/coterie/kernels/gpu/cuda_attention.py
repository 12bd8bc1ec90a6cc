"""CUDA kernels of attention: rotation with the way into the KV cache, and softmax over it, span by span.

`rope`: grid (rows, heads + 2 kv_heads), a head a block of threads. `attend`: grid (rows, heads / together), as many
heads one after the other as make up whole blocks of 32 values (docs/packed-format.md has the KV blocks).
"""

import math
from typing import Any

import numpy as np

from coterie.kernels.gpu.cuda_ffn import exponential
from coterie.kernels.gpu.cuda_memory import (
    cuda,
    device,
    float_at,
    high_half,
    int_at,
    long_at,
    low_half,
    quotient,
    set_float,
    set_half,
    words2,
)
from coterie.kernels.gpu.cuda_products import MOST, ROUNDED, THREADS, inverse_of, rows_of, whole
from coterie.kernels.gpu.cuda_rows import SUMS, sum_of
from coterie.kernels.shapes import SPAN

ZERO, ONE = np.float32(0), np.float32(1)
LOWEST = np.float32(-1e30)
LARGEST_HALF = np.float32(65504)
PARTIAL = 4 * SPAN
DIMS = 1024  # most dimensions of a head
VALUES = 2048  # most values of the heads that one block of threads has


def together(dim: int) -> int:
    """Heads of `dim` dimensions that make up whole blocks of 32 values."""
    return 32 // math.gcd(dim, 32)


def fits(dim: int) -> bool:
    """Whether `attend` takes heads of that many dimensions."""
    return dim % 4 == 0 and 0 < dim <= DIMS and together(dim) * dim <= VALUES


@device
def kv_block(a, step_tables, base, row, span, layer):
    """Where the keys of a row's span begin."""
    table = a + long_at(step_tables + 8 * row) - base
    return a + long_at(table + 8 * span) - base + layer


def rope() -> Any:
    """Rotated queries in place, rotated keys and values into the KV cache."""

    def kernel(
        w, a, step, positions, tables, base, qkv, qkv_row, heads, kv_heads, dim, half, angles, query_norm, key_norm,
        eps, scale, layer, values,
    ):  # fmt: skip
        parts = cuda.shared.array(SUMS, np.float32)
        u, row, head = cuda.threadIdx.x, cuda.blockIdx.x, cuda.blockIdx.y
        if row < rows_of(a, step, 0):
            position = int_at(a + positions + 4 * row)
            at = a + qkv + row * qkv_row + 4 * head * dim
            slot, is_query = position % SPAN, head < heads
            keys = at
            if not is_query:
                keys = kv_block(a, a + tables, base, row, position // SPAN, layer)
            if head >= heads + kv_heads:
                target = keys + values + (head - heads - kv_heads) * (2 * SPAN * dim) + 2 * dim * slot
                for d in range(u, dim, THREADS):
                    set_half(target + 2 * d, _finite(float_at(at + 4 * d)))
            else:
                weight, factor, multiple = query_norm if is_query else key_norm, ONE, scale if is_query else ONE
                if weight >= 0:
                    squares = ZERO
                    for d in range(u, dim, THREADS):
                        squares += float_at(at + 4 * d) * float_at(at + 4 * d)
                    factor = ONE / np.float32(math.sqrt(sum_of(squares, parts) / np.float32(dim) + eps))
                table = a + angles + 8 * position * half
                target = keys + (head - heads) * (2 * SPAN * dim) + slot // 16 * (32 * dim) + 2 * (slot % 16)
                for p in range(u, dim - half, THREADS):  # pairs (p, p + half), then dimensions that do not rotate
                    if p < half:
                        x = _normed(w, at, p, weight, factor)
                        y = _normed(w, at, p + half, weight, factor)
                        cos, sin = float_at(table + 4 * p), float_at(table + 4 * (half + p))
                        _put(is_query, at, target, p, (x * cos - y * sin) * multiple)
                        _put(is_query, at, target, p + half, (x * sin + y * cos) * multiple)
                    else:
                        _put(is_query, at, target, p + half, _normed(w, at, p + half, weight, factor) * multiple)

    return kernel


@device
def _finite(v):
    return max(min(v, LARGEST_HALF), -LARGEST_HALF)


@device
def _normed(w, at, d, weight, factor):
    v = float_at(at + 4 * d)
    if weight >= 0:
        v = v * factor * float_at(w + weight + 4 * d)
    return v


@device
def _put(is_query, query, key, d, v):
    if is_query:
        set_float(query + 4 * d, v)
    else:
        set_half(key + 32 * d, _finite(v))


@device
def largest_of(v, parts):
    """The largest of all threads' v, for all of them."""
    u = cuda.threadIdx.x
    cuda.syncthreads()
    parts[u] = v
    cuda.syncthreads()
    if u < 16:
        top = parts[u]
        for i in range(1, 16):
            top = max(top, parts[16 * i + u])
        parts[THREADS + u] = top
    cuda.syncthreads()
    top = parts[THREADS]
    for i in range(1, 16):
        top = max(top, parts[THREADS + i])
    return top


@device
def _scores(query, keys, dim, scores, partial):
    """scores[slot] of a span: thread (64 quads of slots, 4 shares of the dimensions), then the shares are added."""
    u = cuda.threadIdx.x
    quad, share = u % 64, u // 64
    at = keys + quad // 4 * (32 * dim) + 8 * (quad % 4)
    s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
    for d in range(share, dim, 4):
        k = words2(at + 32 * d)
        q = query[d]
        s0 += q * low_half(k[0])
        s1 += q * high_half(k[0])
        s2 += q * low_half(k[1])
        s3 += q * high_half(k[1])
    partial[SPAN * share + 4 * quad] = s0
    partial[SPAN * share + 4 * quad + 1] = s1
    partial[SPAN * share + 4 * quad + 2] = s2
    partial[SPAN * share + 4 * quad + 3] = s3
    cuda.syncthreads()
    scores[u] = (partial[u] + partial[SPAN + u]) + (partial[2 * SPAN + u] + partial[3 * SPAN + u])


def attend() -> Any:
    """out[row][head][dim]: softmax attention over the positions that a row sees."""

    def kernel(
        w, a, step, positions, tables, base, qkv, qkv_row, heads, kv_heads, dim, window, layer, values, out, out_row,
        rounded, rounded_row, width,
    ):  # fmt: skip
        query = cuda.shared.array(DIMS, np.float32)
        weights = cuda.shared.array(SPAN, np.float32)
        partial = cuda.shared.array(PARTIAL, np.float32)
        parts = cuda.shared.array(SUMS, np.float32)
        mixed = cuda.shared.array(VALUES, np.float32)
        u, row, each = cuda.threadIdx.x, cuda.blockIdx.x, 1
        if row < rows_of(a, step, 0):
            position = int_at(a + positions + 4 * row)
            lowest = max(0, position - window + 1) if window > 0 else 0
            while each * dim % 32:
                each *= 2
            first = cuda.blockIdx.y * each
            count = min(each, heads - first)
            quads = dim // 4
            lanes = quotient(THREADS, quads)  # positions whose values are read side by side
            lane = quotient(u, quads)
            mine = u - lane * quads
            for i in range(count):
                cuda.syncthreads()
                for d in range(u, dim, THREADS):
                    query[d] = float_at(a + qkv + row * qkv_row + 4 * ((first + i) * dim + d))
                cuda.syncthreads()
                kv_head = quotient((first + i) * kv_heads, heads)
                highest, weight = LOWEST, ZERO
                v0, v1, v2, v3 = ZERO, ZERO, ZERO, ZERO
                for span in range(lowest // SPAN, position // SPAN + 1):
                    keys = kv_block(a, a + tables, base, row, span, layer) + kv_head * (2 * SPAN * dim)
                    _scores(query, keys, dim, weights, partial)
                    seen = lowest <= SPAN * span + u <= position
                    score = weights[u] if seen else LOWEST
                    top = max(highest, largest_of(score, parts))
                    p = exponential(score - top) if seen else ZERO
                    keep = exponential(highest - top)
                    weights[u] = p
                    weight = weight * keep + sum_of(p, parts)
                    highest = top
                    v0, v1, v2, v3 = v0 * keep, v1 * keep, v2 * keep, v3 * keep
                    if lane < lanes:
                        begin, end = max(0, lowest - SPAN * span), min(SPAN, position - SPAN * span + 1)
                        for slot in range(begin + lane, end, lanes):
                            v = words2(keys + values + 2 * dim * slot + 8 * mine)
                            p = weights[slot]
                            v0 += p * low_half(v[0])
                            v1 += p * high_half(v[0])
                            v2 += p * low_half(v[1])
                            v3 += p * high_half(v[1])
                    cuda.syncthreads()  # weights and partial are the next span's
                partial[4 * u], partial[4 * u + 1], partial[4 * u + 2], partial[4 * u + 3] = v0, v1, v2, v3
                cuda.syncthreads()
                for d in range(u, dim, THREADS):
                    v = ZERO
                    for k in range(lanes):
                        v += partial[4 * (k * quads) + d]
                    mixed[i * dim + d] = v / weight
            cuda.syncthreads()
            last = width - first * dim if first + count == heads else count * dim
            for c in range(u, last, THREADS):
                set_float(a + out + row * out_row + 4 * (first * dim + c), mixed[c] if c < count * dim else ZERO)
            if rounded >= 0:
                target = a + rounded + row * rounded_row + first * dim // 32 * ROUNDED
                for block in range(u, last // 32, THREADS):
                    _write_rounded(mixed, 32 * block, count * dim, target + ROUNDED * block)

    return kernel


@device
def _write_rounded(mixed, begin, end, target):
    """A block of 32 values rounded; behind `end` there are none."""
    top, count = ZERO, ZERO
    for c in range(begin, min(begin + 32, end)):
        top = max(top, abs(mixed[c]))
    inverse = inverse_of(top)
    for c in range(begin, begin + 32):
        q = whole(mixed[c], inverse) if c < end else ZERO
        set_float(target + 4 * (c - begin), q)
        count += q
    set_float(target + 128, top / MOST)
    set_float(target + 132, count)
