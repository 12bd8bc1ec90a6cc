"""A read loop: what memory gives, for plans and benchmarks to be held against."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from coterie.kernels.compiler import kernel
from coterie.kernels.operands import PROBE_BASE, PROBE_BYTES, PROBE_OUT, PROBE_PIECE
from coterie.kernels.sync import claim, finish, word
from coterie.kernels.vector import ADDRESS, I64, I32x16, const, load, op, store

UNROLL = 8  # vectors an iteration


@op(types.void, ADDRESS, types.intp, ADDRESS)
def read_range(b, base, nbytes, out):
    """Read whole runs of 512 bytes, and leave their exclusive or where nobody looks."""
    sums = [cgutils.alloca_once_value(b, const(I32x16, 0)) for _ in range(UNROLL)]
    for s in sums:
        b.store(const(I32x16, 0), s)
    with cgutils.for_range(b, b.udiv(nbytes, const(I64, 64 * UNROLL)), intp=I64) as loop:
        at = b.add(base, b.mul(loop.index, const(I64, 64 * UNROLL)))
        for i, s in enumerate(sums):
            b.store(b.xor(b.load(s), load(b, at, I32x16, 64 * i)), s)
    total: ir.Value = b.load(sums[0])
    for s in sums[1:]:
        total = b.xor(total, b.load(s))
    store(b, out, total)


@kernel
def probe() -> Callable[..., Any]:
    """Read a buffer from end to end."""

    def run(record, step, lane):
        nbytes, size = word(record, PROBE_BYTES), word(record, PROBE_PIECE)
        total = (nbytes + size - 1) // size
        pieces = 0
        piece = claim(record, step, lane, total)
        while piece >= 0:
            first = piece * size
            read_range(
                word(record, PROBE_BASE) + first,
                min(size, nbytes - first),
                word(record, PROBE_OUT) + 64 * lane,
            )
            pieces += 1
            piece = claim(record, step, lane, total)
        return finish(record, step, pieces, total)

    return run
