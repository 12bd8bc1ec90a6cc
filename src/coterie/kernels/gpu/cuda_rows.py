"""CUDA kernels of whole rows: embedding, norms, and the flag that ends a step. Grid: (rows)."""

import math
from typing import Any

import numpy as np

from coterie.kernels.formats import FORMATS
from coterie.kernels.gpu.cuda_formats import column_reader, reader
from coterie.kernels.gpu.cuda_memory import (
    cuda,
    device,
    float_at,
    int_at,
    long_at,
    quotient,
    raise_flag,
    set_float,
)
from coterie.kernels.gpu.cuda_products import MOST, ROUNDED, THREADS, inverse_of, rows_of, whole
from coterie.kernels.record import EPOCH

ZERO, ONE = np.float32(0), np.float32(1)
SUMS = THREADS + 16  # floats of shared memory for a sum of all threads
EIGHT = 8  # neighbouring columns of a thread: four threads have a block of 32


@device
def sum_of(v, parts):
    """The sum of all threads' v, in one order, for all of them; `parts` is float32[SUMS]."""
    u = cuda.threadIdx.x
    cuda.syncthreads()
    parts[u] = v
    cuda.syncthreads()
    if u < 16:
        s = ZERO
        for i in range(16):
            s += parts[16 * i + u]
        parts[THREADS + u] = s
    cuda.syncthreads()
    s = ZERO
    for i in range(16):
        s += parts[THREADS + i]
    return s


# --- embedding -----------------------------------------------------------------------------------------


def _integer_values(name: str) -> Any:
    f = FORMATS[name]
    fetch, expand = reader(name)
    subs, size, split, minimum = f.subs, f.block, f.split_scales, f.has_minimum
    offset = (1 << f.offset_bits) if f.offset_bits else 0

    @device
    def write(row, lane, sub, j, out, width, factor):
        raw = fetch(row + sub // subs * size, sub % subs, j, lane // 4)
        lower, upper, scale, second = expand(raw, j)
        r = lane % 4
        for i in range(8):
            q = (lower[r] if i < 4 else upper[r]) >> (8 * (i % 4)) & 255
            s = second[r] if split and i >= 4 else scale[r]
            v = np.float32(np.int32(np.int32(q) - offset)) * s
            if minimum:
                v = v + second[r]
            c = 32 * sub + 4 * j + i % 4 + i // 4 * 16
            if c < width:
                set_float(out + 4 * c, v * factor)

    return write


def _float_values(name: str) -> Any:
    column, size = column_reader(name), FORMATS[name].block

    @device
    def write(row, lane, sub, j, out, width, factor):
        for i in range(8):
            c = 4 * j + i % 4 + i // 4 * 16
            v = column(row + sub * size, c, lane // 4)
            if 32 * sub + c < width:
                set_float(out + 4 * (32 * sub + c), v[lane % 4] * factor)

    return write


def embed(name: str) -> Any:
    """out[row][0:width] = scale * embedding row ids[row]; zeros where there is none, and behind it."""
    f = FORMATS[name]
    write = _float_values(name) if f.is_float else _integer_values(name)
    subs_of = f.subs

    def kernel(w, a, step, ids, weights, per, stride, group, blocks, vocab, out, out_row, width, scale):
        row = cuda.blockIdx.x
        if row < rows_of(a, step, 0):
            number = int_at(a + ids + 4 * row)
            target = a + out + row * out_row
            subs = blocks * subs_of if 0 <= number < vocab else 0
            if subs > 0:
                mine = number // 16
                extent = quotient(mine, per)
                base = w + weights + extent * stride + (mine - extent * per) * group
                for item in range(cuda.threadIdx.x, 4 * subs, THREADS):
                    write(base, number % 16, item // 4, item % 4, target, width, scale)
            for c in range(32 * subs + cuda.threadIdx.x, width, THREADS):
                set_float(target + 4 * c, ZERO)

    return kernel


# --- norms ---------------------------------------------------------------------------------------------


@device
def _inverse_rms(squares, dim, eps):
    return ONE / np.float32(math.sqrt(squares / np.float32(dim) + eps))


def norm() -> Any:
    """x_out = x + y, or x + rms_norm(y) * post; out = rms_norm(x_out) * weight, `rounded` the same in `planes` rows."""

    def kernel(
        w, a, step, select, outputs, x, y, x_out, row, post, weight, dim, eps, out, out_row, rounded, rounded_row,
        planes, width,
    ):  # fmt: skip
        parts = cuda.shared.array(SUMS, np.float32)
        u, i = cuda.threadIdx.x, cuda.blockIdx.x
        if i < rows_of(a, step, select):
            source = int_at(a + outputs + 4 * i) if select else i
            at_x, at_y, at_out = a + x + source * row, a + y + source * row, a + x_out + i * row
            factor = ONE
            if y >= 0 and post >= 0:
                squares = ZERO
                for c in range(u, dim, THREADS):
                    v = float_at(at_y + 4 * c)
                    squares += v * v
                factor = _inverse_rms(sum_of(squares, parts), dim, eps)
            squares = ZERO
            for begin in range(EIGHT * u, dim, EIGHT * THREADS):
                for c in range(begin, min(begin + EIGHT, dim)):
                    v = _residual(w, at_x, at_y, y, post, factor, c)
                    squares += v * v
            rms = _inverse_rms(sum_of(squares, parts), dim, eps)
            levels = planes if rounded >= 0 else 1
            last = quotient(width + EIGHT * THREADS - 1, EIGHT * THREADS) * EIGHT * THREADS
            for begin in range(EIGHT * u, last, EIGHT * THREADS):  # all threads make the same number of rounds
                before, before_inverse = ZERO, ZERO
                for plane in range(levels):
                    top, count = ZERO, ZERO
                    for c in range(begin, min(begin + EIGHT, dim)):
                        v = _residual(w, at_x, at_y, y, post, factor, c) * rms * float_at(w + weight + 4 * c)
                        top = max(top, abs(v - before * whole(v, before_inverse)))
                    top = _largest_of_four(top, parts)
                    inverse = inverse_of(top)
                    to = a + rounded + (i * planes + plane) * rounded_row + begin // 32 * ROUNDED
                    for c in range(begin, min(begin + EIGHT, width)):
                        v = ZERO
                        if c < dim:
                            r = _residual(w, at_x, at_y, y, post, factor, c)
                            v = r * rms * float_at(w + weight + 4 * c)
                            if y >= 0 and plane == levels - 1:  # x_out may be x, which is not read again
                                set_float(at_out + 4 * c, r)
                        if out >= 0 and plane == 0:
                            set_float(a + out + i * out_row + 4 * c, v)
                        if rounded >= 0:
                            q = whole(v - before * whole(v, before_inverse), inverse)
                            set_float(to + 4 * (c % 32), q)
                            count += q
                    count = _sum_of_four(count, parts)
                    if rounded >= 0 and u % 4 == 0 and begin < width:
                        set_float(to + 128, top / MOST)
                        set_float(to + 132, count)
                    before, before_inverse = top / MOST, inverse

    return kernel


@device
def _largest_of_four(v, parts):
    """Of the four threads that have a block of 32 columns. All threads come here."""
    u = cuda.threadIdx.x
    cuda.syncthreads()
    parts[u] = v
    cuda.syncthreads()
    four = u // 4 * 4
    return max(max(parts[four], parts[four + 1]), max(parts[four + 2], parts[four + 3]))


@device
def _sum_of_four(v, parts):
    u = cuda.threadIdx.x
    cuda.syncthreads()
    parts[u] = v
    cuda.syncthreads()
    four = u // 4 * 4
    return (parts[four] + parts[four + 1]) + (parts[four + 2] + parts[four + 3])


@device
def _residual(w, at_x, at_y, y, post, factor, c):
    """x + y in column c, y normed if there is `post`. x_out, which may be x, is written only once all have read it."""
    v = float_at(at_x + 4 * c)
    if y >= 0:
        change = float_at(at_y + 4 * c)
        if post >= 0:
            change = change * factor * float_at(w + post + 4 * c)
        v = v + change
    return v


# --- the end of a step ---------------------------------------------------------------------------------


def post() -> Any:
    """The flag takes the step's EPOCH. Kernels of a stream run in order: all before it is done."""

    def kernel(w, a, step, flag):
        if cuda.threadIdx.x == 0:
            raise_flag(a + flag, long_at(a + step + 8 * EPOCH))

    return kernel
