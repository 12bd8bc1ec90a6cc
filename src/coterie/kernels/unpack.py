"""From packed weights to registers: one description of each format for all kernels.

Functions add instructions to an `ir.IRBuilder`; `at` is the address of a sub-block, `block` that of a block.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from coterie.kernels.formats import QUADS, Format
from coterie.kernels.vector import (
    F32x16,
    I8x16,
    I8x64,
    I32x16,
    bfloats_to_floats,
    const,
    halves_to_floats,
    load,
)


def _nibbles(b: ir.IRBuilder, at: Any, offset: int) -> list[Any]:
    """Low nibbles are quads 0-3, high nibbles quads 4-7."""
    packed = [load(b, at, I8x64, offset + 64 * j) for j in range(4)]
    low = [b.and_(q, const(I8x64, 15)) for q in packed]
    return low + [b.lshr(q, const(I8x64, 4)) for q in packed]


def _bit(b: ir.IRBuilder, planes: Any, source: int, target: int) -> Any:
    """Bit `source` of every byte, moved to bit `target`."""
    if source > target:
        planes = b.lshr(planes, const(I8x64, source - target))
    elif source < target:
        planes = b.shl(planes, const(I8x64, target - source))
    return b.and_(planes, const(I8x64, 1 << target))


def _two_bits(b: ir.IRBuilder, planes: Any, source: int) -> Any:
    """Bits `source`, `source`+1 of every byte, moved to bits 4 and 5."""
    if source > 4:
        planes = b.lshr(planes, const(I8x64, source - 4))
    elif source < 4:
        planes = b.shl(planes, const(I8x64, 4 - source))
    return b.and_(planes, const(I8x64, 0x30))


def quads(b: ir.IRBuilder, f: Format, at: Any) -> list[Any]:
    """The eight 64-byte vectors of a sub-block, unsigned."""
    match f.name:
        case "Q4_0":
            return _nibbles(b, at, 32)
        case "Q4_1":
            return _nibbles(b, at, 64)
        case "Q4_K":
            return _nibbles(b, at, 32)
        case "Q5_0" | "Q5_K":
            fifth = load(b, at, I8x64, 32 + 256)
            return [b.or_(q, _bit(b, fifth, k, 4)) for k, q in enumerate(_nibbles(b, at, 32))]
        case "Q8_0":
            return [load(b, at, I8x64, 32 + 64 * k) for k in range(QUADS)]
        case "Q6_K":
            upper = [load(b, at, I8x64, 32 + 256 + 64 * v) for v in range(2)]
            return [b.or_(q, _two_bits(b, upper[k // 4], 2 * (k % 4))) for k, q in enumerate(_nibbles(b, at, 32))]
    raise ValueError(f.name)


def _bytes_to_ints(b: ir.IRBuilder, at: Any, offset: int, widen: Callable[..., Any]) -> Any:
    return widen(load(b, at, I8x16, offset), I32x16)


def header(b: ir.IRBuilder, f: Format, block: Any) -> tuple[Any | None, Any | None]:
    """What all sub-blocks of a block share: its scale and (negated) minimum as 16 floats each."""
    if f.subs == 1:
        return None, None
    scale = halves_to_floats(b, block)
    if not f.has_minimum:
        return scale, None
    return scale, b.fsub(const(F32x16, -0.0), halves_to_floats(b, block, 32))


def scales(b: ir.IRBuilder, f: Format, at: Any, shared: tuple[Any | None, Any | None]) -> tuple[Any, Any | None]:
    """Scale and minimum of a sub-block, 16 floats each."""
    if f.subs == 1:
        return halves_to_floats(b, at), halves_to_floats(b, at, 32) if f.has_minimum else None
    scale, low = shared
    assert scale is not None
    if f.split_scales:
        return scale, None
    steps = b.sitofp(_bytes_to_ints(b, at, 0, b.zext), F32x16)
    low_steps = b.sitofp(_bytes_to_ints(b, at, 16, b.zext), F32x16)
    return b.fmul(scale, steps), b.fmul(low, low_steps)


def half_scales(b: ir.IRBuilder, at: Any) -> tuple[Any, Any]:
    """Q6_K: the int8 scales of the two halves of a sub-block, as 16 int32 each."""
    return _bytes_to_ints(b, at, 0, b.sext), _bytes_to_ints(b, at, 16, b.sext)


def column(b: ir.IRBuilder, f: Format, at: Any, c: int) -> Any:
    """Float formats: column `c` of a sub-block, 16 rows, as float32."""
    match f.name:
        case "F16":
            return halves_to_floats(b, at, 32 * c)
        case "BF16":
            return bfloats_to_floats(b, at, 32 * c)
        case "F32":
            return load(b, at, F32x16, 64 * c)
    raise ValueError(f.name)
