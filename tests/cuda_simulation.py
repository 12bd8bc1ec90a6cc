"""CUDA kernels against numpy: in numba's simulator, run by test_cuda.py with NUMBA_ENABLE_CUDASIM=1, or on a device,
run by benchmarks/cuda_check.py.

python cuda_simulation.py CASE...        a case is a function below and its arguments, as matmul:Q4_0:1
"""

import math
import sys
from typing import Any

import numpy as np
import pytest
from cuda_bench import Array, Bench, Simulator, Value
from reference import FLOAT_FORMATS, floats_of, nmse, quantise, random_raw

from coterie.errors import UnitError
from coterie.kernels.formats import FORMATS
from coterie.storage.arena import round_up

EPS = 1e-5


def rounded(x: Array) -> Array:
    """float32[n, columns] as it comes back from int8."""
    q, scale = quantise(np.ascontiguousarray(x))
    return (q.astype(np.float32) * scale[..., None]).reshape(x.shape)


def blocks(x: Array) -> Array:
    """float32[n, blocks * 34]: rows as matrices of integer weights read them."""
    q, scale = quantise(np.ascontiguousarray(x))
    whole = q.astype(np.float32)
    return np.concatenate([whole, scale[..., None], whole.sum(-1, keepdims=True)], axis=-1).reshape(len(x), -1)


def planes(x: Array) -> Array:
    """float32[2 n, blocks * 34]: each row, and what rounding left of it."""
    both = np.stack([blocks(x), blocks(x - rounded(x))], axis=1)
    return both.reshape(2 * len(x), -1)


def assert_rounded(got: Array, exact: Array) -> None:
    """Blocks of 34; values may have been rounded the other way where they were almost between two steps."""
    parts, expected = got.reshape(len(got), -1, 34), blocks(exact).reshape(len(exact), -1, 34)
    np.testing.assert_array_equal(parts[..., 33], parts[..., :32].sum(-1))
    np.testing.assert_allclose(parts[..., 32], expected[..., 32], rtol=3e-3, atol=1e-30)
    steps = np.abs(parts[..., :32] - expected[..., :32])
    assert steps.max() <= 1
    assert (steps > 0).mean() < 0.02


def assert_product(name: str, x: Array, weights: Array, got: Array, count: int = 1) -> None:
    """One plane is exact but for float rounding, two have 15 bits."""
    x = x if name in FLOAT_FORMATS or count == 2 else rounded(x)
    expected = x.astype(np.float64) @ weights.astype(np.float64).T
    assert nmse(got, expected) < (1e-12 if count == 1 else 1e-8), nmse(got, expected)


def fed(name: str, x: Array, count: int) -> Array:
    """Rows as a matrix of that format reads them, in one plane or two."""
    if name in FLOAT_FORMATS:
        return x
    return planes(x) if count == 2 else blocks(x)


def matmul(name: str, tokens: str) -> None:
    """21 rows in extents of one group; one row in two planes, or three rows of a tile of eight in one."""
    rng, t, count = np.random.default_rng(1), int(tokens), 21
    columns, n = 2 * FORMATS[name].columns, 1 if tokens == "1" else 3
    raw, x = random_raw(rng, name, count, columns), rng.standard_normal((n, columns), np.float32)
    count_of = 2 if t == 1 and name not in FLOAT_FORMATS else 1
    rows = fed(name, x, count_of)
    with Bench() as m:
        _, layout = m.pack(name, raw, columns, per=1)
        y = m.room(n, 32)
        m.run(
            f"matmul:{name}:{t}",
            layout
            | {"select": 0, "groups": 2, "x": m.put(rows), "x_row": 4 * rows.shape[1], "planes": count_of}
            | {"y": y, "y_row": 4 * 32},
            n,
        )
        assert_product(name, x, floats_of(name, raw), m.look(y)[:, :count], count_of)


def tiles() -> None:
    """More rows than a tile has, of which only those that want logits count, and more columns than a chunk has."""
    rng, columns = np.random.default_rng(2), 33 * 32
    raw, x = random_raw(rng, "Q4_1", 20, columns), rng.standard_normal((9, columns), np.float32)
    with Bench() as m:
        _, layout = m.pack("Q4_1", raw, columns, per=1)
        y = m.room(10, 32)
        where: dict[str, Value] = {
            "groups": 2,
            "x": m.put(planes(x)),
            "x_row": 33 * 136,
            "planes": 2,
            "y": y,
            "y_row": 4 * 32,
        }
        m.run("matmul:Q4_1:8", layout | where | {"select": 1}, 12, range(9))
        assert_product("Q4_1", x, floats_of("Q4_1", raw), m.look(y)[:9, :20], 2)
        assert np.isnan(m.look(y)[9]).all()


def narrow() -> None:
    """Rows of 40 columns, filled up to 64: a K-quant's block has 256, of which 192 are not there."""
    rng = np.random.default_rng(3)
    raw, x = random_raw(rng, "Q4_K", 16, 256), np.zeros((1, 64), np.float32)
    x[0, :40] = rng.standard_normal(40)
    with Bench() as m:
        _, layout = m.pack("Q4_K", raw, 256, per=1)
        y = m.room(1, 16)
        where: dict[str, Value] = {
            "groups": 1,
            "x": m.put(blocks(x)),
            "x_row": 2 * 136,
            "planes": 1,
            "y": y,
            "y_row": 64,
        }
        m.run("matmul:Q4_K:1", layout | where | {"select": 0}, 1)
        assert_product("Q4_K", x, floats_of("Q4_K", raw)[:, :64], m.look(y))


def activated(activation: str, gate: Array, up: Array) -> Any:
    with np.errstate(over="ignore"):
        match activation:
            case "silu":
                return gate / (1 + np.exp(-gate)) * up
            case "gelu":
                return 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
            case "relu":
                return np.maximum(gate, 0) * up
            case "relu2":
                return np.maximum(gate, 0) ** 2 * up
    return np.maximum(gate, 0) * np.maximum(up, 0)


def ffn_up(gate: str, up: str, activation: str, tokens: str) -> None:
    """Two clusters of 64 neurons, an extent each; hidden values as they are, or rounded."""
    rng, n, neurons = np.random.default_rng(4), 1 if tokens == "1" else 2, 32
    columns = FORMATS[gate].columns
    raws = [random_raw(rng, name, 2 * neurons, columns) for name in (gate, up)]
    x = rng.standard_normal((n, columns), np.float32)
    group = [FORMATS[name].group_bytes(columns) for name in (gate, up)]
    bundle, is_float, rows = 2 * sum(group) + 64, gate in FLOAT_FORMATS, fed(gate, x, 1)
    x = x if is_float else rounded(x)
    with Bench() as m:
        weights = m.arena.allocate("weights", 2 * round_up(bundle, 4096), np.uint8, align=4096)
        for cluster in range(2):
            at = cluster * round_up(bundle, 4096)
            for part, name in enumerate((gate, up)):
                _, layout = m.pack(name, raws[part][neurons * cluster : neurons * (cluster + 1)], columns, per=2)
                first = at + part * 2 * group[0]
                source = layout["weights"]
                m.look(weights)[first : first + 2 * group[part]] = m.look(source)[: 2 * group[part]]  # type: ignore[arg-type]
        hidden = m.room(n, 2 * (32 if is_float else 34))
        operands: dict[str, Value] = {
            "weights": weights, "clusters": 2, "neurons": neurons, "bundle": bundle, "per": 1,
            "stride": round_up(bundle, 4096), "up": 2 * group[0], "blocks": 1, "x": m.put(rows),
            "x_row": 4 * rows.shape[1], "hidden": hidden, "hidden_row": 4 * hidden.shape[1],
            "rounded": 0 if is_float else 1,
        }  # fmt: skip
        m.run(f"ffn_up:{gate}:{up}:{activation}:{tokens}", operands, n)
        g, u = (
            x.astype(np.float64) @ floats_of(name, raw).astype(np.float64).T
            for name, raw in zip((gate, up), raws, strict=True)
        )
        expected = activated(activation, g, u)
        if is_float:
            assert nmse(m.look(hidden), expected) < 1e-10
        else:
            assert_rounded(m.look(hidden), expected.astype(np.float32))


def ffn_down(name: str, tokens: str) -> None:
    """21 outputs of three clusters, two in an extent."""
    rng, n, t, count = np.random.default_rng(5), 1 if tokens == "1" else 3, int(tokens), 21
    f = FORMATS[name]
    columns, down = 3 * f.columns, 192
    raw, x = random_raw(rng, name, count, columns), rng.standard_normal((n, columns), np.float32)
    rows = fed(name, x, 1)
    bundle = round_up(down + 2 * f.block, 64)
    stride = round_up(2 * bundle, 4096)
    with Bench() as m:
        packed, _ = m.pack(name, raw, columns, per=2)
        source = m.look(packed)[: 6 * f.block].reshape(2, 3, f.block)  # group, cluster
        weights = m.arena.allocate("weights", 2 * stride, np.uint8, align=4096)
        for cluster in range(3):
            at = cluster // 2 * stride + cluster % 2 * bundle + down
            m.look(weights)[at : at + 2 * f.block] = source[:, cluster].reshape(-1)
        y = m.room(n, 32)
        operands: dict[str, Value] = {
            "weights": weights, "clusters": 3, "neurons": f.columns, "bundle": bundle, "per": 2, "stride": stride,
            "down": down, "groups": 2, "hidden": m.put(rows), "hidden_row": 4 * rows.shape[1], "y": y, "y_row": 4 * 32,
        }  # fmt: skip
        m.run(f"ffn_down:{name}:{t}", operands, n)
        assert_product(name, x, floats_of(name, raw), m.look(y)[:, :count])


def embed(name: str) -> None:
    rng, columns = np.random.default_rng(6), 2 * FORMATS[name].columns
    raw, ids = random_raw(rng, name, 43, columns), np.array([42, 17, -1, 43, 0], np.int32)
    with Bench() as m:
        _, layout = m.pack(name, raw, columns, per=2)
        out, width = m.room(len(ids), columns + 32), columns + 32
        m.run(
            f"embed:{name}",
            layout | {"ids": m.put(ids), "vocab": 43, "out": out, "out_row": 4 * width, "width": width, "scale": 1.7},
            len(ids),
        )
        expected = np.zeros((len(ids), width), np.float32)
        expected[[0, 1, 4], :columns] = floats_of(name, raw)[[42, 17, 0]] * np.float32(1.7)
        np.testing.assert_allclose(m.look(out), expected, rtol=1e-5, atol=1e-6)


def rms(x: Array, weight: Array) -> Array:
    wide = x.astype(np.float64)
    normed: Array = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + EPS) * weight
    return normed


def norm(add: str, dim: str) -> None:
    """Rows 2 and 0 of three, added to and normed, in place; a width of whole blocks of 256."""
    rng, d = np.random.default_rng(7), int(dim)
    row, width, chosen = round_up(d, 32), round_up(d, 256), [2, 0]
    x, y = (np.zeros((3, row), np.float32) for _ in range(2))
    weight, post = (np.zeros(row, np.float32) for _ in range(2))
    for part in (x, y, weight, post):
        part[..., :d] = rng.standard_normal((*part.shape[:-1], d))
    with Bench() as m:
        levels = 2 if add == "plain" else 1
        at, out, whole = m.put(x), m.room(2 * levels, width // 32 * 34), m.room(2, width)
        x_out = m.put(x)
        operands: dict[str, Value] = {
            "select": 1, "x": at, "y": None if add == "nothing" else m.put(y),
            "x_out": None if add == "nothing" else x_out, "row": 4 * row, "planes": levels,
            "post": m.put(post, "weights") if add == "normed" else None, "weight": m.put(weight, "weights"), "dim": d,
            "eps": EPS, "out": whole, "out_row": 4 * width, "rounded": out,
            "rounded_row": 4 * out.shape[1], "width": width,
        }  # fmt: skip
        m.run("norm", operands, 3, chosen)
        change = {"nothing": 0 * y, "plain": y, "normed": rms(y[:, :d], post[:d])}[add][:, :d]
        residual = x[:, :d].astype(np.float64) + change
        expected = np.zeros((2, width))
        expected[:, :d] = rms(residual[chosen], weight[:d])
        np.testing.assert_allclose(m.look(whole), expected, rtol=1e-4, atol=1e-5)
        assert_rounded(m.look(out)[::levels], expected.astype(np.float32))
        if levels == 2:
            parts = m.look(out).reshape(2, 2, -1, 34)
            values = (parts[..., :32] * parts[..., 32:33]).sum(1).reshape(2, width)
            np.testing.assert_allclose(values, expected, atol=np.abs(expected).max() / 127 / 127)
        np.testing.assert_array_equal(m.look(at), x)
        if add != "nothing":
            np.testing.assert_allclose(m.look(x_out)[:2, :d], residual[chosen], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(m.look(x_out)[2], x[2])


def attention(dim: str, heads: str, kv_heads: str, window: str, extra: str) -> None:
    """Rotation, the way into the cache, and attention over what was there before, across a block's end."""
    rng, d, h, kv, seen = np.random.default_rng(8), int(dim), int(heads), int(kv_heads), int(window)
    half, normed, positions = d // 2 - 2, extra == "norms", np.array([258, 40], np.int32)
    values, layer, scale = kv * 512 * d, 64, d**-0.5
    with Bench(integrated=extra != "own") as m:
        block = 64 + 2 * values
        cache = rng.standard_normal((3, block // 2)).astype(np.float16)
        blocks = m.put(cache, "kv")
        address = m.arena.address(blocks) + block * np.arange(3, dtype=np.int64)
        tables = [m.put(address[[1, 0]]), m.put(address[[2]])]
        for ref in tables:
            m.refs.remove(ref)  # nobody names them
        table = m.put(np.array([m.arena.address(ref) for ref in tables], np.int64))
        qkv = rng.standard_normal((2, (h + 2 * kv) * d), np.float32)
        qkv[0, -1] = 1e6  # more than float16 takes
        at, angles = m.put(qkv), rng.standard_normal((259, 2 * half), np.float32)
        weights = rng.standard_normal((2, d), np.float32)
        width = round_up(h * d, 32) + 32
        out, whole = m.room(2, width), m.room(2, width // 32 * 34)
        common: dict[str, Value] = {
            "positions": m.put(positions), "tables": table, "qkv": at, "qkv_row": 4 * qkv.shape[1], "heads": h,
            "kv_heads": kv, "dim": d, "layer": layer, "values": values,
        }  # fmt: skip
        rope: dict[str, Value] = {
            "half": half, "angles": m.put(angles), "eps": EPS, "scale": scale,
            "query_norm": m.put(weights[0], "weights") if normed else None,
            "key_norm": m.put(weights[1], "weights") if normed else None,
        }  # fmt: skip
        m.run("rope", common | rope, 2)
        attend: dict[str, Value] = {"window": seen, "out": out, "out_row": 4 * width, "width": width}
        attend |= {"rounded": whole if extra == "rounded" else None, "rounded_row": 4 * whole.shape[1]}
        m.run("attend", common | attend, 2)

        queries = np.empty((2, h, d))
        for row, position in enumerate(positions):
            parts = qkv[row].reshape(-1, d).astype(np.float64)
            for head in range(h + kv):
                x = rms(parts[head], weights[int(head >= h)]) if normed else parts[head]
                cos, sin = angles[position, :half], angles[position, half:]
                first, second = x[:half].copy(), x[half : 2 * half].copy()
                x[:half], x[half : 2 * half] = first * cos - second * sin, first * sin + second * cos
                parts[head] = x * (scale if head < h else 1)
            queries[row] = parts[:h]
            np.testing.assert_allclose(m.look(at)[row, : h * d].reshape(h, d), parts[:h], rtol=1e-4, atol=1e-5)
            mine = cache[0 if position > 255 else 2, layer // 2 :]
            slot = position % 256
            keys = mine[: values // 2].reshape(kv, 16, d, 16)
            keys[:, slot // 16, :, slot % 16] = parts[h : h + kv]
            mine[values // 2 : values].reshape(kv, 256, d)[:, slot] = np.clip(parts[h + kv :], -65504, 65504)
        np.testing.assert_allclose(m.look(blocks).astype(np.float64), cache.astype(np.float64), rtol=2e-3, atol=1e-4)

        stored = m.look(blocks)[:, layer // 2 :]
        keys = stored[:, : values // 2].reshape(3, kv, 16, d, 16).swapaxes(3, 4).reshape(3, kv, 256, d)
        contents = stored[:, values // 2 : values].reshape(3, kv, 256, d)
        expected = np.zeros((2, width))
        for row, (position, order) in enumerate(zip(positions, ([1, 0], [2]), strict=True)):
            visible = np.s_[max(0, position - seen + 1) if seen else 0 : position + 1]
            for head in range(h):
                k = keys[order, head * kv // h].reshape(-1, d)[visible].astype(np.float64)
                v = contents[order, head * kv // h].reshape(-1, d)[visible].astype(np.float64)
                scores = k @ queries[row, head]
                p = np.exp(scores - scores.max())
                expected[row, head * d : head * d + d] = p @ v / p.sum()
        if extra == "rounded":
            assert_rounded(m.look(whole), m.look(out))
        np.testing.assert_allclose(m.look(out), expected, rtol=2e-3, atol=2e-3)


def program(memory: str) -> None:
    """Embedding, norm, logits, flag: on a device that shares memory, or one whose weights' host copy is gone."""
    rng, vocab, dim, n = np.random.default_rng(9), 40, 64, 3
    table, raw = random_raw(rng, "Q8_0", vocab, dim), random_raw(rng, "Q5_0", vocab, dim)
    weight, ids, chosen = rng.standard_normal(dim, np.float32), np.array([3, 39, 7], np.int32), [2]
    with Bench(integrated=memory == "shared") as m:
        embedding, by = m.pack("Q8_0", table, dim, per=2)
        output, layout = m.pack("Q5_0", raw, dim, per=2)
        gain, rows = m.put(weight, "weights"), m.put(ids)
        x, normed, y = m.room(n, dim), m.room(2, dim // 32 * 34), m.room(1, 48)
        flag = m.arena.allocate("flags", 8, np.int64)
        for ref in (embedding, output, gain):
            m.device.upload(ref.offset, ref.nbytes)
            if memory == "own":
                m.look(ref)[...] = 0
        records: list[tuple[str, dict[str, Value]]] = [
            ("embed:Q8_0", by | {
                "ids": rows, "vocab": vocab, "out": x, "out_row": 4 * dim, "width": dim, "scale": 1.0,
            }),
            ("norm", {
                "select": 1, "x": x, "y": None, "x_out": None, "row": 4 * dim, "post": None, "weight": gain, "dim": dim,
                "eps": EPS, "out": None, "out_row": 0, "rounded": normed, "rounded_row": 4 * normed.shape[1],
                "planes": 2, "width": dim,
            }),
            ("matmul:Q5_0:8", layout | {
                "select": 1, "groups": 3, "x": normed, "x_row": 4 * normed.shape[1], "planes": 2, "y": y,
                "y_row": 4 * 48,
            }),
            ("post", {"flag": flag}),
        ]  # fmt: skip
        loaded = m.load(records)
        built = m.device.builds
        m.step(n, chosen, epoch=77)
        m.device.before_step([m.header, m.chosen, rows])
        loaded.run(n, len(chosen))
        m.device.after_step([y, flag])
        m.device.finish()
        assert m.look(flag)[0] == 77
        hidden = rms(floats_of("Q8_0", table)[ids[chosen]], weight)
        assert (
            nmse(m.look(y)[:, :vocab], hidden.astype(np.float64) @ floats_of("Q5_0", raw).astype(np.float64).T) < 1e-6
        )
        m.look(flag)[0] = 0
        if isinstance(m.driver, Simulator):
            assert built == 4
            m.driver.launched.clear()
        m.load(records).run(n, 0)
        m.device.share = 0.5  # it waits, and does the same
        m.load(records).run(0, 0)
        m.device.finish()
        assert m.device.builds == built
        if isinstance(m.driver, Simulator):
            assert m.driver.launched == ["embed:Q8_0", "post", "post"]  # nothing wants logits, then there is no row
        assert m.device.describe()["verified"] is False


def complaints() -> None:
    """What the runtime refuses."""
    with Bench(integrated=False) as m:
        gain = m.put(np.ones(32, np.float32), "weights")
        m.device.upload(gain.offset, gain.nbytes)
        for refused in (
            lambda: m.device.upload(gain.offset, 1 << 20),
            lambda: m.device.upload(m.header.offset, 8),
            lambda: m.device.before_step([gain]),
            lambda: m.load([("post", {"flag": gain})]),
            lambda: m.device.load(np.zeros((1, 32), np.int64), ["matmul:Q3_K:1"]),
            lambda: m.device.load(np.zeros((1, 32), np.int64), ["ffn_up:Q4_0:Q4_K:silu:1"]),
            lambda: m.device.load(np.zeros((1, 32), np.int64), ["matmul:Q4_0:3"]),
            lambda: m.device.load(np.zeros((2, 32), np.int64), ["norm"]),
            lambda: m.device.load(np.zeros((1, 32), np.int64), ["attend"]),
        ):
            with pytest.raises(UnitError) as refusal:
                refused()
            assert "\n" not in str(refusal.value)


def main() -> None:
    for case in sys.argv[1:]:
        name, *arguments = case.split(":")
        try:
            globals()[name](*arguments)
        except BaseException:
            print(f"case {case} failed", file=sys.stderr)
            raise
        print(case)


if __name__ == "__main__":
    main()
