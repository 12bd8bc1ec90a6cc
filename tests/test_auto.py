"""--preset auto on this machine: exact unless near is allowed, by measured times, with its reason."""

from pathlib import Path

import pytest
from tiny_models import write_tiny

from coterie import auto
from coterie.actors.identity import There
from coterie.errors import PlanError, UsageError
from coterie.models.load import read_spec
from coterie.opening import open_file, preset_wishes
from coterie.scheduler.plan import Wishes
from coterie.scheduler.profile import DeviceProfile, Point, Product, ProductTimes, Shapes, UnitTimes

KEYS = {"cpu": "c", "gpu": "g", "npu": "n"}
RATES = {"cpu": (1.0, 1.0), "gpu": (0.5, 2.0), "npu": (0.25, 1.0)}  # of a prompt's and a token's products, seconds


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf", "llama", formats="Q4_0")


def measured(monkeypatch: pytest.MonkeyPatch, model: Path, rates: dict[str, tuple[float, float]]) -> None:
    """A machine on which every product of a prompt takes so long on a unit, and every one of a token."""
    with open_file(model) as file:
        spec = read_spec(file)
        found = {each for products in auto._products(file, spec, 2) for each in products}
    heads = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
    graphs = {
        Product("matmul", heads, spec.dim, "w8a8"),
        Product("matmul", spec.dim, spec.n_heads * spec.head_dim, "w8a8"),
        Product("ffn", 2 * spec.ffn_dim, spec.dim, "w8a8"),
    }
    units = dict[str, UnitTimes]()
    for name, (prompt, token) in rates.items():
        own, is_npu = (graphs, True) if name == "npu" else (found, False)
        tokens = {1: token, 128: prompt / 2, 256: prompt}
        times = tuple(
            ProductTimes(each, 1, tuple(Point(each.rows, n, seconds) for n, seconds in tokens.items()))
            for each in sorted(own)
        )
        lengths, form = ((1, 128), "w8a8") if is_npu else ((), "")
        units[name] = UnitTimes(KEYS[name], form, lengths, 0.0, 0.0, 1.0, times)
    monkeypatch.setattr(auto, "load_profile", lambda: DeviceProfile(shapes=Shapes(units, {}, 0.0, 1.0)))
    monkeypatch.setattr(auto, "units_there", lambda wanted, lanes: There({n: KEYS[n] for n in rates}, None, {}))


def test_without_leave_it_stays_exact(model: Path) -> None:
    wishes = preset_wishes(model, "auto", Wishes())
    assert wishes.units == ("cpu",)
    assert "--allow-near lets GPU and NPU take part" in wishes.reasons[0]


@pytest.mark.parametrize("slow", ["", "gpu", "npu", "gpu npu"])
def test_it_takes_what_is_expected_to_be_fastest(slow: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {name: (1.0, 9.0) if name in slow else pair for name, pair in RATES.items()}
    measured(monkeypatch, model, rates)
    with open_file(model) as file:
        found = auto.candidates(file, read_spec(file), Wishes())
    wishes = preset_wishes(model, "auto", Wishes(), near=True)
    chosen = next(each for each in found if each.units == wishes.units)
    assert len(found) == len(auto.CANDIDATES)
    assert chosen.seconds == min(each.seconds for each in found)
    assert all(each.line() in wishes.reasons[0] for each in found)


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
