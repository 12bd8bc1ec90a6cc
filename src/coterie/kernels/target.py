"""Which instruction set the kernels are compiled for, decided before any code is generated.

LLVM aborts the process when asked for an instruction that the target lacks, so the choice is made
from the features numba compiles for: the host's, or NUMBA_CPU_NAME and NUMBA_CPU_FEATURES.
"""

import os
import platform
from functools import cache
from typing import Literal

from coterie.errors import UnitError

Path = Literal["vnni", "avx2", "dotprod"]

REQUIRED = {"x86_64": {"avx2", "fma", "f16c"}, "aarch64": {"dotprod"}}


@cache
def features() -> frozenset[str]:
    """Features that numba generates code for, in LLVM's spelling ("avx2", "dotprod")."""
    import llvmlite.binding as llvm

    flags = os.environ.get("NUMBA_CPU_FEATURES")
    if flags is None:
        flags = llvm.get_host_cpu_features().flatten()
    return frozenset(flag[1:] for flag in flags.split(",") if flag.startswith("+"))


@cache
def cpu_name() -> str:
    """The CPU that numba generates code for, in LLVM's spelling."""
    import llvmlite.binding as llvm

    chosen = os.environ.get("NUMBA_CPU_NAME")
    return str(llvm.get_host_cpu_name()) if chosen in (None, "host") else str(chosen)


@cache
def path() -> Path:
    """The code path for this process; raises UnitError where the CPU is too old."""
    machine = platform.machine()
    if machine not in REQUIRED:
        raise UnitError(f"the CPU unit runs on x86_64 and aarch64, not on {machine}")
    missing = REQUIRED[machine] - features()
    if missing:
        raise UnitError(f"this {machine} CPU lacks {', '.join(sorted(missing))}, which Coterie's kernels need")
    if machine == "aarch64":
        return "dotprod"
    return "vnni" if {"avx512vnni", "avx512bw", "avx512vl"} <= features() else "avx2"
