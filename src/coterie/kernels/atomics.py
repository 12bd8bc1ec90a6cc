"""Atomic words, futex and the cycle counter, for flags that lanes of any process can share."""

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils

from coterie.kernels.vector import ADDRESS, I32, I64, const, op

_ARM = platform.machine() == "aarch64"
FUTEX_CALL = 98 if _ARM else 202
YIELD_CALL = 124 if _ARM else 24
FUTEX_WAIT, FUTEX_WAKE = 0, 1  # not the private forms: flags may cross processes
libc_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))


def _word(b: ir.IRBuilder, address: ir.Value, ty: ir.Type) -> ir.Value:
    return b.inttoptr(address, ty.as_pointer())


@op(types.int64, ADDRESS)
def acquire(b, address):
    return b.load_atomic(_word(b, address, I64), "acquire", 8)


@op(types.void, ADDRESS, types.int64)
def release(b, address, value):
    b.store_atomic(value, _word(b, address, I64), "release", 8)


@op(types.int64, ADDRESS, types.int64)
def fetch_add(b, address, value):
    """Sequentially consistent: also a full fence."""
    return b.atomic_rmw("add", _word(b, address, I64), value, "seq_cst")


@op(types.boolean, ADDRESS, types.int64, types.int64)
def compare_swap(b, address, expected, new):
    pair = b.cmpxchg(_word(b, address, I64), expected, new, "acq_rel", "acquire")
    return b.extract_value(pair, 1)


@op(types.void)
def pause(b):
    name, hint = ("llvm.aarch64.hint", [const(I32, 1)]) if _ARM else ("llvm.x86.sse2.pause", [])
    kind = ir.FunctionType(ir.VoidType(), [h.type for h in hint])
    b.call(cgutils.get_or_insert_function(b.module, kind, name), hint)


@op(types.int64)
def cycles(b):
    """The time-stamp counter (x86-64) or the virtual counter (aarch64): constant rate, one for all cores."""
    if _ARM:
        return b.asm(ir.FunctionType(I64, []), "mrs $0, cntvct_el0", "=r", [], True)
    kind = ir.FunctionType(I64, [])
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.readcyclecounter"), [])


@op(types.int64, ADDRESS, ADDRESS, types.intp, types.intp)
def call_kernel(b, kernel, record, step, lane):
    """Call a compiled kernel by its address; returns the pieces it did."""
    kind = ir.FunctionType(I64, [I64] * 3)
    return b.call(b.inttoptr(kernel, kind.as_pointer()), [record, step, lane])


@op(types.void)
def fence(b):
    """Order everything before against everything after."""
    b.fence("seq_cst")
