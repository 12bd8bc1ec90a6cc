"""Matrix and row kernels bit by bit against reference.py."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from harness import Machine, machine
from reference import (
    BLOCK,
    FLOAT_FORMATS,
    FORMATS,
    INTEGER_FORMATS,
    SCALES,
    Bytes,
    Floats,
    floats_of,
    fma,
    nmse,
    product,
    quantise,
    random_raw,
    same_bits,
    set_scales,
)

from coterie.errors import UnitError
from coterie.kernels import operands as o
from coterie.kernels.formats import FORMATS as PACKED
from coterie.kernels.library import kernel_name
from coterie.kernels.record import Opcode
from coterie.kernels.shapes import INT8_TOKEN, TILE_TOKENS, UNPACKED
from coterie.scheduler.program import Operand
from coterie.storage.arena import BufferRef


def run_matmul(
    m: Machine,
    name: str,
    raw: Bytes,
    x: Floats,
    tile: int,
    *,
    panel: int = 1 << 20,
    chunk: int = 1,
    private: bool = False,
) -> Floats:
    """W x by the kernels: rows to tiles (by each lane for itself if `private`), then the matrix."""
    count, (n, columns) = len(raw), x.shape
    f = PACKED[name]
    subs = -(-columns // f.columns) * f.subs
    source = m.room((m.rows, -(-columns // 32) * 32), np.float32)
    m.look(source)[:n, :columns] = x
    tiles = m.tiles(f.is_float, subs, private=private)
    emit = m.emit(source, subs, tile, None if f.is_float else tiles, tiles if f.is_float else None)
    b, kernel = m.builder(), kernel_name("merge")
    prepare = b.preparation(kernel, Opcode.MERGE, emit) if private else None
    if not private:
        b.add(kernel, Opcode.MERGE, emit)
    weights = m.pack(name, raw, columns)
    y = m.matmul(b, name, weights, count, columns, tiles, tile, panel=panel, chunk=chunk, prepare=prepare)
    m.step(m.load(b), n)
    return np.ascontiguousarray(m.look(y)[:n, :count])


@pytest.fixture(scope="module", params=[1, 3], ids="{} lanes".format)
def bench(request: pytest.FixtureRequest) -> Any:
    with machine(request.param) as m:
        yield m


# --- the reference itself ----------------------------------------------------------------------------


def test_fma_rounds_once() -> None:
    one, ulp = np.float32(1), np.float32(2.0**-23)
    x = np.array([1 + ulp, 1 + ulp, 3, 2.0**-75, 1e30, -0.0, 1 + ulp], np.float32)
    y = np.array([1 - ulp, 1 - ulp, 1 / 3, 2.0**-75, 1e30, 0.0, 1 - ulp], np.float32)
    z = np.array([-1, 0, -1, 0, 1, -0.0, ulp / 2 + 2 * ulp**2], np.float32)
    # (1 + u)(1 - u) = 1 - u**2 exactly
    expected = [-(ulp**2), one, 2.0**-25, 2.0**-149 / 2, np.inf, -0.0, None]
    got = fma(x, y, z)
    for value, wanted in zip(got, expected, strict=True):
        if wanted is not None:
            assert same_bits(np.array([value]), np.array([wanted], np.float32))
    assert got[-1] == one + ulp  # just above half a unit: a sum that was rounded before would go to even


def test_reference_reads_blocks_as_gguf_does() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    for name in FORMATS:
        raw = random_raw(np.random.default_rng(1), name, 5, 512)
        np.testing.assert_array_equal(floats_of(name, raw), dequantize(raw, GGMLQuantizationType[name]))


# --- matrices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_equal_the_reference_bit_by_bit(name: str, bench: Machine) -> None:
    rng = np.random.default_rng(2)
    unit = PACKED[name].columns
    shapes = [(1, unit), (15, unit), (16, 2 * unit), (37, 3 * unit), (70, 5 * unit)]
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33]
    for case in range(len(tokens)):
        (count, columns), n = shapes[case % len(shapes)], tokens[case]
        raw = random_raw(rng, name, count, columns)
        x = rng.standard_normal((n, columns), np.float32) * np.float32(10.0 ** (case % 5 - 2))
        expected = product(name, raw, x)
        for tile, panel, chunk, private in ((1, 2, 1, True), (TILE_TOKENS, 2, 2, False)):
            got = run_matmul(bench, name, raw, x, tile, panel=panel, chunk=chunk, private=private)
            assert same_bits(got, expected), (count, columns, n, tile)


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_float_columns_need_not_fill_blocks(name: str, bench: Machine) -> None:
    rng = np.random.default_rng(3)
    for columns in (1, 31, 33, 100):
        raw, x = random_raw(rng, name, 19, columns), rng.standard_normal((5, columns), np.float32)
        assert same_bits(run_matmul(bench, name, raw, x, TILE_TOKENS), product(name, raw, x)), columns


@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_extreme_weights_and_activations(name: str, bench: Machine) -> None:
    rng = np.random.default_rng(4)
    count, columns = 23, 4 * PACKED[name].columns
    raw = random_raw(rng, name, count, columns)
    blocks = raw.reshape(count, -1, BLOCK[name][0])
    special = np.array([0, -0.0, 2.0**-24, -(2.0**-24), 1000 * 2.0**-24, 65504, -65504, 1], np.float16)
    set_scales(name, blocks, rng.choice(special, (*blocks.shape[:2], 2)))
    fields = [i for i in range(BLOCK[name][0]) if not any(at <= i < at + 2 for at in SCALES[name])]
    for row, byte in ((0, 0x00), (1, 0xFF), (2, 0x80), (3, 0x7F)):  # all quants least, most, -128, 127
        for field in fields:
            blocks[row, :, field] = byte
    x = rng.standard_normal((9, columns), np.float32)
    x[0] = 0
    x[1, :32] = 0
    x[2] = -0.0
    x[3] = np.where(np.arange(columns) % 2, 3e20, -3e20)  # all +-127
    x[4] = 1e-38  # smallest block whose inverse scale is finite is about 4e-37
    x[5, ::7] = 1e-42
    x[6] = 127
    x[7] = rng.integers(-254, 255, columns) / np.float32(2)  # ties of rounding
    x[7, ::32] = 127
    expected = product(name, raw, x)
    assert np.isfinite(expected).all()
    for tile in (1, TILE_TOKENS):
        assert same_bits(run_matmul(bench, name, raw, x, tile), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_error_to_the_float_product(name: str, bench: Machine) -> None:
    """8-bit activations cost about 3e-5 whatever the weights; float formats only round."""
    rng = np.random.default_rng(5)
    raw, x = random_raw(rng, name, 64, 1024), rng.standard_normal((16, 1024), np.float32)
    exact = x.astype(np.float64) @ floats_of(name, raw).astype(np.float64).T
    assert nmse(run_matmul(bench, name, raw, x, TILE_TOKENS), exact) <= (1e-12 if name in FLOAT_FORMATS else 2e-4)


# --- activations -------------------------------------------------------------------------------------


EPS = 1e-5


def read_tiles(data: Bytes, tile: int, subs: int, n: int) -> tuple[Any, ...]:
    """Values int8[n, subs, 32] and the four words [n, subs] of int8 tiles (tile.py draws the layout)."""
    tiles = data.reshape(-1)[: -(-n // tile) * subs * tile * INT8_TOKEN].reshape(-1, subs, tile * INT8_TOKEN)
    values = tiles[..., : 32 * tile].view(np.int8).reshape(-1, subs, tile, 32).swapaxes(1, 2)
    words = tiles[..., 32 * tile :].reshape(-1, subs, 4, tile, 4).transpose(2, 0, 3, 1, 4)
    floats = np.ascontiguousarray(words[:2]).view(np.float32).reshape(2, -1, subs)
    ints = np.ascontiguousarray(words[2:]).view(np.int32).reshape(2, -1, subs)
    return values.reshape(-1, subs, 32)[:n], *(floats[:, :n]), *(ints[:, :n])


def check_tiles(data: Bytes, tile: int, x: Floats) -> None:
    """Whether tiles hold what the reference makes of float32[n, columns]."""
    q, scale = quantise(x)
    values, scales, sums, negated, heads = read_tiles(data, tile, q.shape[1], len(q))
    np.testing.assert_array_equal(values, q)
    assert same_bits(scales, scale)
    assert same_bits(sums, scale * q.sum(-1).astype(np.float32))
    np.testing.assert_array_equal(negated, -q.sum(-1))
    np.testing.assert_array_equal(heads, -q[..., :16].sum(-1))


def reference_norm(x: Floats, weight: Floats, dim: int, eps: float) -> Floats:
    """RMS norm of float32[n, columns] in the kernels' order: 16 running sums, then these by halves."""
    squares = np.zeros((len(x), 16), np.float32)
    for first in range(0, x.shape[1], 16):
        squares = fma(x[:, first : first + 16], x[:, first : first + 16], squares)
    while squares.shape[1] > 1:
        half = squares.shape[1] // 2
        squares = squares[:, :half] + squares[:, half:]
    factor = np.float32(1) / np.sqrt(squares / np.float32(dim) + np.float32(eps))
    normed: Floats = x * factor * weight
    return normed


def norm_operands(m: Machine, x: BufferRef, weight: BufferRef, dim: int, tile: int) -> dict[int, Operand]:
    """Operands of a norm of rows float32[rows][width] to nowhere."""
    return {
        o.NORM_X: x,
        o.NORM_ROW: 4 * x.shape[1],
        o.NORM_WEIGHT: weight,
        o.NORM_DIM: dim,
        o.NORM_EPS: EPS,
        o.NORM_TILE: tile,
        o.NORM_TILE_SUBS: x.shape[1] // 32,
        o.NORM_PLANES: 1,
    }


@pytest.mark.parametrize("add", ["nothing", "y", "normed y"])
@pytest.mark.parametrize("dim", [32, 100, 576])
def test_norm_adds_normalises_and_quantises(add: str, dim: int, bench: Machine) -> None:
    rng, m = np.random.default_rng(6), bench
    n, width = 11, -(-dim // 32) * 32
    x, y = (np.zeros((m.rows, width), np.float32) for _ in range(2))
    weight, post = (np.zeros(width, np.float32) for _ in range(2))
    for part in (x, y, weight, post):
        part[..., :dim] = rng.standard_normal((*part.shape[:-1], dim))
    chosen = [0, 3, 4, 10]  # as the rows that want logits are
    x_out, tiles, floats = m.room(x.shape, np.float32), m.tiles(False, width // 32), m.tiles(True, width // 32)
    operands = norm_operands(m, m.put(x), m.put(weight), dim, 4) | {
        o.NORM_X_OUT: x_out,
        o.NORM_Y: None if add == "nothing" else m.put(y),
        o.NORM_POST: m.put(post) if add == "normed y" else None,
        o.NORM_OUT: tiles,
        o.NORM_FLOAT_OUT: floats,
    }
    change = reference_norm(y, post, dim, EPS) if add == "normed y" else y
    residual = x if add == "nothing" else x + change
    for select in (False, True):
        b = m.builder()
        b.add(kernel_name("norm"), Opcode.NORM, operands | {o.NORM_SELECT: int(select)})
        m.step(m.load(b), n, outputs=chosen if select else ())
        picked = np.array(chosen) if select else np.arange(n)
        if add != "nothing":
            assert same_bits(m.look(x_out)[picked], residual[picked])
        expected = reference_norm(residual[picked], weight, dim, EPS)
        exact = residual[picked].astype(np.float64)
        exact *= weight / np.sqrt(np.square(exact).sum(-1, keepdims=True) / dim + EPS)
        np.testing.assert_allclose(expected, exact, rtol=1e-6, atol=1e-30)
        check_tiles(m.look(tiles), 4, expected)
        groups = m.look(floats).reshape(-1).view(np.float32)[: -(-len(picked) // 4) * 4 * width]
        got = groups.reshape(-1, width // 32, 4, 32).swapaxes(1, 2).reshape(-1, width)[: len(picked)]
        assert same_bits(np.ascontiguousarray(got), expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("tile", [2, TILE_TOKENS])
def test_logits_from_two_planes(name: str, tile: int, bench: Machine) -> None:
    """The final norm's rows as int8 and what that left as int8: two products, added."""
    rng, m = np.random.default_rng(11), bench
    vocab, dim, n, chosen = 45, 2 * PACKED[name].columns, 12, [0, 1, 5, 9, 11]
    x, weight = rng.standard_normal((m.rows, dim), np.float32), rng.standard_normal(dim, np.float32)
    raw, tiles = random_raw(rng, name, vocab, dim), m.tiles(False, dim // 32, planes=2)
    b = m.builder()
    planes: dict[int, Operand] = {o.NORM_SELECT: 1, o.NORM_PLANES: 2, o.NORM_OUT: tiles}
    b.add(kernel_name("norm"), Opcode.NORM, norm_operands(m, m.put(x), m.put(weight), dim, tile) | planes)
    y = m.matmul(b, name, m.pack(name, raw, dim), vocab, dim, tiles, tile, panel=2, chunk=2, planes=2)
    m.step(m.load(b), n, outputs=chosen)
    normed = reference_norm(x[chosen], weight, dim, EPS)
    q, scale = quantise(normed)
    blocks = normed.reshape(q.shape)
    left = fma(np.broadcast_to(-scale[..., None], q.shape), q.astype(np.float32), blocks).reshape(normed.shape)
    expected = product(name, raw, normed) + product(name, raw, left)
    assert same_bits(np.ascontiguousarray(m.look(y)[: len(chosen), :vocab]), expected)
    exact = normed.astype(np.float64) @ floats_of(name, raw).astype(np.float64).T
    assert nmse(expected, exact) < 1e-8


def embedding(m: Machine, name: str, raw: Bytes, columns: int, x: BufferRef) -> dict[int, Operand]:
    return {
        o.EMBED_BLOCKS: columns // PACKED[name].columns,
        o.EMBED_VOCAB: len(raw),
        o.EMBED_X: x,
        o.EMBED_ROW: 4 * columns,
        o.EMBED_SCALE: 1.7,
        o.EMBED_SCRATCH: m.room(m.lanes * UNPACKED),
    }


def groups(m: Machine, name: str, raw: Bytes, columns: int, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Where each id's group lies."""
    first = m.arena.address(m.pack(name, raw, columns))
    return first + np.asarray(ids, np.int64) // 16 * PACKED[name].group_bytes(columns)


@pytest.mark.parametrize("name", FORMATS)
def test_embedding_rows_are_the_dequantised_weights(name: str, bench: Machine) -> None:
    rng, m = np.random.default_rng(7), bench
    vocab, columns = 43, 2 * PACKED[name].columns
    raw, ids = random_raw(rng, name, vocab, columns), np.array([42, 0, 17, 17, 16, 15, 31], np.int32)
    x = m.room((m.rows, columns), np.float32)
    b = m.builder()
    b.add(kernel_name("embed", name), Opcode.EMBED, embedding(m, name, raw, columns, x))
    m.unit.run(m.load(b), ids, (), (), (), groups(m, name, raw, columns, ids))
    assert same_bits(m.look(x)[: len(ids)], (floats_of(name, raw) * np.float32(1.7))[ids])


@pytest.mark.parametrize("wrong", [-1, 43, 48, 2**31 - 1])
def test_an_id_that_is_no_row_is_reported(wrong: int, bench: Machine) -> None:
    m = bench
    raw = random_raw(np.random.default_rng(12), "Q4_0", 43, 32)
    b = m.builder()
    operands = embedding(m, "Q4_0", raw, 32, m.room((m.rows, 32), np.float32))
    b.add(kernel_name("embed", "Q4_0"), Opcode.EMBED, operands)
    name = m.load(b)
    with pytest.raises(UnitError, match="reported error 1"):
        m.unit.run(name, [3, wrong, 4], (), (), (), groups(m, "Q4_0", raw, 32, [3, 0, 4]))
    m.unit.run(name, [3, 42, 4], (), (), (), groups(m, "Q4_0", raw, 32, [3, 42, 4]))
