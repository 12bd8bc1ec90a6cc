"""GPU kernels in OpenCL, in all shapes, bit by bit against plain numpy. Where there is no GPU, PoCL runs them on the
CPU; a GPU that divides and takes roots otherwise than IEEE says fails here."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_bench import EPOCH, GpuBench, in_extents, untouched
from gpu_reference import SPAN, activated, attended, blocks_of, embedded, left_over, normed, rotated
from reference import FORMATS, INTEGER_FORMATS, Bytes, Floats, product, random_raw, same_bits

from coterie.actors import opencl_cache
from coterie.errors import UnitError
from coterie.kernels.formats import FORMATS as PACKED
from coterie.kernels.gpu.signatures import BLOCK, TOKENS
from coterie.kernels.gpu.source import source
from coterie.storage.arena import BufferRef, round_up
from coterie.storage.pack import pack
from coterie.storage.runs import ClusterLayout

ROWS = (1, 2, 7, 8, 9, 17)
ACTIVATIONS: tuple[Any, ...] = ("silu", "gelu", "relu", "relu2", "drelu")


in_floats_too = pytest.mark.parametrize("device", ["wide", "floats", "narrow"], indirect=True, scope="module")


@pytest.fixture(scope="module", params=["wide", "narrow"])
def device(request: pytest.FixtureRequest) -> Iterator[GpuBench]:
    """`floats`: the wide shape where there are no dot products of bytes."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "floats":
            patch.setattr(opencl_cache, "source", lambda *about: f"#undef __AVX512VNNI__\n{source(*about)}")
        try:
            made = GpuBench(wide=request.param != "narrow")
        except UnitError as error:
            pytest.skip(str(error))
        yield made
        made.close()


@pytest.fixture
def bench(device: GpuBench) -> GpuBench:
    device.begin()
    return device


def padded(x: Floats, width: int) -> Floats:
    return np.pad(x, ((0, 0), (0, width - x.shape[1])))


def written(bench: GpuBench, to: BufferRef, expected: Floats) -> bool:
    """Whether the first rows are these bits, and no row behind them was written."""
    got = bench.look(to)
    return same_bits(got[: len(expected)], expected) and untouched(got[len(expected) :])


def rounded(bench: GpuBench, to: BufferRef, rows: Floats) -> bool:
    """The same of rows that are rounded to blocks, where zeros may have any sign."""
    got = bench.look(to)
    return np.array_equal(got[: len(rows)], blocks_of(rows)) and untouched(got[len(rows) :])


# --- matrices ----------------------------------------------------------------------------------------


def operands(x: BufferRef, y: BufferRef, planes: int = 1) -> dict[str, Any]:
    return {"x": x, "x_row": 4 * x.shape[1], "planes": planes, "y": y, "y_row": 4 * y.shape[1]}


@in_floats_too
@pytest.mark.parametrize("name", FORMATS)
def test_products_of_all_sizes(name: str, bench: GpuBench) -> None:
    rng = np.random.default_rng(1)
    f = PACKED[name]
    cases = [(16, 1, 1), (40, 3, 1), (48, 9, 2), (33, 2, 3), (16, 17, 2), (48, 5, 1)]
    for rows, (count, blocks, per) in zip(ROWS, cases, strict=True):
        columns = blocks * f.columns - (5 if f.is_float else 0)
        raw, x = random_raw(rng, name, count, columns), rng.standard_normal((rows, columns), np.float32)
        expected = product(name, raw, x)
        for t in (1, TOKENS):
            bench.begin()
            matrix = bench.matrix(name, raw, columns, per, 96)
            y = bench.room(rows + 9, matrix["groups"] * 16)
            bench.run(f"matmul:{name}:{t}", rows, select=0, **matrix, **operands(bench.rows(x, name), y))
            assert written(bench, y, padded(expected, y.shape[1])), (rows, t)


@in_floats_too
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q6_K"])
def test_products_of_two_planes(name: str, bench: GpuBench) -> None:
    rng = np.random.default_rng(2)
    columns = 3 * PACKED[name].columns
    raw, x = random_raw(rng, name, 32, columns), rng.standard_normal((9, columns), np.float32)
    planes = np.stack([x, left_over(x)], axis=1).reshape(18, columns)
    expected = product(name, raw, x) + product(name, raw, left_over(x))
    for t in (1, TOKENS):
        bench.begin()
        matrix, source, y = bench.matrix(name, raw, columns, 2, 0), bench.rows(planes, name), bench.room(12, 32)
        bench.run(f"matmul:{name}:{t}", 9, select=0, **matrix, **operands(source, y, 2))
        assert written(bench, y, expected), t


def test_products_of_rows_that_want_logits(bench: GpuBench) -> None:
    rng = np.random.default_rng(2)
    raw, x = random_raw(rng, "Q4_0", 32, 64), rng.standard_normal((12, 64), np.float32)
    for t, outputs in ((1, 3), (TOKENS, 9), (TOKENS, 0)):
        bench.begin()
        matrix, y = bench.matrix("Q4_0", raw, 64, 1, 0), bench.room(12, 32)
        bench.run(f"matmul:Q4_0:{t}", 12, outputs, select=1, **matrix, **operands(bench.rows(x, "Q4_0"), y))
        assert written(bench, y, product("Q4_0", raw, x)[:outputs])


@pytest.mark.parametrize("name", FORMATS)
def test_embedding(name: str, bench: GpuBench) -> None:
    rng = np.random.default_rng(3)
    vocab, columns = 75, 2 * PACKED[name].columns
    raw = random_raw(rng, name, vocab, columns)
    ids = np.array([74, 0, 17, -1, 16, 75, 31, 2**31 - 1, 48], np.int32)
    width = round_up(columns, 32) + 64
    matrix = bench.matrix(name, raw, columns, 2, 32)
    out = bench.room(len(ids) + 2, width)
    del matrix["groups"]
    listed = bench.put(ids)
    values = {"ids": listed, "vocab": vocab, "out": out, "out_row": 4 * width, "width": width, "scale": 1.7}
    bench.run(f"embed:{name}", len(ids), **matrix, **values)
    expected = np.zeros((len(ids), width), np.float32)
    known = (ids >= 0) & (ids < vocab)
    expected[known, :columns] = embedded(name, raw, 1.7)[ids[known]]
    assert written(bench, out, expected)


# --- norms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [32, 100, 576, 4100])
@pytest.mark.parametrize("post", [False, True], ids=["plain", "post norm"])
@pytest.mark.parametrize("residual", [False, True], ids=["first", "residual"])
def test_norms(dim: int, post: bool, residual: bool, bench: GpuBench) -> None:
    """All rows, in place, and selected ones, as two planes, to somewhere else."""
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((2, 9, dim), np.float32)
    weight, scales = rng.standard_normal((2, dim), np.float32)
    width, place = round_up(dim, 32) + 32, round_up(dim, 32)
    total = x + (normed(y, scales, 1e-5) if post else y) if residual else x
    vectors = bench.rows(np.stack([weight, scales]), more=0)
    second = bench.put(bench.look(vectors)[1])
    for select, rows in ((0, np.arange(9)), (1, np.array([7, 2, 5]))):
        planes = 1 + select
        expected = padded(normed(total[rows], weight, 1e-5), width)
        source, added, sums = bench.rows(x), bench.rows(y), bench.room(11, place)
        out, small = bench.room(11, width), bench.room(22, width // 32 * BLOCK)
        values: dict[str, Any] = {
            "outputs": bench.put(np.array([7, 2, 5], np.int32)),
            "x": source,
            "x_out": sums if select else source,
        }
        values |= {"y": added if residual else None, "post": second if post else None, "weight": vectors, "out": out}
        values |= {"rounded": small, "out_row": 4 * width, "rounded_row": 4 * small.shape[1], "row": 4 * place}
        bench.run("norm", 9, 3, select=select, planes=planes, dim=dim, eps=1e-5, width=width, **values)
        assert written(bench, out, expected)
        halves = [expected, left_over(expected)][:planes]
        assert rounded(bench, small, np.stack(halves, axis=1).reshape(-1, width))
        if select:
            assert same_bits(bench.look(source)[:9, :dim], x)
            assert written(bench, sums, padded(total[rows], place)) if residual else untouched(bench.look(sums))
        else:
            assert written(bench, source, padded(total, place))


def test_a_norm_that_only_adds(bench: GpuBench) -> None:
    x, y = np.random.default_rng(5).standard_normal((2, 3, 64), np.float32)
    to = bench.room(5, 64)
    nothing = dict.fromkeys(("outputs", "post", "out", "rounded"))
    values = {"x": bench.rows(x), "y": bench.rows(y), "x_out": to, "row": 256, "weight": bench.put(x[0])}
    sizes = {"dim": 64, "out_row": 256, "rounded_row": 256, "planes": 1, "width": 64}
    bench.run("norm", 3, select=0, eps=1e-5, **sizes, **values, **nothing)
    assert written(bench, to, x + y)


@pytest.mark.parametrize("size", [1e-42, 1e-3, 1.0, 1e30])
def test_rounding_is_the_cpu_units(size: float, bench: GpuBench) -> None:
    """Also of zeros, of halves between two values, and of magnitudes of all sizes."""
    x = np.random.default_rng(6).standard_normal((7, 96), np.float32)
    x[1, 32:64] = 0
    x[2, :32] = np.arange(32) * 0.5
    x[2, 31] = 127
    weight = np.full(96, size, np.float32)
    out, small = bench.room(7, 96), bench.room(7, 3 * BLOCK)
    nothing = dict.fromkeys(("outputs", "post", "y", "x_out"))
    values = {"x": bench.rows(x), "row": 384, "weight": bench.put(weight), "out": out, "rounded": small}
    sizes = {"dim": 96, "out_row": 384, "rounded_row": 12 * BLOCK, "planes": 1, "width": 96}
    bench.run("norm", 7, select=0, eps=1e-5, **sizes, **values, **nothing)
    assert same_bits(bench.look(out), normed(x, weight, 1e-5))
    assert rounded(bench, small, bench.look(out))


# --- feed-forward networks ---------------------------------------------------------------------------


def bundles(layout: ClusterLayout, gate: Bytes, up: Bytes, down: Bytes) -> Bytes:
    """uint8[clusters][bundle] of raw rows of Gate and Up, and of raw blocks of Down, uint8[dim][clusters][bytes]."""
    out = np.full((layout.clusters, layout.bundle), 255, np.uint8)
    n, groups = layout.neurons, layout.neurons // 16

    def place(f: Any, raw: Bytes, groups: int, blocks: int, to: Bytes) -> None:
        packed = np.empty((groups, blocks, f.block), np.uint8)
        pack(f.name, raw, packed)
        to[: packed.size] = packed.ravel()

    for c, bundle in enumerate(out):
        for f, raw, at in ((layout.gate, gate, 0), (layout.up, up, layout.gate_bytes)):
            place(f, raw[c * n : (c + 1) * n], groups, -(-layout.dim // f.columns), bundle[at:])
        place(layout.down, down[:, c], layout.down_groups, 1, bundle[layout.down_offset :])
    return out


MIXTURES = [  # of Gate, Up and Down: every format is each of them once
    ("Q4_0", "Q8_0", "Q4_1"), ("Q8_0", "Q4_1", "Q5_0"), ("Q4_1", "Q5_0", "Q8_0"), ("Q5_0", "Q4_0", "Q4_K"),
    ("Q4_K", "Q6_K", "Q4_0"), ("Q6_K", "Q5_K", "F16"), ("Q5_K", "Q4_K", "Q6_K"),
    ("F16", "F32", "BF16"), ("BF16", "F16", "F32"), ("F32", "BF16", "Q5_K"),
]  # fmt: skip


@in_floats_too
@pytest.mark.parametrize("names", MIXTURES, ids="/".join)
def test_feed_forward_networks(names: tuple[str, str, str], bench: GpuBench) -> None:
    rng = np.random.default_rng(7)
    gate, up, down = (PACKED[name] for name in names)
    dim = 2 * gate.columns if gate.subs > 1 else 96 if not gate.is_float else 90
    clusters = 5
    layout = ClusterLayout(gate, up, down, dim, clusters * down.columns)
    w_gate, w_up = (random_raw(rng, f.name, layout.ffn_dim, dim) for f in (gate, up))
    w_down = random_raw(rng, down.name, dim, layout.ffn_dim)
    packed = bundles(layout, w_gate, w_up, w_down.reshape(dim, clusters, -1))
    per, gap = 2, 192
    activation = ACTIVATIONS[MIXTURES.index(names) % len(ACTIVATIONS)]
    rounds = not down.is_float
    for rows in ROWS:
        t = 1 if rows <= 2 else TOKENS
        bench.begin()
        x = rng.standard_normal((rows, dim), np.float32) * np.float32(dim**-0.5)
        source, width = bench.rows(x, gate.name), layout.ffn_dim // 32 * BLOCK
        hidden = bench.room(rows + 3, width)
        common = {"weights": bench.put(in_extents(packed, per, gap)), "clusters": clusters, "neurons": layout.neurons}
        common |= {"bundle": layout.bundle, "per": per, "stride": per * layout.bundle + gap}
        common |= {"hidden": hidden, "hidden_row": 4 * width}
        ups = {"up": layout.gate_bytes, "blocks": -(-dim // gate.columns), "x": source, "x_row": 4 * source.shape[1]}
        bench.run(f"ffn_up:{gate.name}:{up.name}:{activation}:{t}", rows, rounded=int(rounds), **common, **ups)
        expected = activated(activation, product(gate.name, w_gate, x), product(up.name, w_up, x))
        if rounds:
            assert rounded(bench, hidden, expected), (rows, activation)
        else:
            assert same_bits(bench.look(hidden)[:rows, : layout.ffn_dim], expected), (rows, activation)
            assert untouched(bench.look(hidden)[:, layout.ffn_dim :])
            assert untouched(bench.look(hidden)[rows:])

        y = bench.room(rows + 3, layout.down_groups * 16)
        downs = {"down": layout.down_offset, "groups": layout.down_groups, "y": y, "y_row": 4 * y.shape[1]}
        bench.run(f"ffn_down:{down.name}:{t}", rows, **common, **downs)
        assert written(bench, y, padded(product(down.name, w_down, expected), y.shape[1])), rows


# --- attention ---------------------------------------------------------------------------------------


class Sequences:
    """KV blocks of two layers, float16, of which the second is looked at; a block table a sequence."""

    def __init__(self, bench: GpuBench, count: int, blocks: int, kv_heads: int, dim: int) -> None:
        self.bench, self.kv_heads, self.dim = bench, kv_heads, dim
        self.values = kv_heads * SPAN * dim * 2
        self.layer = 2 * self.values
        rng = np.random.default_rng(8)
        places = rng.permutation(count * blocks).reshape(count, blocks)
        data = rng.standard_normal((count * blocks, 2, 2, kv_heads, SPAN * dim), np.float32).astype(np.float16)
        self.blocks = bench.put(data)
        self.places = places
        address = bench.address(self.blocks) + places * data[0].nbytes
        self.tables = [bench.put(row) for row in address.astype(np.int64)]

    def read(self, sequence: int) -> tuple[Floats, Floats]:
        """Keys and values of the second layer, each float32[kv heads][positions][dim]."""
        k, v = self.bench.look(self.blocks)[self.places[sequence], 1].astype(np.float32).swapaxes(0, 1)
        k = k.reshape(len(k), self.kv_heads, SPAN // 16, self.dim, 16).transpose(1, 0, 2, 4, 3)
        v = v.reshape(len(v), self.kv_heads, SPAN, self.dim).transpose(1, 0, 2, 3)
        return k.reshape(self.kv_heads, -1, self.dim), v.reshape(self.kv_heads, -1, self.dim)

    def operands(self, rows: list[tuple[int, int]]) -> dict[str, Any]:
        """Of rows (sequence, position)."""
        tables = [self.bench.address(self.tables[sequence]) for sequence, _ in rows]
        return {
            "positions": self.bench.put(np.array([p for _, p in rows], np.int32)),
            "tables": self.bench.put(np.array(tables, np.int64)),
            "layer": self.layer,
            "values": self.values,
            "kv_heads": self.kv_heads,
            "dim": self.dim,
        }


PLACES = [(0, 0), (1, 3), (2, 15), (0, 16), (1, 255), (2, 256), (0, 257), (1, 511), (2, 700)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"),
    [(3, 1, 64, 0), (4, 2, 16, 0), (9, 3, 48, 300), (2, 2, 80, 1), (5, 1, 16, 17), (1, 1, 256, 256), (1, 1, 512, 0)],
)
def test_attention(heads: int, kv_heads: int, dim: int, window: int, bench: GpuBench) -> None:
    sequences = Sequences(bench, 3, 3, kv_heads, dim)
    n, width = len(PLACES), round_up(heads * dim, 32) + 32
    q = np.random.default_rng(9).standard_normal((n, heads, dim), np.float32) * np.float32(dim**-0.5)
    columns = (heads + 2 * kv_heads) * dim
    qkv = bench.room(n + 2, columns)
    bench.look(qkv)[:n, : heads * dim] = q.reshape(n, -1)
    expected = np.zeros((n, width), np.float32)
    for i, (sequence, position) in enumerate(PLACES):
        keys, kept = (np.repeat(part, heads // kv_heads, axis=0) for part in sequences.read(sequence))
        expected[i, : heads * dim] = attended(q[i], keys, kept, position, window).ravel()
    values = {"qkv": qkv, "qkv_row": 4 * columns, "heads": heads, "window": window, "out_row": 4 * width}
    values |= {"width": width, "rounded_row": width // 8 * BLOCK} | sequences.operands(PLACES)
    for rounds in (False, True):
        out, small = bench.room(n + 2, width), bench.room(n + 2, width // 32 * BLOCK)
        bench.run("attend", n, rounded=small if rounds else None, out=out, **values)
        assert written(bench, out, expected)
        assert rounded(bench, small, expected) if rounds else untouched(bench.look(small))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "half", "norms"), [(3, 1, 64, 32, False), (4, 2, 48, 24, True), (2, 2, 80, 16, True)]
)
def test_rotation_and_what_the_cache_takes(
    heads: int, kv_heads: int, dim: int, half: int, norms: bool, bench: GpuBench
) -> None:
    rng = np.random.default_rng(10)
    sequences = Sequences(bench, 3, 3, kv_heads, dim)
    before = bench.look(sequences.blocks).copy()
    n, columns = len(PLACES), (heads + 2 * kv_heads) * dim
    x = rng.standard_normal((n, heads + 2 * kv_heads, dim), np.float32)
    x[0, -1, 0], x[1, -1, 1] = 1e6, -1e6  # values that no float16 holds
    qkv = bench.put(np.concatenate([x.reshape(n, -1), np.full((2, columns), np.nan, np.float32)]))
    angles = rng.uniform(-3, 3, (768, half))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    weights = rng.standard_normal((2, dim), np.float32)
    places = [bench.put(row) if norms else None for row in weights]
    values = {"qkv": qkv, "qkv_row": 4 * columns, "heads": heads, "half": half, "angles": bench.put(table)}
    values |= {"query_norm": places[0], "key_norm": places[1], "eps": 1e-5, "scale": 0.3} | sequences.operands(PLACES)
    bench.run("rope", n, **values)

    def turned(part: Floats, weight: Floats, scale: float) -> Floats:
        return rotated(normed(part, weight, 1e-5) if norms else part, table[[at for _, at in PLACES]], scale)

    def halves(part: Floats) -> Floats:
        return np.clip(part, -65504, 65504).astype(np.float16).astype(np.float32)

    got = bench.look(qkv)
    assert same_bits(got[:n, : heads * dim], turned(x[:, :heads], weights[0], 0.3).reshape(n, -1))
    assert untouched(got[n:])
    keys = turned(x[:, heads : heads + kv_heads], weights[1], 1)
    after = bench.look(sequences.blocks)
    for i, (sequence, position) in enumerate(PLACES):
        found = sequences.read(sequence)
        assert same_bits(found[0][:, position], halves(keys[i]))
        assert same_bits(found[1][:, position], halves(x[i, heads + kv_heads :]))
    changed = (after != before).reshape(len(after), 2, -1).sum(axis=-1)
    assert not changed[:, 0].any()  # the other layer
    assert changed.sum() <= n * 2 * kv_heads * dim


# --- the end of a step -------------------------------------------------------------------------------


def test_the_flag_takes_the_epoch(bench: GpuBench) -> None:
    flag = bench.put(np.zeros(8, np.int64))
    bench.run("post", 3, flag=flag)
    assert bench.look(flag).tolist() == [EPOCH] + [0] * 7


@pytest.mark.parametrize(
    "name", ["matmul:Q4_0:3", "matmul:Q9_9:1", "matmul", "norm:Q4_0", "ffn_up:F16:F16:tanh:1", "no"]
)
def test_a_kernel_that_there_is_not_is_named(name: str, bench: GpuBench) -> None:
    from coterie.kernels.gpu.source import source

    with pytest.raises(UnitError, match=f"no kernel '{name}'"):
        source([name], True)


def test_formats_are_all_there() -> None:
    assert set(PACKED) == set(FORMATS)
    assert set(INTEGER_FORMATS) < set(FORMATS)
