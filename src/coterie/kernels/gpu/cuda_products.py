"""What CUDA's matrix kernels have in common: activations in shared memory, products of sub-blocks, sums.

A block of 256 threads is 16 teams (cuda_formats.py). They divide up `streams` groups of 16 rows, and each group's
sub-blocks of 32 columns; at the end the teams' and their threads' sums are added in a fixed order.

Integer weights meet the whole numbers of rounded rows, four at a time (dp4a), with exact int32 dots as on the CPU;
float sums are added in another order than there, but always in the same. Of two planes the products are added up
together.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from coterie.kernels.formats import FORMATS
from coterie.kernels.gpu.cuda_formats import BITS, column_reader, reader
from coterie.kernels.gpu.cuda_memory import (
    as_float,
    cuda,
    device,
    dot4,
    int_at,
    nearest,
    quotient,
    word,
    words2,
    words4,
)
from coterie.kernels.gpu.signatures import BLOCK
from coterie.kernels.record import OUTPUTS, TOKENS

THREADS = 256
PARTS = 4 * THREADS  # floats of shared memory for threads' sums
TEAMS = 16
ROUNDED = 4 * BLOCK  # bytes of 32 rounded columns: whole numbers, scale, sum
LEAST, MOST = np.float32(-127), np.float32(127)


class Tile(NamedTuple):
    """Sizes of a kernel for `tokens` rows at once."""

    tokens: int
    streams: int  # groups of 16 rows that a block of threads sums up
    chunk: int  # sub-blocks of activations in shared memory
    planes: int  # of integers

    @property
    def splits(self) -> int:
        """Teams of a stream."""
        return TEAMS // self.streams

    @property
    def blocks(self) -> int:
        """Activation blocks in shared memory, of one plane."""
        return self.tokens * self.chunk


def tile(tokens: int, streams: int, is_float: bool) -> Tile:
    """Chunks are as large as leaves an SM several blocks of threads (at most 20 KiB)."""
    if is_float:
        return Tile(tokens, streams, 64 if tokens == 1 else 16, 0)
    return Tile(tokens, streams, 128 if tokens == 1 else 32, 2)


@device
def _octet(bits):
    return nearest(as_float(bits)) & 255


@device
def rows_of(a, step, select):
    """How many rows this step has, or those that want logits."""
    return int_at(a + step + 8 * (OUTPUTS if select else TOKENS))


@device
def bounded(v):
    """Within what int8 takes; not a number counts as 127, as on the CPU."""
    if not v < MOST:
        v = MOST
    if not v > LEAST:
        v = LEAST
    return v


@device
def whole(v, inverse):
    """A value as int8, as a float."""
    return np.float32(nearest(bounded(v * inverse)))


@device
def inverse_of(top):
    """By what a block with that largest magnitude is multiplied to become int8."""
    return MOST / top if top > np.float32(0) else np.float32(0)


@cache
def stage_integers(sizes: Tile) -> Any:
    """Rounded blocks first to first + chunk of the tile's rows as int8: `values`, four in a word, and `scales`, for
    each plane; zeros where there are none. A row is `planes` rows, `x_row` bytes apart."""
    chunk, blocks = sizes.chunk, sizes.blocks

    @device
    def stage(x, x_row, planes, rows, first, count, values, scales):
        for item in range(cuda.threadIdx.x, blocks, THREADS):
            t, local = item // chunk, item % chunk
            begin = ROUNDED * (first + local)
            there = t < rows and local < count and begin + ROUNDED <= x_row
            for plane in range(planes):
                at = x + (t * planes + plane) * x_row + begin
                place = plane * blocks + item
                for k in range(8):
                    four = 0
                    if there:
                        low, high = words2(at + 16 * k), words2(at + 16 * k + 8)
                        four = _octet(low[0]) | _octet(low[1]) << 8 | _octet(high[0]) << 16 | _octet(high[1]) << 24
                    values[8 * place + k] = four
                scales[place] = as_float(word(at + 128)) if there else np.float32(0)

    return stage


@cache
def stage_floats(sizes: Tile) -> Any:
    """The same rows as they are, one plane without scales."""
    chunk, blocks = sizes.chunk, sizes.blocks

    @device
    def stage(x, x_row, planes, rows, first, count, values, scales):
        for item in range(cuda.threadIdx.x, 8 * blocks, THREADS):
            t, local, k = item // (8 * chunk), item // 8 % chunk, item % 8
            at = 128 * (first + local) + 16 * k
            if t < rows and local < count and at < x_row:
                w = words4(x + t * x_row + at)
                for i in range(4):
                    values[4 * item + i] = as_float(w[i])
            else:
                for i in range(4):
                    values[4 * item + i] = np.float32(0)

    return stage


@cache
def block_at(name: str, clustered: bool) -> Any:
    """Where sub-block s of a group's row lies: the address of its block. Blocks are neighbours, or if `clustered` there
    is one in each cluster, `item` bytes apart, `per` of them in an extent of `stride` bytes."""
    f = FORMATS[name]
    size, subs = f.block, f.subs

    @device
    def at(base, s, per, stride, item):
        if clustered:
            cluster = s // subs
            extent = quotient(cluster, per)
            return base + extent * stride + (cluster - extent * per) * item
        return base + s // subs * size

    return at


@cache
def integer_sums(name: str, sizes: Tile, clustered: bool) -> Any:
    """Add the products of a thread's share of sub-blocks, begin to end, every `splits`th of them, to `sums`,
    float32[token][4 rows]. The next sub-block's weights are on their way while one is computed."""
    f = FORMATS[name]
    fetch, expand = reader(name)
    where, subs = block_at(name, clustered), f.subs
    offset, minimum, split = (1 << f.offset_bits) if f.offset_bits else 0, f.has_minimum, f.split_scales
    tokens, chunk, blocks, splits = sizes.tokens, sizes.chunk, sizes.blocks, sizes.splits

    @device
    def row(lower, upper, scale, second, low, high, ones, upper_ones):
        if split:
            left = np.float32(dot4(lower, low, -offset * ones)) * scale
            return left + np.float32(dot4(upper, high, -offset * upper_ones)) * second
        if minimum:
            return np.float32(dot4(lower, low, dot4(upper, high, 0))) * scale + np.float32(ones) * second
        return np.float32(dot4(lower, low, dot4(upper, high, -offset * ones))) * scale

    @device
    def add(sums, base, per, stride, item, first, begin, end, values, scales, planes, j, four):
        if begin < end:
            s = begin
            raw = fetch(where(base, s, per, stride, item), s % subs, j, four)
            while s < end:
                following = s + splits if s + splits < end else s
                after = fetch(where(base, following, per, stride, item), following % subs, j, four)
                lower, upper, scale, second = expand(raw, j)
                for plane in range(planes):
                    for t in range(tokens):
                        at = plane * blocks + t * chunk + (s - first)
                        # Indices without a sign, of which none needs to be looked at for being below 0.
                        low, high = values[np.uint32(8 * at + j)], values[np.uint32(8 * at + 4 + j)]
                        step = scales[np.uint32(at)]
                        upper_ones = dot4(BITS, high, 0)
                        ones = dot4(BITS, low, 0) if split else dot4(BITS, low, upper_ones)
                        for r in range(4):
                            sums[4 * t + r] += step * row(
                                lower[r], upper[r], scale[r], second[r], low, high, ones, upper_ones
                            )
                raw = after
                s += splits

    return add


@cache
def float_sums(name: str, sizes: Tile, clustered: bool) -> Any:
    """The same for a float format, but for scales and planes."""
    column = column_reader(name)
    where = block_at(name, clustered)
    tokens, chunk, splits = sizes.tokens, sizes.chunk, sizes.splits

    @device
    def add(sums, base, per, stride, item, first, begin, end, values, scales, planes, j, four):
        for s in range(begin, end, splits):
            block = where(base, s, per, stride, item)
            for i in range(8):
                c = 4 * j + i % 4 + i // 4 * 16
                w = column(block, c, four)
                for t in range(tokens):
                    x = values[np.uint32(32 * (t * chunk + s - first) + c)]
                    sums[4 * t] += w[0] * x
                    sums[4 * t + 1] += w[1] * x
                    sums[4 * t + 2] += w[2] * x
                    sums[4 * t + 3] += w[3] * x

    return add


@cache
def total(sizes: Tile) -> Any:
    """The block's sums of row `t`: threads below 16 * streams get those of row thread % 16 of group thread / 16, others
    nothing of use. `parts` is float32[PARTS], `teams` float32[THREADS]. All threads come here."""
    splits, streams = sizes.splits, sizes.streams

    @device
    def add(sums, t, parts, teams):
        u = cuda.threadIdx.x
        four, at = u % 4, u // 4 * 16
        cuda.syncthreads()  # whoever still reads what was here before
        for r in range(4):
            parts[at + 4 * four + r] = sums[4 * t + r]
        cuda.syncthreads()
        at = u // 16 * 64 + u % 16
        teams[u] = (parts[at] + parts[at + 16]) + (parts[at + 32] + parts[at + 48])
        cuda.syncthreads()
        sum_of_all = np.float32(0)
        if u < 16 * streams:
            for k in range(splits):
                sum_of_all += teams[(u // 16 * splits + k) * 16 + u % 16]
        return sum_of_all

    return add


class Products(NamedTuple):
    """How activations meet weights of a format: `stage` puts them into shared memory, `values` of type `kind` and
    `scales`, as many as said; `add` multiplies."""

    stage: Any
    add: Any
    kind: Any
    values: int
    scales: int


def products(name: str, sizes: Tile, clustered: bool) -> Products:
    """For weights of that format: int8 activations in planes, or floats."""
    if FORMATS[name].is_float:
        return Products(stage_floats(sizes), float_sums(name, sizes, clustered), np.float32, 32 * sizes.blocks, 1)
    blocks = sizes.planes * sizes.blocks
    return Products(stage_integers(sizes), integer_sums(name, sizes, clustered), np.uint32, 8 * blocks, blocks)
