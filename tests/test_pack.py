"""Packed weights hold the numbers of the file, whatever their place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import BLOCK, FORMATS, Floats, floats_of, random_raw, same_bits
from tiny_models import write_tiny

from coterie.engine import Engine
from coterie.errors import PlanError
from coterie.kernels.formats import FORMATS as PACKED
from coterie.models.dequant import dequantise
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes
from coterie.storage.pack import RAW, pack, packed_bytes, padded_columns, raw_bytes, unpack
from coterie.storage.packer import half_split_rows
from coterie.storage.weights import FFN, Matrix


@pytest.mark.parametrize("name", FORMATS)
def test_unpacked_is_what_was_packed(name: str) -> None:
    rng = np.random.default_rng(0)
    f = PACKED[name]
    for rows, columns in ((1, f.columns), (16, f.columns), (37, 3 * f.columns)):
        raw = random_raw(rng, name, rows, columns)
        groups, blocks = -(-rows // 16), columns // f.columns
        out = np.full((groups, blocks, f.block), 0xEE, np.uint8)
        pack(name, raw, out)
        got = unpack(name, out)
        assert same_bits(got[:rows], floats_of(name, raw))
        assert got.shape == (16 * groups, columns)
        # rows of padding have scales 0, so whatever their quants mean they are 0
        assert not got[rows:].any()
        assert out.nbytes == packed_bytes(name, rows, columns)
        assert raw_bytes(name, columns) == raw.shape[1]


@pytest.mark.parametrize("name", FORMATS)
def test_the_destination_may_be_strided(name: str) -> None:
    f = PACKED[name]
    raw = random_raw(np.random.default_rng(1), name, 32, 3 * f.columns)
    plain = np.zeros((2, 3, f.block), np.uint8)
    columns_first = np.full((3, 3, f.block), 0xEE, np.uint8)  # a third group that stays as it is
    pack(name, raw, plain)
    pack(name, raw, columns_first[:, :2].transpose(1, 0, 2))
    np.testing.assert_array_equal(columns_first[:, :2].transpose(1, 0, 2), plain)
    assert (columns_first[:, 2] == 0xEE).all()


@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_columns_of_padding_are_zero(name: str) -> None:
    raw = random_raw(np.random.default_rng(2), name, 16, 45)
    out = np.full((1, 2, PACKED[name].block), 0xEE, np.uint8)
    pack(name, raw, out)
    got = unpack(name, out)
    assert padded_columns(name, 45) == 64
    assert same_bits(np.ascontiguousarray(got[:, :45]), floats_of(name, raw))
    assert not got[:, 45:].any()


def test_raw_blocks_are_gguf_s() -> None:
    assert RAW == BLOCK


def test_rotary_pairs_are_split_into_halves() -> None:
    assert half_split_rows(8, 8, 1).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert half_split_rows(8, 4, 2).tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]


# --- a whole model -----------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "Q4_0": {"formats": "Q4_0"},
    "Q6_K": {"formats": "Q6_K", "dim": 256, "ffn": 512, "head_dim": 64},
    "F16, odd": {"formats": "F16", "dim": 72, "ffn": 100, "vocab": 301},
    "mixed": {"formats": {"attn_q": "Q5_0", "attn_k": "Q5_0", "attn_v": "F16", "ffn_gate": "Q4_1", "ffn_up": "Q8_0",
                          "ffn_down": "BF16", "token_embd": "Q8_0"}},
}  # fmt: skip


@pytest.fixture(scope="module", params=[(a, s) for a in ("llama", "gemma3") for s in SHAPES], ids=str)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    architecture, shape = request.param
    path = write_tiny(tmp_path_factory.mktemp("pack") / "m.gguf", architecture, **SHAPES[shape])
    made = Engine(open_model(path), Wishes(threads=2))
    yield made
    made.close()


def tensor(engine: Engine, name: str) -> Floats:
    """A tensor of the file as floats."""
    return dequantise(engine.model.source.read(name), engine.model.file.tensors[name].format)


def unpacked(engine: Engine, matrix: Matrix) -> Floats:
    f = matrix.format
    (whole,) = matrix.slices
    run, data = matrix.run, engine.arena.numpy(whole.ref)
    extents = [data[i * run.stride :][: run.items_of(i) * run.item_bytes] for i in range(run.extents)]
    groups = np.concatenate(extents).reshape(run.items, matrix.blocks, f.block)
    return unpack(f.name, groups)[: matrix.rows, : matrix.columns]


def test_matrices_are_in_the_arena(engine: Engine) -> None:
    weights, spec = engine.layout.weights, engine.spec
    assert weights.embedding is not None
    np.testing.assert_array_equal(unpacked(engine, weights.embedding), tensor(engine, "token_embd.weight"))
    for i, layer in enumerate(weights.layers):
        projected = np.concatenate([unpacked(engine, m) for m in layer.projections])
        expected = []
        for part, heads in (("q", spec.n_heads), ("k", spec.n_kv_heads), ("v", 0)):
            rows = tensor(engine, f"blk.{i}.attn_{part}.weight")
            if heads and spec.interleaved_rope:
                rows = rows[half_split_rows(spec.head_dim, spec.layers[i].rope.dims, heads)]
            expected.append(rows)
        np.testing.assert_array_equal(projected, np.concatenate(expected))
        np.testing.assert_array_equal(unpacked(engine, layer.output), tensor(engine, f"blk.{i}.attn_output.weight"))
        for name, ref in layer.norms.items():
            values, wanted = engine.arena.numpy(ref), tensor(engine, f"blk.{i}.{name}.weight")[0]
            np.testing.assert_array_equal(values[: wanted.size], wanted)
            assert not values[wanted.size :].any()


def clusters(engine: Engine, ffn: FFN) -> tuple[Floats, Floats, Floats]:
    """Gate and Up [neurons, dim] and Down [dim, neurons], put together from the addresses in the cluster table."""
    layout, arena = ffn.layout, engine.arena
    gates, ups, downs = list[Floats](), list[Floats](), list[Floats]()
    for gate_up, down, flag, _ in arena.numpy(ffn.table).tolist():
        assert flag == 0  # nothing to wait for
        start = arena.base
        for f, first, to in ((layout.gate, 0, gates), (layout.up, layout.gate_bytes, ups)):
            size = packed_bytes(f.name, layout.neurons, layout.dim)
            data = arena._bytes[gate_up - start + first :][:size]
            to.append(unpack(f.name, data.reshape(layout.neurons // 16, -1, f.block))[:, : layout.dim])
        data = arena._bytes[down - start :][: layout.down_groups * layout.down.block]
        downs.append(unpack(layout.down.name, data.reshape(layout.down_groups, 1, -1))[: layout.dim])
    return np.concatenate(gates), np.concatenate(ups), np.concatenate(downs, axis=1)


def test_clusters_are_where_their_table_says(engine: Engine) -> None:
    n = engine.spec.ffn_dim
    for i, layer in enumerate(engine.layout.weights.layers):
        assert isinstance(layer.ffn, FFN)
        gate, up, down = clusters(engine, layer.ffn)
        assert len(gate) == layer.ffn.layout.clusters * layer.ffn.layout.neurons >= n
        for got, name in ((gate, "gate"), (up, "up"), (down.T, "down")):
            wanted = tensor(engine, f"blk.{i}.ffn_{name}.weight")
            np.testing.assert_array_equal(got[:n], wanted.T if name == "down" else wanted)
            assert not got[n:].any()
        (span,) = layer.ffn.spans
        count, *ids = engine.arena.numpy(span.list).tolist()
        assert ids == list(range(count))
        assert count == layer.ffn.layout.clusters
        assert (engine.arena.numpy(layer.ffn.table)[:, :2] % 64 == 0).all()


def test_gate_and_up_of_different_kinds_are_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", formats={"ffn_gate": "Q4_0", "ffn_up": "F16"})
    model = open_model(path)
    with pytest.raises(PlanError, match="mixes Gate Q4_0 with Up F16"):
        Engine(model)
    model.close()
