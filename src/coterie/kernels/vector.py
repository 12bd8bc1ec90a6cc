"""LLVM vectors as numba values, and the few operations all kernels are written with.

Two layers: functions of an `ir.IRBuilder` (lower case, first argument `b`) that add a few instructions,
and numba intrinsics made from them with `op`. Kernels hold 16 lanes of 32 bits; LLVM splits them where
registers are narrower, so a lane's arithmetic is the same on every instruction set.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from coterie.kernels import target

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
LANES = 16


def vec(element: ir.Type, n: int) -> ir.VectorType:
    return ir.VectorType(element, n)


I8x16, I8x64, I32x16 = vec(I8, 16), vec(I8, 64), vec(I32, 16)
I16x16, F16x16, F32x16 = vec(I16, 16), vec(F16, 16), vec(F32, 16)


class Vec(types.Type):  # type: ignore[misc]  # numba is untyped
    """An LLVM vector as a numba value; it lives in registers."""

    def __init__(self, llvm_type: ir.VectorType) -> None:
        self.llvm_type = llvm_type
        super().__init__(name=str(llvm_type))


register_model(Vec)(lambda manager, ty: models.PrimitiveModel(manager, ty, ty.llvm_type))
FLOATS = Vec(F32x16)
INTS = Vec(I32x16)
ADDRESS = types.intp


def op(result: types.Type, *arguments: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Make a numba intrinsic of fixed types from `build(b, *values)`."""

    def wrap(build: Callable[..., Any]) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> Any:
            made = build(b, *values)
            return context.get_dummy_value() if made is None else made

        def define(typingctx: Any, *_: Any) -> Any:
            return result(*arguments), codegen

        define.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]  # numba reads the arity
        define.__name__ = build.__name__
        return intrinsic(define)

    return wrap


# --- builder layer -------------------------------------------------------------------------------


def const(ty: ir.Type, value: float) -> ir.Constant:
    """A scalar constant, or a vector with `value` in every lane."""
    if isinstance(ty, ir.VectorType):
        return ir.Constant(ty, [value] * ty.count)
    return ir.Constant(ty, value)


def load(b: ir.IRBuilder, address: ir.Value, ty: ir.Type, offset: int = 0) -> ir.Value:
    if offset:
        address = b.add(address, const(I64, offset))
    return b.load(b.inttoptr(address, ty.as_pointer()), align=1)


def store(b: ir.IRBuilder, address: ir.Value, value: ir.Value, offset: int = 0) -> None:
    if offset:
        address = b.add(address, const(I64, offset))
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def call(b: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    function = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, function, name), args)


def pick(b: ir.IRBuilder, v: ir.Value, w: ir.Value, lanes: Sequence[int]) -> ir.Value:
    """The chosen lanes of `v` and `w` laid end to end."""
    return b.shuffle_vector(v, w, ir.Constant(vec(I32, len(lanes)), list(lanes)))


def splat(b: ir.IRBuilder, scalar: ir.Value, n: int = LANES) -> ir.Value:
    one = b.insert_element(ir.Constant(vec(scalar.type, n), ir.Undefined), scalar, const(I32, 0))
    return pick(b, one, one, [0] * n)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, rounded once."""
    return call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def halves_to_floats(b: ir.IRBuilder, address: ir.Value, offset: int = 0) -> ir.Value:
    """16 float16 at an address, as float32."""
    return b.fpext(load(b, address, F16x16, offset), F32x16)


def bfloats_to_floats(b: ir.IRBuilder, address: ir.Value, offset: int = 0) -> ir.Value:
    """16 bfloat16 at an address, as float32: the upper half of its bits."""
    wide = b.zext(load(b, address, I16x16, offset), I32x16)
    return b.bitcast(b.shl(wide, const(I32x16, 16)), F32x16)


def maximum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Per lane; `y` where either is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def minimum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Per lane; `y` where either is NaN."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def ask_for(b: ir.IRBuilder, address: ir.Value, near: bool = False) -> None:
    """Prefetch the line at an address, for reading: into the second-level cache, or all the way if `near`."""
    pointer = b.inttoptr(address, I8.as_pointer())
    function = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    callee = cgutils.get_or_insert_function(b.module, function, "llvm.prefetch.p0")
    b.call(callee, [pointer, const(I32, 0), const(I32, 3 if near else 2), const(I32, 1)])


def across(b: ir.IRBuilder, v: ir.Value, combine: Callable[..., ir.Value]) -> ir.Value:
    """Combine all lanes into a scalar, by halves: the same tree on every machine."""
    n = v.type.count
    while n > 1:
        n //= 2
        v = combine(b, pick(b, v, v, range(n)), pick(b, v, v, range(n, 2 * n)))
    return b.extract_element(v, const(I32, 0))


def dot4(b: ir.IRBuilder, acc: ir.Value, weights: ir.Value, x: ir.Value, narrow: bool) -> ir.Value:
    """acc[lane] += the sum of 4 products of unsigned weight bytes and signed activation bytes.

    `narrow` promises weights below 128, which lets AVX2 and ARM use their short forms; wider ones are
    stored as signed + 128 and the caller's start value takes the 128 off again.
    """
    path = target.path()
    if path == "vnni":  # LLVM 22 takes bytes here, LLVM 21 and before took 32-bit lanes
        ty = I8x64 if llvm.llvm_version_info[0] >= 22 else I32x16
        return call(b, "llvm.x86.avx512.vpdpbusd.512", acc.type, acc, b.bitcast(weights, ty), b.bitcast(x, ty))
    if path == "avx2":
        return _by_parts(b, acc, weights, x, 8, _dot4_avx2_narrow if narrow else _dot4_avx2_wide)
    return _by_parts(b, acc, weights, x, 4, _dot4_arm_narrow if narrow else _dot4_arm_wide)


def _by_parts(
    b: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value, width: int, part: Callable[..., ir.Value]
) -> ir.Value:
    """Apply `part` to slices of `width` 32-bit lanes."""
    parts = []
    for first in range(0, LANES, width):
        lanes, octets = range(first, first + width), range(4 * first, 4 * (first + width))
        parts.append(part(b, pick(b, acc, acc, lanes), pick(b, u, u, octets), pick(b, s, s, octets)))
    while len(parts) > 1:
        n = 2 * parts[0].type.count
        parts = [pick(b, low, high, range(n)) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _dot4_avx2_narrow(b: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", vec(I16, 16), u, s)  # 2 x 127 x 127 fits 16 bits
    quads = call(b, "llvm.x86.avx2.pmadd.wd", vec(I32, 8), pairs, const(vec(I16, 16), 1))
    return b.add(acc, quads)


def _dot4_avx2_wide(b: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    # 255 x 127 twice would saturate 16 bits: multiply by 7 low bits and by the top bit apart.
    low = _dot4_avx2_narrow(b, acc, b.and_(u, const(u.type, 127)), s)
    pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", vec(I16, 16), b.lshr(u, const(u.type, 7)), s)
    quads = call(b, "llvm.x86.avx2.pmadd.wd", vec(I32, 8), pairs, const(vec(I16, 16), 128))
    return b.add(low, quads)


def _dot4_arm_narrow(b: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    return call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, u, s)


def _dot4_arm_wide(b: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    low = _dot4_arm_narrow(b, acc, b.and_(u, const(u.type, 127)), s)
    top = _dot4_arm_narrow(b, const(acc.type, 0), b.lshr(u, const(u.type, 7)), s)
    return b.add(low, b.shl(top, const(top.type, 7)))


# --- numba layer: scalars and vectors at addresses -----------------------------------------------


@op(types.int64, ADDRESS)
def i64_at(b, address):
    return load(b, address, I64)


@op(types.int32, ADDRESS)
def i32_at(b, address):
    return load(b, address, I32)


@op(types.float32, ADDRESS)
def f32_at(b, address):
    return load(b, address, F32)


@op(types.void, ADDRESS, types.int64)
def set_i64(b, address, value):
    store(b, address, value)


@op(types.void, ADDRESS, types.int32)
def set_i32(b, address, value):
    store(b, address, value)


@op(types.void, ADDRESS, types.float32)
def set_f32(b, address, value):
    store(b, address, value)


@op(FLOATS, ADDRESS)
def floats_at(b, address):
    return load(b, address, F32x16)


@op(types.void, ADDRESS, FLOATS)
def set_floats(b, address, v):
    store(b, address, v)


@op(types.void, ADDRESS, FLOATS)
def set_float16s(b, address, v):
    """Round to nearest even; beyond float16's range the largest finite value, so that the cache holds no
    infinity which a masked zero would turn into NaN."""
    limit = const(F32x16, 65504.0)
    clamped = maximum(b, minimum(b, v, limit), const(F32x16, -65504.0))
    store(b, address, b.fptrunc(clamped, F16x16))


@op(FLOATS, types.float32)
def floats(b, scalar):
    return splat(b, scalar)


@op(FLOATS, FLOATS, FLOATS, FLOATS)
def fmadd(b, x, y, z):
    return fma(b, x, y, z)


@op(FLOATS, FLOATS, FLOATS)
def add(b, x, y):
    return b.fadd(x, y)


@op(FLOATS, FLOATS, FLOATS)
def sub(b, x, y):
    return b.fsub(x, y)


@op(FLOATS, FLOATS, FLOATS)
def mul(b, x, y):
    return b.fmul(x, y)


@op(FLOATS, FLOATS, FLOATS)
def div(b, x, y):
    return b.fdiv(x, y)


@op(FLOATS, FLOATS, FLOATS)
def larger(b, x, y):
    return maximum(b, x, y)


@op(types.float32, FLOATS)
def total(b, v):
    return across(b, v, lambda b, x, y: b.fadd(x, y))


@op(types.float32, FLOATS)
def largest(b, v):
    return across(b, v, maximum)


@op(FLOATS, FLOATS)
def absolute(b, v):
    return call(b, "llvm.fabs.v16f32", F32x16, v)


@op(types.void, ADDRESS)
def prefetch(b, address):
    ask_for(b, address)
