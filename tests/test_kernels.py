"""Matrix kernels bit by bit against reference.py; activations, norms, exp and rope against doubles."""

import numpy as np
import pytest
import reference
from harness import Machine, machine
from reference import FLOAT_FORMATS, FORMATS, INTEGER_FORMATS, Bytes, Floats

from coterie.kernels import attention, target
from coterie.kernels.compiled import kernel_name
from coterie.kernels.formats import FORMATS as PACKED
from coterie.kernels.record import Opcode

TILE = target.tile_tokens()
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33)


def run_matmul(
    m: Machine, name: str, raw: Bytes, x: Floats, tile: int, *, panel: int = 1 << 20, chunk: int = 1, private: bool = False
) -> Floats:
    """W x by the kernels: rows to tiles (by each lane for itself if `private`), then the matrix."""
    rows, (n, columns) = len(raw), x.shape
    f = PACKED[name]
    padded = -(-columns // f.columns) * f.columns
    source = m.room((m.rows, -(-columns // 32) * 32), np.float32)
    m.look(source)[:n, :columns] = x
    tiles = m.tiles(f.is_float, padded // 32, private=private)
    emit = m.emit(source, padded // 32, tile, None if f.is_float else tiles, tiles if f.is_float else None)
    b = m.builder()
    prepare = None
    if private:
        prepare = b.preparation(kernel_name(attention.merge), Opcode.MERGE, emit)
    else:
        b.add(kernel_name(attention.merge), Opcode.MERGE, emit)
    y = m.matmul(b, name, m.pack(name, raw, columns), rows, columns, tiles, tile, panel=panel, chunk=chunk, prepare=prepare)
    m.step(m.load(b), n)
    return np.ascontiguousarray(m.look(y)[:n, :rows])
