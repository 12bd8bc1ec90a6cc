"""From Python to machine code: the only module that starts the compiler.

Kernels are families: `factory(*parameters)` returns the Python function of one member. Everything compiled takes and
returns 64-bit integers. Division is IEEE's and nothing raises, so the code needs nothing of Python and can be linked
in a process that never imports the compiler (apart.py, library.py).
"""

import inspect
from collections.abc import Callable
from itertools import count
from typing import Any
from zlib import crc32

from numba import types
from numba.core.bytecode import FunctionIdentity
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock

_FACTORIES: dict[str, Callable[..., Callable[..., Any]]] = {}


def kernel(factory: Callable[..., Callable[..., Any]]) -> Callable[..., Callable[..., Any]]:
    """Register a kernel family under its function's name."""
    _FACTORIES[factory.__name__] = factory
    return factory


def compile_kernel(name: str) -> tuple[str, bytes]:
    """Entry symbol and ELF object of the kernel called `name`, for example "matmul:Q4_0:8"."""
    from coterie.kernels import (  # noqa: F401  register
        attention,
        checksum,
        ffn,
        flash,
        hidden,
        lane,
        matmul,
        meet,
        neuron_lane,
        opencl_queue,
        probe,
        rows,
        sparse,
        sparse_down,
        sparse_late,
        sparse_predict,
    )

    family, *parameters = name.split(":")
    function = _FACTORIES[family](*parameters)
    function.__name__ = function.__qualname__ = name.replace(":", "_")  # the symbol, unlike any other kernel's
    arity = len(inspect.signature(function).parameters)
    signature = ((types.int64,) * arity, types.int64)
    compiled = CFunc(function, signature, locals={}, options={"nopython": True, "error_model": "numpy"})
    with global_compiler_lock:
        # Functions within a factory differ from kernel to kernel, but numba numbers them by the order in a process: two
        # objects of two processes could give one symbol to both.
        FunctionIdentity._unique_ids = count(crc32(name.encode()) << 20)
        result = compiled._compile_uncached()
        result.library.finalize()
        _, _, (code, _) = result.library.serialize_using_object_code()
    return result.fndesc.llvm_cfunc_wrapper_name, code
