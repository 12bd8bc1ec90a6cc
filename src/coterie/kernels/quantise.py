"""Activations as matrices read them: blocks of 32 columns in int8 or float32, in tiles or woven.

A block is scaled by its largest magnitude over 127 and rounded to nearest even. Tiles: tile.py; woven: neurons.py.
"""

from llvmlite import ir
from numba import types
from numba.extending import register_jitable

from coterie.kernels.formats import COLUMNS
from coterie.kernels.shapes import FLOAT_TOKEN, INT8_TOKEN, SUPERBLOCK, WOVEN_FLOAT, WOVEN_INT, WOVEN_WORDS
from coterie.kernels.vector import (
    ADDRESS,
    F32,
    FLOATS,
    I32,
    I64,
    F32x16,
    I8x16,
    I32x16,
    across,
    call,
    const,
    maximum,
    minimum,
    op,
    set_floats,
    splat,
    store,
    vec,
)


def quantised(b: ir.IRBuilder, low: ir.Value, high: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
    """32 floats as two times 16 int8, and their four words: scale, scale * sum, -sum, -(sum of the first 16)."""
    magnitude = maximum(b, *(call(b, "llvm.fabs.v16f32", F32x16, v) for v in (low, high)))
    top = across(b, magnitude, maximum)
    zero, limit = const(F32, 0.0), const(F32x16, 127.0)
    inverse = b.select(b.fcmp_ordered(">", top, zero), b.fdiv(const(F32, 127.0), top), zero)
    halves, sums = [], []
    for v in (low, high):
        scaled = call(b, "llvm.rint.v16f32", F32x16, b.fmul(v, splat(b, inverse)))
        bounded = maximum(b, minimum(b, scaled, limit), const(F32x16, -127.0))
        ints = b.fptosi(bounded, I32x16)
        halves.append(b.trunc(ints, I8x16))
        sums.append(across(b, ints, lambda b, p, q: b.add(p, q)))
    scale, both = b.fdiv(top, const(F32, 127.0)), b.add(*sums)
    return halves, [scale, b.fmul(scale, b.sitofp(both, F32)), b.neg(both), b.neg(sums[0])]


@op(types.void, FLOATS, FLOATS, ADDRESS, types.intp, types.intp)
def quantise_block(b, low, high, x, tokens, t):
    """Write 32 floats as token `t`'s int8 sub-block and its four words (see tile.py for the layout)."""
    halves, words = quantised(b, low, high)
    row = b.add(x, b.mul(t, const(I64, COLUMNS)))
    for half, octets in enumerate(halves):
        store(b, row, octets, 16 * half)
    at = b.add(b.add(x, b.mul(tokens, const(I64, COLUMNS))), b.mul(t, const(I64, 4)))
    for kind, value in enumerate(words):
        store(b, b.add(at, b.mul(tokens, const(I64, 4 * kind))), value)


@register_jitable
def emit_block(low, high, x, tokens, row, sub, subs, as_float):
    """Write 32 floats as sub-block `sub` of `row` in the tiles at `x`: quantised, or as they are."""
    tile = row // tokens
    t = row - tile * tokens
    if as_float:
        at = x + ((tile * subs + sub) * tokens + t) * FLOAT_TOKEN
        set_floats(at, low)
        set_floats(at + 64, high)
    else:
        quantise_block(low, high, x + (tile * subs + sub) * tokens * INT8_TOKEN, tokens, t)


@op(types.void, FLOATS, FLOATS, ADDRESS, types.intp)
def weave_ints(b, low, high, x, lane):
    """Write 32 floats as block `lane` of the woven superblock at `x`, quantised."""
    halves, words = quantised(b, low, high)
    at = b.add(x, b.mul(lane, const(I64, 4)))
    for half, octets in enumerate(halves):
        four = b.bitcast(octets, vec(I32, 4))
        for i in range(4):
            store(b, at, b.extract_element(four, const(I32, i)), 64 * (4 * half + i))
    for kind, value in enumerate(words[:3]):  # scale, scale * sum, -sum
        store(b, at, value, WOVEN_WORDS + 64 * kind)


@op(types.void, FLOATS, FLOATS, ADDRESS, types.intp)
def weave_floats(b, low, high, x, lane):
    """The same, as they are."""
    at = b.add(x, b.mul(lane, const(I64, 4)))
    for half, v in enumerate((low, high)):
        for i in range(16):
            store(b, at, b.extract_element(v, const(I32, i)), 64 * (16 * half + i))


@register_jitable
def weave_block(low, high, x, tokens, row, sub, supers, as_float):
    """Write 32 floats as block `sub` of `row` into woven tiles of `tokens` tokens at `x`."""
    tile = row // tokens
    t = row - tile * tokens
    place = (tile * supers + sub // SUPERBLOCK) * tokens + t
    if as_float:
        weave_floats(low, high, x + place * WOVEN_FLOAT, sub % SUPERBLOCK)
    else:
        weave_ints(low, high, x + place * WOVEN_INT, sub % SUPERBLOCK)
