"""Dense matrix kernels: y[row] = W x[row], for one token, a small batch or a prefill chunk."""

from collections.abc import Callable
from typing import Any

from numba.extending import register_jitable

from coterie.kernels import formats
from coterie.kernels.compiler import kernel
from coterie.kernels.operands import (
    MATMUL_ALL,
    MATMUL_ARRIVAL,
    MATMUL_BEFORE,
    MATMUL_BLOCKS,
    MATMUL_CHUNK,
    MATMUL_GIVEN,
    MATMUL_GROUP,
    MATMUL_GROUPS,
    MATMUL_OUTPUTS,
    MATMUL_PANEL,
    MATMUL_PER,
    MATMUL_PLANES,
    MATMUL_STRIDE,
    MATMUL_WEIGHTS,
    MATMUL_X,
    MATMUL_X_LANE,
    MATMUL_X_SUBS,
    MATMUL_Y,
    MATMUL_Y_ROW,
)
from coterie.kernels.record import OUTPUTS, TOKENS
from coterie.kernels.shapes import VECTOR
from coterie.kernels.sync import await_position, claim, finish, given, prepare, word
from coterie.kernels.tile import Tile, tile_groups, tile_op
from coterie.kernels.vector import add, floats_at, set_floats


@register_jitable
def join_planes(out, y, y_row, first, last):
    """out = y + the row below it, bytes `first` to `last` of a row."""
    for at in range(first, last, VECTOR):
        set_floats(out + at, add(floats_at(y + at), floats_at(y + y_row + at)))


@kernel
def matmul(name: str, tokens: str) -> Callable[..., Any]:
    """A piece is a run of row groups, of those that are this unit's. Loops: panel of columns, row group, token tile, so
    that a panel of activations stays in the second-level cache and one of weights in the first."""
    tile_tokens = int(tokens)
    together = tile_groups(tile_tokens)
    tile, wide_tile = tile_op(name, tile_tokens), tile_op(name, tile_tokens, together)
    f = formats.FORMATS[name]
    block_bytes, x_sub = f.block, Tile(f, tile_tokens).x_sub
    subs = f.subs

    def run(record, step, lane):
        n = word(step, OUTPUTS) if word(record, MATMUL_OUTPUTS) != 0 else word(step, TOKENS)
        planes = word(record, MATMUL_PLANES)
        tiles = (n * planes + tile_tokens - 1) // tile_tokens
        groups, chunk, blocks = (
            word(record, MATMUL_GROUPS),
            word(record, MATMUL_CHUNK),
            word(record, MATMUL_BLOCKS),
        )
        panel = word(record, MATMUL_PANEL) if tiles > 1 else blocks
        x = word(record, MATMUL_X) + lane * word(record, MATMUL_X_LANE)
        y, y_row = word(record, MATMUL_Y), word(record, MATMUL_Y_ROW)
        x_tile, group = word(record, MATMUL_X_SUBS) * x_sub, word(record, MATMUL_GROUP)
        per, stride, arrival = word(record, MATMUL_PER), word(record, MATMUL_STRIDE), word(record, MATMUL_ARRIVAL)
        start = given(record, MATMUL_GIVEN, step, word(record, MATMUL_ALL)) - word(record, MATMUL_BEFORE)
        start = min(max(start, 0), groups)
        total = max(1, (groups - start + chunk - 1) // chunk)
        pieces = 0
        piece = claim(record, step, lane, total)
        if piece >= 0:
            prepare(record, step, lane)
        while piece >= 0:
            first, last = start + piece * chunk, min(groups, start + (piece + 1) * chunk)
            if arrival != 0 and not await_position(arrival - 1 + (last - 1) // per, step, lane):
                return pieces
            for first_block in range(0, blocks, panel):
                count = min(panel, blocks - first_block)
                g = first
                while g < last:
                    extent = g // per
                    end = min(last, (extent + 1) * per)
                    w = word(record, MATMUL_WEIGHTS) + extent * stride + (g - extent * per) * group
                    w += first_block * block_bytes
                    wide = g + together <= end
                    for i in range(tiles):
                        x_at = x + i * x_tile + first_block * subs * x_sub
                        y_at = y + i * tile_tokens * y_row + g * VECTOR
                        if wide:
                            wide_tile(w, group, x_at, y_at, y_row, count, first_block)
                        else:
                            tile(w, group, x_at, y_at, y_row, count, first_block)
                    g += together if wide else 1
            if planes == 2:
                for i in range(n):
                    join_planes(y + i * y_row, y + 2 * i * y_row, y_row, first * VECTOR, last * VECTOR)
            pieces += 1
            piece = claim(record, step, lane, total)
        return finish(record, step, pieces, total)

    return run
