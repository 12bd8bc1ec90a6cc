"""GPU kernels in OpenCL, in both shapes, against plain numpy. Where there is no GPU, PoCL runs them on the CPU."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_bench import EPOCH, GpuBench, close_to, in_extents, is_product, untouched
from reference import FORMATS, INTEGER_FORMATS, Bytes, Floats, floats_of, quantise, random_raw

from coterie.errors import UnitError
from coterie.kernels.formats import FORMATS as PACKED
from coterie.kernels.gpu.signatures import TOKENS
from coterie.models.llama import activated, rms_norm
from coterie.storage.arena import round_up
from coterie.storage.pack import pack
from coterie.storage.runs import ClusterLayout

ROWS = (1, 2, 7, 8, 9, 17)
ACTIVATIONS: tuple[Any, ...] = ("silu", "gelu", "relu", "relu2", "drelu")
SPAN = 256


@pytest.fixture(scope="module", params=[True, False], ids=["wide", "narrow"])
def device(request: pytest.FixtureRequest) -> Iterator[GpuBench]:
    try:
        made = GpuBench(wide=request.param)
    except UnitError as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
def bench(device: GpuBench) -> GpuBench:
    device.begin()
    return device


def rounded(x: Floats) -> Floats:
    """Rows rounded as the CPU unit rounds them, float32[n][columns], columns a multiple of 32."""
    values, scale = quantise(x)
    result: Floats = (values * scale[..., None]).astype(np.float32).reshape(x.shape)
    return result


def padded(x: Floats, width: int) -> Floats:
    return np.pad(x, ((0, 0), (0, width - x.shape[1])))


# --- matrices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_products_of_all_sizes(name: str, bench: GpuBench) -> None:
    rng = np.random.default_rng(1)
    f = PACKED[name]
    cases = [(16, 1, 1), (40, 3, 1), (48, 9, 2), (33, 2, 3), (16, 17, 2), (48, 5, 1)]
    for rows, (count, blocks, per) in zip(ROWS, cases, strict=True):
        columns = blocks * f.columns - (5 if f.is_float else 0)
        raw, x = random_raw(rng, name, count, columns), rng.standard_normal((rows, columns), np.float32)
        for t in (1, TOKENS):
            bench.begin()
            matrix = bench.matrix(name, raw, columns, per, 96)
            source, y = bench.rows(x), bench.room(rows + 9, matrix["groups"] * 16)
            values = {"x": source, "x_row": 4 * source.shape[1], "y": y, "y_row": 4 * y.shape[1]}
            bench.run(f"matmul:{name}:{t}", rows, select=0, **matrix, **values)
            got = bench.look(y)
            assert is_product(got[:rows, :count], x, floats_of(name, raw)), (rows, t)
            assert not got[:rows, count:].any()
            assert untouched(got[rows:])


def test_products_of_rows_that_want_logits(bench: GpuBench) -> None:
    rng = np.random.default_rng(2)
    raw, x = random_raw(rng, "Q4_0", 32, 64), rng.standard_normal((12, 64), np.float32)
    for t, outputs in ((1, 3), (TOKENS, 9), (TOKENS, 0)):
        bench.begin()
        matrix, source, y = bench.matrix("Q4_0", raw, 64, 1, 0), bench.rows(x), bench.room(12, 32)
        values = {"x": source, "x_row": 256, "y": y, "y_row": 128}
        bench.run(f"matmul:Q4_0:{t}", 12, outputs, select=1, **matrix, **values)
        assert is_product(bench.look(y)[:outputs], x[:outputs], floats_of("Q4_0", raw))
        assert untouched(bench.look(y)[outputs:])


@pytest.mark.parametrize("name", FORMATS)
def test_embedding(name: str, bench: GpuBench) -> None:
    rng = np.random.default_rng(3)
    vocab, columns = 75, 2 * PACKED[name].columns
    raw = random_raw(rng, name, vocab, columns)
    ids = np.array([74, 0, 17, -1, 16, 75, 31, 2**31 - 1, 48], np.int32)
    width = columns + 64
    matrix = bench.matrix(name, raw, columns, 2, 32)
    out = bench.room(len(ids) + 2, width)
    del matrix["groups"]
    listed = bench.put(ids)
    values = {"ids": listed, "vocab": vocab, "out": out, "out_row": 4 * width, "width": width, "scale": 1.7}
    bench.run(f"embed:{name}", len(ids), **matrix, **values)
    expected = np.zeros((len(ids), width))
    known = (ids >= 0) & (ids < vocab)
    expected[known, :columns] = floats_of(name, raw)[ids[known]].astype(np.float64) * np.float32(1.7)
    got = bench.look(out)
    assert close_to(got[: len(ids)], expected, 1e-6)
    assert not got[: len(ids)][expected == 0].any()
    assert untouched(got[len(ids) :])


# --- norms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [32, 100, 576, 4100])
@pytest.mark.parametrize("post", [False, True], ids=["plain", "post norm"])
@pytest.mark.parametrize("residual", [False, True], ids=["first", "residual"])
def test_norms(dim: int, post: bool, residual: bool, bench: GpuBench) -> None:
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((2, 9, dim), np.float32)
    weight, scales = rng.standard_normal((2, dim), np.float32)
    width, place = round_up(dim, 32) + 32, round_up(dim, 32)
    total = x + (rms_norm(y, scales, 1e-5) if post else y) if residual else x
    expected = padded(rms_norm(total, weight, 1e-5), width)
    vector = bench.rows(np.stack([weight, scales]), 0)
    second = bench.put(bench.look(vector)[1])
    for select in (0, 1):
        rows = np.array([7, 2, 5], np.int32) if select else np.arange(9)
        source, added = bench.rows(x), bench.rows(y)
        out, small = bench.room(11, width), bench.room(11, width)
        bench.run(
            "norm",
            9,
            3,
            select=select,
            outputs=bench.put(np.array([7, 2, 5], np.int32)),
            x=source,
            y=added if residual else None,
            x_out=source if residual else None,
            row=4 * place,
            post=second if post else None,
            weight=vector,
            dim=dim,
            eps=1e-5,
            out=out,
            rounded=small,
            out_row=4 * width,
            width=width,
        )
        got = bench.look(out)
        assert close_to(got[: len(rows)], expected[rows])
        assert not got[: len(rows), dim:].any()
        np.testing.assert_array_equal(bench.look(small)[: len(rows)], rounded(got[: len(rows)]))
        assert untouched(got[len(rows) :])
        assert untouched(bench.look(small)[len(rows) :])
        kept = np.setdiff1d(np.arange(9), rows)
        assert close_to(bench.look(source)[rows, :dim], total[rows])
        np.testing.assert_array_equal(bench.look(source)[kept, :dim], x[kept])


def test_a_norm_that_only_adds(bench: GpuBench) -> None:
    x, y = np.random.default_rng(5).standard_normal((2, 3, 64), np.float32)
    to = bench.room(5, 64)
    nothing = dict.fromkeys(("outputs", "post", "out", "rounded"))
    values = {"x": bench.rows(x), "y": bench.rows(y), "x_out": to, "row": 256, "weight": bench.put(x[0])}
    bench.run("norm", 3, select=0, dim=64, eps=1e-5, out_row=256, width=64, **values, **nothing)
    np.testing.assert_array_equal(bench.look(to)[:3], x + y)
    assert untouched(bench.look(to)[3:])


@pytest.mark.parametrize("size", [1e-42, 1e-3, 1.0, 1e30])
def test_rounding_is_the_cpu_units(size: float, bench: GpuBench) -> None:
    """Also of zeros, of halves between two values, and of magnitudes of all sizes."""
    x = np.random.default_rng(6).standard_normal((7, 96), np.float32)
    x[1, 32:64] = 0
    x[2, :32] = np.arange(32) * 0.5
    x[2, 31] = 127
    x *= np.float32(size)
    small, weight = bench.room(7, 96), bench.put(np.ones(96, np.float32))
    out = bench.room(7, 96)
    nothing = dict.fromkeys(("outputs", "post", "y", "x_out"))
    values = {"x": bench.rows(x), "row": 384, "weight": weight, "rounded": small}
    bench.run("norm", 7, select=0, dim=96, eps=1e-5, out=out, out_row=384, width=96, **values, **nothing)
    np.testing.assert_array_equal(bench.look(small), rounded(bench.look(out)))


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
    for rows in ROWS:
        t = 1 if rows <= 2 else TOKENS
        bench.begin()
        x = rng.standard_normal((rows, dim), np.float32) * np.float32(dim**-0.5)
        source, hidden = bench.rows(x), bench.room(rows + 3, layout.ffn_dim)
        common = {"weights": bench.put(in_extents(packed, per, gap)), "clusters": clusters, "neurons": layout.neurons}
        common |= {"bundle": layout.bundle, "per": per, "stride": per * layout.bundle + gap}
        common |= {"hidden": hidden, "hidden_row": 4 * layout.ffn_dim}
        ups = {"up": layout.gate_bytes, "blocks": -(-dim // gate.columns), "x": source, "x_row": 4 * source.shape[1]}
        kernel = f"ffn_up:{gate.name}:{up.name}:{activation}:{t}"
        bench.run(kernel, rows, rounded=0, **common, **ups)
        gates, ups_ = (x.astype(np.float64) @ floats_of(f.name, w).T for f, w in ((gate, w_gate), (up, w_up)))
        expected: Any = activated(activation, gates, ups_)  # type: ignore[arg-type]  # in double precision
        got = bench.look(hidden)
        assert close_to(got[:rows], expected, 1e-5), (rows, activation)
        assert untouched(got[rows:])
        exact = got[:rows].copy()
        bench.run(kernel, rows, rounded=1, **common, **ups)
        np.testing.assert_array_equal(bench.look(hidden)[:rows], rounded(exact))
        assert untouched(bench.look(hidden)[rows:])

        y = bench.room(rows + 3, layout.down_groups * 16)
        downs = {"down": layout.down_offset, "groups": layout.down_groups, "y": y, "y_row": 4 * y.shape[1]}
        bench.run(f"ffn_down:{down.name}:{t}", rows, **common, **downs)
        assert is_product(bench.look(y)[:rows, :dim], bench.look(hidden)[:rows], floats_of(down.name, w_down)), rows
        assert not bench.look(y)[:rows, dim:].any()
        assert untouched(bench.look(y)[rows:])


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

    def keys(self, sequence: int) -> Floats:
        """float32[kv heads][positions][dim] of the second layer."""
        k = self.bench.look(self.blocks)[self.places[sequence], 1, 0].astype(np.float32)
        k = k.reshape(len(k), self.kv_heads, SPAN // 16, self.dim, 16).transpose(1, 0, 2, 4, 3)
        keys: Floats = k.reshape(self.kv_heads, -1, self.dim)
        return keys

    def kept(self, sequence: int) -> Floats:
        """The same of the values."""
        v = self.bench.look(self.blocks)[self.places[sequence], 1, 1].astype(np.float32)
        v = v.reshape(len(v), self.kv_heads, SPAN, self.dim).transpose(1, 0, 2, 3)
        values: Floats = v.reshape(self.kv_heads, -1, self.dim)
        return values

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
    [(3, 1, 64, 0), (4, 2, 16, 0), (9, 3, 48, 300), (2, 2, 40, 1), (5, 1, 8, 17), (1, 1, 128, 256), (4, 4, 2, 0)],
)
def test_attention(heads: int, kv_heads: int, dim: int, window: int, bench: GpuBench) -> None:
    sequences = Sequences(bench, 3, 3, kv_heads, dim)
    n, width = len(PLACES), round_up(heads * dim, 32) + 32
    q = np.random.default_rng(9).standard_normal((n, heads, dim), np.float32) * np.float32(dim**-0.5)
    columns = (heads + 2 * kv_heads) * dim
    qkv = bench.room(n + 2, columns)
    bench.look(qkv)[:n, : heads * dim] = q.reshape(n, -1)
    expected = np.zeros((n, width))
    for i, (sequence, position) in enumerate(PLACES):
        first = max(0, position + 1 - window) if window else 0
        k, v = (
            part[:, first : position + 1].astype(np.float64)
            for part in (sequences.keys(sequence), sequences.kept(sequence))
        )
        for h in range(heads):
            scores = k[h * kv_heads // heads] @ q[i, h]
            p = np.exp(scores - scores.max())
            expected[i, h * dim : (h + 1) * dim] = p @ v[h * kv_heads // heads] / p.sum()
    out = bench.room(n + 2, width)
    values = {"qkv": qkv, "qkv_row": 4 * columns, "heads": heads, "window": window, "out": out, "out_row": 4 * width}
    values |= sequences.operands(PLACES)
    bench.run("attend", n, rounded=0, width=width, **values)
    exact = bench.look(out).copy()
    assert close_to(exact[:n], expected, 1e-5)
    assert not exact[:n, heads * dim :].any()
    assert untouched(exact[n:])
    bench.run("attend", n, rounded=1, width=width, **values)
    np.testing.assert_array_equal(bench.look(out)[:n], rounded(exact[:n]))
    assert untouched(bench.look(out)[n:])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "half", "norms"), [(3, 1, 64, 32, False), (4, 2, 48, 24, True), (2, 2, 20, 6, True)]
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
        part = rms_norm(part, weight, 1e-5) if norms else part.copy()
        angle = table[[position for _, position in PLACES]]
        cos, sin = angle[:, None, :half], angle[:, None, half:]
        a, b = part[..., :half].copy(), part[..., half : 2 * half].copy()
        part[..., :half], part[..., half : 2 * half] = a * cos - b * sin, a * sin + b * cos
        return part * np.float32(scale)

    queries = turned(x[:, :heads], weights[0], 0.3)
    got = bench.look(qkv)
    assert close_to(got[:n, : heads * dim], queries.reshape(n, -1))
    assert untouched(got[n:])
    keys = turned(x[:, heads : heads + kv_heads], weights[1], 1)
    after = bench.look(sequences.blocks)
    for i, (sequence, position) in enumerate(PLACES):
        assert close_to(sequences.keys(sequence)[:, position], keys[i], 1e-3)
        kept = np.clip(x[i, heads + kv_heads :], -65504, 65504).astype(np.float16)
        np.testing.assert_array_equal(sequences.kept(sequence)[:, position], kept.astype(np.float32))
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
