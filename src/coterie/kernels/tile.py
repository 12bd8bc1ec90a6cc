"""The matrix tile: 16 rows of packed weights times T tokens, the sums in registers.

One arithmetic for decode (T = 1), small batches and prefill, so a token's result does not depend on its
company: activations are int8 in blocks of 32 columns, a block's dot product is an exact int32, and blocks are
added in ascending order by float32 fused multiply-adds:

    sum = fma(float(dot), scale_w * scale_x, sum)         then, where the format has a minimum,
    sum = fma(minimum_w, scale_x * sum_x, sum)

Float weights multiply float32 activations, one fused multiply-add a column, ascending.

Activations of a tile lie `[sub-block][bytes of T tokens x 32][T x scale][T x dsum][T x nsum][T x nlow]`:
int8, float32 scale, float32 scale * sum, int32 -sum, int32 -(sum of the first 16 columns). For float weights:
`[sub-block][T][32]` float32.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from coterie.kernels import formats, unpack
from coterie.kernels.formats import COLUMNS, QUADS, Format
from coterie.kernels.shapes import CLUSTER_DOWN, CLUSTER_ROW, token_bytes
from coterie.kernels.vector import (
    ADDRESS,
    F32,
    I32,
    I64,
    F32x16,
    I8x64,
    I32x16,
    const,
    dot4,
    fma,
    load,
    op,
    splat,
    store,
)


@dataclass(frozen=True)
class Tile:
    """What a tile is generated for."""

    f: Format
    tokens: int

    @property
    def x_sub(self) -> int:
        """Bytes of a sub-block of activations of all tokens."""
        return self.tokens * token_bytes(self.f)


def _int_sub_block(
    b: ir.IRBuilder, tile: Tile, w: ir.Value, x: ir.Value, shared: Any, sums: list[ir.Value]
) -> None:
    """Add one sub-block of an integer format into the sums (stack slots)."""
    f, n = tile.f, tile.tokens
    words = COLUMNS * n

    def word(kind: int, t: int, ty: ir.Type) -> ir.Value:
        return splat(b, load(b, x, ty, words + 4 * (kind * n + t)))

    scale, low = unpack.scales(b, f, w, shared)
    zero = const(I32x16, 0)
    dots = [zero] * n
    uppers = [zero] * n
    if f.offset_bits:
        shift = const(I32x16, f.offset_bits)
        for t in range(n):
            if f.split_scales:
                head = word(3, t, I32)
                dots[t] = b.shl(head, shift)
                uppers[t] = b.shl(b.sub(word(2, t, I32), head), shift)
            else:
                dots[t] = b.shl(word(2, t, I32), shift)
    for k, quad in enumerate(unpack.quads(b, f, w)):
        for t in range(n):
            four = b.bitcast(splat(b, load(b, x, I32, COLUMNS * t + 4 * k)), I8x64)
            if f.split_scales and k >= QUADS // 2:
                uppers[t] = dot4(b, uppers[t], quad, four, f.narrow)
            else:
                dots[t] = dot4(b, dots[t], quad, four, f.narrow)
    if f.split_scales:
        first, second = unpack.half_scales(b, w)
        dots = [b.add(b.mul(d, first), b.mul(u, second)) for d, u in zip(dots, uppers, strict=True)]
    for t in range(n):
        total = fma(b, b.sitofp(dots[t], F32x16), b.fmul(scale, word(0, t, F32)), b.load(sums[t]))
        if low is not None:
            total = fma(b, low, word(1, t, F32), total)
        b.store(total, sums[t])


def _float_sub_block(b: ir.IRBuilder, tile: Tile, w: ir.Value, x: ir.Value, sums: list[ir.Value]) -> None:
    """Add one sub-block of a float format into the sums."""
    totals = [b.load(s) for s in sums]
    for c in range(COLUMNS):
        weights = unpack.column(b, tile.f, w, c)
        for t in range(tile.tokens):
            totals[t] = fma(b, weights, splat(b, load(b, x, F32, 4 * (COLUMNS * t + c))), totals[t])
    for s, total in zip(sums, totals, strict=True):
        b.store(total, s)


def _block(b: ir.IRBuilder, tile: Tile, w: ir.Value, x: ir.Value, sums: list[ir.Value]) -> None:
    """Add one block: a sub-block, or eight that share scales."""
    f = tile.f
    if f.is_float:
        _float_sub_block(b, tile, w, x, sums)
    elif f.subs == 1:
        _int_sub_block(b, tile, w, x, (None, None), sums)
    else:
        shared = unpack.header(b, f, w)
        with cgutils.for_range(b, const(I64, f.subs), intp=I64) as loop:
            at = b.add(w, b.add(b.mul(loop.index, const(I64, f.sub)), const(I64, f.header)))
            _int_sub_block(b, tile, at, b.add(x, b.mul(loop.index, const(I64, tile.x_sub))), shared, sums)


def _with_sums(
    b: ir.IRBuilder, tile: Tile, y: ir.Value, y_stride: ir.Value, keep: ir.Value, body: Any
) -> None:
    """Run `body(sums)` on sums that start at zero, or at what `y` holds if `keep` is not 0, and store them."""
    at = [b.add(y, b.mul(y_stride, const(I64, t))) for t in range(tile.tokens)]
    sums = [cgutils.alloca_once_value(b, const(F32x16, 0.0)) for _ in at]
    for s in sums:
        b.store(const(F32x16, 0.0), s)
    with b.if_then(b.icmp_signed("!=", keep, const(I64, 0))):
        for s, a in zip(sums, at, strict=True):
            b.store(load(b, a, F32x16), s)
    body(sums)
    for s, a in zip(sums, at, strict=True):
        store(b, a, b.load(s))


def build_tile(
    b: ir.IRBuilder, tile: Tile, w: Any, x: Any, y: Any, y_stride: Any, blocks: Any, keep: Any
) -> None:
    """Instructions for `blocks` blocks that lie one behind the other."""

    def body(sums: list[ir.Value]) -> None:
        with cgutils.for_range(b, blocks, intp=I64) as loop:
            w_at = b.add(w, b.mul(loop.index, const(I64, tile.f.block)))
            x_at = b.add(x, b.mul(loop.index, const(I64, tile.x_sub * tile.f.subs)))
            _block(b, tile, w_at, x_at, sums)

    _with_sums(b, tile, y, y_stride, keep, body)


def build_cluster_tile(
    b: ir.IRBuilder,
    tile: Tile,
    table: Any,
    ids: Any,
    count: Any,
    offset: Any,
    x: Any,
    y: Any,
    y_stride: Any,
    keep: Any,
) -> None:
    """The same over the Down blocks of a list of neuron clusters: block `i` lies `offset` bytes into the Down
    column of cluster `ids[i]`, and its activations at that cluster's place in `x`."""

    def body(sums: list[ir.Value]) -> None:
        with cgutils.for_range(b, count, intp=I64) as loop:
            cluster = b.sext(load(b, b.add(ids, b.mul(loop.index, const(I64, 4))), I32), I64)
            row = b.add(table, b.mul(cluster, const(I64, CLUSTER_ROW)))
            w_at = b.add(load(b, row, I64, CLUSTER_DOWN), offset)
            x_at = b.add(x, b.mul(cluster, const(I64, tile.x_sub * tile.f.subs)))
            _block(b, tile, w_at, x_at, sums)

    _with_sums(b, tile, y, y_stride, keep, body)


@cache
def tile_op(name: str, tokens: int) -> Any:
    """tile(w, x, y, y_stride, blocks, keep): the intrinsic for a format and token count."""
    tile = Tile(formats.FORMATS[name], tokens)

    @op(types.void, ADDRESS, ADDRESS, ADDRESS, types.intp, types.intp, types.intp)
    def run_tile(b, w, x, y, y_stride, blocks, keep):  # type: ignore[no-untyped-def]
        build_tile(b, tile, w, x, y, y_stride, blocks, keep)

    return run_tile


@cache
def cluster_tile_op(name: str, tokens: int) -> Any:
    """tile(table, ids, count, offset, x, y, y_stride, keep): the same over clusters."""
    tile = Tile(formats.FORMATS[name], tokens)

    @op(types.void, ADDRESS, ADDRESS, types.intp, types.intp, ADDRESS, ADDRESS, types.intp, types.intp)
    def run_tile(b, table, ids, count, offset, x, y, y_stride, keep):  # type: ignore[no-untyped-def]
        build_cluster_tile(b, tile, table, ids, count, offset, x, y, y_stride, keep)

    return run_tile
