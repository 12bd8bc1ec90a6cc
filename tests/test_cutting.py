"""Products of whole models, cut across the units of a device that is described: by the partition solver, simulated."""

from dataclasses import replace

import numpy as np
import phone
import pytest
from simulated import LLAMA_1B, LLAMA_8B, PHONE, SMALL, simulation
from test_partition import assert_whole

from coterie.commands.measure_units import Shape
from coterie.errors import PlanError
from coterie.scheduler.bandwidth import until_all_end
from coterie.scheduler.cutting import Cutter
from coterie.scheduler.device_model import Instruction
from coterie.scheduler.operators import Rows
from coterie.scheduler.simulate import Simulation
from coterie.scheduler.soc import Device, Rates, UnitModel
from coterie.scheduler.steps import product_of
from coterie.sizes import Share

UNITS = "gpu", "npu"
FAR_OFF = "decode, fast synchronisation"  # by its constants most of a token's products are not worth a cut


def test_the_paper_s_ratios_come_out() -> None:
    """HeteroInfer's, within a quarter each, by constants that were not fitted to them."""
    found = {ratio.name: ratio for ratio in phone.ratios()}
    assert {name for name, ratio in found.items() if abs(ratio.error) > 0.25} == {FAR_OFF}
    assert found[FAR_OFF].found > 1.2


@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_1B])
@pytest.mark.parametrize("prompt", [1, 31, 100, 300, 525])
def test_cutting_is_never_slower(prompt: int, shape: Shape) -> None:
    """Than one unit, or the rule that gives all products of a prompt to the NPU."""

    def seconds(units: tuple[str, ...], cut: tuple[str, ...] = ()) -> tuple[float, float]:
        made = simulation(PHONE, shape, prompt=prompt, tokens=4, units=units, cut=cut, memory=1 << 34, chunk=544)
        return made.prefill()[0].seconds, made.decode()[0].seconds

    prefill, decode = seconds(UNITS, UNITS)
    for units in (("gpu",), UNITS):
        rule = seconds(units)
        assert prefill <= 1.01 * rule[0]
        assert decode <= 1.01 * rule[1]


def test_both_units_compute_a_cut_product_at_once() -> None:
    made = simulation(PHONE, LLAMA_8B, prompt=256, tokens=0, units=UNITS, cut=UNITS, memory=1 << 34, chunk=256)
    step = made.step("prefill", Rows(256, 0))
    outcome = made.run([step])
    downs = [event for event in outcome.events if event.name == "ffn_down" and event.layer == 3]
    assert {event.unit for event in downs} == set(UNITS)
    together = min(event.end for event in downs) - max(event.start for event in downs)
    assert together > 0.8 * (max(event.end for event in downs) - min(event.start for event in downs))
    assert not outcome.waits["flash"].get("memory")


def test_streamed_products_are_not_cut() -> None:
    made = simulation(units=UNITS, cut=UNITS, memory=Share(0.5))
    assert made.cutter is not None
    operators = made.reader.operators(made.layout.programs["decode"], Rows(1, 16))
    streamed = [each for each in operators if each.first >= 0]
    assert streamed
    assert made.cutter.cut(streamed) == {}
    assert made.answer().decode


def perturbed(rng: np.random.Generator) -> Device:
    """The phone with every rate and delay changed by up to a factor of ten."""

    def by(value: float) -> float:
        return value * float(10 ** rng.uniform(-1, 1))

    def rates(old: Rates) -> Rates:
        return replace(old, rate=by(old.rate), fill=by(old.fill), launch=by(old.launch or 1e-5))

    def unit(old: UnitModel) -> UnitModel:
        changed = {name: rates(each) for name, each in old.rates.items()}
        step = int(rng.choice([1, 16, 32, 100]))
        return replace(old, rates=changed, bandwidth=by(old.bandwidth), sync=by(old.sync), step=step)

    units = {name: unit(each) for name, each in PHONE.units.items()}
    return replace(PHONE, units=units, together=by(PHONE.together))


@pytest.mark.parametrize("seed", range(10))
def test_perturbed_profiles_have_valid_plans(seed: int) -> None:
    """A hundred a seed: every output is computed once, by graphs that there are, never slower than by one unit."""
    rng = np.random.default_rng(seed)
    for _ in range(100):
        units = ("cpu", "gpu", "npu")[: int(rng.integers(2, 4))]
        cutter = Cutter(perturbed(rng), units, "gpu", fence=bool(rng.integers(2)))
        rows, columns, tokens = (int(rng.integers(1, most)) for most in (3000, 3000, 300))
        i = Instruction("matmul", "", rows, columns, tokens, "Q4_0", rows * columns * 0.5625)
        best = cutter.best(i)
        assert_whole(best, rows, tokens, [cutter.worker(name, tokens) for name in units])
        for name in ("cpu", "gpu"):
            if name in units:
                whole = cutter.part(i, name, rows, tokens)
                alone = until_all_end([(whole.seconds, whole.nbytes)], cutter.device.together)
                assert best.seconds <= (alone + cutter.worker(name, tokens).join) * (1 + 1e-9)


def test_small_models_are_cut_too() -> None:
    made = simulation(PHONE, SMALL, prompt=40, tokens=4, units=("cpu", "gpu", "npu"), cut=("cpu", "gpu", "npu"))
    assert made.answer().prefill


def window(nbytes: float) -> Device:
    return replace(PHONE, units={**PHONE.units, "npu": replace(PHONE.units["npu"], window=nbytes)})


def npu_bytes(made: Simulation) -> float:
    """Bytes of the weights that the NPU computes with, for prompts or tokens."""
    found: dict[tuple[object, ...], float] = {}
    for name, rows in (("prefill", Rows(64, 0)), ("decode", Rows(1, 64))):
        placement = made.placement(name, rows)
        for operator in made.operators(name, rows):
            i = operator.instruction
            cut = placement.cuts.get(product_of(i))
            taken = max((piece.rows for piece in cut.pieces if piece.unit == "npu"), default=0) if cut else 0
            key = i.layer, i.kind, i.rows, i.columns
            found[key] = max(found.get(key, 0.0), taken * i.nbytes / max(1, i.rows))
    return sum(found.values())


def test_an_npu_computes_with_what_it_can_address() -> None:
    """The checklist's row 46: with less to address fewer products are the NPU's, and it is never faster."""
    pytest.importorskip("highspy", reason="pip install -e .[plan]")
    before = 0.0
    for part in (1.0, 0.6, 0.3, 0.1, 0.01):
        device = window(part * 700e6)
        asked = {"prompt": 64, "tokens": 4, "units": UNITS, "cut": UNITS, "memory": 1 << 34, "chunk": 64}
        made = simulation(device, LLAMA_1B, **asked)
        assert npu_bytes(made) <= part * 700e6
        seconds = made.prefill()[0].seconds
        assert seconds >= 0.98 * before
        before = max(before, seconds)
    with pytest.raises(PlanError, match="products want at least"):
        simulation(window(1e6), LLAMA_1B, prompt=64, units=("npu",), cut=("npu",), memory=1 << 34).answer()
