"""PoCL on a CPU that is newer than its compiler.

PoCL asks its LLVM what the CPU is called. One that LLVM does not know is "generic", which its own clang then refuses
("unknown target CPU 'generic'"): nothing can be built. Or LLVM takes it for an older one of its kind, without the
AVX-512 that it has and that PoCL chooses its library of functions by ("Cannot select"): the process is aborted. Such a
device is given the name of an older CPU with the same vector instructions, at least those that PoCL's library for them
was compiled for, so that its functions can be inlined.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

TRIPLE, UNKNOWN = b"x86_64", (b"generic\0",)
NARROW = (b"znver1\0", b"znver2\0", b"znver3\0")  # without AVX-512
OLD = "haswell"
SEARCHED = 4096  # bytes of PoCL's description of a device
_kept: list[Any] = []  # names that PoCL points to


def name_cpu(device: int) -> str:
    """Name the CPU of PoCL's device at this address; returns the name, or "" where PoCL knows the CPU itself.

    The name stands behind that of the platform. Memory is looked at through a file, where a wrong address is an error.
    """
    name = _older_cpu(Path("/proc/cpuinfo").read_text())
    wrong = UNKNOWN if name == OLD else UNKNOWN + NARROW
    handle = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        words = memoryview(_read(handle, device, SEARCHED)).cast("Q")
        for i in range(1, len(words)):
            if _read(handle, words[i], 8).startswith(wrong) and _read(handle, words[i - 1], 6) == TRIPLE:
                _kept.append(ctypes.create_string_buffer(name.encode()))
                ctypes.c_uint64.from_address(device + 8 * i).value = ctypes.addressof(_kept[-1])
                return name
    finally:
        os.close(handle)
    return ""


def _older_cpu(cpuinfo: str) -> str:
    flags = set(next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "").split())
    if not {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return OLD
    return "cascadelake" if "avx512_vnni" in flags else "skylake-avx512"


def _read(handle: int, address: int, count: int) -> bytes:
    """Bytes of this process; none where there is no memory."""
    if not 0 < address < 1 << 47:
        return b""
    try:
        data = os.pread(handle, count, address)
    except OSError:
        return b""
    return data[: len(data) // 8 * 8] if count >= 8 else data
