"""CUDA kernels of matrices whose rows are groups of 16: projections, logits, and Down over neuron clusters.

Grid: (tiles of rows, groups / streams), tiles first, so that blocks that run side by side read the same weights.
"""

from typing import Any

import numpy as np

from coterie.kernels.formats import FORMATS
from coterie.kernels.gpu.cuda_memory import cuda, device, quotient, set_float
from coterie.kernels.gpu.cuda_products import (
    PARTS,
    THREADS,
    Tile,
    products,
    rows_of,
    tile,
    total,
)


def sizes_of(name: str, tokens: int) -> Tile:
    """Of one row all threads work on one group, so that there are many blocks; of several rows they share what
    activations cost to quantise."""
    return tile(tokens, 1 if tokens == 1 else 4, FORMATS[name].is_float)


def _write(sizes: Tile) -> Any:
    finish, tokens, streams = total(sizes), sizes.tokens, sizes.streams

    @device
    def write(sums, rows, y, y_row, group, groups, parts, teams):
        u = cuda.threadIdx.x
        for t in range(tokens):
            whole = finish(sums, t, parts, teams)
            if u < 16 * streams and t < rows and group + u // 16 < groups:
                set_float(y + t * y_row + 4 * (16 * group + u), whole)

    return write


def _rows(name: str, tokens: int, clustered: bool) -> Any:
    """A function that writes y[row][16 group + r] for one tile of rows and `streams` groups; `base` is where the row of
    this thread's group begins, `here` whether there is such a group."""
    sizes = sizes_of(name, tokens)
    write, (stage, add, kind, words, scale_count) = _write(sizes), products(name, sizes, clustered)
    accumulators, chunk, splits = 4 * tokens, sizes.chunk, sizes.splits

    @device
    def compute(base, here, per, stride, item, subs, x, x_row, planes, rows, y, y_row, group, groups):
        values = cuda.shared.array(words, kind)
        scales = cuda.shared.array(scale_count, np.float32)
        parts = cuda.shared.array(PARTS, np.float32)
        teams = cuda.shared.array(THREADS, np.float32)
        sums = cuda.local.array(accumulators, np.float32)
        u = cuda.threadIdx.x
        for i in range(accumulators):
            sums[i] = np.float32(0)
        for first in range(0, subs, chunk):
            end = min(first + chunk, subs)
            cuda.syncthreads()
            stage(x, x_row, planes, rows, first, end - first, values, scales)
            cuda.syncthreads()
            begin = first + u // 16 % splits if here else end
            add(sums, base, per, stride, item, first, begin, end, values, scales, planes, u // 4 % 4, u % 4)
        write(sums, rows, y, y_row, group, groups, parts, teams)

    return compute


def matmul(name: str, tokens: int) -> Any:
    """y[row][16 g + r] = sum over columns of weights[g][r] * x[row]."""
    compute, sizes, subs_of = _rows(name, tokens, False), sizes_of(name, tokens), FORMATS[name].subs
    streams, splits = sizes.streams, sizes.splits

    def kernel(w, a, step, select, weights, groups, blocks, group, per, stride, x, x_row, planes, y, y_row):
        first = cuda.blockIdx.x * tokens
        rows = rows_of(a, step, select) - first
        if rows > 0:
            block = cuda.blockIdx.y * streams
            mine = block + cuda.threadIdx.x // 16 // splits
            extent = quotient(mine, per)
            base = w + weights + extent * stride + (mine - extent * per) * group
            compute(
                base, mine < groups, 1, 0, 0, blocks * subs_of, a + x + first * planes * x_row, x_row,
                planes, rows,
                a + y + first * y_row, y_row, block, groups,
            )  # fmt: skip

    return kernel


def ffn_down(name: str, tokens: int) -> Any:
    """y[row][16 g + r] = sum over clusters of Down's block column."""
    compute, sizes, f = _rows(name, tokens, True), sizes_of(name, tokens), FORMATS[name]
    streams, splits, subs_of, size = sizes.streams, sizes.splits, f.subs, f.block

    def kernel(
        w, a, step, weights, clusters, neurons, bundle, per, stride, down, groups, hidden, hidden_row, y, y_row
    ):  # fmt: skip
        first = cuda.blockIdx.x * tokens
        rows = rows_of(a, step, 0) - first
        if rows > 0:
            block = cuda.blockIdx.y * streams
            mine = block + cuda.threadIdx.x // 16 // splits
            base = w + weights + down + mine * size
            compute(
                base, mine < groups, per, stride, bundle, clusters * subs_of, a + hidden + first * hidden_row,
                hidden_row, 1, rows, a + y + first * y_row, y_row, block, groups,
            )  # fmt: skip

    return kernel
