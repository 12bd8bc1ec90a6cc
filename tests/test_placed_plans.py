"""Plan files that say who does what: rows by unit, in TOML and on the wire, sound and wrong; what is said is done."""

import random
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import pytest
from damage import GIANTS, damaged_bytes, little_memory_and_no_hang, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_graphs import PlainGraphs
from sparse_models import write_gated
from tiny_models import write_tiny

from coterie import others
from coterie.divergence import divergences
from coterie.engine import Engine
from coterie.errors import PlanError
from coterie.opening import flash_of, open_model, open_to_run, plan_identity
from coterie.scheduler.balance import Given
from coterie.scheduler.placement import DECODE, ROW_KINDS, Placement, fitting, most_first
from coterie.scheduler.placement import KINDS as PROMPTS
from coterie.scheduler.plan import MAX_LANES, Wishes
from coterie.scheduler.plan_file import (
    MAX_BYTES,
    format_plan,
    plan_from_bytes,
    plan_to_bytes,
    read_decisions,
    read_plan,
)
from coterie.scheduler.plan_schema import KINDS, OTHER, Decisions, parse, tables
from coterie.scheduler.planner import make_plan
from coterie.scheduler.profile import machine
from coterie.storage.activations import Activations, model_key

MUTANTS = 1500
NEAR = 1e-6  # KL of units that differ by float rounding only
UNITS = ("cpu",), ("gpu",), ("cpu", "gpu"), ("cpu", "npu"), ("cpu", "gpu", "npu")


@st.composite
def cuts(draw: st.DrawFn) -> Given:
    of = draw(st.integers(1, 64))
    points = tuple(sorted(draw(st.sets(st.integers(1, of), min_size=1, max_size=6))))
    return Given(draw(st.sampled_from((0, *points))), of, points)


@st.composite
def decisions(draw: st.DrawFn) -> Decisions:
    """Anything that a plan may decide."""
    units, chunk = draw(st.sampled_from(UNITS)), 8 * draw(st.integers(1, 64))
    prefill = draw(st.sampled_from(units))
    decode = draw(st.sampled_from([unit for unit in units if unit != "npu"]))
    units = tuple(unit for unit in ("cpu", "gpu", "npu") if unit in units and unit in ("cpu", prefill, decode))
    split = draw(st.sampled_from(("layer", "tensor"))) if "cpu" in units else "layer"
    lengths: tuple[int, ...] = ()
    if prefill == "npu":
        found = draw(st.sets(st.integers(1, chunk // 8), min_size=1, max_size=4))
        lengths = tuple(sorted(8 * length for length in found))
    shared = [kind for kind in KINDS["prefill"] if OTHER[kind] == prefill] + [*DECODE] * ("gpu" in units)
    shared += [*ROW_KINDS] * ("gpu" not in units and prefill == "npu")
    given = {kind: Given.whole() for kind in shared if kind in PROMPTS}
    if split == "tensor":
        given |= {kind: draw(cuts()) for kind in shared}
        first = draw(cuts())
        if prefill == "npu" and "gpu" in units and most_first(lengths, chunk, first.of) >= max(1, first.parts):
            given |= fitting(first, lengths, chunk)  # three units share a prompt
    if units == ("cpu", "gpu") and prefill == decode == "gpu" and split == "layer":
        units = ("gpu",)
    placement = Placement(prefill, decode, lengths, split, given, draw(st.integers(0, MAX_LANES)), draw(st.booleans()))
    flash = draw(st.none() | st.tuples(st.integers(1, 64).map(lambda n: 4096 * n), st.integers(1, 1024)))
    sizes = sorted(draw(st.sets(st.integers(1, 8), max_size=4)))
    hot = sorted(draw(st.lists(st.integers(0, 1000), min_size=len(sizes), max_size=len(sizes))))
    return Decisions(
        draw(st.text(st.characters(categories=("L", "N", "P")), max_size=20)),
        draw(st.text("0123456789abcdef", min_size=32, max_size=64)),
        draw(st.sampled_from(("0123456789abcdef", "snapdragon-8gen3"))),
        draw(st.integers(1, 1 << 20)),
        draw(st.integers(1, MAX_LANES)),
        chunk,
        units,
        placement,
        draw(st.integers(1, 1 << 20)),
        4096 * draw(st.integers(0, 1 << 10)) if flash else 0,
        draw(st.integers(0, 1 << 20)) if flash else 0,
        draw(st.none() | st.integers(1, 1 << 40)),
        flash,
        {size: (count, 1000 - count) for size, count in zip(sizes, hot, strict=True)},
    )


@pytest.fixture(scope="module")
def gguf(folder: Path) -> Path:
    return write_tiny(folder / "tiny.gguf", formats="F32", window=24)


@pytest.fixture(scope="module")
def sound(gguf: Path) -> str:
    """A plan file's text: prompts cut between CPU and NPU."""
    model = open_model(gguf)
    wishes = Wishes(threads=2, context=512, chunk=128, units=("cpu", "npu"), split="tensor", memory=1 << 30)
    plan, _ = make_plan(model.file, model.spec, wishes)
    made = Decisions.of(plan, plan_identity(model.file), machine())
    model.close()
    assert made.placement.lengths == (128,)
    made = replace(made, hot={1: (10, 90), 4: (30, 70)})
    return format_plan(made, plan, ["predicted: soon"])


# --- two forms of the same -----------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(decisions())
def test_both_forms_give_back_what_was_decided(made: Decisions) -> None:
    assert parse(tables(made), "it") == made
    from_toml = parse(tomllib.loads(format_plan(made, PLAN)), "it")
    assert from_toml == plan_from_bytes(plan_to_bytes(from_toml)) == made
    assert plan_to_bytes(from_toml) == plan_to_bytes(made)


PLAN: Any = SimpleNamespace(regions={}, streamed_per_token=0, bytes_per_token=1, lines=list)  # for comments


def test_the_file_says_who_computes_which_rows(sound: str) -> None:
    cut = tomllib.loads(sound)["prefill"]["cuts"]["ffn"]
    assert cut["pieces"] == [{"unit": "npu", "first": 0, "last": 4}, {"unit": "cpu", "first": 4, "last": 8}]
    assert "# predicted: soon" in sound.splitlines()
    assert parse(tomllib.loads(sound), "it").hot == {1: (10, 90), 4: (30, 70)}


PAGE = Path(__file__).parent.parent / "docs" / "plan.md"


@pytest.mark.skipif(not PAGE.exists(), reason="an sdist has no docs")
def test_the_page_s_example_is_sound_and_names_every_key() -> None:
    page = PAGE.read_text()
    example = tomllib.loads(page.split("```toml\n")[1].split("```")[0])
    made = parse(example, "docs/plan.md")
    assert tables(made) == example
    every = replace(made, flash=(4096, 1), hot={1: (1, 1)})
    assert all(f"`{key}`" in page for key in keys_of(tables(every)))


def keys_of(table: dict[str, Any]) -> set[str]:
    """All keys but tables', in tables in tables and in lists."""
    found = set[str]()
    for key, value in table.items():
        inner = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, dict)]
        found |= ({key} if not isinstance(value, dict) else set()).union(*map(keys_of, inner))
    return found


# --- what is wrong -------------------------------------------------------------------------------------

NPU, CPU = "{unit = 'npu', first = 0, last = 4}", "{unit = 'cpu', first = 4, last = 8}"
WRONG = [
    ([("ffn", "pieces", f"[{NPU}, {CPU.replace('4,', '3,')}]")], r"prefill.cuts.ffn.pieces\[1\] overlaps .* ends at 4"),
    ([("ffn", "pieces", f"[{NPU}, {CPU.replace('4,', '5,')}]")], r"leaves a gap: parts 4 to 5 are nobody's"),
    ([("ffn", "pieces", f"[{NPU}]")], r"prefill.cuts.ffn.pieces leave a gap: parts 4 to 8"),
    ([("ffn", "pieces", f"[{NPU.replace('4', '0')}, {CPU}]")], r"is empty: it begins at 0 and ends at 0"),
    ([("ffn", "pieces", f"[{NPU.replace('npu', 'tpu')}, {CPU}]")], r"unit is 'tpu': there is npu, cpu"),
    ([("ffn", "pieces", f"[{CPU.replace('4', '0')}, {NPU}]")], r"overlaps"),
    ([("ffn", "pieces", "[{unit = 'cpu', first = 0, last = 4}, {unit = 'npu', first = 4, last = 8}]")], "are cpu, npu"),
    ([("ffn", "pieces", f"[{NPU}, {CPU.replace('8', '9')}]")], r"last is 9, but must be a whole number from 0 to 8"),
    ([("ffn", "pieces", "[]")], r"must be a list of 1 to"),
    ([("ffn", "points", "[2, 5]")], r"points has no 4, which the npu is to compute"),
    ([("ffn", "points", "[4, 2]")], r"must be ascending"),
    ([("ffn", "of", "nan")], r"ffn.of is nan"),
    ([("units", "names", '["cpu"]')], r"prefill.unit is 'npu': there is cpu"),
    ([("units", "names", '["cpu", "gpu", "npu"]')], r"units.names has gpu, which neither"),
    ([("units", "names", '["cpu", "cpu", "npu"]')], r"name each once"),
    ([("units", "names", '["npu"]')], r"units.names is npu: .*needs the CPU unit"),
    ([("units", "split", '"layer"')], r"prefill.cuts has no meaning"),
    ([("units", "flags", "1")], r"units.flags is 1, but must be true or false"),
    ([("units", "split", '"rows"')], r"units.split is 'rows': there is layer, tensor"),
    ([("decode", "unit", '"npu"')], r"decode.unit is 'npu': there is cpu"),
    ([("prefill", "lengths", "[256]")], r"prefill.lengths is 256, but must be a whole number from 8 to 128"),
    ([("prefill", "lengths", "[]")], r"prefill.lengths must be a list"),
    ([("cpu", "left", "-1")], r"cpu.left is -1"),
    ([("batch", "splits", "[{size = 2, hot = 1, cold = 1}, {size = 1, hot = 1, cold = 1}]")], r"sizes ascend"),
    ([("batch", "splits", "[{size = 1, hot = 2, cold = 1}, {size = 2, hot = 1, cold = 2}]")], r"fewer than the 2"),
    ([("residency", "ring", "4096")], r"residency streams weights, but there is no table flash"),
]


def test_a_gpu_leaves_as_many_tokens_as_graphs_take(sound: str) -> None:
    values = tomllib.loads(sound)
    values["units"]["names"], values["cpu"]["chunk"] = ["cpu", "gpu", "npu"], 192
    cuts = values["prefill"]["cuts"]
    for first in (10, 11):
        pieces = [{"unit": "gpu", "first": 0, "last": first}, {"unit": "cpu", "first": first, "last": 32}]
        cuts["tokens"] = {"of": 32, "pieces": pieces}
        if first == 10:
            assert parse(values, "it").placement.cuts["tokens"] == Given(10, 32, tuple(range(1, 11)))
    with pytest.raises(
        PlanError, match=r"it: prefill.cuts.tokens can give the gpu 10 of 32 parts at most: of a chunk's 192 tokens"
    ):
        parse(values, "it")


def edited(text: str, table: str, key: str, value: str) -> str:
    """A plan file with another value; of cuts only the kind is named."""
    lines, here = text.splitlines(), ""
    for at, line in enumerate(lines):
        if line.startswith("["):
            here = line.split("]")[0].strip("[").rpartition(".")[2]
        if here == table and line.startswith(f"{key} = "):
            lines[at] = f"{key} = {value}"
            return "\n".join(lines)
    raise AssertionError(f"there is no {table}.{key}")


def test_a_token_is_cut_between_two_units(sound: str) -> None:
    values = tomllib.loads(sound)
    values["units"]["names"] = ["cpu", "gpu", "npu"]
    values["decode"]["cuts"]["head"] = {"of": 1, "pieces": [{"unit": "gpu", "first": 0, "last": 1}]}
    with pytest.raises(PlanError, match="cuts are with the gpu and with the npu: a token is cut between two units"):
        parse(values, "it")
    for kind in ROW_KINDS:
        del values["decode"]["cuts"][kind]
    assert parse(values, "it").placement.shares_decode
    values["decode"] = {
        "unit": "gpu",
        "cuts": {"row_ffn": {"of": 1, "pieces": [{"unit": "npu", "first": 0, "last": 1}]}},
    }
    with pytest.raises(PlanError, match=r"decode.cuts with the npu need prefill.unit npu and decode.unit cpu"):
        parse(values, "it")


@pytest.mark.parametrize(("edits", "named"), WRONG)
def test_what_is_wrong_is_one_line(sound: str, tmp_path: Path, edits: list[tuple[str, str, str]], named: str) -> None:
    path, text = tmp_path / "plan.toml", sound
    for edit in edits:
        text = edited(text, *edit)
    path.write_text(text)
    with pytest.raises(PlanError, match=named) as refused:
        read_decisions(path)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"{path}: ")
    with pytest.raises(PlanError, match=named):  # what is refused here is refused there
        plan_from_bytes(msgpack.packb(tomllib.loads(text)))


def test_neurons_of_another_model_are_refused(gguf: Path, sound: str, tmp_path: Path) -> None:
    path, model = tmp_path / "plan.toml", open_model(gguf)
    path.write_text(sound)
    with pytest.raises(PlanError, match=r"10 hot and 90 cold neurons \(batch 1\) is not one for this model"):
        make_plan(model.file, model.spec, read_plan(path, Wishes()))
    model.close()


def test_hot_neurons_of_counted_activations_are_in_the_plan_and_come_back(folder: Path) -> None:
    path, model = folder / "sparse.toml", open_model(write_gated(folder / "sparse.gguf"))
    layers, neurons = len(model.spec.layers), model.spec.ffn_dim
    live = {batch: np.tile(np.arange(neurons) % (4 + 2 * batch), (layers, 1)) for batch in (1, 4)}
    counts = Activations(model_key(model.file), {1: 8, 4: 16}, live)
    wishes = Wishes(threads=2, context=512, activations=counts)
    plan, _ = make_plan(model.file, model.spec, wishes, flash_of(model.file, model.spec, wishes))
    assert list(plan.hot) == [1, 4]
    assert 0 < plan.hot[1] <= plan.hot[4] < plan.neurons
    path.write_text(format_plan(Decisions.of(plan, plan_identity(model.file), machine()), plan))
    told = read_plan(path, Wishes())
    again, _ = make_plan(model.file, model.spec, told, flash_of(model.file, model.spec, told))
    model.close()
    assert again.hot == plan.hot
    assert f"batch 4: {plan.hot[4]:,} neurons hot" in again.lines()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x93",
        b"\x91" * 5000,
        msgpack.packb([1]),
        msgpack.packb({b"version": 5}),
        msgpack.packb({"version": 4}),
        msgpack.packb({"version": 5, "x": msgpack.ExtType(1, b"x")}),
        b"\xdd\xff\xff\xff\xff",
        b"\xa4\xff\xfe\xfd\xfc",
        bytes(MAX_BYTES + 1),
    ],
)
def test_what_is_no_plan_on_the_wire_is_one_line(data: bytes) -> None:
    assert not survives(plan_from_bytes, data)


def odd(chance: random.Random, value: Any) -> Any:
    """A value in the place of another one."""
    near = [value + by for by in (-8, -1, 1, 8)] if type(value) is int else []
    others = [None, True, -1, 1.5, float("nan"), "", "x" * 2000, [], [[]], {}, {"a": 1}, chance.choice(GIANTS), value]
    return chance.choice(near * 4 + others)


def changed(chance: random.Random, table: Any) -> Any:
    """Nested tables with one thing changed, left out, or added."""
    if isinstance(table, list) and table:
        at = chance.randrange(len(table))
        new = changed(chance, table[at])
        return chance.choice(([*table[:at], new, *table[at + 1 :]], table[:at] + table[at + 1 :], [*table, table[at]]))
    if not isinstance(table, dict) or not table:
        return odd(chance, table)
    key = chance.choice(list(table))
    match chance.randrange(12):
        case 0:
            return {name: value for name, value in table.items() if name != key}
        case 1:
            return table | {chance.choice(("unit", "k" * 3000, "\x1b", "of")): chance.choice((0, {}, []))}
        case 2:
            return table | {key: odd(chance, table[key])}
    return table | {key: changed(chance, table[key])}


def test_mutants_of_both_forms_are_refused_in_one_line_or_sound(sound: str, tmp_path: Path) -> None:
    chance, path, values = random.Random(5), tmp_path / "mutant.toml", tomllib.loads(sound)
    wire = plan_to_bytes(parse(values, "it"))
    accepted: list[Decisions] = []

    def from_wire(data: bytes) -> None:
        accepted.append(plan_from_bytes(data))

    def from_file(data: bytes) -> None:
        path.write_bytes(data)
        accepted.append(read_decisions(path))

    with little_memory_and_no_hang():
        for _ in range(MUTANTS):
            survives(from_wire, damaged_bytes(chance, wire, len(wire)))
            survives(from_wire, msgpack.packb(changed(chance, values)))
            survives(from_file, damaged_bytes(chance, sound.encode(), len(sound)))
    assert MUTANTS // 20 < len(accepted) < 2 * MUTANTS
    for made in accepted:  # whatever is accepted means the same in both forms
        assert plan_from_bytes(plan_to_bytes(made)) == made


# --- what is said is done ------------------------------------------------------------------------------


def prompts(engine: Engine, lengths: list[int]) -> np.ndarray:
    rng, found = np.random.default_rng(1), []
    for length in lengths:
        sequence = engine.sequence()
        ids = rng.integers(0, engine.spec.vocab, length).tolist()
        found.append(engine.prefill(sequence, ids, range(length)))
        sequence.close()
    return np.concatenate(found)


def test_a_plan_that_is_edited_by_hand_is_followed(
    gguf: Path, sound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "Graphs", PlainGraphs)
    path, text = tmp_path / "plan.toml", "\n".join(sound.splitlines()[: sound.splitlines().index("[batch]")])
    pieces = "[{unit = 'npu', first = 0, last = 6}, {unit = 'cpu', first = 6, last = 8}]"
    for edit in (
        ("ffn", "pieces", pieces),
        ("matmul", "pieces", "[{unit = 'cpu', first = 0, last = 8}]"),
        ("ffn", "points", "[3, 6]"),
        ("row_head", "pieces", "[{unit = 'npu', first = 0, last = 2}, {unit = 'cpu', first = 2, last = 16}]"),
        ("row_head", "points", "[1, 2, 3, 4]"),
        ("prefill", "lengths", "[32, 64]"),
        ("cpu", "lanes", "1"),
        ("cpu", "chunk", "64"),
    ):
        text = edited(text, *edit)
    path.write_text(text)
    engine = Engine(open_to_run(gguf, read_plan(path, Wishes()), lambda *_: None), read_plan(path, Wishes()))
    alone = Engine(open_model(gguf), Wishes(threads=2, context=512, chunk=128))
    try:
        placed = engine.plan.placement
        assert (engine.plan.lanes, engine.plan.chunk, placed.lengths) == (1, 64, (32, 64))
        assert placed.cuts == {
            "ffn": Given(6, 8, (3, 6)),
            "matmul": Given(0, 8, (2, 4, 5, 6)),
            "row_ffn": Given(4, 16, (2, 4, 5, 6)),
            "row_head": Given(2, 16, (1, 2, 3, 4)),
        }
        assert engine.others is not None
        assert engine.others.balance is not None
        assert engine.others.balance.given == placed.cuts
        assert set(engine.plan.sources.values()) == {"plan"}
        lengths = [20, 32, 64, 100, 150]
        assert divergences(prompts(alone, lengths), prompts(engine, lengths)).max() < NEAR
        assert any(graph.runs for graph in engine.others.graphs.graphs)  # type: ignore[union-attr]
    finally:
        engine.close()
        alone.close()


def test_a_plan_of_another_model_is_refused(gguf: Path, sound: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(sound)
    other = write_tiny(tmp_path / "other.gguf", formats="F32", window=24, seed=1)
    with pytest.raises(PlanError, match=r"another model or packing than other.gguf; make it anew"):
        open_to_run(other, read_plan(path, Wishes()), lambda *_: None)


@pytest.mark.parametrize(
    ("wishes", "named"),
    [
        (Wishes(units=("cpu", "gpu")), "the plan decides units, and the argument says cpu,gpu"),
        (Wishes(units=("cpu",), sources={"units": "flag"}), "the flag says cpu"),
        (Wishes(split="layer", sources={"split": "environment"}), "the environment says layer"),
    ],
)
def test_wishes_that_contradict_a_plan_are_refused(sound: str, tmp_path: Path, wishes: Wishes, named: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(sound)
    with pytest.raises(PlanError, match=named):
        read_plan(path, wishes)
