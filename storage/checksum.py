"""The checksum that guards an extent of the flash file (kernels/checksum.py says how it is made)."""

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from coterie.kernels import library

PAGE = 4096  # bytes: extents are whole pages


@cache
def _compiled() -> Callable[..., int]:
    return library.function("checksum", 2)


def checksum(data: npt.NDArray[np.uint8]) -> int:
    """64 bits, without sign, of contiguous uint8[n], n a multiple of 4096. Raises ValueError for anything else."""
    if data.dtype != np.uint8 or not data.flags.c_contiguous or data.size % PAGE:
        raise ValueError("a checksum is of contiguous bytes, a multiple of 4096")
    return _compiled()(data.ctypes.data, data.size) & 0xFFFFFFFFFFFFFFFF
