"""Plans: what make_plan promises of any ceiling, and plan files, sound and damaged."""

import random
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damage import GIANTS, damaged_bytes, little_memory_and_no_hang, survives
from exact_models import decoded, prefilled, some_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from packed_models import pack
from reference import same_bits
from tiny_models import write_tiny

from coterie.engine import Engine
from coterie.errors import CoterieError, PlanError, UsageError
from coterie.models.load import Model
from coterie.opening import flash_of, open_model, plan_identity
from coterie.scheduler.copies import GRAPH, unit_copies
from coterie.scheduler.layout import BATCH
from coterie.scheduler.placement import Placement
from coterie.scheduler.plan import Plan, Wishes
from coterie.scheduler.plan_file import MAX_BYTES, format_plan, read_plan, write_plan
from coterie.scheduler.plan_schema import Decisions, parse, tables
from coterie.scheduler.planner import CHUNK, LEAST_CHUNK, make_plan
from coterie.scheduler.profile import machine
from coterie.scheduler.residency import region_bytes
from coterie.sizes import Share

CONTEXT = 2560
MUTANTS = 1500
RUN = 12  # of the mutants that are accepted
TOKENS = 20
CEILINGS = st.integers(1, 20 << 20)


pytestmark = pytest.mark.usefixtures("many_extents")


@pytest.fixture(scope="module")
def packed(many_extents: None, folder: Path) -> Path:
    """Weights of about 4 MiB."""
    path = folder / "tiny.gguf"
    return pack(write_tiny(path, dim=256, ffn=768, layers=6, formats="Q8_0", context=CONTEXT))


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, folder: Path) -> Iterator[Model]:
    path = folder / f"{request.param} model.source"
    tied = request.param == "gemma3"
    made = open_model(
        pack(write_tiny(path, request.param, dim=256, ffn=768, layers=6, formats="Q8_0", context=CONTEXT, tied=tied))
    )
    yield made
    made.close()


def plan_of(model: Model, wishes: Wishes) -> Plan:
    return make_plan(model.file, model.spec, wishes, flash_of(model.file, model.spec, wishes))[0]


def text_of(plan: Plan, identity: str = "") -> str:
    """A plan file for this machine."""
    assert plan.flash is not None or identity
    return format_plan(Decisions.of(plan, identity or plan.flash.identity, machine()), plan)  # type: ignore[union-attr]


def planned(model: Model, memory: int, context: int | None = None, chunk: int | None = None) -> Plan | None:
    """The plan under a ceiling; None where there is none."""
    try:
        return plan_of(model, Wishes(2, context, chunk, memory))
    except PlanError:
        return None


def logits_of(path: Path, wishes: Wishes) -> NDArray[np.float32]:
    """Of a short prompt, and of tokens decoded."""
    engine = Engine(open_model(path), wishes)
    try:
        tokens = some_tokens(TOKENS)
        together = [engine.sequence() for _ in range(2)]
        both = engine.decode(together, tokens[:1] * 2).copy()
        for sequence in together:
            sequence.close()
        return np.concatenate([prefilled(engine, tokens), decoded(engine, tokens), both])
    finally:
        engine.close()


# --- any ceiling -------------------------------------------------------------------------------------

settled = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settled
@given(memory=CEILINGS, context=st.none() | st.integers(1, CONTEXT))
def test_a_plan_keeps_to_its_ceiling(model: Model, memory: int, context: int | None) -> None:
    wishes = Wishes(threads=2, context=context, memory=memory)
    try:
        plan = plan_of(model, wishes)
    except PlanError as error:
        raised = memory + (raise_of(error) << 20)
        assert plan_of(model, replace(wishes, memory=raised)).total <= raised  # what the message says is enough
        assert raised - memory <= 64 << 20
        return
    assert plan.total == sum(region_bytes(size) for size in plan.regions.values()) <= memory
    assert plan.memory == memory
    if context is not None:
        assert plan.context == context
    else:
        assert plan.context == CONTEXT or plan.context % 256 == 0
    assert LEAST_CHUNK <= plan.chunk <= CHUNK or plan.chunk >= plan.context
    assert plan.chunk % BATCH == 0
    assert 0 <= plan.streamed_per_token <= plan.bytes_per_token
    assert plan.pinned > 0
    assert (plan.ring > 0) == (plan.streamed_per_token > 0)
    assert plan_of(model, wishes) == plan
    assert all("\n" not in line for line in plan.lines())


def raise_of(error: PlanError) -> int:
    """The MiB by which a message says to raise --memory."""
    return int(str(error).split("raise --memory by ")[1].split(" MiB")[0])


@settled
@given(
    memory=CEILINGS, more=st.integers(0, 16 << 20), context=st.integers(1, CONTEXT), chunk=st.sampled_from([16, 256])
)
def test_more_memory_never_streams_more(model: Model, memory: int, more: int, context: int, chunk: int) -> None:
    little, much = (planned(model, size, context=context, chunk=chunk) for size in (memory, memory + more))
    if little is not None:
        assert much is not None
        assert much.streamed_per_token <= little.streamed_per_token
        assert much.pinned >= little.pinned


@settled
@given(memory=CEILINGS, more=st.integers(0, 20 << 20))
def test_more_memory_is_never_worse_where_all_is_chosen(model: Model, memory: int, more: int) -> None:
    little, much = planned(model, memory), planned(model, memory + more)
    if little is not None:
        assert much is not None
        assert much.context >= little.context
        assert much.chunk >= little.chunk


def test_a_context_that_nobody_asked_for_gives_way_to_weights(model: Model) -> None:
    contexts = [plan.context for size in range(1, 33) if (plan := planned(model, size << 20)) is not None]
    assert contexts == sorted(contexts)
    assert contexts[0] < contexts[-1] == CONTEXT
    assert contexts[0] >= 256


@settled
@given(percent=st.floats(0.01, 100))
def test_a_share_is_a_budget_for_weights(model: Model, percent: float) -> None:
    size = sum(tensor.nbytes for tensor in model.file.tensors.values())
    try:
        plan = plan_of(model, Wishes(threads=1, memory=Share(percent / 100)))
    except PlanError:
        return
    assert plan.context == CONTEXT
    if plan.streamed_per_token:
        assert region_bytes(plan.regions["weights"]) + plan.ring <= percent / 100 * size + (2 << 20)
    else:
        assert plan.ring == 0


@pytest.mark.parametrize("wishes", [Wishes(threads=0), Wishes(threads=65), Wishes(context=0), Wishes(context=1 << 40)])
def test_what_makes_no_sense_is_a_usage_error(model: Model, wishes: Wishes) -> None:
    with pytest.raises(UsageError):
        plan_of(model, wishes)


# --- plan files --------------------------------------------------------------------------------------


@settled
@given(memory=CEILINGS | st.floats(0.05, 1).map(Share), context=st.none() | st.integers(1, CONTEXT))
def test_a_plan_that_is_written_and_read_is_the_same(
    model: Model, tmp_path_factory: pytest.TempPathFactory, memory: int | Share, context: int | None
) -> None:
    try:
        plan = plan_of(model, Wishes(threads=2, memory=memory, context=context))
    except PlanError:
        return
    path = tmp_path_factory.getbasetemp() / "written.toml"
    write_plan(path, text_of(plan))
    wishes = read_plan(path, Wishes())
    again = plan_of(model, wishes)
    assert set(again.sources.values()) <= {"plan", "automatic"}
    assert again.flash is not None
    assert plan.flash is not None
    assert again.flash.source == "plan"
    assert replace(again, sources=plan.sources, flash=replace(again.flash, source=plan.flash.source)) == plan
    assert read_plan(path, Wishes(threads=2, context=plan.context)) == wishes  # no contradiction


@pytest.mark.parametrize(
    "name", ['quote" and \\', "two\nlines = 1", "\x1b[2J", "\udcff", "é 模型 \U0001f600", "a" * 255]
)
def test_a_model_s_name_may_hold_anything(packed: Path, tmp_path: Path, name: str) -> None:
    model = open_model(packed)
    plan = plan_of(model, Wishes(threads=2, memory=Share(0.5)))
    model.close()
    path = tmp_path / "plan.toml"
    write_plan(path, text_of(replace(plan, model=name)))
    assert read_plan(path, Wishes()).pinned == plan.pinned
    assert "\x1b" not in path.read_text()


@pytest.fixture(scope="module")
def sound(packed: Path) -> str:
    """A plan file's text."""
    model = open_model(packed)
    plan = plan_of(model, Wishes(threads=2, context=300, memory=6 << 20))
    model.close()
    assert plan.streamed_per_token > 0
    return text_of(plan)


@pytest.fixture(scope="module")
def expected(packed: Path) -> NDArray[np.float32]:
    """Logits with all in memory."""
    return logits_of(packed, Wishes(threads=2, context=300))


def mutant(chance: random.Random, text: str) -> bytes:
    """A plan file with something wrong, maybe."""
    lines = text.splitlines()
    settings = [i for i, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    at, other = chance.choice(settings), chance.randrange(len(lines))
    name, _, value = lines[at].partition(" = ")
    number = int(value.split()[0]) if value.split()[0].isdigit() else 0
    match chance.randrange(10):
        case 0 | 1:
            return damaged_bytes(chance, text.encode(), len(text))
        case 2:
            del lines[chance.choice((at, other))]
        case 3:
            lines.insert(other, lines[chance.choice((at, other))])
        case 4:
            lines[at] = f"{name} = {chance.choice(GIANTS) * chance.choice((1, -1))}"
        case 5:
            lines[at] = f"{name} = {chance.choice(ODD)}"
        case 6 | 7:
            lines[at] = f"{name} = {max(0, number + chance.choice((-4096, -256, -8, -1, 1, 8, 100, 4096, 1 << 21)))}"
        case 8:
            lines[at] = f"{name} = {number * chance.choice((2, 3, 10)) // chance.choice((1, 2, 3))}"
        case 9:
            lines[at], lines[other] = lines[other], lines[at]
    return "\n".join(lines).encode()


ODD = (
    "-1", "1.5", "nan", "inf", "true", '""', '"1"', "[]", "[1]", "{}", "{a = 1}", "1979-05-27", "07:32:00", "0x10",
    "0b1", "1e3", "''", '"""\n"""', "1_000", "0x" + "f" * 9000, "9" * 5000, "[" * 3000 + "]" * 3000,
    '"' + "x" * 2000 + '"', "", "=", '"\\u0000"', '"\x1b[2J"',
)  # fmt: skip


def test_a_damaged_plan_is_refused_in_one_line_or_runs(
    packed: Path, sound: str, expected: NDArray[np.float32], folder: Path
) -> None:
    chance, path, model = random.Random(3), folder / "mutant.toml", open_model(packed)
    accepted: list[Wishes] = []

    def use() -> None:
        wishes = read_plan(path, Wishes())
        if wishes.identity != model.file.identity:  # type: ignore[attr-defined]
            raise PlanError("another packing")  # as coterie.opening says it
        plan_of(model, wishes)
        accepted.append(wishes)

    path.write_text(sound)
    use()
    with little_memory_and_no_hang():
        for _ in range(MUTANTS):
            path.write_bytes(mutant(chance, sound))
            survives(use)
    model.close()
    assert MUTANTS // 20 < len(accepted) < MUTANTS // 2
    sources = accepted[0].sources
    distinct = [each for i, each in enumerate(accepted) if each not in accepted[:i] and (each.context or 0) >= TOKENS]
    for wishes in chance.sample(distinct, RUN):
        few = replace(wishes, threads=min(3, wishes.threads or 1))
        assert wishes.sources == sources
        assert same_bits(logits_of(packed, few), expected), wishes


def edited(text: str, **values: object) -> str:
    lines = text.splitlines()
    for name, value in values.items():
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"{name} = "))
        lines[at] = f"{name} = {value}"
    return "\n".join(lines)


@pytest.mark.parametrize("chunk", [8, 24, 256, 1024])
@pytest.mark.parametrize(
    "residency", [{}, {"pinned": 1}, {"block": 4096, "depth": 1}, {"block": 1 << 30, "depth": 1024}]
)
def test_an_edited_plan_runs_and_gives_the_same_bits(
    packed: Path, sound: str, expected: NDArray[np.float32], tmp_path: Path, chunk: int, residency: dict[str, int]
) -> None:
    path = tmp_path / "edited.toml"
    path.write_text(edited(sound, ceiling=64 << 20, chunk=chunk, **residency))
    assert same_bits(logits_of(packed, read_plan(path, Wishes())), expected)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"chunk": 4}, "cpu.chunk"),
        ({"chunk": 20}, "multiple of 8"),
        ({"ring": 4095}, "multiple of 4096"),
        ({"block": 5000}, "multiple of 4096"),
        ({"lanes": "true"}, "cpu.lanes is True"),
        ({"lanes": 65}, "from 1 to 64"),
        ({"pinned": 0}, "residency.pinned"),
        ({"context": "'300'"}, "memory.context"),
        ({"version": 1}, "plan version 1"),
        ({"version": "[1]"}, "a list"),
        ({"identity": 7}, "must be text"),
        ({"depth": "0x" + "f" * 9000}, "too large"),
        ({"depth": "9" * 5000}, "4300 digits"),
        ({"depth": "[" * 9000 + "]" * 9000}, "cannot read the plan"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(
    sound: str, tmp_path: Path, values: dict[str, object], named: str
) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(edited(sound, **values))
    with pytest.raises(PlanError, match=named) as refused:
        read_plan(path, Wishes())
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[memory]\n", "declare|twice|overwrite"),
        ("[gpu]\nlanes = 1\n", "gpu is not known"),
        ("spare = 1\n", "flash.spare"),
        (f"[{'k' * 5000}]\nx = 1\n", "is not known"),
        ("x" * MAX_BYTES, "MiB"),
    ],
)
def test_what_is_not_known_is_refused(sound: str, tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(sound + text)
    with pytest.raises(PlanError, match=named) as refused:
        read_plan(path, Wishes())
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"pinned": 1 << 30}, "is not one for this model"),
        ({"ring": 0}, "is not one for this model"),
        ({"ring": 1 << 40}, "is not one for this model"),
        ({"ceiling": 1 << 20}, "more than its own ceiling"),
        ({"context": CONTEXT + 1}, "this model takes"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    packed: Path,
    sound: str,
    tmp_path: Path,
    values: dict[str, object],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coterie.scheduler.planner.available_memory", lambda: 400 << 20)
    path, model = tmp_path / "plan.toml", open_model(packed)
    path.write_text(edited(sound, **values))
    try:
        with pytest.raises(CoterieError, match=named):
            plan_of(model, read_plan(path, Wishes()))
    finally:
        model.close()


def test_every_value_of_a_plan_file_is_needed(sound: str, tmp_path: Path) -> None:
    path, lines = tmp_path / "plan.toml", sound.splitlines()
    for at, line in enumerate(lines):
        if " = " in line and not line.startswith(("#", "ceiling", "flags")):
            path.write_text("\n".join(lines[:at] + lines[at + 1 :]))
            with pytest.raises(PlanError, match=r"missing|version"):
                read_plan(path, Wishes())


def test_the_schema_is_what_is_written(sound: str) -> None:
    assert tables(parse(tomllib.loads(sound), "it")) == tomllib.loads(sound)


def test_a_plan_for_a_gguf_has_all_in_memory(packed: Path, tmp_path: Path) -> None:
    gguf, path = packed.with_suffix(".gguf"), tmp_path / "plan.toml"
    model = open_model(gguf)
    plan = plan_of(model, Wishes(threads=2, context=300, memory=64 << 20))
    text = text_of(plan, plan_identity(model.file))
    assert "flash" not in tomllib.loads(text)
    path.write_text(text)
    again = plan_of(model, read_plan(path, Wishes()))
    assert replace(again, sources=plan.sources) == plan
    for values, named in (({"pinned": plan.pinned - 1, "ring": 1 << 20}, "no table flash"), ({"pinned": 1}, "not one")):
        path.write_text(edited(text, **values))
        with pytest.raises(PlanError, match=named):
            plan_of(model, read_plan(path, Wishes()))
    path.write_text(edited(text, ceiling=1 << 20))
    with pytest.raises(PlanError, match="more than its own ceiling"):
        plan_of(model, read_plan(path, Wishes()))
    model.close()


def test_a_plan_of_another_machine_is_refused(sound: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(edited(sound, machine='"snapdragon-8gen3"'))
    with pytest.raises(PlanError, match=r"another device \(snapdragon-8gen3\); make one for this machine"):
        read_plan(path, Wishes())


def test_each_graph_of_an_npu_is_counted(tmp_path: Path) -> None:
    """Of a cut product there is one for each point to which the cut may move."""
    model = open_model(write_tiny(tmp_path / "tiny.gguf"))
    spec = model.spec
    model.close()
    placed = Placement.of(("cpu", "npu"), 128, "tensor")
    few = replace(placed, cuts={kind: replace(cut, points=cut.points[-1:]) for kind, cut in placed.cuts.items()})
    graphs = len(spec.layers) * (2 * 3 + 3 + 3) + 3
    assert unit_copies(placed, spec)["npu"] - unit_copies(few, spec)["npu"] == GRAPH * graphs
