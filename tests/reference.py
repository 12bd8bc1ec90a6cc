"""The kernels' arithmetic once more in numpy, from raw GGUF blocks, written from the formats' definitions.

Nothing here knows of packed layouts, tiles, lanes or instruction sets: only of numbers and their order.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]

COLUMNS = 32  # columns of an activation block
INTEGER_FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
FLOAT_FORMATS = ("F16", "BF16", "F32")
FORMATS = INTEGER_FORMATS + FLOAT_FORMATS
BLOCK = {  # bytes and columns of a raw block
    "Q4_0": (18, 32), "Q4_1": (20, 32), "Q5_0": (22, 32), "Q8_0": (34, 32),
    "Q4_K": (144, 256), "Q5_K": (176, 256), "Q6_K": (210, 256),
    "F16": (2, 1), "BF16": (2, 1), "F32": (4, 1),
}  # fmt: skip
SCALES = {  # first byte of each float16 in a raw block
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays are equal bit by bit; a NaN equals a NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kind = f"u{a.dtype.itemsize}"
    equal = np.ascontiguousarray(a).view(kind) == np.ascontiguousarray(b).view(kind)
    if a.dtype.kind == "f":
        equal |= np.isnan(a) & np.isnan(b)
    return bool(equal.all())


def fma(x: Floats, y: Floats, z: Floats) -> Floats:
    """x * y + z, rounded once to float32.

    The product is exact in float64. The sum is rounded there to odd (TwoSum gives what was lost), so that the
    second rounding decides as one rounding would.
    """
    with np.errstate(all="ignore"):
        product, addend = np.multiply(x, y, dtype=np.float64), z.astype(np.float64)
        total = product + addend
        part = total - product
        lost = (product - (total - part)) + (addend - part)
        even = (np.ascontiguousarray(total).view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & (lost != 0) & even
        odd = np.where(inexact, np.nextafter(total, np.copysign(np.inf, lost)), total)
        rounded: Floats = odd.astype(np.float32)
    return rounded


# --- weights ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """Weights as integers: `scale * ints + low`, in blocks of 32 columns.

    ints: int32[rows, blocks, 32]; scale, low: float32[rows, blocks] (low is None where there is none).
    """

    ints: Ints
    scale: Floats
    low: Floats | None


def _float16s(block: Bytes, at: int) -> Floats:
    halves: Floats = np.ascontiguousarray(block[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)
    return halves


def _k_scale(packed: Bytes, j: int) -> tuple[Floats, Floats]:
    """Six-bit scale and minimum number `j` of a K-quant's 12 bytes (get_scale_min_k4)."""
    if j < 4:
        scale, low = packed[..., j] & 63, packed[..., j + 4] & 63
    else:
        scale = (packed[..., j + 4] & 15) | (packed[..., j - 4] >> 6) << 4
        low = (packed[..., j + 4] >> 4) | (packed[..., j] >> 6) << 4
    return scale.astype(np.float32), low.astype(np.float32)


def integer_blocks(name: str, raw: Bytes) -> Blocks:
    """Decode uint8[rows, row bytes] of an integer format."""
    size, columns = BLOCK[name]
    b = raw.reshape(len(raw), -1, size)
    subs = columns // COLUMNS
    ints = np.empty((*b.shape[:2], subs, COLUMNS), np.int32)
    scale = np.empty((*b.shape[:2], subs), np.float32)
    low = np.empty_like(scale) if name in ("Q4_1", "Q4_K", "Q5_K") else None
    match name:
        case "Q4_0" | "Q4_1":
            first = 2 if name == "Q4_0" else 4
            ints[..., 0, :16], ints[..., 0, 16:] = b[..., first:] & 15, b[..., first:] >> 4
            scale[..., 0] = _float16s(b, 0)
            if low is None:
                ints -= 8
            else:
                low[..., 0] = _float16s(b, 2)
        case "Q5_0":
            for j in range(16):
                byte = b[..., 6 + j].astype(np.int32)
                upper = [b[..., 2 + bit // 8] >> (bit % 8) & 1 for bit in (j, j + 16)]
                ints[..., 0, j] = (byte & 15 | upper[0].astype(np.int32) << 4) - 16
                ints[..., 0, j + 16] = (byte >> 4 | upper[1].astype(np.int32) << 4) - 16
            scale[..., 0] = _float16s(b, 0)
        case "Q8_0":
            ints[..., 0, :] = b[..., 2:].view(np.int8)
            scale[..., 0] = _float16s(b, 0)
        case "Q4_K" | "Q5_K":
            assert low is not None
            for j in range(8):
                nibbles = b[..., -128:][..., 32 * (j // 2) : 32 * (j // 2) + 32] >> (4 * (j % 2)) & 15
                fifth = (b[..., 16:48] >> j & 1) << 4 if name == "Q5_K" else np.uint8(0)
                ints[..., j, :] = nibbles | fifth
                steps, low_steps = _k_scale(b[..., 4:16], j)
                scale[..., j] = _float16s(b, 0) * steps
                low[..., j] = -_float16s(b, 2) * low_steps
        case "Q6_K":
            for n in range(2):  # halves of 128 columns, each with 64 low bytes and 32 high bytes
                ql, qh = b[..., 64 * n : 64 * n + 64], b[..., 128 + 32 * n : 160 + 32 * n]
                for part in range(4):
                    nibbles = ql[..., 32 * (part % 2) : 32 * (part % 2) + 32] >> (4 * (part // 2)) & 15
                    values = (nibbles | (qh >> (2 * part) & 3) << 4).astype(np.int32) - 32
                    at = 192 + 8 * n + 2 * part
                    steps = b[..., at : at + 2].view(np.int8).astype(np.int32)
                    ints[..., 4 * n + part, :] = values * np.repeat(steps, 16, axis=-1)
            scale[...] = _float16s(b, 208)[..., None]
    return Blocks(
        ints.reshape(len(raw), -1, COLUMNS),
        scale.reshape(len(raw), -1),
        None if low is None else low.reshape(len(raw), -1),
    )


def floats_of(name: str, raw: Bytes) -> Floats:
    """Weights uint8[rows, row bytes] as float32[rows, columns]: exact for float formats, the product and the
    sum rounded for the others."""
    if name == "F16":
        return raw.view(np.float16).astype(np.float32)
    if name == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if name == "F32":
        return raw.view(np.float32)
    w = integer_blocks(name, raw)
    weights: Floats = w.ints.astype(np.float32) * w.scale[..., None]
    if w.low is not None:
        weights = weights + w.low[..., None]
    return weights.reshape(len(raw), -1)


# --- activations and products ------------------------------------------------------------------------


def quantise(x: Floats) -> tuple[Ints, Floats]:
    """int8 values as int32[n, blocks, 32] and scales float32[n, blocks] of float32[n, columns].

    A block's largest magnitude becomes 127; where that is so small that 127 / magnitude overflows, zeros count
    as not-a-numbers do, as 127.
    """
    blocks = x.reshape(len(x), -1, COLUMNS)
    top = np.abs(blocks).max(axis=-1)
    with np.errstate(all="ignore"):
        inverse = np.where(top > 0, np.float32(127) / top, np.float32(0))
        scaled = np.rint(blocks * inverse[..., None])
        bounded = np.where(scaled < 127, scaled, np.float32(127))
        bounded = np.where(bounded > -127, bounded, np.float32(-127))
    return bounded.astype(np.int32), top / np.float32(127)


def integer_product(w: Blocks, q: Ints, scale: Floats) -> Floats:
    """float32[n, rows]: exact int32 dots of blocks, added in ascending order by fused multiply-adds."""
    shape = len(q), len(w.ints)
    total = np.zeros(shape, np.float32)
    sums = scale * q.sum(axis=-1).astype(np.float32)
    for block in range(w.ints.shape[1]):
        dots = q[:, block].astype(np.int64) @ w.ints[:, block].T.astype(np.int64)
        assert np.abs(dots).max(initial=0) < 2**31
        with np.errstate(all="ignore"):
            factor = w.scale[None, :, block] * scale[:, None, block]
        total = fma(dots.astype(np.float32), factor, total)
        if w.low is not None:
            low = np.broadcast_to(w.low[None, :, block], shape)
            total = fma(low, np.broadcast_to(sums[:, None, block], shape), total)
    return total


def product(name: str, raw: Bytes, x: Floats) -> Floats:
    """float32[n, rows] = x float32[n, columns] times weights uint8[rows, row bytes], as class `exact` has it."""
    if name in INTEGER_FORMATS:
        return integer_product(integer_blocks(name, raw), *quantise(x))
    weights = floats_of(name, raw)
    total = np.zeros((len(x), len(weights)), np.float32)
    for column in range(weights.shape[1]):
        total = fma(x[:, column, None] + 0 * total, weights[None, :, column] + 0 * total, total)
    return total


def nmse(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """Squared error over squared magnitude."""
    wanted = expected.astype(np.float64)
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


# --- random weights ------------------------------------------------------------------------------------


def random_raw(rng: np.random.Generator, name: str, rows: int, columns: int) -> Bytes:
    """Raw rows of every bit pattern in the quants, with scales that are ordinary numbers."""
    size, per = BLOCK[name]
    if name in FLOAT_FORMATS:
        floats = rng.standard_normal((rows, columns), np.float32)
        if name == "BF16":
            return (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return floats.astype(np.float16 if name == "F16" else np.float32).view(np.uint8)
    raw = rng.integers(0, 256, (rows, columns // per, size), np.uint8)
    set_scales(name, raw, rng.standard_normal((rows, columns // per, 2)).astype(np.float16))
    return raw.reshape(rows, -1)


def set_scales(name: str, blocks: Bytes, values: NDArray[np.float16]) -> None:
    """Write the float16s of raw blocks uint8[rows, blocks, bytes]; values: [rows, blocks, at least as many]."""
    for i, at in enumerate(SCALES[name]):
        blocks[..., at : at + 2] = np.ascontiguousarray(values[..., i]).view(np.uint8).reshape(*blocks.shape[:2], 2)
