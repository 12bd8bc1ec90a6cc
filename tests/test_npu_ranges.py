"""Activation ranges: what the oracle's blocks are given, kept per model."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny

from coterie.errors import ModelError
from coterie.models import llama
from coterie.models.calibration_text import TEXT
from coterie.models.load import ARCHITECTURES, Model, open_source, understand
from coterie.models.part import model_identity
from coterie.models.ranges import INPUTS, RangeFinder, Ranges, widths
from coterie.storage import npu_ranges
from coterie.storage.npu_ranges import model_ranges


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Model]:
    made = understand(open_source(write_tiny(tmp_path / "tiny.gguf", request.param, layers=3)))
    yield made
    made.close()


def test_the_oracle_computes_the_same_looked_on_at(model: Model) -> None:
    forward, finder = ARCHITECTURES[model.spec.architecture].forward, RangeFinder(model.spec)
    tokens = list(range(20, 60))
    watched = forward(model.spec, model.source.floats, tokens, finder.network, finder.product)
    assert (watched == forward(model.spec, model.source.floats, tokens)).all()


def test_ranges_are_those_of_the_inputs(model: Model) -> None:
    """Against inputs gathered by another look: weights that are asked for tell which input is multiplied."""
    spec, tokens = model.spec, list(range(20, 60))
    finder, inputs = RangeFinder(spec), dict[tuple[str, int], llama.Floats]()

    def product(weights: llama.Weights, name: str, x: llama.Floats) -> llama.Floats:
        inputs[name.split(".")[2], int(name.split(".")[1])] = x
        return llama.matrix_product(weights, name, x)

    def network(spec: object, weights: llama.Weights, layer: int, h: llama.Floats) -> llama.Floats:
        hidden = llama.activated(model.spec.activation, *llama.gate_and_up(weights, layer, h))
        inputs["ffn", layer], inputs["hidden", layer] = h, hidden
        return llama.down(model.spec, weights, layer, hidden)

    forward = ARCHITECTURES[spec.architecture].forward
    forward(spec, model.source.floats, tokens, network, product)
    forward(spec, model.source.floats, tokens, finder.network, finder.product)
    found = finder.ranges("identity")
    assert found.tokens == len(tokens)
    for layer in range(len(spec.layers)):
        for name, seen in {"qkv": "attn_k", "out": "attn_output", "ffn": "ffn", "hidden": "hidden"}.items():
            x = inputs[seen, layer]
            np.testing.assert_array_equal(found.peaks[name][layer], np.abs(x).max(axis=0))
            np.testing.assert_allclose(found.squares[name][layer], np.square(x).mean(axis=0), rtol=1e-5)
            assert found.largest(name, layer) == np.abs(x).max()
            magnitudes = np.abs(x[1:])
            for share in (0.5, 0.99):
                bound = found.largest(name, layer, share)
                assert (magnitudes <= bound).mean() >= share
                assert (magnitudes <= bound * 0.93).mean() < share + 0.001


def test_ranges_are_found_once(model: Model, own_home: Path) -> None:
    said: list[str] = []
    first = model_ranges(model, tokens=32, say=said.append)
    second = model_ranges(model, tokens=32, say=said.append)
    assert len(said) == 1
    assert first.model == second.model == model_identity(model.source)
    for name in INPUTS:
        np.testing.assert_array_equal(first.peaks[name], second.peaks[name])
        np.testing.assert_array_equal(first.squares[name], second.squares[name])
        np.testing.assert_array_equal(first.counts[name], second.counts[name])
    model_ranges(model, tokens=31, say=said.append)
    assert len(said) == 2


def test_a_damaged_file_is_found_again(model: Model, own_home: Path) -> None:
    said: list[str] = []
    model_ranges(model, tokens=16, say=said.append)
    (path,) = (own_home / "ranges").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    model_ranges(model, tokens=16, say=said.append)
    assert len(said) == 2


def test_files_that_are_refused(model: Model, own_home: Path) -> None:
    found = model_ranges(model, tokens=16)
    data, spec = found.to_bytes(), model.spec
    with pytest.raises(ModelError, match="made for another model"):
        Ranges.from_bytes(data, "x.ranges", "another", spec)
    with pytest.raises(ModelError, match="no file of activation ranges"):
        Ranges.from_bytes(b"\x93\x01\x02\x03", "x.ranges", found.model, spec)
    found.peaks["ffn"][1, 2] = np.inf
    with pytest.raises(ModelError, match="do not fit the model"):
        Ranges.from_bytes(found.to_bytes(), "x.ranges", found.model, spec)
    found.peaks["ffn"] = found.peaks["ffn"][:, :-1]
    with pytest.raises(ModelError, match="do not fit the model"):
        Ranges.from_bytes(found.to_bytes(), "x.ranges", found.model, spec)


def test_mutated_files_are_refused_or_harmless(model: Model, own_home: Path) -> None:
    found = model_ranges(model, tokens=8)
    data, rng = found.to_bytes(), np.random.default_rng(0)
    for _ in range(300):
        mutant = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            mutant[at] = rng.integers(256)
        try:
            read = Ranges.from_bytes(bytes(mutant), "x.ranges", found.model, model.spec)
        except ModelError:
            continue
        for name, width in widths(model.spec).items():
            assert read.peaks[name].shape == (3, width)
            assert np.isfinite(read.peaks[name]).all()


def test_the_text_is_short_and_ours() -> None:
    assert len(TEXT.encode()) < 4096


def test_parts_and_sparse_models_are_refused(tmp_path: Path) -> None:
    sparse = understand(open_source(write_tiny(tmp_path / "s.gguf", sparse=True)))
    with pytest.raises(ModelError, match="whole dense models"):
        npu_ranges.model_ranges(sparse)
    sparse.close()
