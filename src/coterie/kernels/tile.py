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

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from coterie.kernels import formats, unpack
from coterie.kernels.formats import COLUMNS, QUADS, Format
from coterie.kernels.shapes import CLUSTER_DOWN, CLUSTER_ROW, VECTOR, token_bytes
from coterie.kernels.vector import (
    ADDRESS,
    F32,
    I32,
    I64,
    F32x16,
    I8x64,
    I32x16,
    ask_for,
    const,
    dot4,
    fma,
    load,
    op,
    splat,
    store,
)

FEW = 2  # tokens up to which memory is the bound
AHEAD = 4096  # bytes; without it a core waits for a tenth to a fifth of its reads, with hardware's prefetch alone


@dataclass(frozen=True)
class Tile:
    """What a tile is generated for: a format, tokens, and groups of 16 rows side by side."""

    f: Format
    tokens: int
    groups: int = 1
    ahead: Any = 0  # prefetch weights so many bytes ahead of their use: a number, or a value of the program's

    @property
    def x_sub(self) -> int:
        """Bytes of a sub-block of activations of all tokens."""
        return self.tokens * token_bytes(self.f)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Every (group, token)."""
        return [(g, t) for g in range(self.groups) for t in range(self.tokens)]


Sums = dict[tuple[int, int], Any]  # by (group, token): stack slots that become registers


def _int_sub_block(b: ir.IRBuilder, tile: Tile, w: list[Any], x: Any, shared: list[Any], sums: Sums) -> None:
    """Add one sub-block of an integer format into the sums. `w`, `shared`: one a group."""
    f, n = tile.f, tile.tokens
    words = COLUMNS * n
    ahead = const(I64, tile.ahead) if isinstance(tile.ahead, int) else tile.ahead
    for at in w:
        for line in range(0, 0 if tile.ahead == 0 else f.sub, 64):
            ask_for(b, b.add(at, b.add(ahead, const(I64, line))), near=True)

    def word(kind: int, t: int, ty: ir.Type) -> Any:
        return splat(b, load(b, x, ty, words + 4 * (kind * n + t)))

    zero, shift = const(I32x16, 0), const(I32x16, f.offset_bits)
    starts, upper_starts = [zero] * n, [zero] * n  # what takes the weights' offset off again
    for t in range(n if f.offset_bits else 0):
        if f.split_scales:
            head = word(3, t, I32)
            starts[t] = b.shl(head, shift)
            upper_starts[t] = b.shl(b.sub(word(2, t, I32), head), shift)
        else:
            starts[t] = b.shl(word(2, t, I32), shift)
    dots = {(g, t): starts[t] for g, t in tile.pairs}
    uppers = {(g, t): upper_starts[t] for g, t in tile.pairs}
    quads = [unpack.quads(b, f, at) for at in w]
    for k in range(QUADS):
        into = uppers if f.split_scales and k >= QUADS // 2 else dots
        for t in range(n):
            four = b.bitcast(splat(b, load(b, x, I32, COLUMNS * t + 4 * k)), I8x64)
            for g in range(tile.groups):
                into[g, t] = dot4(b, into[g, t], quads[g][k], four, f.narrow)
    for g in range(tile.groups):
        scale, low = unpack.scales(b, f, w[g], shared[g])
        if f.split_scales:
            first, second = unpack.half_scales(b, w[g])
            for t in range(n):
                dots[g, t] = b.add(b.mul(dots[g, t], first), b.mul(uppers[g, t], second))
        for t in range(n):
            total = fma(b, b.sitofp(dots[g, t], F32x16), b.fmul(scale, word(0, t, F32)), b.load(sums[g, t]))
            if low is not None:
                total = fma(b, low, word(1, t, F32), total)
            b.store(total, sums[g, t])


def _float_sub_block(b: ir.IRBuilder, tile: Tile, w: list[Any], x: Any, sums: Sums) -> None:
    """Add one sub-block of a float format into the sums."""
    totals = {pair: b.load(sums[pair]) for pair in tile.pairs}
    for c in range(COLUMNS):
        weights = [unpack.column(b, tile.f, at, c) for at in w]
        for t in range(tile.tokens):
            value = splat(b, load(b, x, F32, 4 * (COLUMNS * t + c)))
            for g in range(tile.groups):
                totals[g, t] = fma(b, weights[g], value, totals[g, t])
    for pair, total in totals.items():
        b.store(total, sums[pair])


def _block(b: ir.IRBuilder, tile: Tile, w: list[Any], x: Any, sums: Sums) -> None:
    """Add one block: a sub-block, or eight that share scales."""
    f = tile.f
    if f.is_float:
        _float_sub_block(b, tile, w, x, sums)
    elif f.subs == 1:
        _int_sub_block(b, tile, w, x, [(None, None)] * tile.groups, sums)
    else:
        shared = [unpack.header(b, f, at) for at in w]
        with cgutils.for_range(b, const(I64, f.subs), intp=I64) as loop:
            offset = b.add(b.mul(loop.index, const(I64, f.sub)), const(I64, f.header))
            x_at = b.add(x, b.mul(loop.index, const(I64, tile.x_sub)))
            _int_sub_block(b, tile, [b.add(at, offset) for at in w], x_at, shared, sums)


def _with_sums(b: ir.IRBuilder, tile: Tile, y: Any, y_stride: Any, keep: Any, body: Any) -> None:
    """Run `body(sums)` on sums that start at zero, or at what `y` holds if `keep` is not 0, and store them."""
    at = {(g, t): b.add(b.add(y, b.mul(y_stride, const(I64, t))), const(I64, VECTOR * g)) for g, t in tile.pairs}
    sums = {pair: cgutils.alloca_once_value(b, const(F32x16, 0.0)) for pair in at}
    for slot in sums.values():
        b.store(const(F32x16, 0.0), slot)
    with b.if_then(b.icmp_signed("!=", keep, const(I64, 0))):
        for pair, slot in sums.items():
            b.store(load(b, at[pair], F32x16), slot)
    body(sums)
    for pair, slot in sums.items():
        store(b, at[pair], b.load(slot))


def build_tile(
    b: ir.IRBuilder, tile: Tile, w: Any, group: Any, x: Any, y: Any, y_stride: Any, blocks: Any, keep: Any
) -> None:
    """Instructions for `blocks` blocks that lie one behind the other; groups lie `group` bytes apart."""

    _with_sums(b, tile, y, y_stride, keep, lambda sums: _blocks(b, tile, w, group, x, blocks, sums))


def build_turning_tile(
    b: ir.IRBuilder, tile: Tile, w: Any, x: Any, y: Any, y_stride: Any, blocks: Any, keep: Any, following: Any
) -> None:
    """The same for one group; the last blocks prefetch what lies at `following` and behind it."""
    turn = -(-tile.ahead // tile.f.block)

    def body(sums: Sums) -> None:
        before = b.sub(blocks, const(I64, turn))
        before = b.select(b.icmp_signed("<", before, const(I64, 0)), const(I64, 0), before)
        at = b.add(w, b.mul(before, const(I64, tile.f.block)))
        x_at = b.add(x, b.mul(before, const(I64, tile.x_sub * tile.f.subs)))
        _blocks(b, tile, w, const(I64, 0), x, before, sums)
        turning = replace(tile, ahead=b.sub(following, at))
        _blocks(b, turning, at, const(I64, 0), x_at, b.sub(blocks, before), sums)

    _with_sums(b, tile, y, y_stride, keep, body)


def _blocks(b: ir.IRBuilder, tile: Tile, w: Any, group: Any, x: Any, blocks: Any, sums: Sums) -> None:
    """Add blocks that lie one behind the other into the sums."""
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        at = b.add(w, b.mul(loop.index, const(I64, tile.f.block)))
        x_at = b.add(x, b.mul(loop.index, const(I64, tile.x_sub * tile.f.subs)))
        _block(b, tile, [b.add(at, b.mul(group, const(I64, g))) for g in range(tile.groups)], x_at, sums)


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
    column of cluster `ids[i]`, its group's neighbours behind it, and its activations at that cluster's place in
    `x`."""

    def body(sums: Sums) -> None:
        with cgutils.for_range(b, count, intp=I64) as loop:
            cluster = b.sext(load(b, b.add(ids, b.mul(loop.index, const(I64, 4))), I32), I64)
            row = b.add(table, b.mul(cluster, const(I64, CLUSTER_ROW)))
            at = b.add(load(b, row, I64, CLUSTER_DOWN), offset)
            x_at = b.add(x, b.mul(cluster, const(I64, tile.x_sub * tile.f.subs)))
            _block(b, tile, [b.add(at, const(I64, tile.f.block * g)) for g in range(tile.groups)], x_at, sums)

    _with_sums(b, tile, y, y_stride, keep, body)


@cache
def tile_op(name: str, tokens: int, groups: int = 1, *, ahead: bool = True) -> Any:
    """tile(w, group, x, y, y_stride, blocks, keep): the intrinsic for a format, tokens and groups. `ahead`: the
    weights behind these are read next, so with few tokens they are prefetched."""
    tile = Tile(formats.FORMATS[name], tokens, groups, AHEAD if ahead and tokens <= FEW else 0)

    @op(types.void, ADDRESS, types.intp, ADDRESS, ADDRESS, types.intp, types.intp, types.intp)
    def run_tile(b, w, group, x, y, y_stride, blocks, keep):
        build_tile(b, tile, w, group, x, y, y_stride, blocks, keep)

    return run_tile


@cache
def turning_tile_op(name: str, tokens: int) -> Any:
    """tile(w, group, x, y, y_stride, blocks, keep, following): what lies at `following` is read next, not what lies
    behind these. With few tokens the last blocks prefetch it."""
    tile = Tile(formats.FORMATS[name], tokens, tile_groups(tokens), AHEAD if tokens <= FEW else 0)

    @op(types.void, ADDRESS, types.intp, ADDRESS, ADDRESS, types.intp, types.intp, types.intp, ADDRESS)
    def run_tile(b, w, group, x, y, y_stride, blocks, keep, following):
        if tokens > FEW:
            build_tile(b, tile, w, group, x, y, y_stride, blocks, keep)
        else:
            build_turning_tile(b, tile, w, x, y, y_stride, blocks, keep, following)

    return run_tile


@cache
def cluster_tile_op(name: str, tokens: int, groups: int = 1) -> Any:
    """tile(table, ids, count, offset, x, y, y_stride, keep): the same over clusters."""
    tile = Tile(formats.FORMATS[name], tokens, groups)

    @op(types.void, ADDRESS, ADDRESS, types.intp, types.intp, ADDRESS, ADDRESS, types.intp, types.intp)
    def run_tile(b, table, ids, count, offset, x, y, y_stride, keep):
        build_cluster_tile(b, tile, table, ids, count, offset, x, y, y_stride, keep)

    return run_tile


def tile_groups(tokens: int) -> int:
    """Row groups a tile takes together. With four tokens two, which halves the loads of activations and makes 8
    integer sums; with fewer, memory is the bound, and weights are read in order."""
    return 2 if tokens > FEW else 1
