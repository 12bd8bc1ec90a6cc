"""What the operations of cuda_memory.py do in numba's simulator: host memory, looked at through ctypes.

Accesses outside of `MEMORY` raise IndexError, so that tests find kernels that read or write where they must not.
"""

import ctypes
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import cuda

MEMORY: list[tuple[int, int]] = []  # first address and end of what kernels may touch
Words = tuple[int, ...]


class _Shared:
    """Shared arrays, one for each line that asks; the simulator's own may give two threads that ask at once two arrays.
    They hold nonsense at first, as on a device."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.arrays: dict[tuple[str, int], npt.NDArray[Any]] = {}

    def array(self, shape: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        frame = sys._getframe(1)
        line = frame.f_code.co_filename, frame.f_lineno
        with self.lock:
            if line not in self.arrays:
                self.arrays[line] = np.frombuffer(b"\xab" * (shape * np.dtype(dtype).itemsize), dtype).copy()
            return self.arrays[line]


class Cuda:
    """numba.cuda as simulated threads see it. The simulator puts theirs into the globals of the module that a launched
    function is of, which is this one; kernels and what they call lie in several."""

    shared = _Shared()

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda, name)


def launch(kernel: Callable[..., Any], grid: tuple[int, int], threads: int, arguments: tuple[Any, ...]) -> None:
    """Run a kernel, thread by thread."""

    def entry(*values: Any) -> None:
        kernel(*values)

    Cuda.shared.arrays.clear()
    cuda.jit(entry)[grid, threads](*arguments)


def _checked(at: int, nbytes: int) -> int:
    at = int(at)
    if at % nbytes:
        raise IndexError(f"{nbytes} bytes at {at:#x} are not aligned")
    if not any(first <= at and at + nbytes <= end for first, end in MEMORY):
        raise IndexError(f"{nbytes} bytes at {at:#x} are outside of the device's memory")
    return at


def _words(at: int, count: int) -> Words:
    return tuple((ctypes.c_uint32 * count).from_address(_checked(at, 4 * count)))


def words4(at: int) -> Words:
    return _words(at, 4)


def words2(at: int) -> Words:
    return _words(at, 2)


def word(at: int) -> int:
    return _words(at, 1)[0]


def int_at(at: int) -> int:
    return ctypes.c_int32.from_address(_checked(at, 4)).value


def long_at(at: int) -> int:
    return ctypes.c_int64.from_address(_checked(at, 8)).value


def float_at(at: int) -> np.float32:
    return np.float32(ctypes.c_float.from_address(_checked(at, 4)).value)


def set_float(at: int, value: float) -> None:
    ctypes.c_float.from_address(_checked(at, 4)).value = float(value)


def set_half(at: int, value: float) -> None:
    ctypes.c_uint16.from_address(_checked(at, 2)).value = int(np.float16(value).view(np.uint16))


def raise_flag(at: int, value: int) -> None:
    ctypes.c_int64.from_address(_checked(at, 8)).value = int(value)


def _of_bits(bits: int, kind: Any, view: npt.DTypeLike) -> np.float32:
    return np.float32(kind(bits).view(view))


def low_half(bits: int) -> np.float32:
    return _of_bits(int(bits) & 0xFFFF, np.uint16, np.float16)


def high_half(bits: int) -> np.float32:
    return _of_bits(int(bits) >> 16 & 0xFFFF, np.uint16, np.float16)


def as_float(bits: int) -> np.float32:
    return _of_bits(int(bits) & 0xFFFFFFFF, np.uint32, np.float32)


def dot4(weights: int, values: int, total: int) -> int:
    weights, values, dot = int(weights), int(values), int(total)
    for shift in (0, 8, 16, 24):
        dot += (weights >> shift & 255) * (((values >> shift & 255) ^ 128) - 128)
    assert abs(dot) < 1 << 31
    return dot


def nearest(value: float) -> int:
    return int(np.rint(value))


def quotient(n: int, d: int) -> int:
    return int(n) // int(d)
