"""The checksum that guards what lies in the flash file (kernels/checksum.py says how it is made)."""

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from coterie.kernels import library

SECTOR = 512  # bytes: of these everything is made, single neurons too


@cache
def _compiled() -> Callable[..., int]:
    return library.function("checksum", 2)


def checksum(data: npt.NDArray[np.uint8]) -> int:
    """64 bits, without sign, of contiguous uint8[n], n a multiple of 512. Raises ValueError for anything else."""
    if data.dtype != np.uint8 or not data.flags.c_contiguous or data.size % SECTOR:
        raise ValueError("a checksum is of contiguous bytes, a multiple of 512")
    return _compiled()(data.ctypes.data, data.size) & 0xFFFFFFFFFFFFFFFF
