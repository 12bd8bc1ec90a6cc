"""Trained predictors: what they find and leave out, by their own figures and by the engine's counts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import coterie, refused
from exact_models import decoded
from learnable_models import SIZES, some_text, write, write_learnable
from numpy.typing import NDArray
from packed_models import pack
from reference import nmse, same_bits
from tiny_models import write_tiny

from coterie.engine import Engine
from coterie.errors import ModelError
from coterie.models import predictor, predictor_training
from coterie.models.gguf_file import GGUFFile
from coterie.models.load import Model
from coterie.models.predictor_training import Training
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes

TEXT = some_text(6000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictor")
    write_learnable(folder / "m.gguf")
    (folder / "text").write_text(TEXT)
    return folder


def train(folder: Path, model: str, *more: str, out: str = "") -> dict[str, Any]:
    """What the command says of the packed model it wrote."""
    path = folder / (out or f"{model}.coterie")
    words = ("train-predictor", str(folder / model), "-f", str(folder / "text"), "-o", str(path), "--json", *more)
    result = coterie(*words)
    assert result.exit_code == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout)
    assert facts["path"] == str(path)
    return facts


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    return train(folder, "m.gguf", "--recall", "0.96")


@contextmanager
def running(path: Path) -> Iterator[Engine]:
    engine = Engine(open_model(path), Wishes(threads=2, context=2 * predictor.CHUNK, counting=True))
    try:
        yield engine
    finally:
        engine.close()


def held_out(model: Model) -> list[list[int]]:
    """The chunks of the text that are not trained on."""
    chunks = predictor.cut(model.tokenizer.encode(TEXT), [])
    return chunks[-predictor.held_out(len(chunks)) :]


def live_sets(engine: Engine) -> NDArray[np.bool_]:
    """Which neurons were computed, bool[tokens, layers, neurons], by the engine's counts while it decodes what is held
    out."""
    assert engine.layout.shared.uses is not None
    uses, counts = engine.arena.numpy(engine.layout.shared.uses), [0]
    before, sets = uses.copy(), []
    for chunk in held_out(engine.model):
        sequence = engine.sequence()
        for token in chunk:
            engine.decode([sequence], [token])
            sets.append(uses != before)
            before = uses.copy()
            counts.append(engine.unit.neuron_counts()[0])
        sequence.close()
    assert np.diff(counts).tolist() == [int(found.sum()) for found in sets]
    return np.stack(sets)


# --- what they do ------------------------------------------------------------------------------------


def test_they_find_what_is_live_and_skip_the_rest(facts: dict[str, Any]) -> None:
    for layer in (facts, *facts["layers"]):
        assert layer["recall"] >= 0.95
        assert layer["skipped"] >= 0.80
        assert layer["live"] >= 0.05  # or it would be easy
    assert facts["held_out_tokens"] == 2 * predictor.CHUNK
    assert facts["numerics"].startswith("lossy")
    assert facts["perplexity_lossy"] != facts["perplexity_exact"]
    assert facts["perplexity_lossy"] == pytest.approx(facts["perplexity_exact"], rel=0.02)
    units, width, neurons, row = 32, SIZES["dim"], SIZES["ffn"], 34
    assert facts["predictor_bytes"] == 2 * (units * width + neurons * units) // 32 * row
    assert facts["network_bytes"] == 2 * 3 * neurons * width // 32 * row
    assert facts["saved_bytes_per_token"] == pytest.approx(facts["network_bytes"] * facts["skipped"], abs=2)


def test_the_engine_counts_the_same(folder: Path, facts: dict[str, Any]) -> None:
    with running(folder / "m.gguf") as engine:
        live = live_sets(engine)
    with running(Path(facts["path"])) as engine:
        assert engine.plan.numerics == facts["numerics"]
        chosen = live_sets(engine)
    assert len(live) == facts["held_out_tokens"]
    for i, layer in enumerate(facts["layers"]):
        recall = (chosen & live)[:, i].sum() / live[:, i].sum()
        skipped = 1 - chosen[:, i].mean()
        assert recall >= 0.95
        assert skipped >= 0.80
        assert recall == pytest.approx(layer["recall"], abs=0.01)  # the engine's integers, and what went missing before
        assert skipped == pytest.approx(layer["skipped"], abs=0.01)


def test_logits_are_near_those_of_all_neurons(folder: Path, facts: dict[str, Any]) -> None:
    train(folder, "m.gguf", "--recall", "0.999", out="careful.coterie")
    logits = []
    for path in (folder / "m.gguf", Path(facts["path"]), folder / "careful.coterie"):
        with running(path) as engine:
            logits.append(decoded(engine, held_out(engine.model)[-1]))
    usual, careful = (nmse(each, logits[0]) for each in logits[1:])
    assert usual < 0.02
    assert 0 < careful < usual / 4


def trained(path: Path, recall: float = 0.95, seed: int = 0) -> predictor.Trained:
    """Predictors of 32 units, learnt from a shorter text."""
    model = open_model(path)
    chunks = predictor.cut(model.tokenizer.encode(TEXT[:3000]), [])
    wanted = Training(32, "Q8_0", recall, seed)
    found = predictor.train(model.source, model.spec, chunks, wanted, lambda label, done, total: None)
    model.close()
    return found


def test_a_predictor_wide_enough_begins_as_gate_itself() -> None:
    rng = np.random.default_rng(0)
    gate, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((40, 16), (200, 16)))
    first, second = predictor_training.begin(gate, x, 32, rng)
    found = predictor_training.scores(first, second, x)
    assert (np.sign(found) == np.sign(x @ gate.T)).mean() > 0.999


def test_gradients_are_the_slopes_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 5), (12, 8)))
    x, live = rng.standard_normal((30, 5)).astype(np.float32), rng.random((30, 12)) < 0.3

    def loss() -> float:
        return 12 * predictor_training.loss_of(predictor_training.scores(first, second, x), live)

    for matrix, found in zip((first, second), predictor_training.gradients(first, second, x, live), strict=True):
        for place in ((0, 0), (3, 2), (7, 4)):
            here = matrix[place]
            matrix[place] = here + 0.003
            above = loss()
            matrix[place] = here - 0.003
            assert found[place] == pytest.approx((above - loss()) / 0.006, abs=0.005)
            matrix[place] = here


def test_training_is_better_than_where_it_begins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = predictor.Figures.total(trained(folder / "m.gguf").figures)
    monkeypatch.setattr(predictor_training, "EPOCHS", 0)
    before = predictor.Figures.total(trained(folder / "m.gguf").figures)
    assert before.recall >= 0.95
    assert after.chosen < 0.75 * before.chosen


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictors stay nearly as they begin, which is quick."""
    monkeypatch.setattr(predictor_training, "EPOCHS", 1)


@pytest.mark.usefixtures("untrained")
def test_recall_is_what_was_asked_for(folder: Path) -> None:
    skipped = []
    for recall in (0.5, 0.8, 0.99, 1.0):
        figures = trained(folder / "m.gguf", recall=recall).figures
        assert all(recall <= layer.recall <= recall + 0.01 for layer in figures)
        skipped.append(predictor.Figures.total(figures).skipped)
    assert skipped == sorted(skipped, reverse=True)


@pytest.mark.usefixtures("untrained")
def test_the_same_seed_gives_the_same_predictors(folder: Path) -> None:
    first, again, other = (trained(folder / "m.gguf", seed=seed).predictors for seed in (1, 1, 2))
    for one, same in zip(first, again, strict=True):
        assert same_bits(one.first, same.first)
        assert same_bits(one.second, same.second)
    assert not same_bits(first[0].second, other[0].second)


@pytest.mark.usefixtures("untrained")
def test_live_with_drelu_is_what_both_let_pass(folder: Path) -> None:
    path = write_learnable(folder / "drelu.gguf", activation="drelu")
    relu, drelu = (trained(each).figures[0] for each in (folder / "m.gguf", path))
    assert drelu.live < 0.6 * relu.live
    assert drelu.recall >= 0.95


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("format", ["Q4_0", "F16"])
def test_predictors_in_other_formats_take_the_place_of_older_ones(format: str, folder: Path) -> None:
    """Q4_0 and F16; the model has predictors of another width already."""
    path = write_tiny(folder / f"old {format}.gguf", sparse=True, oracle=True, activation="relu", formats="Q4_0")
    found = train(folder, path.name, "--rank", "64", "--format", format)
    assert found["rank"] == 64
    with running(Path(found["path"])) as engine:
        assert engine.spec.predictor == 64
        tensors = engine.model.file.tensors
        assert {tensors[f"blk.{i}.{name}.weight"].format for i in (0, 1) for name in ("fc1", "fc2")} == {format}
        assert np.isfinite(decoded(engine, held_out(engine.model)[0])).all()


# --- what cannot be ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("", "give -f FILE"),
        ("-f text", "give -o FILE"),
        ("-f none -o o.coterie", "cannot read"),
        ("-f text -o o.coterie --tokens 500", "500 tokens, training needs 512"),
        ("-f text -o o.coterie --rank 33", "multiple of 32"),
        ("-f text -o o.coterie --rank 0", "multiple of 32"),
        ("-f text -o o.coterie --rank 1048576", "up to the model's width, 64"),
        ("-f text -o o.coterie --recall 0", "recall 0"),
        ("-f text -o o.coterie --recall nan", "recall nan"),
        ("-f text -o o.coterie --format Q6_K", "Q8_0, Q4_0, F16"),
        ("-f text -o no-such-folder/o.coterie", "no-such-folder"),
        ("-f text -o text", "is no packed model"),
    ],
)
def test_wishes_that_make_no_sense(words: str, reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    refused(coterie("train-predictor", "m.gguf", *words.split()), reason)
    assert (folder / "text").read_text() == TEXT
    assert not list(folder.glob("*o.coterie*"))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"sparse": True, "activation": "relu", "formats": "F16", "dim": 72}, "no Q8_0 blocks"),
        ({"activation": "relu"}, "coterie pack --sparse"),
        ({}, "leaves no neuron idle"),
    ],
)
def test_models_that_cannot_have_them(model: dict[str, Any], reason: str, folder: Path) -> None:
    path = write_tiny(folder / "other.gguf", **model)
    words = "-f", str(folder / "text"), "-o", str(folder / "o.coterie")
    refused(coterie("train-predictor", str(path), *words), reason)


def test_a_packed_model_is_refused(folder: Path) -> None:
    path = pack(folder / "m.gguf")
    refused(coterie("train-predictor", str(path), "-f", str(folder / "text"), "-o", "o.coterie"), "needs the GGUF")


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(("value", "reason"), [(np.nan, "holds a weight that is not a number"), (1e38, "layer 1")])
def test_weights_that_are_no_numbers(value: float, reason: str, folder: Path) -> None:
    path = write_learnable(folder / "damaged.gguf", formats="F32")
    name = "blk.1.ffn_up.weight"
    with GGUFFile(path) as file:
        matrix = file.floats(name)
        matrix[:, 5] = value
        write(file, {name: matrix})
    words = "-f", str(folder / "text"), "-o", str(folder / "o.coterie"), "--tokens", "512"
    refused(coterie("train-predictor", str(path), *words), reason, code=3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fc2": None}, "'blk.0.fc2.weight' is missing"),
        ({"fc1": None}, "'blk.0.fc2.weight' has no place"),
        ({"fc2": (512, 64)}, "is 512 x 64, but the metadata call for 512 x 32"),
        ({"fc2": (511, 32)}, "is 511 x 32"),
        ({"fc1": (32, 32)}, "is 32 x 32"),
    ],
)
def test_predictors_of_the_wrong_shape(change: dict[str, Any], reason: str, folder: Path) -> None:
    from coterie.models.load import understand
    from coterie.models.source import DerivedModel, Made

    shapes = {"fc1": (32, 64), "fc2": (512, 32)} | change
    made = {
        f"blk.{i}.{name}.weight": Made("F32", shape, lambda rows: np.zeros(0, np.uint8))
        for name, shape in shapes.items()
        if shape
        for i in (0, 1)
    }
    with pytest.raises(ModelError, match=reason):
        understand(DerivedModel(GGUFFile(folder / "m.gguf"), made, salt="wrong"))


def test_predictors_that_are_no_numbers_are_not_packed(folder: Path) -> None:
    path = write_tiny(folder / "nan.gguf", sparse=True, oracle=True, activation="relu")
    with GGUFFile(path) as file:
        rows = file.floats("blk.1.fc2.weight")
        rows[7, 3] = np.inf
        write(file, {"blk.1.fc2.weight": rows})
    with pytest.raises(ModelError, match=r"'blk.1.fc2.weight' holds a weight that is not a number"):
        pack(path)
