"""coterie profile --shapes: what is measured of a model's products, how it is kept, and estimates in between."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from command_line import coterie, refused
from hypothesis import given
from hypothesis import strategies as st
from simulated import LLAMA_1B
from tiny_models import write_tiny

from coterie.actors import identity
from coterie.actors.gpu import Device
from coterie.actors.identity import units_there
from coterie.actors.npu_graphs import Runtime
from coterie.commands import measure_meeting, measure_shapes, npu_meter, shape_meters
from coterie.commands.measure_shapes import representative
from coterie.commands.measure_units import made_up
from coterie.errors import PlanError, UnitError, UsageError
from coterie.opening import begun_wishes
from coterie.scheduler import profile
from coterie.scheduler.device_model import Instruction
from coterie.scheduler.estimate import Estimator, estimate, graphs, known_error, linear, product_of
from coterie.scheduler.partition import Worker, solve
from coterie.scheduler.placement import DECODE, Placement
from coterie.scheduler.plan import Wishes
from coterie.scheduler.planner import lanes_and_kept
from coterie.scheduler.profile import (
    DeviceProfile,
    Point,
    Product,
    ProductTimes,
    Shapes,
    UnitTimes,
    load_profile,
    profile_path,
    save_profile,
)

QKV = Product("matmul", 960, 576, "Q4_0")
ROWS, TOKENS, LENGTHS = (240, 480, 720, 960), (1, 8, 32, 128), (32, 64, 128)
Time = Callable[[int, int], float]


def flat(rows: int, tokens: int) -> float:
    """Linear in rows for any tokens, and in tokens for any rows."""
    return 1e-5 + 1e-8 * rows + 2e-6 * tokens + 3e-9 * rows * tokens


def unit(time: Time, lengths: tuple[int, ...] = (), product: Product = QKV, key: str = "here") -> UnitTimes:
    """A unit of which one product was measured."""
    points = tuple(Point(rows, tokens, time(rows, tokens)) for rows in ROWS for tokens in lengths or TOKENS)
    times = ProductTimes(product, 960 * 576, points)
    return UnitTimes(key, "w8a8" if lengths else "", lengths, 2e-4, 1e-6, 2e10, (times,))


def estimator(**units: UnitTimes) -> Estimator:
    return Estimator(Shapes(units, {}, 1e-5, 1e10), dict.fromkeys(units, "here"))


# --- estimates ----------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 1.0), min_size=16, max_size=16))
def test_at_points_it_is_what_was_measured(seconds: list[float]) -> None:
    places = [(rows, tokens) for rows in ROWS for tokens in TOKENS]
    table = dict(zip(places, seconds, strict=True))
    made = estimator(cpu=unit(lambda rows, tokens: table[rows, tokens]))
    assert all(made.seconds("cpu", QKV, *place) == value for place, value in table.items())


@given(st.integers(240, 960), st.integers(1, 128))
def test_between_points_it_is_linear(rows: int, tokens: int) -> None:
    assert estimator(cpu=unit(flat)).seconds("cpu", QKV, rows, tokens) == pytest.approx(flat(rows, tokens))


@given(st.lists(st.floats(0, 1), min_size=8, max_size=8), st.integers(1, 960), st.integers(1, 400))
def test_more_work_takes_no_less(steps: list[float], rows: int, tokens: int) -> None:
    def time(rows: int, tokens: int) -> float:
        return 1e-6 + sum(steps[: 1 + ROWS.index(rows)]) + sum(steps[4 : 5 + TOKENS.index(tokens)])

    made = estimator(cpu=unit(time))
    least = made.seconds("cpu", QKV, rows, tokens) * (1 - 1e-9)
    assert made.seconds("cpu", QKV, min(960, rows + 7), tokens) >= least
    assert made.seconds("cpu", QKV, rows, tokens + 3) >= least


def test_beyond_points_it_is_proportional_and_never_less_than_a_launch() -> None:
    points = [(10, 2.0), (20, 3.0)]
    assert [linear(points, at, 0.5) for at in (1, 5, 10, 15, 20, 40)] == [0.5, 1.0, 2.0, 2.5, 3.0, 6.0]
    assert linear(points, 1, 9.0) == 2.0
    assert linear([(4, 1.0)], 4, 0.0) == 1.0


def test_a_graph_takes_the_time_of_its_length() -> None:
    made = estimator(npu=unit(flat, LENGTHS, QKV._replace(format="w8a8")))
    for tokens, runs in ((1, [32]), (32, [32]), (33, [64]), (128, [128]), (130, [128, 32]), (300, [128, 128, 64])):
        assert graphs(LENGTHS, tokens) == runs
        expected = sum(flat(600, length) for length in runs)
        assert made.seconds("npu", QKV, 600, tokens) == pytest.approx(expected)


def test_costs_have_the_bytes_and_the_launch() -> None:
    made = estimator(cpu=unit(flat), npu=unit(flat, LENGTHS, QKV._replace(format="w8a8")))
    cost = made.cost(QKV, "cpu", 480, 8)
    assert cost.seconds == pytest.approx(flat(480, 8))
    assert (cost.launch, cost.nbytes) == (1e-6, 480 * 576)
    assert made.cost(QKV, "npu", 480, 200).nbytes == 2 * 480 * 576
    assert made.meeting == 2e-5


def test_what_is_linear_is_known_without_error() -> None:
    found = known_error(unit(flat))
    assert found is not None
    assert found.p90 < 1e-9
    assert found.estimates == 2 * 4 + 2 * 4  # inner rows, inner tokens
    steps = known_error(unit(flat, LENGTHS))
    assert steps is not None
    assert steps.estimates == 2 * 3  # lengths are not left out: nothing lies between them
    assert steps.p90 < 1e-9


def test_a_wrong_point_is_known_as_an_error() -> None:
    def wrong(rows: int, tokens: int) -> float:
        return flat(rows, tokens) * (1.5 if (rows, tokens) == (480, 8) else 1)

    found = known_error(unit(wrong))
    assert found is not None
    assert found.median < 0.01
    assert 0.1 < found.p90 < 0.5
    alone = ProductTimes(QKV, 1, (Point(960, 1, 1e-3), Point(960, 8, 2e-3)))
    assert known_error(replace(unit(flat), products=(alone,))) is None
    assert estimate(alone.points, 960, 8, unit(flat)) == 2e-3


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda e: e.seconds("gpu", QKV, 960, 1), "gpu has not been measured as it is now: coterie profile --shapes"),
        (lambda e: e.seconds("cpu", QKV._replace(rows=8), 8, 1), "with matmul of 8 x 576 in Q4_0: coterie profile"),
        (lambda e: e.seconds("cpu", QKV, 961, 1), "no part of 961 rows for 1 tokens"),
        (lambda e: e.seconds("cpu", QKV, 0, 1), "no part of 0 rows"),
        (lambda e: e.seconds("cpu", QKV, 960, 0), "for 0 tokens"),
        (lambda e: e.known_error("npu"), "npu has not been measured"),
    ],
)
def test_what_is_not_known_is_said(ask: Callable[[Estimator], object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ask(estimator(cpu=unit(flat)))


def test_a_unit_that_has_changed_is_not_known() -> None:
    made = Estimator(Shapes({"cpu": unit(flat)}), {"cpu": "another driver"})
    with pytest.raises(PlanError, match="cpu has not been measured as it is now"):
        made.seconds("cpu", QKV, 960, 1)


def test_the_solver_takes_its_costs() -> None:
    """An NPU that is as fast as the CPU gets about half of the rows of its lengths, and nothing of a single token."""
    made = estimator(
        cpu=unit(lambda rows, tokens: 1e-6 * rows * tokens),
        npu=unit(lambda rows, tokens: 1e-6 * rows * tokens, LENGTHS, QKV._replace(format="w8a8")),
    )
    workers = [Worker("cpu", 16), Worker("npu", 32, LENGTHS, made.meeting)]
    cut = solve(960, 128, workers, partial(made.cost, QKV))
    assert cut.strategy == "rows"
    assert sorted(piece.rows for piece in cut.pieces) == [480, 480]
    assert cut.seconds == pytest.approx(0.5 * 960 * 128e-6 + made.meeting)
    assert solve(960, 1, workers, partial(made.cost, QKV)).units == ("cpu",)


def test_an_instruction_names_its_product() -> None:
    made = Instruction("matmul", "", 960, 576, format="Q4_0", kernel="matmul:Q4_0:4", layer=3)
    assert product_of(made) == QKV
    assert product_of(replace(made, layer=-1)).operator == "head"
    assert product_of(replace(made, kernel="ffn_down:Q4_0:1")).operator == "ffn_down"


# --- the file -----------------------------------------------------------------------------------------

SHAPES = Shapes({"cpu": unit(flat), "npu": unit(flat, LENGTHS)}, {"cpu+npu": 2e10}, 1e-5, 1e10)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path))
    profile._warn.cache_clear()
    return tmp_path


def test_products_come_back_as_they_were_saved(home: Path) -> None:
    save_profile(DeviceProfile(3e10, shapes=SHAPES))
    assert load_profile() == DeviceProfile(3e10, shapes=SHAPES)


def test_a_profile_of_before_has_none(home: Path) -> None:
    save_profile(DeviceProfile(3e10, shapes=SHAPES))
    content = json.loads(profile_path().read_text())
    del content["machines"][profile.machine()]["shapes"]
    profile_path().write_text(json.dumps(content))
    assert load_profile() == DeviceProfile(3e10)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is anything in some JSON."""
    keys = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [path, *(place for key, each in keys for place in places(each, (*path, key)))]


def test_every_damaged_value_is_noticed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(json.dumps({"shapes": asdict(SHAPES)}))
    save_profile(DeviceProfile(shapes=SHAPES))
    right = json.loads(profile_path().read_text())
    count, bad = 0, list[Any]([None, -1, 1e300, "x" * 1000, [[]], True])
    for place in places(whole)[1:]:
        for value in bad:
            wrong = json.loads(json.dumps(right))
            at = wrong["machines"][profile.machine()]
            for key in place[:-1]:
                at = at[key]
            at[place[-1]] = value
            profile_path().write_text(json.dumps(wrong))
            profile._warn.cache_clear()
            assert load_profile() == DeviceProfile(), (place, value)
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert "is damaged; measure again" in said
            count += 1
    assert count > 200


def test_points_that_contradict_each_other_are_damaged(home: Path) -> None:
    for points in ((), (Point(240, 1, 1e-3), Point(240, 1, 2e-3)), (Point(961, 1, 1e-3),), (Point(240, 1, 0.0),)):
        wrong = replace(unit(flat), products=(ProductTimes(QKV, 1, points),))
        save_profile(DeviceProfile(shapes=Shapes({"cpu": wrong})))
        assert load_profile() == DeviceProfile()


# --- what it was measured with --------------------------------------------------------------------------


def test_keys_tell_drivers_versions_and_lanes_apart() -> None:
    def gpu(cores: tuple[int, ...] = (), stand_in: bool = False, **changed: str) -> str:
        about = {"runtime": "OpenCL", "name": "a GPU", "platform": "a platform", "driver": "1"} | changed
        made = SimpleNamespace(describe=lambda: about | {"stand_in": stand_in})
        return identity.gpu_key(cast(Device, made), cores)

    def npu(threads: int, **changed: Any) -> str:
        about = {"name": "OpenVINO", "version": "1", "device": "CPU", "stand_in": True} | changed
        return identity.npu_key(cast(Runtime, SimpleNamespace(**about)), threads)

    assert len({gpu(), gpu(driver="2"), gpu(name="b"), gpu(platform="c"), gpu(runtime="CUDA")}) == 5
    assert gpu() == gpu((3,)) == gpu(stand_in=True) != gpu((3,), stand_in=True) != gpu((2, 3), stand_in=True)
    assert len({npu(2), npu(1), npu(2, version="2"), npu(2, device="NPU"), npu(2, name="ONNX Runtime")}) == 5
    assert npu(2, stand_in=False) == npu(1, stand_in=False)
    assert identity.cpu_key(1) != identity.cpu_key(2)
    assert all(len(key) <= profile.LONGEST for key in (gpu(name="x" * 999), npu(2), identity.cpu_key(1024)))


def test_the_best_time_is_no_slip() -> None:
    assert shape_meters.best([3.0, 1.1, 1e-7, 0.4, 1.0, 1.2, 1.3]) == 1.0
    assert shape_meters.best([2.0]) == 2.0


def test_a_large_model_is_represented_by_a_few_layers() -> None:
    spec, tensors = made_up(replace(LLAMA_1B, layers=64), "Q4_0")
    tensors = {
        name: replace(t, format="Q6_K") if name in ("blk.60.ffn_down.weight", "blk.62.ffn_down.weight") else t
        for name, t in tensors.items()
    }
    small, kept = representative(spec, tensors)
    layers = len(small.layers)
    nbytes = sum(t.nbytes for name, t in kept.items() if name.startswith("blk."))
    assert measure_shapes.COLD <= nbytes < 1.5 * measure_shapes.COLD
    assert {name.split(".")[1] for name in kept if name.startswith("blk.")} == {str(i) for i in range(layers)}
    formats = [kept[f"blk.{i}.ffn_down.weight"].format for i in range(layers)]
    assert formats.count("Q6_K") == 2
    assert kept["token_embd.weight"] == tensors["token_embd.weight"]
    assert all(name == tensor.name for name, tensor in kept.items())
    tiny, tensors = made_up(replace(LLAMA_1B, layers=2), "Q4_0")
    assert representative(tiny, tensors) == (tiny, tensors)


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def short(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few points, each measured once or twice."""
    for module in (shape_meters, npu_meter):
        monkeypatch.setattr(module, "SHARES", (0.5, 1.0))
        monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(shape_meters, "TOKENS", (1, 8, 32))
    monkeypatch.setattr(npu_meter.NpuMeter, "lengths", (1, 32))
    monkeypatch.setattr(npu_meter, "READS", (64, 64))
    monkeypatch.setattr(measure_meeting, "READING", 0.01)
    monkeypatch.setattr(measure_meeting, "HANDS", 5)


@pytest.fixture
def model(folder: Path) -> Path:
    """Queries and keys in one format, values in another."""
    path = folder / "tiny.gguf"
    return path if path.exists() else write_tiny(path, formats=MIXED)


ROLES = ("token_embd", "attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MIXED = dict.fromkeys(ROLES, "Q4_0") | {"attn_v": "Q8_0"}
OF_THE_MODEL = {
    ("matmul", 96, 64, "Q4_0"), ("matmul", 32, 64, "Q8_0"), ("matmul", 64, 64, "Q4_0"),
    ("ffn_up", 192, 64, "Q4_0"), ("ffn_down", 64, 96, "Q4_0"), ("head", 304, 64, "Q4_0"), ("others", 128, 64, ""),
}  # fmt: skip


def shown(*arguments: str) -> dict[str, Any]:
    result = coterie("profile", "--shapes", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return cast(dict[str, Any], json.loads(result.stdout))


def test_the_cpu_units_products_are_measured_and_reused(short: None, model: Path) -> None:
    first = coterie("profile", "--shapes", str(model), "--on", "cpu", "-t", "1")
    assert first.exit_code == 0, first.stderr
    assert "cpu: 7 products measured\n" in first.stderr
    assert "  matmul 96 x 64 Q4_0 " in first.stdout
    assert "together" not in first.stdout
    found = load_profile().shapes
    assert {tuple(times.product) for times in found.units["cpu"].products} == OF_THE_MODEL
    for times in found.units["cpu"].products:
        wanted = (1, 8) if times.product.operator == "head" else (1, 8, 32)
        assert {p.tokens for p in times.points} == set(wanted)
        assert max(p.rows for p in times.points) == times.product.rows
        assert len(times.points) == 2 * len(wanted) or times.product.rows <= 32 or times.product.operator == "others"
    second = shown("-m", str(model), "--on", "cpu", "-t", "1")
    assert load_profile().shapes == found
    assert second["path"] == str(profile_path())
    assert second["shapes"]["units"]["cpu"]["key"] == identity.cpu_key(1)
    assert second["errors"].keys() == {"cpu"}
    again = coterie("profile", "--shapes", str(model), "--on", "cpu", "-t", "1")
    assert "cpu: 0 products measured, 7 reused\n" in again.stderr
    assert again.stdout == first.stdout
    assert again.stdout in coterie("profile").stdout


def test_other_lanes_and_other_kernels_are_measured_again(
    short: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coterie("profile", "--shapes", str(model), "--on", "cpu", "-t", "1")
    again = coterie("profile", "--shapes", str(model), "--on", "cpu", "-t", "2")
    before, now = identity.cpu_key(1), identity.cpu_key(2)
    assert f"cpu: 7 products measured (those known were measured with {before}, not with {now})\n" in again.stderr
    monkeypatch.setattr(identity, "cpu_key", lambda lanes: "other kernels")
    again = coterie("profile", "--shapes", str(model), "--on", "cpu", "-t", "2")
    assert f"(those known were measured with {now}, not with other kernels)\n" in again.stderr
    assert load_profile().shapes.units["cpu"].key == "other kernels"
    assert len(load_profile().shapes.units["cpu"].products) == 7


def test_another_model_adds_its_products(short: None, model: Path, tmp_path: Path) -> None:
    shown(str(model), "--on", "cpu", "-t", "1")
    known = load_profile().shapes.units["cpu"].products
    other = write_tiny(tmp_path / "other.gguf", ffn=128, formats=MIXED)
    result = coterie("profile", "--shapes", str(other), "--on", "cpu", "-t", "1")
    assert "cpu: 2 products measured, 5 reused\n" in result.stderr
    assert load_profile().shapes.units["cpu"].products[:7] == known


def test_again_replaces_this_models_points(short: None, model: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.gguf", ffn=128, formats=MIXED)
    for path in (other, model):
        shown(str(path), "--on", "cpu", "-t", "1")
    before = load_profile().shapes.units["cpu"].products
    result = coterie("profile", "--shapes", str(model), "--on", "cpu", "-t", "1", "--again")
    assert "cpu: 7 products measured\n" in result.stderr
    after = load_profile().shapes.units["cpu"].products
    assert len(after) == len(before) == 9
    assert after[:2] == tuple(times for times in before if tuple(times.product) not in OF_THE_MODEL)
    assert {times.product for times in after} == {times.product for times in before}


def test_points_of_a_busy_machine_are_named(short: None, model: Path) -> None:
    shown(str(model), "--on", "cpu", "-t", "1")
    known = load_profile()
    bent = unit(lambda rows, tokens: flat(rows, tokens) * (3 if tokens == 8 else 1)).products[0].points
    own = known.shapes.units["cpu"]
    more = tuple(ProductTimes(QKV._replace(format=f"F{n}"), 1, bent) for n in range(20))
    known.shapes.units["cpu"] = replace(own, products=(*own.products, *more))
    save_profile(known)
    result = coterie("profile", "--shapes", str(model), "--on", "cpu", "-t", "1")
    assert "perhaps of a busy machine; try --again" in result.stderr


def test_all_units_are_measured_alone_and_together(short: None, model: Path) -> None:
    for package in ("pyopencl", "openvino"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    found = shown(str(model), "-t", "2")["shapes"]
    assert list(found["units"]) == ["cpu", "gpu", "npu"]
    assert found["together"].keys() == {"cpu+gpu", "cpu+npu", "gpu+npu"}
    assert all(rate > 0 for rate in found["together"].values())
    assert found["sync"] > 0
    assert found["copy"] > 0
    products = {name: {tuple(t["product"]) for t in each["products"]} for name, each in found["units"].items()}
    assert products["cpu"] == products["gpu"] == OF_THE_MODEL
    on_npu = {
        (operator, rows, columns, "w8a8")
        for operator, rows, columns, form in OF_THE_MODEL
        if form and operator != "head"
    }
    of_prompts = {("matmul", 128, 64, "w8a8"), ("ffn", 192, 64, "w8a8")}
    assert products["npu"] == on_npu | of_prompts | {("ffn", 192, 64, "w4a16"), ("head", 304, 64, "w4a16")}
    for name, each in found["units"].items():
        assert each["launch"] > 0
        assert each["bandwidth"] > 0
        assert each["lengths"] == ([1, 32] if name == "npu" else [])
    there = units_there(["cpu", "gpu", "npu"], 2)
    made = Estimator(load_profile().shapes, there.keys)
    product = Product("matmul", 96, 64, "Q4_0")
    workers = [Worker("cpu", 16), Worker("gpu", 16, (), made.meeting), Worker("npu", 32, (1, 32), made.meeting)]
    cut = solve(96, 32, workers, partial(made.cost, product))
    assert sum(piece.rows * piece.tokens for piece in cut.pieces) == 96 * 32
    assert all(a.row <= b.row for a, b in pairwise(cut.pieces))
    again = coterie("profile", "--shapes", str(model), "-t", "2")
    assert again.stderr.count("0 products measured") == 3


def test_units_that_share_products_are_measured_as_they_are_then(short: None, model: Path) -> None:
    if find_spec("pyopencl") is None:
        pytest.skip("pyopencl is not installed")
    result = coterie("profile", "--shapes", str(model), "--split", "tensor", "--on", "cpu,gpu", "--json")
    assert result.exit_code == 0, result.stderr
    known = load_profile()
    assert known.shapes == Shapes()
    wishes = Wishes(units=("cpu", "gpu"), split="tensor")
    lanes, kept = lanes_and_kept(wishes)
    cores = Placement(kept=kept).own_cores()
    assert {name: unit.key for name, unit in known.beside.units.items()} == units_there(wishes.units, lanes, cores).keys
    assert json.loads(result.stdout)["shapes"] == json.loads(json.dumps(asdict(known.beside)))
    assert "units that share products:\ncpu, " in coterie("profile").stdout
    begun = begun_wishes(model, wishes)
    assert begun.begin.keys() == {"tokens", *DECODE}
    assert begun.reasons[0].startswith("cuts begin where measured products end soonest: cpu,gpu tokens ")
    explained = coterie("plan", str(model), "--units", "cpu,gpu", "--split", "tensor", "--explain")
    assert explained.exit_code == 0, explained.stderr
    assert "decode, a token: " in explained.stdout
    other = coterie("plan", str(model), "--units", "gpu", "--explain")
    refused(other, "gpu has not been measured as it is now: coterie profile --shapes MODEL", code=PlanError.exit_code)


def test_missing_units_are_named(short: None, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any, **more: Any) -> Any:
        raise UnitError("it is not here: pip install it")

    monkeypatch.setattr(identity, "open_device", missing)
    monkeypatch.setattr(identity, "open_runtime", missing)
    result = coterie("profile", "--shapes", str(model), "-t", "1")
    assert result.exit_code == 0
    assert "gpu: not measured, it is not here: pip install it\nnpu: not measured, it is not here" in result.stderr
    assert list(load_profile().shapes.units) == ["cpu"]
    refused(coterie("profile", "--shapes", str(model), "--on", "gpu"), "gpu: not measured, it is not here", code=6)


def test_bad_arguments_are_refused(short: None, model: Path, tmp_path: Path) -> None:
    for wrong in (("--on", "cpu"), ("--again",), ("--split", "tensor")):
        refused(coterie("profile", *wrong), "--on, --split and --again belong to --shapes")
    refused(coterie("profile", "--shapes", str(model), "--split", "rows"), "there are layer and tensor")
    refused(coterie("profile", "--shapes", str(model), "--split", "tensor", "--on", "cpu"), "--on cpu,gpu or cpu,npu")
    refused(coterie("profile", "--shapes", str(model), "--on", "cpu,tpu"), "'tpu'", "cpu, gpu, npu")
    refused(coterie("profile", "--shapes", "--flash", str(model)), "one at a time")
    refused(coterie("profile", "--shapes"), "which model?")
    refused(coterie("profile", "--shapes", str(model), "-m", str(model)), "two models")
    refused(coterie("profile", "--shapes", str(tmp_path / "nothing.gguf")), "nothing.gguf")
    sparse = write_tiny(tmp_path / "sparse.gguf", "bamboo", sparse=True, activation="relu")
    refused(coterie("profile", "--shapes", str(sparse)), "only whole dense models", code=UsageError.exit_code)
