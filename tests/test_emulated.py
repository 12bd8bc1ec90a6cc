"""Units that are not there: they do the arithmetic, take their time, and meet others at flags."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from coterie.actors.emulated import EmulatedUnit, Job
from coterie.errors import UnitError, UsageError
from coterie.kernels.record import LINE
from coterie.scheduler.device_model import Instruction
from coterie.scheduler.device_model import time as modelled
from coterie.scheduler.soc_file import load_soc
from coterie.storage.arena import Arena

PHONE = load_soc("snapdragon-8gen3")
KERNEL = Instruction("matmul", "npu", 512, 2048, 1, format="w4", nbytes=589824.0)  # takes some 160 us there


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena({"flags": 1 << 16})
    yield made
    made.close()


def test_it_computes_paces_itself_and_posts_flags(arena: Arena) -> None:
    unit = EmulatedUnit(arena, PHONE, "npu", dilation=20)
    x, y = np.arange(8.0), np.zeros(8)
    flag = arena.allocate("flags", LINE)
    unit.load("step", [Job(lambda: np.multiply(x, 2, out=y), KERNEL, sets=flag)] * 3)
    for epoch in (1, 2):
        begun = time.perf_counter()
        unit.run("step", epoch)
        assert time.perf_counter() - begun >= 3 * 20 * modelled(KERNEL, PHONE)
        assert arena.numpy(flag).view(np.int64)[0] == epoch
    assert y.tolist() == (2 * x).tolist()
    assert [(event.epoch, event.number) for event in unit.events] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    for event in unit.events:
        assert event.end - event.start >= 20 * event.modelled
    unit.close()
    unit.close()


def test_it_says_that_it_is_emulated(arena: Arena) -> None:
    unit = EmulatedUnit(arena, PHONE, "npu", dilation=10)
    said = unit.describe()
    assert said["runtime"] == "emulated: npu of Snapdragon 8 Gen 3, 10 times as slow"
    assert said["emulated"]
    assert not said["real"]
    unit.close()


def test_two_units_wait_for_each_other_at_flags(arena: Arena) -> None:
    npu, gpu = EmulatedUnit(arena, PHONE, "npu"), EmulatedUnit(arena, PHONE, "gpu")
    there, back = arena.allocate("flags", LINE), arena.allocate("flags", LINE)
    order: list[str] = []
    norm = Instruction("norm", "gpu", nbytes=4096.0, flops=4096.0)
    npu.load(
        "step", [Job(lambda: order.append("npu"), KERNEL, (), there), Job(lambda: order.append("end"), KERNEL, (back,))]
    )
    gpu.load("step", [Job(lambda: order.append("gpu"), norm, (there,), back)])
    for epoch in range(1, 6):
        gpu.begin("step", epoch)
        npu.begin("step", epoch)
        npu.wait(epoch)
        gpu.wait(epoch)
    assert order == ["npu", "gpu", "end"] * 5
    npu.close()
    gpu.close()


def test_what_goes_wrong_is_said(arena: Arena) -> None:
    unit = EmulatedUnit(arena, PHONE, "npu")
    with pytest.raises(UnitError, match="no program 'step'"):
        unit.begin("step", 1)
    with pytest.raises(UsageError, match="a job of unit 'gpu' was given to 'npu'"):
        unit.load("step", [Job(lambda: None, Instruction("norm", "gpu"))])
    never, stop = arena.allocate("flags", LINE), threading.Event()
    unit.load("waits", [Job(stop.set, KERNEL, (never,))])
    unit.begin("waits", 1)
    with pytest.raises(UnitError, match="has not finished step 1"):
        unit.wait(1, patience=0.05)
    with pytest.raises(UnitError, match="still at step 1"):
        unit.begin("waits", 2)
    unit.close()
    assert not stop.is_set()
    with pytest.raises(UnitError, match="has been closed"):
        unit.begin("waits", 2)
    for dilation in (0, -1, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="makes no sense"):
            EmulatedUnit(arena, PHONE, "npu", dilation=dilation)
    with pytest.raises(UsageError, match="has no unit 'tpu'"):
        EmulatedUnit(arena, PHONE, "tpu")


def test_arithmetic_that_fails_ends_the_step(arena: Arena) -> None:
    def broken() -> None:
        raise ValueError("no")

    unit = EmulatedUnit(arena, PHONE, "npu")
    unit.load("step", [Job(broken, KERNEL)])
    with pytest.raises(UnitError, match="failed: ValueError: no"):
        unit.run("step", 1)
    unit.close()
