"""--preset auto on this machine: exact unless near is allowed, by measured times, with its reason."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from tiny_models import write_tiny

from coterie import auto
from coterie.actors.identity import There
from coterie.commands.explained import portion_lines
from coterie.errors import PlanError, UsageError
from coterie.models.load import read_spec
from coterie.opening import begun_wishes, open_file, preset_wishes
from coterie.scheduler.balance import Given
from coterie.scheduler.estimate import others_of
from coterie.scheduler.placement import DECODE, GPU_PARTS, PARTS, ROW_KINDS, ROW_PARTS, Placement
from coterie.scheduler.plan import Wishes
from coterie.scheduler.planner import make_plan
from coterie.scheduler.profile import DeviceProfile, Point, ProductTimes, Shapes, UnitTimes
from coterie.scheduler.sharing import PROMPT, TOKENS, Candidate, graphs_of, kinds_of, row_graphs_of

KEYS = {"cpu": "c", "gpu": "g", "npu": "n"}
REST = ("qkv", "out", "down")  # of decode's products
RATES = {"cpu": (1.0, 1.0), "gpu": (0.5, 2.0), "npu": (0.25, 1.0)}  # of a prompt's and a token's products, seconds


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf", "llama", formats="Q4_0")


def measured(
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    rates: dict[str, tuple[float, float]],
    beside: dict[str, tuple[float, float]] | None = None,
) -> None:
    """A machine on which all products of a kind in a prompt take so long on a unit, and in a token; `beside`: where it
    shares them."""
    made = {name: times_of(model, each) for name, each in (("shapes", rates), ("beside", beside or {}))}
    profile = DeviceProfile(shapes=Shapes(made["shapes"], {}, 0.0, 1.0), beside=Shapes(made["beside"], {}, 0.0, 1.0))
    monkeypatch.setattr(auto, "load_profile", lambda: profile)

    def there(wanted: Sequence[str], lanes: int, cores: Collection[int] = ()) -> There:
        return There({name: KEYS[name] for name in rates if name in wanted}, None, {})

    monkeypatch.setattr(auto, "units_there", there)


def times_of(model: Path, rates: dict[str, tuple[float, float]]) -> dict[str, UnitTimes]:
    with open_file(model) as file:
        spec = read_spec(file)
        found = {each for n in (PROMPT, 1) for own in kinds_of(spec, file.tensors, 2, n).values() for each in own}
    graphs = {each for own in graphs_of(spec).values() for each in own}
    rows = set(row_graphs_of(spec, found).values())
    units = dict[str, UnitTimes]()
    for name, (prompt, token) in rates.items():
        own, is_npu = (graphs | rows, True) if name == "npu" else (found | {others_of(spec)}, False)
        tokens = {1: token, 128: prompt / 2, 256: prompt}
        times = tuple(
            ProductTimes(
                each,
                1,
                tuple(
                    Point(part, n, seconds * part / each.rows)
                    for part in (each.rows // 4, each.rows)
                    for n, seconds in tokens.items()
                    if n == 1 or each not in rows
                ),
            )
            for each in sorted(own)
        )
        lengths, form = ((1, 128), "w8a8") if is_npu else ((), "")
        units[name] = UnitTimes(KEYS[name], form, lengths, 0.0, 0.0, 1.0, times)
    return units


def test_without_leave_it_stays_exact(model: Path) -> None:
    wishes = preset_wishes(model, "auto", Wishes())
    assert wishes.units == ("cpu",)
    assert "--allow-near lets GPU and NPU take part" in wishes.reasons[0]


@pytest.mark.parametrize("slow", ["", "gpu", "npu", "gpu npu"])
def test_it_takes_what_is_expected_to_be_fastest(slow: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {name: (1.0, 9.0) if name in slow else pair for name, pair in RATES.items()}
    measured(monkeypatch, model, rates)
    with open_file(model) as file:
        found = auto.Here(file, read_spec(file), Wishes()).all()
    wishes = preset_wishes(model, "auto", Wishes(), near=True)
    chosen = next(each for each in found if each.units == wishes.units)
    assert len(found) == len(auto.APART)
    assert chosen.seconds == min(each.seconds for each in found)
    assert all(each.line() in wishes.reasons[0] for each in found)


def test_units_that_share_products_are_weighed_where_they_were_measured_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, model, RATES, {"cpu": (1.0, 1.0), "gpu": (1.0, 3.0)})
    with open_file(model) as file:
        found = auto.Here(file, read_spec(file), Wishes()).all()
    (shared,) = (each for each in found if each.split == "tensor")
    assert len(found) == len(auto.APART) + 1
    parts = shared.begin
    assert parts["tokens"] == 16  # of 32: both are as fast
    assert {parts[kind] for kind in DECODE} == {8}  # the GPU takes three times as long
    alone = next(each for each in found if each.units == ("cpu",))
    assert shared.prefill < 0.6 * alone.prefill  # all but the head
    rest = TOKENS * sum(each.seconds for each in alone.portions if (each.phase, each.kind) == ("decode", "others"))
    assert shared.decode == pytest.approx(0.75 * (alone.decode - rest) + rest)
    wishes = preset_wishes(model, "auto", Wishes(), near=True)
    assert (wishes.split, wishes.begin) == (("tensor", parts) if shared.seconds < alone.seconds else ("layer", {}))
    assert shared.line() in wishes.reasons[0]


def test_three_units_share_a_prompt(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Wishes(units=("cpu", "gpu", "npu"), split="tensor")
    found = dict[float, Candidate]()
    for gpu in (0.1, 3.0, 1000.0):  # seconds that its products take
        measured(monkeypatch, model, RATES, {"cpu": (1.0, 1.0), "gpu": (gpu, gpu / 256), "npu": (1.0, 1.0)})
        wishes = begun_wishes(model, asked)
        with open_file(model) as file:
            spec = read_spec(file)
            found[gpu] = auto.Here(file, spec, asked).beside(asked.units)
            made = make_plan(file, spec, wishes)[0]
            told, _ = auto.explained(file, spec, wishes, made)
        assert told.begin == wishes.begin == found[gpu].begin
        assert told.prefill == pytest.approx(found[gpu].prefill)
    parts = {gpu: each.begin["tokens"] for gpu, each in found.items()}
    assert parts[0.1] == GPU_PARTS // 2  # all that is not a graph's
    assert parts[1000.0] == 0
    assert 0 < parts[3.0] < parts[0.1]
    two = found[1000.0].prefill
    assert found[0.1].prefill < found[3.0].prefill < two
    shares = {portion.kind: portion for portion in found[3.0].portions if portion.phase == "prefill"}
    rest = shares["matmul"].seconds + shares["ffn"].seconds + shares["others"].seconds
    assert shares["tokens"].there == pytest.approx(rest, rel=0.3)  # as near as a 32nd comes
    assert f"gpu {parts[3.0]}/32 {1e3 * shares['tokens'].there:.3f}\n" in "\n".join(portion_lines(found[3.0], []))


def test_where_cuts_begin(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Wishes(units=("cpu", "gpu"), split="tensor")
    measured(monkeypatch, model, RATES, {"cpu": (1.0, 0.004), "gpu": (3.0, 0.004)})
    wishes = begun_wishes(model, asked)
    assert (wishes.begin["tokens"], wishes.begin["up"]) == (8, 16)
    assert "cuts begin where measured products end soonest: cpu,gpu tokens 8/32" in wishes.reasons[0]
    with open_file(model) as file:
        placement = make_plan(file, read_spec(file), wishes)[0].placement
    assert {placement.cuts[kind].parts for kind in DECODE} == {16}
    assert placement.cuts["tokens"].parts == 8
    assert begun_wishes(model, wishes) is wishes
    measured(monkeypatch, model, RATES)
    (why,) = begun_wishes(model, asked).reasons
    assert why.startswith("cuts begin in the middle (not measured beside each other: coterie profile --shapes MODEL")


def test_a_plan_of_several_units_explains_itself(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, model, RATES, {"cpu": (1.0, 1.0), "gpu": (1.0, 3.0)})
    told = Wishes(
        units=("cpu", "gpu"), split="tensor", begin={"up": 4, "head": 32, "tokens": 16} | dict.fromkeys(REST, 0)
    )
    with open_file(model) as file:
        spec = read_spec(file)
        made = make_plan(file, spec, told)[0]
        mine, others = auto.explained(file, spec, told, made)
        best = auto.Here(file, spec, told).beside(told.units)
    assert mine.begin == told.begin  # what the plan says, not what would be best
    assert mine.seconds > best.seconds
    parts = {portion.kind: portion for portion in mine.portions if portion.phase == "decode"}
    layers = len(spec.layers)
    assert (parts["up"].there, parts["up"].cpu) == pytest.approx((layers * 3 / 8, layers * 7 / 8))
    assert (parts["head"].there, parts["head"].cpu) == (3.0, 0.0)
    assert {(other.units, other.split) for other in others} == {(units, "layer") for units in auto.APART}
    lines = "\n".join(portion_lines(mine, others))
    assert "up           " in lines
    assert f"gpu 4/32 {1e3 * layers * 3 / 8:.3f}, cpu 28/32 {1e3 * layers * 7 / 8:.3f}" in lines
    assert re.search(r"decode, a token: [0-9.]+ ms, bound by cpu", lines)
    assert re.search(r"qkv .*  cpu\n", lines)
    assert all(f"  {','.join(other.units):20}{mine.seconds / other.seconds:.2f}" in lines for other in others)


def test_an_npus_cut_begins_where_there_are_graphs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, model, RATES, {"cpu": (1.0, 1.0), "npu": (0.01, 1.0)})
    wishes = begun_wishes(model, Wishes(units=("cpu", "npu"), split="tensor"))
    begin = {"matmul": PARTS, "ffn": PARTS, "row_ffn": 11, "row_head": ROW_PARTS // 2}
    assert wishes.begin == begin  # of 16: the CPU unit takes twice as long for a network, which is two products
    cuts = Placement.of(wishes.units, 256, "tensor", 0, wishes.begin).cuts
    assert cuts == {
        kind: Given.around(parts, ROW_PARTS if kind in ROW_KINDS else PARTS) for kind, parts in begin.items()
    }
    with open_file(model) as file:
        told = auto.Here(file, read_spec(file), wishes).beside(wishes.units)
    row = {portion.kind: portion for portion in told.portions if portion.phase == "decode"}
    assert row.keys() == {"others", "qkv", "out", "row_ffn", "row_head"}
    layers, parts = len(read_spec(file).layers), begin["row_ffn"] / ROW_PARTS
    assert (row["row_ffn"].there, row["row_ffn"].cpu) == pytest.approx((layers * parts, 2 * layers * (1 - parts)))
    assert (row["row_head"].there, row["row_head"].cpu) == pytest.approx((0.5, 0.5))
    measured(monkeypatch, model, RATES, {"cpu": (1.0, 1.0), "npu": (100.0, 1.0)})
    wishes = begun_wishes(model, Wishes(units=("cpu", "npu"), split="tensor"))
    assert wishes.begin["ffn"] == 0
    assert Placement.of(wishes.units, 256, "tensor", 0, wishes.begin).cuts["ffn"] == Given.around(1, PARTS)


def test_only_the_cpu_unit_streams(model: Path) -> None:
    assert preset_wishes(model, "auto", Wishes(memory=1 << 20), near=True).units == ("cpu",)


def test_it_says_what_is_missing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "load_profile", DeviceProfile)
    with pytest.raises(PlanError, match="cpu has not been measured as it is now: coterie profile --shapes"):
        preset_wishes(model, "auto", Wishes(), near=True)
    with pytest.raises(UsageError, match="drop --units and --split"):
        preset_wishes(model, "auto", Wishes(units=("cpu", "gpu")))
    with pytest.raises(UsageError, match="--allow-near is for --preset auto"):
        preset_wishes(model, "llmnpu", Wishes(), near=True)
