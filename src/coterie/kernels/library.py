"""Compiled kernels by name: linked from the cache, or compiled first.

A kernel's machine code is an ELF object in a folder of the cache. The folder's name is a hash of all kernel sources,
the compiler's versions and the CPU, so an edit or another machine can never meet stale code. Linking needs only LLVM's
linker: this process never loads the compiler, which saves it half a second and 100 MB.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coterie.errors import UnitError
from coterie.kernels import target
from coterie.kernels.apart import CompilerProcess
from coterie.paths import kernels_dir, replace_file

KEPT_FOLDERS = 7  # of earlier versions, when a new one is made
COMPILER = CompilerProcess()
MANY = 4  # kernels for which a second compiler is started; it takes three quarters of a second to begin
PLENTY = 1 << 30  # bytes of memory that must be available then


def kernel_name(family: str, *parameters: str | int) -> str:
    """The name under which a program asks for a kernel, for example "matmul:Q4_0:8"."""
    return ":".join([family, *map(str, parameters)])


@cache
def cache_folder() -> Path:
    """The folder for machine code of exactly these sources, this compiler and this CPU."""
    key = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    parts = (
        version("numba"),
        version("llvmlite"),
        platform.machine(),
        target.cpu_name(),
        *sorted(target.features()),
    )
    key.update("\n".join(parts).encode())
    folder = kernels_dir() / key.hexdigest()[:16]
    if not folder.exists():
        _prune(folder.parent)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _prune(parent: Path) -> None:
    """Forget the oldest folders, of sources or machines that are gone."""
    folders = sorted((f for f in parent.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)
    for folder in folders[: -KEPT_FOLDERS or None]:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def address(name: str) -> int:
    """Where the kernel of that name starts, in this process."""
    found = _read(name)
    if found is None:
        found = COMPILER.compile(name)
        _write(name, *found)
    return _linker().link(*found)


def compile_missing(names: Iterable[str], progress: Callable[[str, int, int], None], memory: int) -> None:
    """Have the machine code of these kernels, and the compiler gone. `progress` gets (label, kernels done, in all).
    Where there are cores for it, and `memory` bytes that are available are enough, a second compiler begins at the
    other end."""
    missing = [name for name in dict.fromkeys(names) if not is_cached(name)]
    left, helper = deque(missing), None
    if len(missing) >= MANY and len(os.sched_getaffinity(0)) > 1 and memory > PLENTY:
        helper = threading.Thread(target=_help, args=(left,), name="coterie-compiler", daemon=True)
        helper.start()
    try:
        while (name := _next(left)) is not None:
            progress("compiling", len(missing) - len(left) - 1, len(missing))
            address(name)
        if helper is not None:
            helper.join()
            for name in missing:  # where it failed, the error is ours
                if not is_cached(name):
                    address(name)
    finally:
        left.clear()  # after an interrupt the second one ends by itself
        COMPILER.end()


def _help(left: deque[str]) -> None:
    """Compile kernels from the end, and leave errors to who needs these."""
    compiler = CompilerProcess()
    try:
        with suppress(UnitError):
            while (name := _next(left, last=True)) is not None:
                _write(name, *compiler.compile(name))
    finally:
        compiler.end()


def _next(left: deque[str], last: bool = False) -> str | None:
    """A kernel that nobody compiles yet; None: there is none."""
    try:
        return left.pop() if last else left.popleft()
    except IndexError:
        return None


def function(name: str, arguments: int) -> Callable[..., int]:
    """A compiled function of so many 64-bit integers; a call releases the GIL."""
    made: Callable[..., int] = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)(address(name))
    return made


def is_cached(name: str) -> bool:
    """Whether the kernel's machine code is on disk."""
    return _path(name).exists()


def _path(name: str) -> Path:
    return cache_folder() / (name.replace(":", "-") + ".kernel")


def _read(name: str) -> tuple[str, bytes] | None:
    """Entry symbol and object; None where there is no whole file: its last line is a checksum."""
    try:
        data = _path(name).read_bytes()
    except OSError:
        return None
    body, digest = data[:-32], data[-32:]
    if hashlib.sha256(body).digest() != digest:
        return None
    symbol, _, code = body.partition(b"\n")
    return symbol.decode(), code


def _write(name: str, symbol: str, code: bytes) -> None:
    """Keep a kernel, if the disk lets us: else the next process compiles it again."""
    body = symbol.encode() + b"\n" + code
    with suppress(OSError):
        replace_file(_path(name), body + hashlib.sha256(body).digest())


# What compiled code calls to report an exception. Kernels raise none; where the compiler is not loaded, and so does
# not define these, they end the process.
ERROR_PATH = (
    "NRT_Free",
    "numba_do_raise",
    "numba_gil_ensure",
    "numba_gil_release",
    "numba_runtime_build_excinfo_struct",
    "numba_unpickle",
)


class _Linker:
    """LLVM's in-process linker. Objects stay linked for the life of the process."""

    def __init__(self) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        end = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
        for symbol in ERROR_PATH:
            if llvm.address_of_symbol(symbol) is None:
                llvm.add_symbol(symbol, end)
        self._llvm: Any = llvm
        self._engine: Any = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)

    def link(self, symbol: str, code: bytes) -> int:
        self._engine.add_object_file(self._llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        return int(self._engine.get_function_address(symbol))


@cache
def _linker() -> _Linker:
    return _Linker()
