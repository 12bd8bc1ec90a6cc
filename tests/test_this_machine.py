"""This machine as a device: its profile, how it is measured and kept, and what follows from it."""

import json
from pathlib import Path

import numpy as np
import pytest
from simulated import LLAMA_1B, SMALL, on_paper, simulation

from coterie.commands import measure_pauses, measure_units
from coterie.commands.measure_units import Shape, fitted, non_negative
from coterie.errors import UsageError
from coterie.scheduler import profile
from coterie.scheduler import this_machine as machine
from coterie.scheduler.device_model import Instruction
from coterie.scheduler.profile import DeviceProfile, load_profile
from coterie.scheduler.simulate import Question, Simulation
from coterie.scheduler.this_machine import this_machine
from coterie.sizes import Share


def test_this_machine_is_what_was_measured(measured: DeviceProfile) -> None:
    assert load_profile() == measured
    device = this_machine()
    assert not device.emulated
    assert device.guesses() == ()
    made = simulation(device, LLAMA_1B, threads=2, memory=Share(1.0), prompt=0)
    decode, _ = made.decode()
    count = made.layout.programs["decode"].length
    assert decode.seconds == pytest.approx(made.plan.bytes_per_token / 1e10 + 1e-5 * count + 1e-4, rel=0.02)  # padding
    streamed = simulation(device, LLAMA_1B, threads=2, memory=Share(0.5), prompt=0)
    assert streamed.device.between == 2e-4
    assert streamed.device.flash == device.flash
    reading = streamed.plan.streamed_per_token / 4e9
    assert reading < streamed.decode()[0].seconds


def test_lanes_on_all_cores_lose_time_to_reads(measured: DeviceProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 us a read of 1 MiB, at 4e9 bytes/s, on two lanes."""
    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    busy = 1e-6 / (1 << 20) * 4e9 / 2
    assert this_machine().units["cpu"].beside_flash == pytest.approx(1 - busy)
    monkeypatch.setattr(machine, "available_cores", lambda: 4)
    assert this_machine().units["cpu"].beside_flash == 1.0


def test_looking_up_reads_each_extent_once(measured: DeviceProfile) -> None:
    """Few tokens want as many extents at most, two of them in flight, and many tokens not more than all extents."""
    made = simulation(this_machine(), LLAMA_1B, threads=2, memory=Share(0.25), prompt=0)
    embedding = made.layout.weights.embedding
    assert embedding is not None
    size, extents = embedding.run.stride, embedding.run.extents
    assert 0 < made._lookup(3) <= 3 * size / 2e9
    assert made._lookup(3) < made._lookup(1 << 20) <= extents * size / 4e9


def test_what_has_not_been_measured_is_said(measured: DeviceProfile) -> None:
    with pytest.raises(UsageError, match="with 7 lanes: coterie profile --units"):
        this_machine(lanes=7)
    with pytest.raises(UsageError, match="coterie profile --units"):
        this_machine(DeviceProfile())
    made = Simulation(*on_paper(SMALL, "Q8_0"), this_machine(), Question(Share(1.0), prompt=0, tokens=2))
    with pytest.raises(UsageError, match="has not been measured here: coterie profile --units --formats Q8_0"):
        made.decode()


def test_a_profile_of_before_and_a_damaged_one(measured: DeviceProfile, capsys: pytest.CaptureFixture[str]) -> None:
    path = profile.profile_path()
    content = json.loads(path.read_text())
    section = content["machines"][profile.machine()]
    units = section.pop("units")
    path.write_text(json.dumps(content))
    assert load_profile() == DeviceProfile(measured.memory_bandwidth, measured.flash)
    profile._warn.cache_clear()
    for key, value in (
        ("flash_beside", 0),
        ("flash_beside", 2.0),
        ("lanes", -1),
        ("kernels", []),
        ("between", float("nan")),
    ):
        section["units"] = {"2": units["2"] | {key: value}}
        path.write_text(json.dumps(content))
        assert load_profile() == DeviceProfile()
    assert "is damaged" in capsys.readouterr().err


def test_kernels_are_fitted() -> None:
    def point(rows: int, tokens: int, seconds: float) -> tuple[Instruction, float]:
        return Instruction("matmul", "cpu", rows, 1024, tokens, nbytes=rows * 576.0, kernel="matmul:Q4_0:1"), seconds

    few = fitted("a", [point(n, 1, 1e-5 + n * 576 / 2e10) for n in (512, 4096, 32768)])
    assert (few.launch, few.bandwidth) == pytest.approx((1e-5, 2e10))
    many = fitted(
        "b",
        [point(n, t, 2e-5 + 2 * n * 1024 * (t + 8) / 5e11) for n in (512, 4096) for t in (64, 256)]
        + [point(4096, 2, 1e-3)],
    )
    assert (many.launch, many.rate, many.fill) == pytest.approx((2e-5, 5e11, 8))
    assert many.bandwidth == pytest.approx(4096 * 576 / (1e-3 - 2e-5), rel=1e-3)
    ones = np.ones(3)
    assert non_negative(np.stack([ones, -ones * 2 + [0, 0, 0.1]], axis=1), ones) == pytest.approx([1, 0])


def test_pauses_are_measured_of_a_real_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path))
    monkeypatch.setattr(measure_pauses, "NARROW", Shape(256, 4, 2, 2048, 24, 512))
    between, streamed = measure_pauses.measure_pauses(1, lambda *_: None)
    assert 0 < between < 1
    assert 0 < streamed < 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tmp")] == []


def test_measuring_units_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes: what comes out is of no use, but whole."""
    monkeypatch.setattr(measure_units, "NARROW", Shape(256, 4, 2, 512, 2, 512))
    monkeypatch.setattr(measure_units, "WIDE", Shape(512, 8, 2, 1024, 2, 1024))
    monkeypatch.setattr(measure_units, "REPEAT", 2)
    found = measure_units.measure_units(["Q4_0"], 1, lambda *_: None, (1e-4, 2e-4))
    names = {cost.kernel for cost in found.kernels}
    assert {"matmul:Q4_0:1", "ffn_up:Q4_0:4", "ffn_down:Q4_0:1", "attend", "attend_one", "norm"} <= names
    assert all(cost.rate or cost.bandwidth or cost.launch for cost in found.kernels)
    made = simulation(this_machine(DeviceProfile(2e10, {}, {"1": found})), threads=1, memory=Share(1.0))
    assert made.answer().decode
    with pytest.raises(UsageError, match="no weights are in 'Q9'"):
        measure_units.measure_units(["Q9"], 1, lambda *_: None, (1e-4, 2e-4))
