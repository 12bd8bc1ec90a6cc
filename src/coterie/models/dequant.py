"""Weights as floats and back, and a look at their scales: for conversion, the oracle and checks, not for speed."""

import numpy as np
from numpy.typing import NDArray

from coterie.models.header import BLOCKS

# Where in a block its 16-bit scales lie: (first byte, how many).
SCALES = {
    "Q4_0": (0, 1),
    "Q4_1": (0, 2),
    "Q5_0": (0, 1),
    "Q8_0": (0, 1),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208, 1),
}


def dequantise(raw: NDArray[np.uint8], format: str) -> NDArray[np.float32]:
    """Decode uint8[rows, row bytes] in a format of `header.BLOCKS` to float32[rows, cols]."""
    import gguf
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # scales that are not numbers give weights that are not numbers
        floats: NDArray[np.float32] = dequantize(raw, gguf.GGMLQuantizationType[format])
    return floats


def quantise(floats: NDArray[np.float32], format: str) -> NDArray[np.uint8]:
    """Code float32[rows, cols] row by row in a format that has blocks of 32 columns, or none, as ggml does:
    uint8[rows, row bytes]. What is no number, or too large, gives weights that are no numbers (`finite`)."""
    import gguf
    from gguf.quants import quantize

    with np.errstate(all="ignore"):
        coded: NDArray[np.uint8] = np.ascontiguousarray(quantize(floats, gguf.GGMLQuantizationType[format]))
    return coded.view(np.uint8).reshape(len(floats), -1)


def finite(raw: NDArray[np.uint8], format: str) -> bool:
    """Whether uint8[rows, row bytes] decodes to finite floats only."""
    if format in SCALES:
        first, count = SCALES[format]
        blocks = raw.reshape(-1, BLOCKS[format][1])
        exponents = blocks[:, first + 1 : first + 2 * count : 2] & 0x7C
        return not bool((exponents == 0x7C).any())
    if format == "BF16":
        return not bool(((raw.view(np.uint16) & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(raw.view(np.float16 if format == "F16" else np.float32)).all())
