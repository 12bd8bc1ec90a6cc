"""Rows of single neurons: products with them, and their sums into an output (docs/packed-format.md, "Neurons").

A neuron's row lies by itself: 16 blocks of 32 columns side by side are a *superblock*, one 32-bit lane a block, in the
very bytes that a block of 16 rows has elsewhere. Activations are *woven* the same way, so that a product needs no
broadcast:

    of a superblock, token by token: 8 quads of 64 bytes (int8), then float32 scale, float32 scale * sum and int32 -sum
    of 16 blocks; for float weights float32[32 columns][16 blocks]

A lane adds its blocks in ascending order by fused multiply-adds, at last the 16 lanes are added by halves. What Down
adds to the output is woven, float32[32 columns][16 blocks] a superblock, and neurons are added in ascending order.
"""

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import register_jitable

from coterie.kernels import target, unpack
from coterie.kernels.formats import COLUMNS, FORMATS, QUADS, Format
from coterie.kernels.shapes import DOWN_FORMATS, SUPERBLOCK, WOVEN_FLOAT, WOVEN_INT, WOVEN_WORDS
from coterie.kernels.vector import (
    ADDRESS,
    F32,
    I64,
    F32x16,
    I32x16,
    across,
    ask_for,
    call,
    const,
    dot4,
    f32_at,
    fma,
    load,
    op,
    set_f32,
    splat,
    store,
)

NEURONS_TOGETHER = 4  # added in one pass over the output
LATER = 12  # neurons further on whose rows are prefetched meanwhile


def weave_bytes(f: Format) -> int:
    """Bytes of a token's superblock of activations for weights of format `f`."""
    return WOVEN_FLOAT if f.is_float else WOVEN_INT


@cache
def product_op(name: str, tokens: int, rows: int, *, prefetch: bool = True) -> Any:
    """product(w, stride, x, out, supers, ahead): out float32[rows][tokens] of rows `stride` bytes apart and a woven
    tile. With `prefetch`, it asks for what lies `ahead` bytes further while it reads."""
    f = FORMATS[name]
    assert f.subs == 1
    size = weave_bytes(f)
    pairs = [(r, t) for r in range(rows) for t in range(tokens)]

    @op(types.void, ADDRESS, types.intp, ADDRESS, ADDRESS, types.intp, types.intp)
    def product(b, w, stride, x, out, supers, ahead):
        sums = {pair: cgutils.alloca_once_value(b, const(F32x16, 0.0)) for pair in pairs}
        for slot in sums.values():
            b.store(const(F32x16, 0.0), slot)
        with cgutils.for_range(b, supers, intp=I64) as loop:
            first = b.add(w, b.mul(loop.index, const(I64, f.block)))
            ats = [b.add(first, b.mul(stride, const(I64, r))) for r in range(rows)]
            xs = [b.add(x, b.mul(b.add(b.mul(loop.index, const(I64, tokens)), const(I64, t)), const(I64, size)))
                  for t in range(tokens)]  # fmt: skip
            for at in ats if prefetch else ():
                for line in range(0, f.block, 64):
                    ask_for(b, b.add(at, b.add(ahead, const(I64, line))), near=True)
            totals = {pair: b.load(sums[pair]) for pair in pairs}
            (_add_floats if f.is_float else _add_ints)(b, f, ats, xs, totals)
            for pair in pairs:
                b.store(totals[pair], sums[pair])
        for r, t in pairs:
            value = across(b, b.load(sums[r, t]), lambda b, p, q: b.fadd(p, q))
            store(b, out, value, 4 * (r * tokens + t))

    return product


def _add_ints(b: ir.IRBuilder, f: Format, ats: list[Any], xs: list[Any], totals: dict[tuple[int, int], Any]) -> None:
    """Add a superblock of an integer format into the totals by (row, token)."""
    quads = [unpack.quads(b, f, at) for at in ats]
    dots = {}
    for t, x in enumerate(xs):
        start = b.shl(load(b, x, I32x16, WOVEN_WORDS + 128), const(I32x16, f.offset_bits)) if f.offset_bits else None
        for r in range(len(ats)):
            dots[r, t] = const(I32x16, 0) if start is None else start
    for k in range(QUADS):
        for t, x in enumerate(xs):
            four = load(b, x, ir.VectorType(ir.IntType(8), 64), 64 * k)
            for r in range(len(ats)):
                dots[r, t] = dot4(b, dots[r, t], quads[r][k], four, f.narrow)
    for r, at in enumerate(ats):
        scale, low = unpack.scales(b, f, at, (None, None))
        for t, x in enumerate(xs):
            factor = b.fmul(scale, load(b, x, F32x16, WOVEN_WORDS))
            totals[r, t] = fma(b, b.sitofp(dots[r, t], F32x16), factor, totals[r, t])
            if low is not None:
                totals[r, t] = fma(b, low, load(b, x, F32x16, WOVEN_WORDS + 64), totals[r, t])


def _add_floats(b: ir.IRBuilder, f: Format, ats: list[Any], xs: list[Any], totals: dict[tuple[int, int], Any]) -> None:
    for c in range(COLUMNS):
        weights = [unpack.column(b, f, at, c) for at in ats]
        for t, x in enumerate(xs):
            value = load(b, x, F32x16, 64 * c)
            for r, weight in enumerate(weights):
                totals[r, t] = fma(b, weight, value, totals[r, t])


def _quant(b: ir.IRBuilder, f: Format, vectors: list[Any], c: int) -> Any:
    """Column `c` of a superblock as 16 floats without their scale; `vectors`: its 64-byte vectors as int32 lanes."""
    quad, byte = divmod(c, 4)
    if f.name == "Q8_0":
        q = b.and_(b.lshr(vectors[quad], const(I32x16, 8 * byte)), const(I32x16, 255))
        return b.sitofp(b.sub(q, const(I32x16, 128)), F32x16)
    shift = 8 * byte + 4 * (quad // 4)
    q = b.lshr(vectors[quad % 4], const(I32x16, shift)) if shift else vectors[quad % 4]
    if target.path() == "vnni":  # one permutation of a table, which looks at four bits
        table = ir.Constant(F32x16, [float(i - 8) for i in range(16)])
        return call(b, "llvm.x86.avx512.permvar.sf.512", F32x16, table, q)
    return b.sitofp(b.sub(b.and_(q, const(I32x16, 15)), const(I32x16, 8)), F32x16)


@cache
def accumulate_op(name: str, tokens: int) -> Any:
    """accumulate(rows, h, offset, supers, y, y_token): add NEURONS_TOGETHER neurons into woven sums.

    rows: int64[neurons], addresses, `offset` bytes before the first superblock; h: float32[neurons][tokens]; y: float32
    [supers][32][16], of each token `y_token` bytes further. Rows named behind these are prefetched.
    """
    f, together = FORMATS[name], NEURONS_TOGETHER
    if name not in DOWN_FORMATS:
        raise ValueError(f"Down as {name} rows")
    quads = (f.block - 32) // 64

    @op(types.void, ADDRESS, ADDRESS, types.intp, types.intp, ADDRESS, types.intp)
    def accumulate(b, rows, h, offset, supers, y, y_token):
        bases = [b.add(load(b, rows, I64, 8 * n), offset) for n in range(together)]
        later = [b.add(load(b, rows, I64, 8 * (n + LATER)), offset) for n in range(together)]
        weights = [[splat(b, load(b, h, F32, 4 * (n * tokens + t))) for t in range(tokens)] for n in range(together)]
        with cgutils.for_range(b, supers, intp=I64) as loop:
            at = b.mul(loop.index, const(I64, f.block))
            for base in later:
                for line in range(0, f.block, 64):
                    ask_for(b, b.add(b.add(base, at), const(I64, line)), near=True)
            ats = [b.add(base, at) for base in bases]
            out = b.add(y, b.mul(loop.index, const(I64, WOVEN_FLOAT)))
            outs = [b.add(out, b.mul(y_token, const(I64, t))) for t in range(tokens)]
            if f.is_float:
                factors, vectors = weights, []
            else:
                scales = [unpack.scales(b, f, a, (None, None))[0] for a in ats]
                factors = [[b.fmul(scales[n], w) for w in weights[n]] for n in range(together)]
                vectors = [[load(b, a, I32x16, 32 + 64 * k) for k in range(quads)] for a in ats]
            for c in range(COLUMNS):
                if f.is_float:
                    columns = [unpack.column(b, f, a, c) for a in ats]
                else:
                    columns = [_quant(b, f, vectors[n], c) for n in range(together)]
                for t in range(tokens):
                    total = load(b, outs[t], F32x16, 64 * c)
                    for n in range(together):
                        total = fma(b, columns[n], factors[n][t], total)
                    store(b, outs[t], total, 64 * c)

    return accumulate


@register_jitable
def unweave(woven, y, first, supers, blocks):
    """Write woven sums of superblocks `first` to `first + supers` as plain float32 columns of a row of `blocks`."""
    for s in range(supers):
        for lane in range(SUPERBLOCK):
            block = (first + s) * SUPERBLOCK + lane
            if block < blocks:
                for c in range(COLUMNS):
                    value = f32_at(woven + (s * COLUMNS + c) * 64 + 4 * lane)
                    set_f32(y + 4 * (block * COLUMNS + c), value)
