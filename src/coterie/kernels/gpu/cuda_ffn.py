"""CUDA kernels of a feed-forward network's first half: hidden = activation(Gate x) * (Up x).

Grid: (tiles of rows, pairs of groups). A block of threads has 32 neurons, one block of what Down reads: Gate's two
groups of rows are its first two streams, Up's the others.
"""

import math
from typing import Any

import numpy as np

from coterie.kernels.formats import FORMATS
from coterie.kernels.gpu.cuda_memory import cuda, device, quotient, set_float
from coterie.kernels.gpu.cuda_products import (
    MOST,
    PARTS,
    ROUNDED,
    THREADS,
    Tile,
    inverse_of,
    products,
    rows_of,
    tile,
    total,
    whole,
)

PAIR = 32  # neurons of a block of threads
GATES = 2 * PAIR
STREAMS = 4
ZERO, ONE = np.float32(0), np.float32(1)
LOWEST, HIGHEST = np.float32(-87), np.float32(88)
CUBE, TWICE = np.float32(0.044715), np.float32(1.5957691)


@device
def exponential(x):
    """exp within the bounds of docs/numerics.md."""
    return np.float32(math.exp(min(x, HIGHEST))) if x >= LOWEST else ZERO


@device
def _silu(x):
    return x / (ONE + exponential(-x))


@device
def _gelu(x):
    return x / (ONE + exponential(-(x + CUBE * (x * x * x)) * TWICE))


@device
def _relu(x):
    return max(x, ZERO)


@device
def _relu2(x):
    return max(x, ZERO) * max(x, ZERO)


@device
def _same(x):
    return x


ACTIVATIONS = {
    "silu": (_silu, _same),
    "gelu": (_gelu, _same),
    "relu": (_relu, _same),
    "relu2": (_relu2, _same),
    "drelu": (_relu, _relu),
}


def _write(sizes: Tile, activation: str) -> Any:
    """What becomes of the sums: 32 neurons' hidden values of each row."""
    finish, tokens = total(sizes), sizes.tokens
    activate_gate, activate_up = ACTIVATIONS[activation]

    @device
    def write(sums, rows, hidden, hidden_row, pair, rounded, parts, teams, gates):
        u = cuda.threadIdx.x
        for t in range(tokens):
            total_of_row = finish(sums, t, parts, teams)
            if u < GATES:
                gates[GATES * t + u] = total_of_row  # 32 of Gate, then 32 of Up
        cuda.syncthreads()
        t, n = u // PAIR, u % PAIR  # from here on a thread has one value of one row
        here, at, value = t < tokens, GATES * t, ZERO
        if here:
            value = activate_gate(gates[at + n]) * activate_up(gates[at + PAIR + n])
        cuda.syncthreads()
        if here:
            gates[at + n] = value
        cuda.syncthreads()
        if here and t < rows:
            target = hidden + t * hidden_row
            if rounded:
                top, count = ZERO, ZERO
                for i in range(PAIR):
                    top = max(top, abs(gates[at + i]))
                inverse = inverse_of(top)
                target += ROUNDED * pair
                if n == 0:
                    for i in range(PAIR):
                        count += whole(gates[at + i], inverse)
                    set_float(target + 128, top / MOST)
                    set_float(target + 132, count)
                set_float(target + 4 * n, whole(value, inverse))
            else:
                set_float(target + 4 * (PAIR * pair + n), value)

    return write


def _place(gate: str, up: str) -> Any:
    """Where a thread's group begins, of pair number `pair`: Gate's rows for threads below 128, else Up's."""
    gate_block, up_block = FORMATS[gate].block, FORMATS[up].block

    @device
    def place(pair, neurons, bundle, per, stride, up, blocks):
        u = cuda.threadIdx.x
        pairs = neurons // PAIR
        cluster = quotient(pair, pairs)
        extent = quotient(cluster, per)
        group = 2 * (pair - cluster * pairs) + u // 64 % 2
        base = extent * stride + (cluster - extent * per) * bundle
        return base + (group * blocks * gate_block if u < 128 else up + group * blocks * up_block)

    return place


def ffn_up(gate: str, up: str, activation: str, tokens: int) -> Any:
    """hidden[row][cluster * neurons + n] = activation(Gate) * Up."""
    sizes = tile(tokens, STREAMS, FORMATS[gate].is_float)
    write, place = _write(sizes, activation), _place(gate, up)
    (stage, add_gate, kind, words, scale_count), add_up = products(gate, sizes, False), products(up, sizes, False).add
    accumulators, chunk, splits, subs_of = 4 * tokens, sizes.chunk, sizes.splits, FORMATS[gate].subs
    values_of_pair = GATES * tokens

    def kernel(
        w, a, step, weights, clusters, neurons, bundle, per, stride, up, blocks, x, x_row, hidden, hidden_row, rounded
    ):  # fmt: skip
        values = cuda.shared.array(words, kind)
        scales = cuda.shared.array(scale_count, np.float32)
        parts = cuda.shared.array(PARTS, np.float32)
        teams = cuda.shared.array(THREADS, np.float32)
        gates = cuda.shared.array(values_of_pair, np.float32)
        sums = cuda.local.array(accumulators, np.float32)
        u, pair, tile_first = cuda.threadIdx.x, cuda.blockIdx.y, cuda.blockIdx.x * tokens
        rows = rows_of(a, step, 0) - tile_first
        if rows > 0:
            base = w + weights + place(pair, neurons, bundle, per, stride, up, blocks)
            source = a + x + tile_first * x_row
            subs, j, four = blocks * subs_of, u // 4 % 4, u % 4
            for i in range(accumulators):
                sums[i] = ZERO
            for first in range(0, subs, chunk):
                end = min(first + chunk, subs)
                cuda.syncthreads()
                stage(source, x_row, 1, rows, first, end - first, values, scales)
                cuda.syncthreads()
                begin = first + u // 16 % splits
                if u < 128:
                    add_gate(sums, base, 1, 0, 0, first, begin, end, values, scales, 1, j, four)
                else:
                    add_up(sums, base, 1, 0, 0, first, begin, end, values, scales, 1, j, four)
            write(sums, rows, a + hidden + tile_first * hidden_row, hidden_row, pair, rounded, parts, teams, gates)

    return kernel
