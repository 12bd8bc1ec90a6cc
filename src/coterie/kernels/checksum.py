"""The checksum of an extent: 64 bits over its 32-bit words, at the speed of memory.

The words are dealt to 128 sums in turn, 512 bytes a round: h = rotate(h, 13) * P + w, modulo 2^32. Every step can be
undone, so one wrong word always shows; the rotation makes errors in the top bits of two words show as well. The sums
are joined in order by 64-bit multiplications. All of it is integer arithmetic: every processor gets the same number.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from coterie.kernels.compiler import kernel
from coterie.kernels.vector import ADDRESS, I32, I64, LANES, I32x16, const, load, op, store

P = 0x9E3779B1
Q = 0x9FB21C651E98DF25
SUMS = 8  # vectors
ROUND = SUMS * LANES * 4  # bytes


@op(types.int64, ADDRESS, types.intp)
def checksum_at(b, address, nbytes):
    """Of `nbytes` bytes, a multiple of 512."""
    sums = [cgutils.alloca_once_value(b, const(I32x16, 0)) for _ in range(SUMS)]
    for s in sums:  # once a call, where alloca_once_value is once a function
        b.store(const(I32x16, 0), s)
    with cgutils.for_range(b, b.udiv(nbytes, const(I64, ROUND)), intp=I64) as loop:
        at = b.add(address, b.mul(loop.index, const(I64, ROUND)))
        for i, s in enumerate(sums):
            h = b.load(s)
            turned = b.or_(b.shl(h, const(I32x16, 13)), b.lshr(h, const(I32x16, 19)))
            b.store(b.add(b.mul(turned, const(I32x16, P)), load(b, at, I32x16, 64 * i)), s)
    laid = cgutils.alloca_once(b, ir.ArrayType(I32x16, SUMS))
    first = b.ptrtoint(laid, I64)
    for i, s in enumerate(sums):
        store(b, first, b.load(s), 64 * i)
    total = cgutils.alloca_once(b, I64)
    b.store(nbytes, total)
    with cgutils.for_range(b, const(I64, SUMS * LANES), intp=I64) as loop:
        word = b.zext(load(b, b.add(first, b.mul(loop.index, const(I64, 4))), I32), I64)
        mixed = b.mul(b.xor(b.load(total), word), const(I64, Q))
        b.store(b.xor(mixed, b.lshr(mixed, const(I64, 32))), total)
    return b.load(total)


@kernel
def checksum() -> Callable[..., Any]:
    """The checksum of `nbytes` bytes at an address."""

    def run(address, nbytes):
        return checksum_at(address, nbytes)

    return run
