"""Compile kernels one by one, and keep their machine code for the next process.

All kernels share one C signature, `int64 kernel(record, step, lane)`, and are called through their address.
Numba checks a cached function against its own source file only, while ours are put together from intrinsics
of several modules; so the cache is a folder whose name is a hash of all kernel sources, the compiler's
versions and the CPU's features, with one file a kernel, written atomically.
"""

import hashlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import types

from coterie.kernels import target
from coterie.paths import kernels_dir

WORD = types.int64
KERNEL_SIGNATURE = WORD(WORD, WORD, WORD)


@cache
def cache_folder() -> Path:
    """The folder for machine code of exactly these sources, this compiler and this CPU."""
    import llvmlite
    import numba
    from numba.core import config

    key = hashlib.sha256()
    here = Path(__file__).parent
    for source in sorted([*here.glob("*.py"), *(here.parent / "actors").glob("*.py")]):
        key.update(source.read_bytes())
    cpu = config.CPU_NAME or "host"
    if cpu == "host":
        import llvmlite.binding as llvm

        cpu = llvm.get_host_cpu_name()
    parts = (numba.__version__, llvmlite.__version__, sys.version, cpu, *sorted(target.features()))
    key.update("\n".join(parts).encode())
    folder = kernels_dir() / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


class _FileCache:
    """What numba asks a cache for, one file a kernel. A file that does not load is compiled anew."""

    def __init__(self, name: str) -> None:
        self.path = cache_folder() / (name.replace(":", "-") + ".kernel")

    def load_overload(self, signature: Any, context: Any) -> Any:
        from numba.core.compiler import CompileResult

        context.refresh()
        try:
            return CompileResult._rebuild(context, *pickle.loads(self.path.read_bytes()))
        except FileNotFoundError:
            return None
        except (EOFError, pickle.UnpicklingError, ValueError, RuntimeError, TypeError, AttributeError):
            self.path.unlink(missing_ok=True)
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        data = pickle.dumps(result._reduce(), protocol=pickle.HIGHEST_PROTOCOL)
        try:
            handle, name = tempfile.mkstemp(dir=self.path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, self.path)
        except OSError:
            pass  # a full or read-only disk only costs the next process its compile time


def compile_function(name: str, function: Callable[..., Any], signature: Any = KERNEL_SIGNATURE) -> Any:
    """Compile `function` (or load it) as a C function called `name`; keep the result alive while it is used.

    Its `.address` is an int; its `.ctypes` releases the GIL for the length of a call.
    """
    from numba.core.ccallback import CFunc

    result = CFunc(function, (signature.args, signature.return_type), locals={}, options={"nopython": True})
    result._cache = _FileCache(name)
    result.compile()
    return result


_FACTORIES: dict[str, Callable[..., Callable[..., Any]]] = {}


def kernel(factory: Callable[..., Callable[..., Any]]) -> Callable[..., Callable[..., Any]]:
    """Register a kernel family: `factory(*parameters)` returns the Python function to compile."""
    _FACTORIES[factory.__name__] = factory
    return factory


def kernel_name(factory: Callable[..., Any], *parameters: str | int) -> str:
    """The name under which a program asks for a kernel, for example "matmul:Q4_0:8"."""
    return ":".join([factory.__name__, *map(str, parameters)])


@cache
def load_kernel(name: str) -> Any:
    """The compiled kernel of that name."""
    family, *parameters = name.split(":")
    return compile_function(name, _FACTORIES[family](*parameters))


def is_cached(name: str) -> bool:
    """Whether machine code for this kernel is already on disk."""
    return _FileCache(name).path.exists()
