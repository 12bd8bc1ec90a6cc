"""Our own exp and the activation functions on 16 lanes: the same bits on every instruction set and library."""

import numpy as np
from llvmlite import ir

from coterie.kernels.vector import (
    FLOATS,
    F32x16,
    I32x16,
    call,
    const,
    fma,
    maximum,
    minimum,
    op,
)

LOG2E = 1.4426950408889634
LN2_HIGH = float(np.float32(0.693359375))  # few bits: n * LN2_HIGH is exact
LN2_LOW = 0.693147180559945309 - 0.693359375
# Minimax polynomial of (exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2 (Cephes' coefficients)
EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
EXP_LOWEST, EXP_HIGHEST = -87.0, 88.0
GELU_SCALE = 0.7978845608028654  # sqrt(2 / pi)
GELU_CUBE = 0.044715


def build_exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp of 16 float32, within 2 units in the last place; 0 below -87, exp(88) above 88; exp(0) is 1."""

    def c(value: float) -> ir.Value:
        return const(F32x16, float(np.float32(value)))

    bounded = maximum(b, minimum(b, x, c(EXP_HIGHEST)), c(EXP_LOWEST))
    n = call(b, "llvm.rint.v16f32", F32x16, b.fmul(bounded, c(LOG2E)))
    r = fma(b, n, c(-LN2_HIGH), bounded)
    r = fma(b, n, c(-LN2_LOW), r)
    p = c(EXP_POLYNOMIAL[0])
    for coefficient in EXP_POLYNOMIAL[1:]:
        p = fma(b, p, r, c(coefficient))
    p = b.fadd(fma(b, p, b.fmul(r, r), r), c(1.0))
    power = b.shl(b.add(b.fptosi(n, I32x16), const(I32x16, 127)), const(I32x16, 23))
    return b.select(b.fcmp_ordered("<", x, c(EXP_LOWEST)), c(0.0), b.fmul(p, b.bitcast(power, F32x16)))


@op(FLOATS, FLOATS)
def exp(b, x):
    return build_exp(b, x)


def _over_one_plus_exp(b: ir.IRBuilder, x: ir.Value, z: ir.Value) -> ir.Value:
    """x / (1 + exp(-z))"""
    negative = b.fsub(const(F32x16, -0.0), z)
    return b.fdiv(x, b.fadd(build_exp(b, negative), const(F32x16, 1.0)))


@op(FLOATS, FLOATS)
def silu(b, x):
    return _over_one_plus_exp(b, x, x)


@op(FLOATS, FLOATS)
def gelu(b, x):
    """The tanh form; 1 + tanh(z) = 2 / (1 + exp(-2z))."""
    cube = b.fmul(b.fmul(x, x), x)
    inner = fma(b, cube, const(F32x16, float(np.float32(GELU_CUBE))), x)
    return _over_one_plus_exp(b, x, b.fmul(inner, const(F32x16, float(np.float32(2 * GELU_SCALE)))))


@op(FLOATS, FLOATS)
def relu(b, x):
    return maximum(b, x, const(F32x16, 0.0))


@op(FLOATS, FLOATS)
def relu2(b, x):
    bounded = maximum(b, x, const(F32x16, 0.0))
    return b.fmul(bounded, bounded)


@op(FLOATS, FLOATS)
def as_is(b, x):
    return x


# What Gate's and Up's outputs go through before they are multiplied. dReLU: Turbo Sparse, section 3.
ACTIVATIONS = {
    "silu": (silu, as_is),
    "gelu": (gelu, as_is),
    "relu": (relu, as_is),
    "relu2": (relu2, as_is),
    "drelu": (relu, relu),
}
