"""Rope, the KV cache and attention against plain softmax in double precision; prefill against decode, bit by bit."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from harness import Machine, machine
from reference import Doubles, Floats, same_bits

from coterie.kernels import operands as o
from coterie.kernels.library import kernel_name
from coterie.kernels.record import Opcode
from coterie.kernels.shapes import HEAD, QUERY_TOKENS, SPAN, attend_scratch
from coterie.models.rope import rope_table
from coterie.models.spec import Rope
from coterie.scheduler.program import Operand
from coterie.storage.arena import BufferRef, round_up
from coterie.storage.kv import KVLayout

CONTEXT = 640
CHUNK = 200  # rows of a prefill step, not a multiple of anything
EPS = 1e-5
LAYERS, LAYER = 2, 1


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    dim: int
    window: int = 0
    norms: bool = False
    rope_dims: int = 0  # 0: all of `dim`
    seed: int = field(default=0, compare=False)

    @property
    def rope(self) -> Rope:
        return Rope(10_000.0, self.rope_dims or self.dim)


CASES = [
    Case(2, 2, 64),
    Case(2, 1, 16, window=16, norms=True),
    Case(3, 1, 80, rope_dims=32),
    Case(4, 1, 128, window=100),
    Case(8, 1, 64),
    Case(6, 2, 64, window=257, norms=True),
    Case(4, 1, 256, window=512, norms=True),
]


class Bed:
    """A case's buffers and programs in a machine: `prefill` (rope, attend) and `decode` (attend_one, merge)."""

    def __init__(self, m: Machine, case: Case) -> None:
        self.m, self.case = m, case
        rng = np.random.default_rng(case.seed)
        self.width = round_up((case.heads + 2 * case.kv_heads) * case.dim, 32)
        self.out_width = round_up(case.heads * case.dim, 32)
        self.scale = case.dim**-0.5
        self.norms = [(1 + 0.1 * rng.standard_normal(case.dim)).astype(np.float32) for _ in range(2)]
        self.layout = KVLayout(LAYERS, case.kv_heads, case.dim)
        self.qkv = m.room((m.rows, self.width), np.float32)
        self.out, self.merged = (m.room((m.rows, self.out_width), np.float32) for _ in range(2))
        self.prefill, self.decode = self._programs()

    def _programs(self) -> tuple[str, str]:
        m, case = self.m, self.case
        lane = round_up(attend_scratch(case.heads // case.kv_heads, case.dim, QUERY_TOKENS), 64)
        scratch, spans = m.room(m.lanes * lane), CONTEXT // SPAN + 1
        state_row = case.heads * spans * (HEAD + 4 * case.dim)
        states = m.room(8 * state_row)
        rope = m.put(rope_table(case.rope, 0, CONTEXT))
        query_norm, key_norm = (m.put(norm) if case.norms else None for norm in self.norms)
        operands: dict[int, Operand] = {
            o.A_QKV: self.qkv,
            o.A_QKV_ROW: 4 * self.width,
            o.A_HEADS: case.heads,
            o.A_KV_HEADS: case.kv_heads,
            o.A_DIM: case.dim,
            o.A_WINDOW: case.window,
            o.A_LAYER: self.layout.layer(LAYER),
            o.A_VALUES: self.layout.values,
            o.A_ROPE: rope,
            o.A_HALF: case.rope.dims // 2,
            o.A_QUERY_NORM: query_norm,
            o.A_KEY_NORM: key_norm,
            o.A_EPS: EPS,
            o.A_SCALE: self.scale,
            o.A_OUT: self.out,
            o.A_OUT_ROW: 4 * self.out_width,
            o.A_SPANS: spans,
            o.A_SCRATCH: scratch,
            o.A_SCRATCH_LANE: lane,
        }
        prefill = m.builder()
        prefill.add(kernel_name("rope"), Opcode.ROPE, operands)
        prefill.add(kernel_name("attend"), Opcode.ATTEND, operands)
        decode = m.builder()
        decode.add(kernel_name("attend_one"), Opcode.ATTEND, operands | {o.A_OUT: states, o.A_OUT_ROW: state_row})
        merge: dict[int, Operand] = {
            o.MERGE_STATES: states,
            o.MERGE_STATES_ROW: state_row,
            o.MERGE_SPANS: spans,
            o.MERGE_HEADS: case.heads,
            o.MERGE_DIM: case.dim,
            o.MERGE_WINDOW: case.window,
            o.MERGE_ROWS: self.merged,
            o.MERGE_ROWS_ROW: 4 * self.out_width,
            o.MERGE_SUBS: self.out_width // 32,
            o.MERGE_TILE: 1,
            o.MERGE_SCRATCH: scratch,
            o.MERGE_SCRATCH_LANE: lane,
        }
        decode.add(kernel_name("merge"), Opcode.MERGE, merge)
        return m.load(prefill), m.load(decode)

    def random_rows(self, n: int, seed: int, size: float = 1.0) -> Floats:
        """Queries, keys and values side by side, float32[n, width]."""
        rng = np.random.default_rng(seed)
        return np.float32(size) * rng.standard_normal((n, self.width), np.float32)

    def sequence(self) -> "Cache":
        return Cache(self)

    def run(self, name: str, rows: Floats, positions: list[int], caches: "list[Cache]") -> Floats:
        """One step; the attended rows float32[n, heads * dim]."""
        self.m.look(self.qkv)[: len(rows)] = rows
        tables = [self.m.arena.address(cache.table) for cache in caches]
        self.m.step(name, len(rows), positions=positions, tables=tables)
        out = self.m.look(self.out if name == self.prefill else self.merged)
        return np.array(out[: len(rows), : self.case.heads * self.case.dim])

    def whole(self, rows: Floats, cache: "Cache", chunk: int = CHUNK) -> Floats:
        """All rows by prefill steps of `chunk` rows."""
        parts = []
        for first in range(0, len(rows), chunk):
            part = rows[first : first + chunk]
            positions = list(range(first, first + len(part)))
            parts.append(self.run(self.prefill, part, positions, [cache] * len(part)))
        return np.concatenate(parts)

    # --- the same in doubles -------------------------------------------------------------------------

    def rotated(self, rows: Floats, first: int, heads: int, norm: int, scale: float) -> Doubles:
        """Queries or keys [n, heads, dim] from column `first` on: normed, rotated, scaled."""
        case, half = self.case, self.case.rope.dims // 2
        x = rows[:, first : first + heads * case.dim].reshape(len(rows), heads, case.dim).astype(np.float64)
        if case.norms:
            x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPS) * self.norms[norm]
        angles = np.arange(len(rows))[:, None] * 10_000.0 ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        low, high = x[..., :half].copy(), x[..., half : 2 * half].copy()
        x[..., :half], x[..., half : 2 * half] = low * cos - high * sin, low * sin + high * cos
        return x * scale

    def exact(self, rows: Floats, keys: Doubles, values: Doubles) -> Doubles:
        """Softmax attention of all rows over keys and values [n, kv heads, dim]."""
        case, n = self.case, len(rows)
        queries = self.rotated(rows, 0, case.heads, 0, self.scale)
        at = np.arange(n)
        hidden = at[None, :] > at[:, None]
        if case.window:
            hidden |= at[None, :] <= at[:, None] - case.window
        out = np.empty((n, case.heads, case.dim))
        for head in range(case.heads):
            kv = head // (case.heads // case.kv_heads)
            scores = np.where(hidden, -np.inf, queries[:, head] @ keys[:, kv].T)
            chances = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = chances @ values[:, kv] / chances.sum(-1, keepdims=True)
        return out.reshape(n, -1)


class Cache:
    """One sequence's KV blocks, in no order, and its table."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        spans = CONTEXT // SPAN + 1
        blocks = [bed.m.room(bed.layout.block, region="kv") for _ in range(spans)]
        self.blocks = blocks[::-1]
        self.table: BufferRef = bed.m.put(np.array([bed.m.arena.address(block) for block in self.blocks]))

    def read(self, n: int) -> tuple[Any, Any]:
        """Keys and values float16[n, kv heads, dim] of the layer under test."""
        layout, parts = self.bed.layout, ([], [])  # type: tuple[KVLayout, tuple[list[Any], list[Any]]]
        for block in self.blocks:
            start = layout.layer(LAYER)
            area = self.bed.m.look(block)[start : start + 2 * layout.values].view(np.float16)
            keys, values = area.reshape(2, layout.kv_heads, SPAN, layout.dim)
            tiles = keys.reshape(layout.kv_heads, SPAN // 16, layout.dim, 16).transpose(1, 3, 0, 2)
            parts[0].append(tiles.reshape(SPAN, layout.kv_heads, layout.dim))
            parts[1].append(values.swapaxes(0, 1))
        return np.concatenate(parts[0])[:n], np.concatenate(parts[1])[:n]


@pytest.fixture(scope="module", params=CASES, ids=str)
def bed(request: pytest.FixtureRequest) -> Any:
    with machine(2, rows=CHUNK, size=128 << 20) as m:
        yield Bed(m, request.param)


def test_keys_and_values_are_stored_as_rounded_floats(bed: Bed) -> None:
    case, rows = bed.case, bed.random_rows(300, 1)
    cache = bed.sequence()
    bed.whole(rows, cache)
    keys, values = cache.read(300)
    first = (case.heads + case.kv_heads) * case.dim
    raw_values = rows[:, first : first + case.kv_heads * case.dim].reshape(300, case.kv_heads, case.dim)
    assert same_bits(np.array(values), raw_values.astype(np.float16))
    exact = bed.rotated(rows, case.heads * case.dim, case.kv_heads, 1, 1.0)
    np.testing.assert_allclose(keys.astype(np.float64), exact, rtol=2.0**-11 + 1e-6, atol=2e-6)
    other = bed.m.look(cache.blocks[0])[: bed.layout.layer(LAYER)]
    assert not other.any()  # the other layer's part is untouched


def test_every_length_from_1_to_600(bed: Bed) -> None:
    rows, cache = bed.random_rows(600, 2), bed.sequence()
    got = bed.whole(rows, cache)
    keys, values = cache.read(600)
    exact = bed.exact(rows, keys.astype(np.float64), values.astype(np.float64))
    assert np.abs(got - exact).max() < 5e-6 * np.abs(exact).max()


def test_sharp_attention_and_values_beyond_float16(bed: Bed) -> None:
    """Scores of thousands leave one position; values are clamped to float16's range."""
    rows, cache = bed.random_rows(300, 3, size=30.0), bed.sequence()
    first = (bed.case.heads + bed.case.kv_heads) * bed.case.dim
    rows[:, first::7] = 1e6
    rows[:, first + 1 :: 7] = -np.inf
    got = bed.whole(rows, cache)
    keys, values = cache.read(300)
    assert np.abs(values.astype(np.float64)).max() == 65504
    exact = bed.exact(rows, keys.astype(np.float64), values.astype(np.float64))
    assert np.abs(got - exact).max() < 1e-3 * np.abs(exact).max()  # scores of 1e4 carry 1e-3 of error


def test_chunks_do_not_change_bits(bed: Bed) -> None:
    rows = bed.random_rows(330, 4)
    whole = bed.whole(rows, bed.sequence())
    for chunk in (1, 7, 61, 64):
        n = 70 if chunk == 1 else 330
        assert same_bits(bed.whole(rows[:n], bed.sequence(), chunk), whole[:n])


def test_decode_equals_prefill_bit_by_bit(bed: Bed) -> None:
    rows, cache = bed.random_rows(600, 5), bed.sequence()
    whole = bed.whole(rows, cache)
    for position in (0, 1, 14, 15, 16, 62, 63, 64, 65, 99, 100, 101, 127, 255, 256, 257, 319, 511, 512, 513, 599):
        one = bed.run(bed.decode, rows[position : position + 1], [position], [cache])
        assert same_bits(one, whole[position : position + 1]), position


def test_rows_of_a_batch_do_not_see_each_other(bed: Bed) -> None:
    positions = [0, 5, 63, 64, 255, 256, 300, 520]
    caches, rows, expected = [], [], []
    for i, position in enumerate(positions):
        mine, cache = bed.random_rows(position + 1, 10 + i), bed.sequence()
        expected.append(bed.whole(mine, cache)[-1])
        caches.append(cache)
        rows.append(mine[-1])
    for order in (range(8), [7, 0, 6, 1, 5], [3, 2]):
        got = bed.run(
            bed.decode, np.array([rows[i] for i in order]), [positions[i] for i in order], [caches[i] for i in order]
        )
        assert same_bits(got, np.array([expected[i] for i in order]))


@pytest.mark.parametrize("lanes", [1, 3])
def test_lanes_do_not_change_bits(lanes: int) -> None:
    results = []
    for count in (2, lanes):
        with machine(count, rows=CHUNK, size=128 << 20) as m:
            bed = Bed(m, Case(6, 2, 64, window=100, norms=True))
            rows, cache = bed.random_rows(330, 6), bed.sequence()
            whole = bed.whole(rows, cache)
            last = bed.run(bed.decode, rows[329:], [329], [cache])
            results.append(np.concatenate([whole, last]))
    assert same_bits(*results)
