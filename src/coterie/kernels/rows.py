"""Row-wise kernels: embedding, normalisation, and quantising what the next matrices read.

Rows are padded with zeros to a multiple of 32 columns. Norms sum 16 lanes in ascending order and then the lanes
by halves. An activation block of 32 is scaled by its largest magnitude over 127 and rounded to nearest even.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.extending import register_jitable

from coterie.kernels import formats
from coterie.kernels import unpack as unpacking
from coterie.kernels.compiler import kernel
from coterie.kernels.formats import COLUMNS
from coterie.kernels.operands import (
    EMBED_BLOCKS,
    EMBED_ROW,
    EMBED_SCALE,
    EMBED_SCRATCH,
    EMBED_VOCAB,
    EMBED_X,
    NORM_AGAIN,
    NORM_DIM,
    NORM_EPS,
    NORM_FLOAT_LANE,
    NORM_FLOAT_OUT,
    NORM_OUT,
    NORM_OUT_LANE,
    NORM_PLAIN,
    NORM_PLANES,
    NORM_POST,
    NORM_ROW,
    NORM_SELECT,
    NORM_TILE,
    NORM_TILE_SUBS,
    NORM_WEIGHT,
    NORM_WOVEN,
    NORM_WOVEN_FLOAT,
    NORM_WOVEN_LANE,
    NORM_X,
    NORM_X_OUT,
    NORM_Y,
)
from coterie.kernels.quantise import emit_block, weave_block
from coterie.kernels.record import CLAIM, EMBEDDINGS, ERROR, IDS, NO_SUCH_TOKEN, OUTPUT_ROWS, OUTPUTS, TOKENS
from coterie.kernels.shapes import INT8_TOKEN, SUPERBLOCK, UNPACKED
from coterie.kernels.sync import claim, finish, word
from coterie.kernels.vector import (
    ADDRESS,
    F32,
    FLOATS,
    I32,
    I64,
    F32x16,
    I8x16,
    I32x16,
    add,
    const,
    f32_at,
    floats,
    floats_at,
    fma,
    fmadd,
    i32_at,
    i64_at,
    load,
    mul,
    op,
    set_f32,
    set_floats,
    set_i64,
    splat,
    store,
    total,
)


@op(types.float32, types.int64)
def bits_to_float(b, bits):
    """A float32 operand."""
    return b.bitcast(b.trunc(bits, I32), F32)


@op(FLOATS, FLOATS, ADDRESS, types.float32)
def left_over(b, v, quantised, scale):
    """v - scale * q for 16 int8 at an address, rounded once."""
    q = b.sitofp(b.sext(load(b, quantised, I8x16), I32x16), F32x16)
    return fma(b, splat(b, b.fsub(const(F32, -0.0), scale)), q, v)


@register_jitable
def residual(low, high, x, tokens, row, sub, subs):
    """What `emit_block` lost of 32 floats when it quantised them."""
    tile = row // tokens
    t = row - tile * tokens
    at = x + (tile * subs + sub) * tokens * INT8_TOKEN
    scale = f32_at(at + tokens * COLUMNS + 4 * t)
    return left_over(low, at + t * COLUMNS, scale), left_over(high, at + t * COLUMNS + 16, scale)


@register_jitable
def inverse_rms(x, count, dim, eps):
    """1 / sqrt(mean of squares + eps) of `count` (a multiple of 16) floats, of which `dim` are not padding."""
    squares = floats(np.float32(0))
    for i in range(0, count, 16):
        v = floats_at(x + 4 * i)
        squares = fmadd(v, v, squares)
    mean = total(squares) / np.float32(dim)
    return np.float32(1) / np.sqrt(mean + eps)


@cache
def unpack_op(name: str) -> Any:
    """unpack(block, sub, out): sub-block `sub` of a block as float32[32 columns][16 rows]."""
    f = formats.FORMATS[name]

    @op(types.void, ADDRESS, types.intp, ADDRESS)
    def unpack(b, block, sub, out):
        at = b.add(b.add(block, const(I64, f.header)), b.mul(sub, const(I64, f.sub)))
        if f.is_float:
            for c in range(COLUMNS):
                store(b, out, unpacking.column(b, f, at, c), 64 * c)
            return
        shared = unpacking.header(b, f, block)
        scale, low = unpacking.scales(b, f, at, shared)
        half = unpacking.half_scales(b, at) if f.split_scales else None
        for k, quad in enumerate(unpacking.quads(b, f, at)):
            lanes = b.bitcast(quad, I32x16)
            for i in range(4):
                value = b.and_(b.lshr(lanes, const(I32x16, 8 * i)), const(I32x16, 255))
                if f.offset_bits:
                    value = b.sub(value, const(I32x16, 1 << f.offset_bits))
                if half:
                    value = b.mul(value, half[k // 4])
                weight = b.fmul(b.sitofp(value, F32x16), scale)
                if low is not None:
                    weight = b.fadd(weight, low)
                store(b, out, weight, 64 * (4 * k + i))

    return unpack


@kernel
def embed(name: str) -> Callable[..., Any]:
    """x[row] = embedding[id[row]] * scale, from packed weights of format `name`; where a row's group lies is data."""
    unpack = unpack_op(name)
    block_bytes, subs = formats.FORMATS[name].block, formats.FORMATS[name].subs

    def run(record, step, lane):
        n = word(step, TOKENS)
        scale = bits_to_float(word(record, EMBED_SCALE))
        scratch = word(record, EMBED_SCRATCH) + lane * UNPACKED
        pieces = 0
        row = claim(record, step, lane, n)
        while row >= 0:
            token = np.int64(i32_at(word(step, IDS) + 4 * row))
            if 0 <= token < word(record, EMBED_VOCAB):
                group = i64_at(word(step, EMBEDDINGS) + 8 * row)
                out = word(record, EMBED_X) + row * word(record, EMBED_ROW)
                for block in range(word(record, EMBED_BLOCKS)):
                    for sub in range(subs):
                        unpack(group + block * block_bytes, sub, scratch)
                        for c in range(COLUMNS):
                            value = f32_at(scratch + 64 * c + 4 * (token & 15))
                            set_f32(out + 4 * c, value * scale)
                        out += 4 * COLUMNS
            else:
                set_i64(word(record, ERROR), NO_SUCH_TOKEN)
            pieces += 1
            row = claim(record, step, lane, n)
        return finish(record, step, pieces, n)

    return run


@kernel
def norm() -> Callable[..., Any]:
    """Add a sub-layer's output to the residual stream, and prepare the next sub-layer's input.

        x_out[row] = x[row] + y[row], or x[row] + rms_norm(y[row]) * post     where y is given
        out[row] = rms_norm(x_out[row]) * weight                as int8 tiles, float tiles, woven, as they are

    Rows lie NORM_ROW apart. Where another unit has summed up a part of y, that is NORM_AGAIN, and added to y first:
    each row once, so never in a preparation. With NORM_SELECT the rows are those that want logits, and row i of the
    output is the i-th of them. With two planes a row becomes two: its int8 rounding, and the int8 rounding of what that
    left (docs/numerics.md).
    """

    def run(record, step, lane):
        select = word(record, NORM_SELECT) != 0
        n = word(step, OUTPUTS) if select else word(step, TOKENS)
        shared = word(record, CLAIM) != 0
        base, base_out = word(record, NORM_X), word(record, NORM_X_OUT)
        y_base, post, weight = word(record, NORM_Y), word(record, NORM_POST), word(record, NORM_WEIGHT)
        dim, subs, tokens = word(record, NORM_DIM), word(record, NORM_ROW) // (4 * COLUMNS), word(record, NORM_TILE)
        eps = bits_to_float(word(record, NORM_EPS))
        out = word(record, NORM_OUT)
        out += lane * word(record, NORM_OUT_LANE)
        has_out = word(record, NORM_OUT) != 0
        float_out = word(record, NORM_FLOAT_OUT) + lane * word(record, NORM_FLOAT_LANE)
        has_float = word(record, NORM_FLOAT_OUT) != 0
        woven, woven_float = word(record, NORM_WOVEN), word(record, NORM_WOVEN_FLOAT) != 0
        has_woven, supers = woven != 0, (subs + SUPERBLOCK - 1) // SUPERBLOCK
        woven += lane * word(record, NORM_WOVEN_LANE)
        width, tile_subs, planes = subs * COLUMNS, word(record, NORM_TILE_SUBS), word(record, NORM_PLANES)
        again, plain = word(record, NORM_AGAIN), word(record, NORM_PLAIN)
        pieces = 0
        i = claim(record, step, lane, n) if shared else 0
        while 0 <= i < n:
            row = np.int64(i32_at(word(step, OUTPUT_ROWS) + 4 * i)) if select else i
            x, x_out = base + row * word(record, NORM_ROW), base_out + row * word(record, NORM_ROW)
            if y_base != 0:
                y = y_base + row * word(record, NORM_ROW)
                if again != 0:
                    other = again + row * word(record, NORM_ROW)
                    for c in range(0, 4 * width, 64):
                        set_floats(y + c, add(floats_at(y + c), floats_at(other + c)))
                if post != 0:
                    factor = floats(inverse_rms(y, width, dim, eps))
                    for c in range(0, 4 * width, 64):
                        scaled = mul(mul(floats_at(y + c), factor), floats_at(post + c))
                        set_floats(x_out + c, add(floats_at(x + c), scaled))
                else:
                    for c in range(0, 4 * width, 64):
                        set_floats(x_out + c, add(floats_at(x + c), floats_at(y + c)))
                x = x_out
            factor = floats(inverse_rms(x, width, dim, eps))
            for sub in range(subs):
                c = sub * 4 * COLUMNS
                low = mul(mul(floats_at(x + c), factor), floats_at(weight + c))
                high = mul(mul(floats_at(x + c + 64), factor), floats_at(weight + c + 64))
                if has_out:
                    emit_block(low, high, out, tokens, i * planes, sub, tile_subs, False)
                if has_out and planes == 2:
                    rest_low, rest_high = residual(low, high, out, tokens, i * planes, sub, tile_subs)
                    emit_block(rest_low, rest_high, out, tokens, i * planes + 1, sub, tile_subs, False)
                if has_float:
                    emit_block(low, high, float_out, tokens, i, sub, tile_subs, True)
                if plain != 0:
                    set_floats(plain + i * word(record, NORM_ROW) + c, low)
                    set_floats(plain + i * word(record, NORM_ROW) + c + 64, high)
                if has_woven:
                    weave_block(low, high, woven, tokens, i, sub, supers, woven_float)
            pieces += 1
            i = claim(record, step, lane, n) if shared else i + 1
        return finish(record, step, pieces, n) if shared else pieces

    return run


@kernel
def unpack_blocks(name: str) -> Callable[..., Any]:
    """run(packed, out, blocks): whole blocks as float32[blocks][sub-blocks][32 columns][16 rows]."""
    unpack = unpack_op(name)
    block_bytes, subs = formats.FORMATS[name].block, formats.FORMATS[name].subs

    def run(packed, out, blocks):
        for block in range(blocks):
            for sub in range(subs):
                unpack(packed + block * block_bytes, sub, out + (block * subs + sub) * UNPACKED)
        return blocks

    return run
