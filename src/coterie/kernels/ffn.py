"""The feed-forward network as neuron-cluster instructions (design sections 2 and 8).

Which clusters run, where their weights lie and whether they have arrived is data: a list of cluster ids, and a
table row a cluster with the address of its Gate and Up groups, of its Down column, and its arrival flag. A
dense model's list is full and nothing is waited for.
"""

from collections.abc import Callable
from typing import Any

from numba.extending import register_jitable

from coterie.kernels import formats
from coterie.kernels.compiler import kernel
from coterie.kernels.formats import ROWS
from coterie.kernels.mathematics import ACTIVATIONS
from coterie.kernels.operands import (
    DOWN_CHUNK,
    DOWN_GIVEN,
    DOWN_GROUPS,
    DOWN_KEEP,
    DOWN_LIST,
    DOWN_PANEL,
    DOWN_TABLE,
    DOWN_WITHOUT,
    DOWN_X,
    DOWN_X_SUBS,
    DOWN_Y,
    DOWN_Y_ROW,
    UP_BLOCKS,
    UP_CHUNK,
    UP_GIVEN,
    UP_LIST,
    UP_NEURONS,
    UP_OUT,
    UP_OUT_FLOAT,
    UP_OUT_SUBS,
    UP_PANEL,
    UP_SCRATCH,
    UP_SCRATCH_LANE,
    UP_TABLE,
    UP_UP_OFFSET,
    UP_X,
    UP_X_LANE,
    UP_X_SUBS,
)
from coterie.kernels.quantise import emit_block
from coterie.kernels.record import TAPE, TOKENS
from coterie.kernels.shapes import (
    CLUSTER_DOWN,
    CLUSTER_FLAG,
    CLUSTER_GATE_UP,
    CLUSTER_ROW,
    CLUSTER_WANTED,
    VECTOR,
)
from coterie.kernels.sync import await_weights, claim, finish, given, prepare, word
from coterie.kernels.tile import Tile, cluster_tile_op, tile_groups, tile_op, turning_tile_op
from coterie.kernels.vector import floats_at, i32_at, i64_at, mul, prefetch


@register_jitable
def arrived(entry, step, lane):
    """Wait until a cluster's weights are there; False if the step is abandoned meanwhile."""
    flag = i64_at(entry + CLUSTER_FLAG)
    if flag == 0:
        return True
    return await_weights(flag, word(step, TAPE) + i64_at(entry + CLUSTER_WANTED), step, lane)


@kernel
def ffn_up(gate_name: str, up_name: str, activation: str, tokens: str) -> Callable[..., Any]:
    """hidden = activation(Gate x) * activation(Up x), cluster by cluster, quantised as Down's input."""
    tile_tokens = int(tokens)
    together = tile_groups(tile_tokens)  # a cluster has an even number of groups
    gate_tile, up_tile = tile_op(gate_name, tile_tokens, together), tile_op(up_name, tile_tokens, together)
    last_tile = turning_tile_op(up_name, tile_tokens)  # Down's column comes next
    gate_format, up_format = formats.FORMATS[gate_name], formats.FORMATS[up_name]
    gate_block, up_block = gate_format.block, up_format.block
    if gate_format.subs != up_format.subs or gate_format.is_float != up_format.is_float:
        raise ValueError(f"Gate as {gate_name} with Up as {up_name}")
    x_sub = Tile(gate_format, tile_tokens).x_sub
    subs = gate_format.subs
    activate_gate, activate_up = ACTIVATIONS[activation]

    def run(record, step, lane):
        n = word(step, TOKENS)
        tiles = (n + tile_tokens - 1) // tile_tokens
        clusters, chunk = i32_at(word(record, UP_LIST)), word(record, UP_CHUNK)
        others = given(record, UP_GIVEN, step, clusters)
        ids = word(record, UP_LIST) + 4 + 4 * others
        clusters -= others
        groups, blocks = word(record, UP_NEURONS) // ROWS, word(record, UP_BLOCKS)
        panel = word(record, UP_PANEL) if tiles > 1 else blocks
        x = word(record, UP_X) + lane * word(record, UP_X_LANE)
        scratch = word(record, UP_SCRATCH) + lane * word(record, UP_SCRATCH_LANE)
        x_tile = word(record, UP_X_SUBS) * x_sub
        gates = scratch  # float32 [row][Gate groups, then Up groups][16]
        row_bytes = 2 * groups * VECTOR
        total = max(1, (clusters + chunk - 1) // chunk)
        pieces = 0
        piece = claim(record, step, lane, total)
        if piece >= 0:
            prepare(record, step, lane)
        while piece >= 0:
            for c in range(piece * chunk, min(clusters, (piece + 1) * chunk)):
                cluster = i32_at(ids + 4 * c)
                entry = word(record, UP_TABLE) + cluster * CLUSTER_ROW
                if not arrived(entry, step, lane):
                    return pieces
                w_gate = i64_at(entry + CLUSTER_GATE_UP)
                w_up = w_gate + word(record, UP_UP_OFFSET)
                after = i32_at(ids + 4 * min(c + 1, clusters - 1))
                following = i64_at(word(record, UP_TABLE) + after * CLUSTER_ROW + CLUSTER_GATE_UP)
                for first in range(0, blocks, panel):
                    count = min(panel, blocks - first)
                    for g in range(0, groups, together):
                        w = w_gate + (g * blocks + first) * gate_block
                        for i in range(tiles):
                            out = gates + i * tile_tokens * row_bytes + g * VECTOR
                            x_at = x + i * x_tile + first * subs * x_sub
                            gate_tile(w, blocks * gate_block, x_at, out, row_bytes, count, first)
                    for g in range(0, groups, together):
                        w = w_up + (g * blocks + first) * up_block
                        for i in range(tiles):
                            out = gates + i * tile_tokens * row_bytes + (groups + g) * VECTOR
                            x_at = x + i * x_tile + first * subs * x_sub
                            if g + together < groups:
                                up_tile(w, blocks * up_block, x_at, out, row_bytes, count, first)
                            else:
                                last_tile(w, blocks * up_block, x_at, out, row_bytes, count, first, following)
                pairs = groups // 2
                for row in range(n):
                    for p in range(pairs):
                        at = gates + row * row_bytes + p * 2 * VECTOR
                        up = at + groups * VECTOR
                        low = mul(activate_gate(floats_at(at)), activate_up(floats_at(up)))
                        high = mul(activate_gate(floats_at(at + VECTOR)), activate_up(floats_at(up + VECTOR)))
                        sub = cluster * pairs + p
                        emit_block(
                            low, high, word(record, UP_OUT), tile_tokens, row, sub,
                            word(record, UP_OUT_SUBS), word(record, UP_OUT_FLOAT) != 0,
                        )  # fmt: skip
            pieces += 1
            piece = claim(record, step, lane, total)
        return finish(record, step, pieces, total)

    return run


@kernel
def ffn_down(name: str, tokens: str) -> Callable[..., Any]:
    """y = Down hidden: a lane owns output rows and walks the clusters in ascending order.

    For one tile of tokens clusters are the outer loop and y holds the sums, so that memory is read in order;
    for more, sums stay in registers over a panel of clusters.
    """
    tile_tokens = int(tokens)
    together = tile_groups(tile_tokens)
    block_tile = tile_op(name, tile_tokens, ahead=False)
    cluster_tile = cluster_tile_op(name, tile_tokens)
    wide_tile = cluster_tile_op(name, tile_tokens, together)
    f = formats.FORMATS[name]
    block_bytes, x_block = f.block, Tile(f, tile_tokens).x_sub * f.subs
    x_sub = Tile(f, tile_tokens).x_sub

    def run(record, step, lane):
        n = word(step, TOKENS)
        tiles = (n + tile_tokens - 1) // tile_tokens
        table, clusters = word(record, DOWN_TABLE), i32_at(word(record, DOWN_LIST))
        others = given(record, DOWN_WITHOUT, step, clusters)
        ids = word(record, DOWN_LIST) + 4 + 4 * others
        clusters -= others
        groups, chunk = word(record, DOWN_GROUPS), word(record, DOWN_CHUNK)
        x, y, y_row = word(record, DOWN_X), word(record, DOWN_Y), word(record, DOWN_Y_ROW)
        panel, keep = word(record, DOWN_PANEL), word(record, DOWN_KEEP)
        start = given(record, DOWN_GIVEN, step, groups)
        total = max(1, (groups - start + chunk - 1) // chunk)
        pieces = 0
        piece = claim(record, step, lane, total)
        if piece >= 0:
            prepare(record, step, lane)
        while piece >= 0:
            first_group, last_group = start + piece * chunk, min(groups, start + (piece + 1) * chunk)
            if clusters == 0:
                for g in range(first_group, last_group):
                    for i in range(tiles):
                        block_tile(0, 0, 0, y + i * tile_tokens * y_row + g * VECTOR, y_row, 0, keep)
            elif tiles == 1:
                for c in range(clusters):
                    cluster = i32_at(ids + 4 * c)
                    w = i64_at(table + cluster * CLUSTER_ROW + CLUSTER_DOWN)
                    following = i32_at(ids + 4 * min(c + 1, clusters - 1))
                    ahead = i64_at(table + following * CLUSTER_ROW + CLUSTER_DOWN) - w
                    for g in range(first_group, last_group):
                        for line in range(0, block_bytes, 64):  # the next cluster's run starts elsewhere
                            prefetch(w + ahead + g * block_bytes + line)
                        block_tile(w + g * block_bytes, 0, x + cluster * x_block, y + g * VECTOR, y_row, 1, c + keep)
            else:
                for first in range(0, clusters, panel):
                    count = min(panel, clusters - first)
                    g = first_group
                    while g < last_group:
                        wide = g + together <= last_group
                        for i in range(tiles):
                            x_at = x + i * word(record, DOWN_X_SUBS) * x_sub
                            y_at = y + i * tile_tokens * y_row + g * VECTOR
                            at = ids + 4 * first
                            if wide:
                                wide_tile(table, at, count, g * block_bytes, x_at, y_at, y_row, first + keep)
                            else:
                                cluster_tile(table, at, count, g * block_bytes, x_at, y_at, y_row, first + keep)
                        g += together if wide else 1
            pieces += 1
            piece = claim(record, step, lane, total)
        return finish(record, step, pieces, total)

    return run
