"""Presets: plans in general terms, made into wishes for a model and the units that are there; or one line that says why
not."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_graphs import PlainGraphs
from reference import Floats, same_bits
from sparse_models import write_gated
from tiny_models import write_tiny
from typer.testing import CliRunner

from coterie import opening, others
from coterie.cli import app
from coterie.divergence import divergences
from coterie.engine import Engine
from coterie.errors import CoterieError, PlanError, UnitError, UsageError
from coterie.opening import open_model, open_to_run, plan_identity, preset_wishes
from coterie.presence import lacking
from coterie.scheduler.balance import Given
from coterie.scheduler.placement import DECODE
from coterie.scheduler.plan import Wishes
from coterie.scheduler.plan_file import format_plan, read_plan
from coterie.scheduler.plan_schema import Decisions
from coterie.scheduler.planner import make_plan
from coterie.scheduler.presets import load_preset, parse_preset, preset_names
from coterie.scheduler.profile import machine

HALF = Given.around(4, 8)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The units that are there, for a test to change."""
    units = {"cpu", "gpu", "npu"}
    monkeypatch.setattr(opening, "lacking", lambda unit: "" if unit in units else f"no {unit} here: buy one")
    return units


@pytest.fixture(scope="module")
def dense(folder: Path) -> Path:
    return write_tiny(folder / "dense.gguf", formats="F32", context=2048)


@pytest.fixture(scope="module")
def sparse(many_extents: None, folder: Path) -> Path:
    return write_gated(folder / "sparse.gguf")


def test_presets_are_what_the_papers_do(dense: Path, sparse: Path, there: set[str]) -> None:
    assert preset_names() == ["heteroinfer", "llmnpu", "powerinfer2"]
    assert all(load_preset(name).about for name in preset_names())
    asked = Wishes(threads=2)
    llmnpu = preset_wishes(dense, "llmnpu", asked).placement
    assert llmnpu is not None
    assert (llmnpu.prefill, llmnpu.decode, llmnpu.lengths, llmnpu.split) == ("npu", "cpu", (128, 256), "layer")
    assert llmnpu.cuts == {"matmul": Given.whole(), "ffn": Given.whole()}
    hetero = preset_wishes(dense, "heteroinfer", asked)
    assert hetero.units == ("cpu", "gpu", "npu")
    assert hetero.placement is not None
    assert hetero.placement.decode == "gpu"
    rows, tokens = Given(24, 32, tuple(range(1, 33))), Given(8, 32, tuple(range(1, 17)))
    assert hetero.placement.cuts == {"matmul": HALF, "ffn": HALF, "tokens": tokens} | dict.fromkeys(DECODE, rows)
    small = preset_wishes(dense, "heteroinfer", Wishes(threads=2, context=130)).placement
    assert small is not None
    assert small.cuts["tokens"] == Given(1, 32, (1,))  # a chunk of 136
    small = preset_wishes(dense, "heteroinfer", Wishes(threads=2, context=128)).placement
    assert small is not None
    assert "tokens" not in small.cuts
    assert preset_wishes(sparse, "powerinfer2", asked).units == ("cpu",)


def test_where_there_is_no_gpu_that_is_a_way_of_its_own_and_said(dense: Path, there: set[str]) -> None:
    there.remove("gpu")
    found = preset_wishes(dense, "heteroinfer", Wishes())
    assert found.units == ("cpu", "npu")
    assert found.placement is not None
    rows = {"row_ffn": Given.around(4, 16), "row_head": Given.around(6, 16)}
    assert found.placement.cuts == {"matmul": HALF, "ffn": HALF} | rows
    model = open_model(dense)
    plan, _ = make_plan(model.file, model.spec, found)
    model.close()
    assert any("there is no GPU for it" in line for line in plan.lines())


def test_a_unit_that_is_not_there_is_one_line(dense: Path, there: set[str]) -> None:
    there.remove("npu")
    for name in ("llmnpu", "heteroinfer"):
        with pytest.raises(UnitError, match=f"preset {name} needs the unit npu: no npu here: buy one"):
            preset_wishes(dense, name, Wishes())


def test_a_model_that_it_is_not_for_is_one_line(dense: Path, sparse: Path, there: set[str]) -> None:
    with pytest.raises(
        PlanError, match=r"powerinfer2 is for sparse models, and dense.gguf is dense; coterie pack --sp"
    ):
        preset_wishes(dense, "powerinfer2", Wishes())
    with pytest.raises(PlanError, match=r"llmnpu is for dense models, and sparse\.\w+ is sparse"):
        preset_wishes(sparse, "llmnpu", Wishes())


@pytest.mark.parametrize(
    "wishes", [Wishes(units=("gpu",)), Wishes(split="tensor"), Wishes(units=("cpu",), sources={"units": "flag"})]
)
def test_what_a_preset_decides_is_not_asked_for_too(dense: Path, there: set[str], wishes: Wishes) -> None:
    with pytest.raises(UsageError, match="preset llmnpu decides"):
        preset_wishes(dense, "llmnpu", wishes)


WAY = """
[[ways]]
because = "it is so"
models = "dense"
cpu = {chunk = 64}
units = {names = ["cpu", "npu"], split = "tensor"}
decode = {unit = "cpu"}
[ways.prefill]
unit = "npu"
lengths = [64]
cuts.ffn.pieces = [{unit = "npu", share = 0.3}, {unit = "cpu", share = 0.7}]
"""
OWN = f'version = 8\nabout = "mine"\n{WAY}'


def test_a_preset_may_be_one_s_own(dense: Path, there: set[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    found = preset_wishes(dense, str(path), Wishes(context=40))
    assert found.chunk == 40
    assert found.placement is not None
    assert found.placement.lengths == (40,)  # a prompt has no more
    assert found.placement.cuts == {"matmul": Given.whole(), "ffn": Given.around(2, 8)}
    assert found.reasons == ("preset mine: it is so",)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("version = 8", "version = 6", "preset version 6"),
        ("share = 0.7", "share = 0.6", r"ways\[0\].prefill.cuts.ffn.pieces have shares that add up to 0.9"),
        ("share = 0.7", "share = nan", "share is nan"),
        ("share = 0.7", "first = 4, last = 8", r"share is missing"),
        ('models = "dense"', 'models = "wide"', "models is 'wide': there is dense, sparse"),
        ("lengths = [64]", "lengths = [128]", "from 8 to 64"),
        ("lengths = [64]", "lengths = [64]\nspare = 1", "spare is not known here"),
        (WAY, "", "ways is missing"),
        ("[[ways]]", "[[ways", "cannot read the plan"),
    ],
)
def test_a_preset_that_makes_no_sense_is_one_line(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(PlanError, match=named) as refused:
        load_preset(str(path))
    assert "\n" not in str(refused.value)


def test_what_is_no_preset_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is heteroinfer, llmnpu, powerinfer2, or name a TOML file"):
        load_preset("fast")
    for path in (str(tmp_path), "/dev/zero", str(tmp_path / "absent.toml")):
        with pytest.raises(CoterieError, match="cannot read"):
            load_preset(path)
    with pytest.raises(PlanError, match="must be a table"):
        parse_preset([], "it")


def test_a_preset_saved_as_a_plan_is_the_same_and_runs(
    dense: Path, there: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "Graphs", PlainGraphs)
    there.remove("gpu")
    path, model = tmp_path / "plan.toml", open_model(dense)
    plan, _ = make_plan(model.file, model.spec, preset_wishes(dense, "heteroinfer", Wishes(threads=2, context=512)))
    path.write_text(format_plan(Decisions.of(plan, plan_identity(model.file), machine()), plan))
    engine = Engine(model, read_plan(path, Wishes()))
    try:
        assert replace(engine.plan, sources=plan.sources, reasons=plan.reasons) == plan
        assert engine.divergence is not None
        assert engine.divergence.worst < 1e-6
    finally:
        engine.close()


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_the_commands(dense: Path, there: set[str], tmp_path: Path, own_home: Path) -> None:
    out = tmp_path / "plan.toml"
    result = run("plan", str(dense), "--preset", "llmnpu", "-c", "300", "--save", str(out), "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["sources"]["units"] == data["sources"]["chunk"] == "preset"
    assert data["placement"]["prefill"] == "npu"
    assert "# preset llmnpu: every product of a prompt" in out.read_text()
    for words, code in (
        (["plan", str(dense), "--preset", "llmnpu", "--units", "cpu"], 2),
        (["plan", str(dense), "--preset", "powerinfer2"], 4),
        (["run", str(dense), "-p", "x", "--preset", "powerinfer2"], 4),
        (["run", str(dense), "-p", "x", "--preset", "fast"], 2),
        (["run", str(dense), "-p", "x", "--preset", "llmnpu", "--plan", str(out)], 2),
        (["run", str(dense), "-p", "x", "--preset", "llmnpu", "--cut", "1"], 2),
    ):
        refused = run(*words)
        assert refused.exit_code == code, refused.output
        assert refused.stderr.count("\n") == 1


def logits(engine: Engine) -> Floats:
    """Of every position of a prompt of 300 tokens, and of four that are decoded behind it."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, engine.spec.vocab, 304).tolist()
    sequence = engine.sequence()
    found = [engine.prefill(sequence, ids[:300], range(300))]
    found += [engine.decode([sequence], [token])[:1].copy() for token in ids[300:]]
    sequence.close()
    return np.concatenate(found)


@pytest.mark.parametrize("gpu", [False, True])
def test_presets_compute_the_same(dense: Path, there: set[str], gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float graphs stand in for an NPU's, so that what is left is the order of sums."""
    if gpu and (why := lacking("gpu")):
        pytest.skip(why)
    there -= set() if gpu else {"gpu"}
    monkeypatch.setattr(others, "Graphs", PlainGraphs)
    asked = Wishes(context=512)
    with closing(Engine(open_model(dense), asked)) as alone:
        wanted = logits(alone)
    for preset in ("llmnpu", "heteroinfer"):
        with closing(Engine(open_model(dense), preset_wishes(dense, preset, asked))) as engine:
            assert divergences(wanted, logits(engine)).max() < 1e-6, preset
            assert not engine.supervisor.losses


def test_a_preset_for_sparse_models_has_their_bits(sparse: Path, there: set[str]) -> None:
    found = []
    for wishes in (Wishes(context=512), preset_wishes(sparse, "powerinfer2", Wishes(context=512))):
        with closing(Engine(open_to_run(sparse, wishes, lambda *progress: None), wishes)) as engine:
            found.append(logits(engine))
    assert same_bits(*found)
