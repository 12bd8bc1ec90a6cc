"""Attention over a paged float16 KV cache, with online softmax over tiles fixed by position.

A KV block holds SPAN positions of every layer: keys as [kv head][16 positions][dim][16], so that a lane is a
position and a score's sum never crosses lanes; values as [kv head][position][dim]. A query's softmax state is
(maximum, sum, weighted values), computed for each span from nothing, tile by tile of 64 positions, and merged
over spans in ascending order. Spans and tiles are cut by absolute position, so the bits depend neither on the
chunk nor on the lanes. Query rows are taken four at a time; rows of one key/value head share its loads.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

from coterie.kernels.compiler import kernel
from coterie.kernels.formats import COLUMNS
from coterie.kernels.operands import (
    A_DIM,
    A_EPS,
    A_HALF,
    A_HEADS,
    A_KEY_NORM,
    A_KV_HEADS,
    A_LAYER,
    A_OUT,
    A_OUT_ROW,
    A_QKV,
    A_QKV_ROW,
    A_QUERY_NORM,
    A_ROPE,
    A_SCALE,
    A_SCRATCH,
    A_SCRATCH_LANE,
    A_SPANS,
    A_VALUES,
    A_WINDOW,
    MERGE_DIM,
    MERGE_FLOAT_LANE,
    MERGE_FLOAT_OUT,
    MERGE_HEADS,
    MERGE_OUT,
    MERGE_OUT_LANE,
    MERGE_ROWS,
    MERGE_ROWS_LANE,
    MERGE_ROWS_ROW,
    MERGE_SCRATCH,
    MERGE_SCRATCH_LANE,
    MERGE_SPANS,
    MERGE_STATES,
    MERGE_STATES_ROW,
    MERGE_SUBS,
    MERGE_TILE,
    MERGE_TILE_SUBS,
    MERGE_WINDOW,
)
from coterie.kernels.quantise import emit_block
from coterie.kernels.record import CLAIM, LANES_COUNT, LAST, POSITIONS, TABLES, TOKENS
from coterie.kernels.rows import bits_to_float
from coterie.kernels.shapes import HEAD, QUERY_ROWS, QUERY_TOKENS, SPAN, TILE
from coterie.kernels.softmax import attend_span, clear_state, merge_state, rope_head, store_kv
from coterie.kernels.sync import claim, finish, word
from coterie.kernels.vector import (
    div,
    f32_at,
    floats,
    floats_at,
    i32_at,
    i64_at,
    set_floats,
    set_i32,
)

RUN_SPANS = 4  # spans of a piece of decode, where there are many


@register_jitable
def first_visible(position, window):
    """The first position that a query at `position` attends to."""
    return max(np.int64(0), position + 1 - window) if window > 0 else np.int64(0)


@kernel
def rope() -> Callable[..., Any]:
    """Prefill: rotate queries in place, and put rotated keys and values into the KV cache. A piece is a row."""

    def run(record, step, lane):
        n = word(step, TOKENS)
        heads, kv_heads, dim, half = (
            word(record, A_HEADS),
            word(record, A_KV_HEADS),
            word(record, A_DIM),
            word(record, A_HALF),
        )
        eps = bits_to_float(word(record, A_EPS))
        pieces = 0
        row = claim(record, step, lane, n)
        while row >= 0:
            position = np.int64(i32_at(word(step, POSITIONS) + 4 * row))
            table = word(record, A_ROPE) + position * half * 8
            q = word(record, A_QKV) + row * word(record, A_QKV_ROW)
            k = q + heads * dim * 4
            v = k + kv_heads * dim * 4
            for h in range(heads):
                at = q + h * dim * 4
                rope_head(
                    at, at, dim, half, table, word(record, A_QUERY_NORM), eps,
                    bits_to_float(word(record, A_SCALE)),
                )  # fmt: skip
            blocks = i64_at(word(step, TABLES) + 8 * row)
            block = i64_at(blocks + 8 * (position // SPAN)) + word(record, A_LAYER)
            for h in range(kv_heads):
                at = k + h * dim * 4
                rope_head(at, at, dim, half, table, word(record, A_KEY_NORM), eps, np.float32(1))
                keys = block + h * SPAN * dim * 2
                store_kv(at, v + h * dim * 4, keys, keys + word(record, A_VALUES), position % SPAN, dim)
            pieces += 1
            row = claim(record, step, lane, n)
        return finish(record, step, pieces, n)

    return run


@kernel
def attend() -> Callable[..., Any]:
    """Prefill: a piece is eight rows of one sequence and a key/value head."""

    def run(record, step, lane):
        n = word(step, TOKENS)
        heads, kv_heads, dim = word(record, A_HEADS), word(record, A_KV_HEADS), word(record, A_DIM)
        share, window = heads // kv_heads, word(record, A_WINDOW)
        stride = HEAD + 4 * dim
        capacity = (QUERY_TOKENS * share + QUERY_ROWS - 1) // QUERY_ROWS * QUERY_ROWS
        q = word(record, A_SCRATCH) + lane * word(record, A_SCRATCH_LANE)
        state = q + capacity * 4 * dim
        running = state + capacity * stride
        weights = running + capacity * stride
        bounds = weights + capacity * 4 * TILE
        tiles = (n + QUERY_TOKENS - 1) // QUERY_TOKENS
        pieces = 0
        piece = claim(record, step, lane, tiles * kv_heads)
        while piece >= 0:
            first, h = piece // kv_heads * QUERY_TOKENS, piece % kv_heads
            count = min(QUERY_TOKENS, n - first)
            rows = (count * share + QUERY_ROWS - 1) // QUERY_ROWS * QUERY_ROWS
            low = high = np.int64(0)
            for r in range(rows):
                t = first + min(r // share, count - 1)  # rows of padding repeat the last token
                position = np.int64(i32_at(word(step, POSITIONS) + 4 * t))
                low = first_visible(position, window) if r == 0 else low
                high = position + 1
                set_i32(bounds + 8 * r, np.int32(first_visible(position, window)))
                set_i32(bounds + 8 * r + 4, np.int32(high))
                source = word(record, A_QKV) + t * word(record, A_QKV_ROW) + (h * share + r % share) * dim * 4
                for c in range(0, 4 * dim, 64):
                    set_floats(q + r * 4 * dim + c, floats_at(source + c))
                clear_state(running + r * stride, dim)
            blocks = i64_at(word(step, TABLES) + 8 * first)
            for span in range(low // SPAN, (high - 1) // SPAN + 1):
                keys = i64_at(blocks + 8 * span) + word(record, A_LAYER) + h * SPAN * dim * 2
                values = keys + word(record, A_VALUES)
                attend_span(q, rows, bounds, keys, values, dim, span * SPAN, state, weights, keys, values)
                for r in range(rows):
                    if i32_at(bounds + 8 * r) < (span + 1) * SPAN and i32_at(bounds + 8 * r + 4) > span * SPAN:
                        merge_state(running + r * stride, state + r * stride, dim)
            for r in range(count * share):
                out = word(record, A_OUT) + (first + r // share) * word(record, A_OUT_ROW)
                out += (h * share + r % share) * dim * 4
                divisor = floats(f32_at(running + r * stride + 4))
                for c in range(0, 4 * dim, 64):
                    set_floats(out + c, div(floats_at(running + r * stride + HEAD + c), divisor))
            pieces += 1
            piece = claim(record, step, lane, tiles * kv_heads)
        return finish(record, step, pieces, tiles * kv_heads)

    return run


@kernel
def attend_one() -> Callable[..., Any]:
    """Decode: rows are last tokens of different sequences; a piece is a row, a key/value head and a run of spans.

    Queries are rotated where they are used; the piece of the last span stores the new key and value. Leaves
    softmax states for `merge`.
    """

    def run(record, step, lane):
        n = word(step, TOKENS)
        heads, kv_heads, dim = word(record, A_HEADS), word(record, A_KV_HEADS), word(record, A_DIM)
        share, window, half = heads // kv_heads, word(record, A_WINDOW), word(record, A_HALF)
        eps = bits_to_float(word(record, A_EPS))
        stride = HEAD + 4 * dim
        rows = (share + QUERY_ROWS - 1) // QUERY_ROWS * QUERY_ROWS
        q = word(record, A_SCRATCH) + lane * word(record, A_SCRATCH_LANE)
        state = q + rows * 4 * dim
        weights = state + 2 * rows * stride
        bounds = weights + rows * 4 * TILE
        key = bounds + rows * 8
        spans = word(step, LAST) // SPAN + 1  # a row that has fewer leaves pieces with nothing to do
        if window > 0:
            spans = min(spans, (window + SPAN - 2) // SPAN + 1)
        run_spans = min(RUN_SPANS, max(1, spans // (2 * word(step, LANES_COUNT))))
        runs = (spans + run_spans - 1) // run_spans
        pieces, amount = 0, n * kv_heads * runs
        piece = claim(record, step, lane, amount)
        while piece >= 0:
            first, h, row = piece % runs * run_spans, piece // runs % kv_heads, piece // (runs * kv_heads)
            position = np.int64(i32_at(word(step, POSITIONS) + 4 * row))
            low = first_visible(position, window)
            last = min(first + run_spans, position // SPAN - low // SPAN + 1)
            if first < last:
                table = word(record, A_ROPE) + position * half * 8
                source = word(record, A_QKV) + row * word(record, A_QKV_ROW)
                for r in range(rows):
                    at = source + (h * share + min(r, share - 1)) * dim * 4
                    rope_head(
                        at, q + r * 4 * dim, dim, half, table, word(record, A_QUERY_NORM), eps,
                        bits_to_float(word(record, A_SCALE)),
                    )  # fmt: skip
                    set_i32(bounds + 8 * r, np.int32(low))
                    set_i32(bounds + 8 * r + 4, np.int32(position + 1))
            blocks = i64_at(word(step, TABLES) + 8 * row) + 8 * (low // SPAN)
            part = word(record, A_LAYER) + h * SPAN * dim * 2
            for span in range(first, last):
                keys = i64_at(blocks + 8 * span) + part
                values = keys + word(record, A_VALUES)
                start = (low // SPAN + span) * SPAN
                if position < start + SPAN:
                    k = source + (heads + h) * dim * 4
                    rope_head(k, key, dim, half, table, word(record, A_KEY_NORM), eps, np.float32(1))
                    store_kv(key, k + kv_heads * dim * 4, keys, values, position % SPAN, dim)
                next_keys = i64_at(blocks + 8 * (span + 1)) + part if position >= start + SPAN else keys
                next_values = next_keys + word(record, A_VALUES)
                attend_span(q, rows, bounds, keys, values, dim, start, state, weights, next_keys, next_values)
                out = word(record, A_OUT) + row * word(record, A_OUT_ROW)
                for r in range(share):
                    to = out + ((h * share + r) * word(record, A_SPANS) + span) * stride
                    for c in range(0, stride, 64):
                        set_floats(to + c, floats_at(state + r * stride + c))
            pieces += 1
            piece = claim(record, step, lane, amount)
        return finish(record, step, pieces, amount)

    return run


@kernel
def merge() -> Callable[..., Any]:
    """Merge the spans' softmax states, and prepare the output projection's input as tiles."""

    def run(record, step, lane):
        n = word(step, TOKENS)
        shared = word(record, CLAIM) != 0
        states, dim, heads = word(record, MERGE_STATES), word(record, MERGE_DIM), word(record, MERGE_HEADS)
        stride = HEAD + 4 * dim
        subs, tile_subs = word(record, MERGE_SUBS), word(record, MERGE_TILE_SUBS)
        state = word(record, MERGE_SCRATCH) + lane * word(record, MERGE_SCRATCH_LANE)
        pieces = 0
        row = claim(record, step, lane, n) if shared else 0
        while 0 <= row < n:
            x = word(record, MERGE_ROWS) + lane * word(record, MERGE_ROWS_LANE) + row * word(record, MERGE_ROWS_ROW)
            if states != 0:
                position = np.int64(i32_at(word(step, POSITIONS) + 4 * row))
                spans = position // SPAN - first_visible(position, word(record, MERGE_WINDOW)) // SPAN + 1
                for h in range(heads):
                    at = states + row * word(record, MERGE_STATES_ROW) + h * word(record, MERGE_SPANS) * stride
                    clear_state(state, dim)
                    for s in range(spans):
                        merge_state(state, at + s * stride, dim)
                    divisor = floats(f32_at(state + 4))
                    for c in range(0, 4 * dim, 64):
                        set_floats(x + h * dim * 4 + c, div(floats_at(state + HEAD + c), divisor))
            for sub in range(subs):
                low, high = floats_at(x + sub * 4 * COLUMNS), floats_at(x + sub * 4 * COLUMNS + 64)
                if word(record, MERGE_OUT) != 0:
                    out = word(record, MERGE_OUT) + lane * word(record, MERGE_OUT_LANE)
                    emit_block(low, high, out, word(record, MERGE_TILE), row, sub, tile_subs, False)
                if word(record, MERGE_FLOAT_OUT) != 0:
                    out = word(record, MERGE_FLOAT_OUT) + lane * word(record, MERGE_FLOAT_LANE)
                    emit_block(low, high, out, word(record, MERGE_TILE), row, sub, tile_subs, True)
            pieces += 1
            row = claim(record, step, lane, n) if shared else row + 1
        return finish(record, step, pieces, n) if shared else pieces

    return run
