"""Memory and the few instructions that CUDA kernels need beside arithmetic; addresses are int64.

Loads are of global memory in 4, 8 and 16 bytes, so that a warp's loads of packed weights are whole lines. In numba's
simulator (NUMBA_ENABLE_CUDASIM=1) the same names are Python functions (cuda_simulated.py).

Imported without numba-cuda, this does nothing but define functions: what needs the package says so when it is used.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import config, types
from numba import cuda as numba_cuda
from numba.cuda.extending import intrinsic

from coterie.kernels.gpu import cuda_simulated

SIMULATED = bool(config.ENABLE_CUDASIM)
cuda: Any = cuda_simulated.Cuda() if SIMULATED else numba_cuda

GLOBAL = 1  # LLVM's address space of device memory
I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def device(function: Callable[..., Any]) -> Any:
    """A function that kernels call and that becomes part of them, so that what it is given stays in registers."""
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def _operation(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make an operation from a function of (builder, values) that writes LLVM instructions; integers of any width and
    sign are taken for what `arguments` says. Several results are given as a list."""

    def decorate(build: Callable[..., Any]) -> Any:
        if SIMULATED:
            return getattr(cuda_simulated, build.__name__)
        signature = result(*arguments)

        def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
            made = build(b, *args)
            if isinstance(made, list):
                return context.make_tuple(b, sig.return_type, made)
            return context.get_dummy_value() if made is None else made

        # numba reads the number of arguments off the function, so that one is made for each.
        names = ", ".join(f"a{i}" for i in range(len(arguments)))
        scope: dict[str, Any] = {"signature": signature, "generate": generate}
        exec(f"def typer(context, {names}):\n    return signature, generate", scope)
        scope["typer"].__name__ = build.__name__
        return intrinsic(scope["typer"])

    return decorate


def _load(b: ir.IRBuilder, at: ir.Value, kind: ir.Type, align: int) -> ir.Value:
    return b.load(b.inttoptr(at, ir.PointerType(kind, GLOBAL)), align=align)


def _store(b: ir.IRBuilder, at: ir.Value, value: ir.Value, align: int) -> None:
    b.store(value, b.inttoptr(at, ir.PointerType(value.type, GLOBAL)), align=align)


def _words(b: ir.IRBuilder, at: ir.Value, count: int) -> list[ir.Value]:
    vector = _load(b, at, ir.VectorType(I32, count), 4 * count)
    return [b.extract_element(vector, I32(i)) for i in range(count)]


def _assembly(b: ir.IRBuilder, result: ir.Type, text: str, constraints: str, *values: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [value.type for value in values])
    return b.call(ir.InlineAsm(kind, text, constraints), values)


# --- loads ---------------------------------------------------------------------------------------------


@_operation(types.UniTuple(types.uint32, 4), types.int64)
def words4(b: ir.IRBuilder, at: ir.Value) -> Any:
    """Four words of 32 bits; `at` is a multiple of 16."""
    return _words(b, at, 4)


@_operation(types.UniTuple(types.uint32, 2), types.int64)
def words2(b: ir.IRBuilder, at: ir.Value) -> Any:
    """Two words; `at` is a multiple of 8."""
    return _words(b, at, 2)


@_operation(types.uint32, types.int64)
def word(b: ir.IRBuilder, at: ir.Value) -> Any:
    return _load(b, at, I32, 4)


@_operation(types.int32, types.int64)
def int_at(b: ir.IRBuilder, at: ir.Value) -> Any:
    return _load(b, at, I32, 4)


@_operation(types.int64, types.int64)
def long_at(b: ir.IRBuilder, at: ir.Value) -> Any:
    return _load(b, at, I64, 8)


@_operation(types.float32, types.int64)
def float_at(b: ir.IRBuilder, at: ir.Value) -> Any:
    return _load(b, at, F32, 4)


# --- stores --------------------------------------------------------------------------------------------


@_operation(types.void, types.int64, types.float32)
def set_float(b: ir.IRBuilder, at: ir.Value, value: ir.Value) -> Any:
    _store(b, at, value, 4)


@_operation(types.void, types.int64, types.float32)
def set_half(b: ir.IRBuilder, at: ir.Value, value: ir.Value) -> Any:
    """The value rounded to float16."""
    _store(b, at, _assembly(b, I16, "cvt.rn.f16.f32 $0, $1;", "=h,f", value), 2)


@_operation(types.void, types.int64, types.int64)
def raise_flag(b: ir.IRBuilder, at: ir.Value, value: ir.Value) -> Any:
    """An int64 that the host waits for, too: whoever sees it sees all that this thread saw before."""
    kind = ir.FunctionType(ir.VoidType(), [I64, I64])
    text = "fence.acq_rel.sys; st.release.sys.global.s64 [$0], $1;"
    b.call(ir.InlineAsm(kind, text, "l,l,~{memory}", side_effect=True), [at, value])


# --- numbers -------------------------------------------------------------------------------------------


@_operation(types.float32, types.uint32)
def low_half(b: ir.IRBuilder, bits: ir.Value) -> Any:
    """The float16 in a word's low half."""
    return _assembly(b, F32, "cvt.f32.f16 $0, $1;", "=f,h", b.trunc(bits, I16))


@_operation(types.float32, types.uint32)
def high_half(b: ir.IRBuilder, bits: ir.Value) -> Any:
    return _assembly(b, F32, "cvt.f32.f16 $0, $1;", "=f,h", b.trunc(b.lshr(bits, I32(16)), I16))


@_operation(types.float32, types.uint32)
def as_float(b: ir.IRBuilder, bits: ir.Value) -> Any:
    """The float32 with these bits."""
    return b.bitcast(bits, F32)


@_operation(types.int32, types.uint32, types.uint32, types.int32)
def dot4(b: ir.IRBuilder, weights: ir.Value, values: ir.Value, total: ir.Value) -> Any:
    """`total` plus the dot product of four uint8 and four int8."""
    return _assembly(b, I32, "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", weights, values, total)


@_operation(types.int32, types.float32)
def nearest(b: ir.IRBuilder, value: ir.Value) -> Any:
    """The nearest integer, the even one of two."""
    return _assembly(b, I32, "cvt.rni.s32.f32 $0, $1;", "=r,f", value)


@_operation(types.int64, types.int64, types.int64)
def quotient(b: ir.IRBuilder, n: ir.Value, d: ir.Value) -> Any:
    """n // d of numbers below 2**32: a division of 64 bits takes five times as long."""
    return b.zext(b.udiv(b.trunc(n, I32), b.trunc(d, I32)), I64)
