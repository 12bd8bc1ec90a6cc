"""Counted activations: how they are counted, kept and added up, and what the plan makes of them."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from command_line import coterie, refused
from damage import damaged_bytes, little_memory_and_no_hang, survives
from exact_models import some_tokens
from packed_models import pack, small_extents
from tiny_models import TEXT, write_tiny

from coterie.engine import Engine
from coterie.errors import ModelError, UsageError
from coterie.opening import flash_of, open_model
from coterie.recording import record
from coterie.scheduler.hotness import HOT, allowed_fetches, expected_misses, hot_set
from coterie.scheduler.plan import Wishes
from coterie.scheduler.planner import make_plan
from coterie.sizes import Share
from coterie.storage.activations import Activations, activations_of, load_activations, model_key
from coterie.storage.arrow_file import encode_table

STEPS = 12
SHAPE: dict[str, Any] = {
    "formats": "Q4_0",
    "activation": "relu",
    "sparse": True,
    "dim": 128,
    "ffn": 200,
    "context": 512,
}
LARGE: dict[str, Any] = {"dim": 512, "heads": 8, "head_dim": 64, "ffn": 3000, "layers": 6}
MUTANTS = 1000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "m.gguf", **SHAPE)


def counting(path: Path) -> Engine:
    return Engine(open_model(path), Wishes(threads=2, context=STEPS * 4, counting=True))


def live_by_step(engine: Engine, sequences: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
    """Which neurons were live in each step of these sequences: bool[steps][layers][neurons]."""
    assert engine.layout.shared.uses is not None
    uses, found = engine.arena.numpy(engine.layout.shared.uses), []
    opened = [engine.sequence() for _ in sequences]
    for step in range(STEPS):
        before = uses.copy()
        engine.decode(opened, [tokens[step] for tokens in sequences])
        found.append((uses != before)[:, : engine.spec.ffn_dim])
    for sequence in opened:
        sequence.close()
    return np.array(found)


def quiet(*_: object) -> None:
    pass


def some_counts(seed: int = 0, model: str = "key") -> Activations:
    rng = np.random.default_rng(seed)
    return Activations(model, {1: 10, 2: 7}, {b: rng.integers(0, 8, (3, 40)) for b in (1, 2)})


# --- counting ----------------------------------------------------------------------------------------


def test_a_batch_counts_what_is_live_for_any_of_its_sequences(model: Path) -> None:
    """Against single sequences, one at a time."""
    tokens = some_tokens(STEPS + 20)
    engine = counting(model)
    try:
        found = record(engine, tokens, [1, 3], STEPS, quiet)
        starts = (0, 10, 20)
        single = [live_by_step(engine, [tokens[start:]]) for start in starts]
    finally:
        engine.close()
    assert found.steps == {1: STEPS, 3: STEPS}
    np.testing.assert_array_equal(found.live[1], single[0].sum(axis=0))
    np.testing.assert_array_equal(found.live[3], np.any(single, axis=0).sum(axis=0))
    assert 0 < found.live[1].sum() < found.live[3].sum()


def test_what_cannot_be_counted(model: Path, tmp_path: Path) -> None:
    engine = counting(model)
    for tokens, batches, reason in (
        (some_tokens(4), [1], "too few"),
        (some_tokens(40), [9], "1 to 8"),
        (some_tokens(40), [], "1 to 8"),
    ):
        with pytest.raises(UsageError, match=reason):
            record(engine, tokens, batches, STEPS, quiet)
    engine.close()
    engine = counting(write_tiny(tmp_path / "dense.gguf"))
    with pytest.raises(UsageError, match="not a sparse model"):
        record(engine, some_tokens(40), [1], STEPS, quiet)
    engine.close()


# --- the file ----------------------------------------------------------------------------------------


def test_files_come_back_and_add_up(tmp_path: Path) -> None:
    first, second = some_counts(1), some_counts(2)
    first.save(tmp_path / "a.arrow")
    back = load_activations(tmp_path / "a.arrow")
    both = back.merged(second)
    assert (back.model, back.steps) == (first.model, first.steps)
    assert both.steps == {1: 20, 2: 14}
    for batch in (1, 2):
        np.testing.assert_array_equal(back.live[batch], first.live[batch])
        np.testing.assert_array_equal(both.live[batch], first.live[batch] + second.live[batch])
    alone = Activations("key", {4: 5}, {4: first.live[1] // 2})
    assert back.merged(alone).batches == [1, 2, 4]
    with pytest.raises(UsageError, match="different models"):
        first.merged(some_counts(1, "other"))


def test_larger_batches_count_what_smaller_ones_showed() -> None:
    counts = Activations("key", {1: 10, 2: 10}, {1: np.array([[9, 0, 3]]), 2: np.array([[5, 4, 6]])})
    np.testing.assert_array_equal(counts.frequencies(2), [[0.9, 0.4, 0.6]])
    np.testing.assert_array_equal(counts.order(), [[0, 2, 1]])


def test_counts_belong_to_one_model(model: Path, tmp_path: Path) -> None:
    """Packed copies number their neurons as the file does that they were made of."""
    packed, path = pack(model), tmp_path / "a.arrow"
    with open_model(model).file as gguf, open_model(packed).file as copy:
        assert model_key(gguf) == model_key(copy)
        spec = open_model(model).spec
        Activations(model_key(copy), {1: 3}, {1: np.ones((2, 200), np.int64)}).save(path)
        assert activations_of(path, spec, gguf).steps == {1: 3}
        Activations("other", {1: 3}, {1: np.ones((2, 200), np.int64)}).save(path)
        with pytest.raises(ModelError, match="another model"):
            activations_of(path, spec, gguf)
        Activations(model_key(copy), {1: 3}, {1: np.ones((2, 199), np.int64)}).save(path)
        with pytest.raises(ModelError, match="another model"):
            activations_of(path, spec, gguf)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.drop_columns("steps"), "other columns"),
        (lambda t: t.set_column(2, "steps", pa.array([1.0] * 6)), "other columns"),
        (lambda t: t.slice(1), "every layer once"),
        (lambda t: t.slice(0, 0), "lacks values"),
        (lambda t: t.take([1, 0, 2, 3, 4, 5]), "every layer once"),
        (lambda t: t.set_column(2, "steps", pa.array([2] * 6)), "cannot be"),
        (lambda t: t.set_column(2, "steps", pa.array([1 << 50] * 6)), "cannot be"),
        (lambda t: t.set_column(2, "steps", pa.array([10, 10, 11, 10, 10, 10])), "different numbers of steps"),
        (lambda t: t.set_column(2, "steps", pa.array([10, None, 10, 10, 10, 10])), "lacks values"),
        (lambda t: t.replace_schema_metadata({}), "version 1"),
    ],
)
def test_tables_that_are_no_counts(change: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    path.write_bytes(encode_table(change(some_counts().table())).to_pybytes())
    with pytest.raises(ModelError, match=reason):
        load_activations(path)


def test_damaged_files_are_refused_or_harmless(tmp_path: Path) -> None:
    path, chance = tmp_path / "a.arrow", random.Random(1)
    content = encode_table(some_counts().table()).to_pybytes()
    path.write_bytes(content)
    load_activations(path)
    sound = 0
    with little_memory_and_no_hang():
        for _ in range(MUTANTS):
            path.write_bytes(damaged_bytes(chance, content, len(content)))
            sound += survives(load_activations, path)
    assert sound < MUTANTS / 2  # counts have no checksum: some changes cannot be seen


# --- the plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_hot_sets(seed: int) -> None:
    """Checklist rows 2, 3: the most frequent neurons, no fewer for larger batches or a faster disk, and no more to
    fetch than attention's time allows."""
    rng = np.random.default_rng(seed)
    counts = Activations(
        "key", dict.fromkeys((1, 2, 4, 8), 100), {b: rng.integers(0, 101, (1, 300)) for b in (1, 2, 4, 8)}
    )
    resident, bundle, seconds = rng.random(300) < 0.4, 4608, 1e-3
    sizes = []
    for batch in counts.batches:
        frequency = counts.frequencies(batch)[0]
        before: set[int] = set()
        for bandwidth in (1e7, 1e8, 1e9, 1e12):
            ids = hot_set(frequency, resident, allowed_fetches(bandwidth, seconds, bundle))
            assert np.count_nonzero(~resident[ids]) * bundle / bandwidth <= seconds
            assert frequency[ids].min(initial=1) >= max(HOT, frequency[np.setdiff1d(np.arange(300), ids)].max() - 0.5)
            assert before <= set(ids.tolist())
            before = set(ids.tolist())
            np.testing.assert_array_equal(
                ids, hot_set(frequency, resident, allowed_fetches(bandwidth, seconds, bundle))
            )
        assert before == set(np.flatnonzero(frequency >= HOT).tolist())
        sizes.append(len(before))
    assert sizes == sorted(sizes)
    assert allowed_fetches(None, seconds, bundle) == allowed_fetches(1e9, None, bundle) == 0


@pytest.mark.parametrize("slots", [50, 200, 600])
def test_expected_misses_are_those_of_a_simulated_cache(slots: int) -> None:
    """An LRU cache over neurons that are live independently of what was before."""
    rng = np.random.default_rng(slots)
    frequency = np.minimum(1, 0.05 * rng.pareto(1.2, 1000))
    stamps, missed, steps = np.full(1000, -1), [], 600
    for step in range(steps):
        live = np.flatnonzero(rng.random(1000) < frequency)
        held = np.argsort(-stamps, kind="stable")[:slots]
        missed.append(np.setdiff1d(live, held[stamps[held] >= 0]).size)
        stamps[live] = step
    assert expected_misses(frequency, slots) == pytest.approx(np.mean(missed[steps // 3 :]), rel=0.1)


def test_no_misses_where_everything_fits() -> None:
    assert expected_misses(np.array([0.5, 0.0, 0.25]), 2) == 0
    assert expected_misses(np.zeros(3), 0) == 0
    assert expected_misses(np.array([0.5, 0.25]), 0) == pytest.approx(0.75)


def test_the_plan_says_what_it_expects(tmp_path: Path) -> None:
    with small_extents():
        model = pack(write_tiny(tmp_path / "m.gguf", **SHAPE | LARGE))
        opened = open_model(model)
        live = np.tile(np.arange(3000)[::-1] // 30, (6, 1))
        counts = Activations(model_key(opened.file), {1: 100}, {1: live})
        missing = []
        for share in (0.97, 0.9, 0.8):
            wishes = Wishes(memory=Share(share), activations=counts)
            plan, _ = make_plan(opened.file, opened.spec, wishes, flash_of(opened.file, opened.spec, wishes))
            (activity,) = plan.activity
            assert activity.live == pytest.approx(6 * 49.5 * 30)
            assert activity.line() in plan.lines()
            missing.append(activity.missing)
        assert 0 <= missing[0] < missing[1] < missing[2] < activity.live
        opened.close()


def test_a_model_is_ordered_by_its_counts(tmp_path: Path) -> None:
    """Packed by counts of the plain packing, neurons that are live often come first, and every neuron is there once."""
    dense = write_tiny(tmp_path / "d.gguf", **SHAPE | {"sparse": False, "ffn": 224})
    text, counts, plain, ordered = (tmp_path / name for name in ("t.txt", "c.arrow", "p.coterie", "o.coterie"))
    text.write_text(TEXT * 4)
    assert coterie("pack", "--sparse", str(dense), "-o", str(plain)).exit_code == 0
    count = "-f", str(text), "-n", "40", "--batches", "1"
    assert coterie("profile", "--activations", str(counts), str(plain), *count).exit_code == 0
    pack = "pack", "--sparse", str(dense), "--activations", str(counts)
    assert coterie(*pack, "-o", str(ordered)).exit_code == 0
    again = tmp_path / "again.arrow"
    assert coterie("profile", "--activations", str(again), str(ordered), *count).exit_code == 0
    before, after = (load_activations(path).live[1] for path in (counts, again))
    np.testing.assert_array_equal(-np.sort(-before[0]), after[0])  # later layers differ in rounding
    assert before.sum() == pytest.approx(after.sum(), rel=0.02)
    refused(coterie(*pack[:2], str(plain), *pack[3:], "-o", str(ordered)), "packed model")
    refused(coterie(*pack[:3], "--activations", str(again), "-o", str(ordered)), "another model", code=3)
    refused(coterie("pack", *pack[2:]), "--activations goes with --sparse")


# --- the command -------------------------------------------------------------------------------------


def test_counting_adds_to_a_file(model: Path, tmp_path: Path) -> None:
    counts, text = tmp_path / "counts.arrow", tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    arguments = "profile", "--activations", str(counts), str(model), "-f", str(text), "-n", "8", "--batches", "1,2"
    for steps in (8, 16):
        result = coterie(*arguments)
        assert result.exit_code == 0, result.output
        assert f"over {steps} steps" in result.stdout
    assert load_activations(counts).steps == {1: 16, 2: 16}
    result = coterie("plan", str(model), "--activations", str(counts))
    assert "batch 2: " in result.stdout
    refused(coterie(*arguments[:-1], "1,x"), "1,x", "numbers with commas")
    refused(coterie(*arguments[:4]), "which text", "-f FILE")
    refused(coterie(*arguments, "--flash"), "one at a time")
    refused(coterie(*arguments, "--memory", "auto"), "--memory auto changes")
    refused(coterie(*arguments[:-1], "9"), "from 1 to 8")
    refused(coterie(*arguments[:-4], "-n", "256", "--batches", "4"), "takes 1024 positions, the model has 512")
    refused(coterie("profile", "--activations", str(tmp_path / "no" / "c"), *arguments[3:]), "cannot write")
    refused(coterie("profile", "-m", str(model)), "--activations")
    counts.write_bytes(b"nonsense")
    refused(coterie(*arguments), str(counts), "no Arrow table", code=3)
    refused(coterie("plan", str(model), "--activations", str(counts)), "no Arrow table", code=3)
    refused(coterie("plan", str(model), "--activations", str(tmp_path / "none")), "cannot read")
