"""Packed weights as CUDA threads read them (docs/packed-format.md).

A *team* of 16 threads takes a sub-block: 32 columns of 16 rows. Thread (j, four), j and four below 4, has rows 4 four
to 4 four + 3 and of these the quads j and 4 + j, columns 4j to 4j + 3 and 16 + 4j to 16 + 4j + 3. So one load of 16
bytes brings 16 or 32 weights, a team's loads are neighbours, and each activation read is used four times.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from coterie.kernels.formats import FORMATS
from coterie.kernels.gpu.cuda_memory import as_float, device, high_half, low_half, word, words2, words4

NIBBLES = 0x0F0F0F0F
BITS = 0x01010101
PAIRS = 0x03030303


class Reader(NamedTuple):
    """How a thread gets at an integer format's weights.

    `fetch(block, sub, j, four)` loads what it needs of sub-block `sub` of the block at that address, a tuple of words.
    `expand(raw, j)` makes of it 16 values: quad j of the four rows, their quads 4 + j, both uint8 in words; a scale a
    row; and a minimum a row, or where `split` the scale of quads 4 + j, or nothing that counts.
    """

    fetch: Callable[..., Any]
    expand: Callable[..., Any]


@device
def _halves(a, b):
    return low_half(a), high_half(a), low_half(b), high_half(b)


@device
def _unsigned(w):
    """Four bytes as floats."""
    return (
        np.float32(np.int32(w & 255)),
        np.float32(np.int32(w >> 8 & 255)),
        np.float32(np.int32(w >> 16 & 255)),
        np.float32(np.int32(w >> 24 & 255)),
    )


@device
def _signed(w):
    return (
        np.float32(np.int32(w & 255 ^ 128) - np.int32(128)),
        np.float32(np.int32(w >> 8 & 255 ^ 128) - np.int32(128)),
        np.float32(np.int32(w >> 16 & 255 ^ 128) - np.int32(128)),
        np.float32(np.int32(w >> 24 & 255 ^ 128) - np.int32(128)),
    )


@device
def _low_nibbles(v):
    return v[0] & NIBBLES, v[1] & NIBBLES, v[2] & NIBBLES, v[3] & NIBBLES


@device
def _high_nibbles(v):
    return v[0] >> 4 & NIBBLES, v[1] >> 4 & NIBBLES, v[2] >> 4 & NIBBLES, v[3] >> 4 & NIBBLES


@device
def _above(q, h, shift, mask):
    """Nibbles with further bits put above them."""
    return (
        q[0] | (h[0] >> shift & mask) << 4,
        q[1] | (h[1] >> shift & mask) << 4,
        q[2] | (h[2] >> shift & mask) << 4,
        q[3] | (h[3] >> shift & mask) << 4,
    )


def _simple(vectors: int, *, minimum: bool, fifth: bool) -> Reader:
    """Q4_0, Q4_1, Q5_0: nibbles at `vectors`, perhaps a minimum before them and a fifth bit behind them."""

    @device
    def fetch(block, sub, j, four):
        scale = words2(block + 8 * four)
        low = words2(block + 32 + 8 * four) if minimum else scale
        v = words4(block + vectors + 64 * j + 16 * four)
        return scale, low, v, words4(block + vectors + 256 + 16 * four) if fifth else v

    @device
    def expand(raw, j):
        scale, low, v, h = raw
        lower, upper = _low_nibbles(v), _high_nibbles(v)
        if fifth:
            lower, upper = _above(lower, h, j, BITS), _above(upper, h, 4 + j, BITS)
        return lower, upper, _halves(scale[0], scale[1]), _halves(low[0], low[1])

    return Reader(fetch, expand)


def _bytes() -> Reader:
    """Q8_0."""

    @device
    def fetch(block, sub, j, four):
        vectors = block + 32 + 64 * j + 16 * four
        return words2(block + 8 * four), words4(vectors), words4(vectors + 256)

    @device
    def expand(raw, j):
        scale, v, u = raw
        scales = _halves(scale[0], scale[1])
        return v, u, scales, scales

    return Reader(fetch, expand)


def _k_quant(size: int, *, fifth: bool) -> Reader:
    """Q4_K, Q5_K, with sub-blocks of `size` bytes."""

    @device
    def fetch(block, sub, j, four):
        at = block + 64 + size * sub
        v = words4(at + 32 + 64 * j + 16 * four)
        h = words4(at + 288 + 16 * four) if fifth else v
        return (
            words2(block + 8 * four),
            words2(block + 32 + 8 * four),
            word(at + 4 * four),
            word(at + 16 + 4 * four),
            v,
            h,
        )

    @device
    def expand(raw, j):
        d, dmin, scale, low, v, h = raw
        lower, upper = _low_nibbles(v), _high_nibbles(v)
        if fifth:
            lower, upper = _above(lower, h, j, BITS), _above(upper, h, 4 + j, BITS)
        s, m = _unsigned(scale), _unsigned(low)
        a, b = _halves(d[0], d[1]), _halves(dmin[0], dmin[1])
        scales = a[0] * s[0], a[1] * s[1], a[2] * s[2], a[3] * s[3]
        return lower, upper, scales, (-b[0] * m[0], -b[1] * m[1], -b[2] * m[2], -b[3] * m[3])

    return Reader(fetch, expand)


def _q6_k() -> Reader:
    @device
    def fetch(block, sub, j, four):
        at = block + 32 + 416 * sub
        v = words4(at + 32 + 64 * j + 16 * four)
        g, h = words4(at + 288 + 16 * four), words4(at + 352 + 16 * four)
        return words2(block + 8 * four), word(at + 4 * four), word(at + 16 + 4 * four), v, g, h

    @device
    def expand(raw, j):
        d, first, second, v, g, h = raw
        lower = _above(_low_nibbles(v), g, 2 * j, PAIRS)
        upper = _above(_high_nibbles(v), h, 2 * j, PAIRS)
        a, s, t = _halves(d[0], d[1]), _signed(first), _signed(second)
        scales = a[0] * s[0], a[1] * s[1], a[2] * s[2], a[3] * s[3]
        return lower, upper, scales, (a[0] * t[0], a[1] * t[1], a[2] * t[2], a[3] * t[3])

    return Reader(fetch, expand)


@cache
def reader(name: str) -> Reader:
    """The reader of an integer format."""
    match name:
        case "Q4_0":
            return _simple(32, minimum=False, fifth=False)
        case "Q4_1":
            return _simple(64, minimum=True, fifth=False)
        case "Q5_0":
            return _simple(32, minimum=False, fifth=True)
        case "Q8_0":
            return _bytes()
        case "Q4_K":
            return _k_quant(FORMATS[name].sub, fifth=False)
        case "Q5_K":
            return _k_quant(FORMATS[name].sub, fifth=True)
    assert name == "Q6_K", name
    return _q6_k()


@cache
def column_reader(name: str) -> Any:
    """Of a float format: `column(block, c, four)`, four rows' float32 of column c."""
    if name == "F32":

        @device
        def column(block, c, four):
            w = words4(block + 64 * c + 16 * four)
            return as_float(w[0]), as_float(w[1]), as_float(w[2]), as_float(w[3])

    elif name == "F16":

        @device
        def column(block, c, four):
            w = words2(block + 32 * c + 8 * four)
            return _halves(w[0], w[1])

    else:

        @device
        def column(block, c, four):
            w = words2(block + 32 * c + 8 * four)
            return (
                as_float(w[0] << 16),
                as_float(w[0] & 0xFFFF0000),
                as_float(w[1] << 16),
                as_float(w[1] & 0xFFFF0000),
            )

    return column
