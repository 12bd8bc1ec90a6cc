"""Repack GGUF rows into the interleaved layouts that kernels read (docs/packed-format.md).

Each `_fill` copies fields of raw blocks [..., 16 rows, blocks, raw bytes] to packed groups
[..., blocks, packed bytes]; only the K-quants' scales and nibbles change form, no weight changes value.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.kernels.formats import COLUMNS, FORMATS, ROWS
from coterie.kernels.library import function, kernel_name

Bytes = npt.NDArray[Any]  # uint8; mypy takes a shift of uint8 for a signed integer

# Bytes of a raw GGUF block and the columns it holds.
RAW = {
    "Q4_0": (18, 32),
    "Q4_1": (20, 32),
    "Q5_0": (22, 32),
    "Q8_0": (34, 32),
    "Q4_K": (144, 256),
    "Q5_K": (176, 256),
    "Q6_K": (210, 256),
    "F16": (2, 1),
    "BF16": (2, 1),
    "F32": (4, 1),
}


def _interleave(to: Bytes, source: Bytes, kind: str) -> None:
    """to[..., block, item, row] = source[..., row, block, item], items of type `kind`."""
    items = source.view(kind)  # [..., 16, blocks, items]
    out = to.view(kind).reshape(*to.shape[:-1], items.shape[-1], ROWS)  # both are views: one copy in all
    out[...] = np.moveaxis(items, -3, -1)


def _bit_planes(bits: Bytes) -> Bytes:
    """One bit a weight [..., 32] to bytes [..., 4]: bit k of byte i belongs to weight 4k + i."""
    planes: Bytes = np.packbits(bits.reshape(*bits.shape[:-1], 8, 4), axis=-2, bitorder="little")[..., 0, :]
    return planes


def _pack_nibbles(q: Bytes) -> Bytes:
    """Weights [..., 32] of 4 bits to bytes [..., 16]: low nibbles are the first 16."""
    nibbles: Bytes = q[..., :16] | q[..., 16:] << 4
    return nibbles


def _fill_4(to: Bytes, raw: Bytes, scales: int) -> None:
    """Q4_0 and Q4_1: `scales` float16, then nibbles that already pair weight i with weight 16 + i."""
    for s in range(scales):
        _interleave(to[..., 32 * s : 32 * s + 32], raw[..., 2 * s : 2 * s + 2], "<u2")
    _interleave(to[..., 32 * scales :], raw[..., 2 * scales :], "<u4")


def _fill_q5_0(to: Bytes, raw: Bytes) -> None:
    _interleave(to[..., :32], raw[..., :2], "<u2")
    _interleave(to[..., 32:288], raw[..., 6:], "<u4")
    planes = _bit_planes(np.unpackbits(raw[..., 2:6], axis=-1, bitorder="little"))
    _interleave(to[..., 288:], planes, "<u4")


def _fill_q8_0(to: Bytes, raw: Bytes) -> None:
    _interleave(to[..., :32], raw[..., :2], "<u2")
    _interleave(to[..., 32:], raw[..., 2:] ^ 0x80, "<u4")


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The eight 6-bit scales and minima of a K-quant's 12 bytes."""
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales: Bytes = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], -1)
    return scales, np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], -1)


def _fill_k(to: Bytes, raw: Bytes, fifth: bool) -> None:
    """Q4_K and Q5_K: scale and minimum, eight sub-blocks of 6-bit scale, 6-bit minimum, weights."""
    _interleave(to[..., :32], raw[..., :2], "<u2")
    _interleave(to[..., 32:64], raw[..., 2:4], "<u2")
    scales, minima = _k_scales(raw[..., 4:16])
    pairs = raw[..., -128:].reshape(*raw.shape[:-1], 4, 32)
    sub_bytes = 352 if fifth else 288
    for s in range(8):
        out = to[..., 64 + s * sub_bytes : 64 + (s + 1) * sub_bytes]
        _interleave(out[..., :16], scales[..., s : s + 1], "u1")
        _interleave(out[..., 16:32], minima[..., s : s + 1], "u1")
        nibbles = pairs[..., s // 2, :] >> 4 if s % 2 else pairs[..., s // 2, :] & 15
        _interleave(out[..., 32:288], _pack_nibbles(nibbles), "<u4")
        if fifth:
            _interleave(out[..., 288:], _bit_planes(raw[..., 16:48] >> s & 1), "<u4")


def _fill_q6_k(to: Bytes, raw: Bytes) -> None:
    """Scale, eight sub-blocks of two int8 scales, nibbles, and two planes of 2-bit fields."""
    _interleave(to[..., :32], raw[..., 208:210], "<u2")
    lead = raw.shape[:-1]
    low, high = raw[..., :128].reshape(*lead, 2, 2, 32), raw[..., 128:192].reshape(*lead, 2, 32)
    for s in range(8):
        half, part = divmod(s, 4)
        out = to[..., 32 + s * 416 : 32 + (s + 1) * 416]
        _interleave(out[..., :16], raw[..., 192 + 2 * s : 193 + 2 * s], "u1")
        _interleave(out[..., 16:32], raw[..., 193 + 2 * s : 194 + 2 * s], "u1")
        nibbles = low[..., half, part % 2, :] >> (4 if part >= 2 else 0) & 15
        _interleave(out[..., 32:288], _pack_nibbles(nibbles), "<u4")
        fields = (high[..., half, :] >> (2 * part) & 3).reshape(*lead, 2, 4, 4)  # plane, field, byte
        shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
        planes = np.bitwise_or.reduce(fields << shifts, axis=-2).reshape(*lead, 8)
        _interleave(out[..., 288:], planes, "<u4")


def _fill_float(to: Bytes, raw: Bytes) -> None:
    """Columns of 16 rows; raw blocks are [..., 16, blocks, 32 columns of 2 or 4 bytes]."""
    _interleave(to, raw, "<u2" if to.shape[-1] == 1024 else "<u4")


_FILL: dict[str, Callable[[Any, Any], None]] = {
    "Q4_0": lambda to, raw: _fill_4(to, raw, 1),
    "Q4_1": lambda to, raw: _fill_4(to, raw, 2),
    "Q5_0": _fill_q5_0,
    "Q8_0": _fill_q8_0,
    "Q4_K": lambda to, raw: _fill_k(to, raw, fifth=False),
    "Q5_K": lambda to, raw: _fill_k(to, raw, fifth=True),
    "Q6_K": _fill_q6_k,
    "F16": _fill_float,
    "BF16": _fill_float,
    "F32": _fill_float,
}


def padded_columns(name: str, columns: int) -> int:
    """Columns of a packed row: the next multiple of the format's block."""
    return -(-columns // FORMATS[name].columns) * FORMATS[name].columns


def packed_bytes(name: str, rows: int, columns: int) -> int:
    """Bytes of a packed matrix, rows padded to whole groups."""
    return -(-rows // ROWS) * FORMATS[name].group_bytes(padded_columns(name, columns))


def raw_bytes(name: str, columns: int) -> int:
    """Bytes of a raw row."""
    size, per = RAW[name]
    return columns // per * size


def pack(name: str, raw: Bytes, out: Bytes) -> None:
    """Pack raw GGUF rows uint8[rows, row bytes] into `out` uint8[groups, blocks, block bytes].

    `out` may be any view of that shape; rows and columns that `raw` lacks become zeros.
    """
    groups, blocks, _ = out.shape
    per_block = FORMATS[name].columns // RAW[name][1] * RAW[name][0]
    rows, width = raw.shape
    if rows != groups * ROWS or width != blocks * per_block:
        whole = np.zeros((groups * ROWS, blocks * per_block), np.uint8)
        whole[:rows, :width] = raw
        raw = whole
    _FILL[name](out, raw.reshape(groups, ROWS, blocks, per_block))


def unpack(name: str, packed: Bytes) -> npt.NDArray[np.float32]:
    """Dequantise packed groups uint8[groups, blocks, block bytes] to float32[16 groups, columns], by the very
    code that kernels unpack with; for tests and tools."""
    f = FORMATS[name]
    groups, blocks, _ = packed.shape
    packed = np.ascontiguousarray(packed)
    out = np.empty((groups, blocks, f.subs, COLUMNS, ROWS), np.float32)
    function(kernel_name("unpack_blocks", name), 3)(packed.ctypes.data, out.ctypes.data, groups * blocks)
    return out.reshape(groups, blocks * f.columns, ROWS).transpose(0, 2, 1).reshape(groups * ROWS, -1)
