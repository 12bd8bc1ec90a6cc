"""The device model gives what the papers printed: checklist rows 17, 18, 23, 24, tables 3 of HeteroLLM and llm.npu."""

import itertools
from statistics import mean

import pytest

from coterie.errors import UsageError
from coterie.scheduler.bandwidth import shared
from coterie.scheduler.device_model import Instruction, Kind, Order, cost, part, time
from coterie.scheduler.soc import Device
from coterie.scheduler.soc_file import load_soc

PHONE = load_soc("snapdragon-8gen3")
BYTES = {"w4": 0.5625, "int4": 0.5, "int8": 1.0, "f16": 2.0, "f16_sdk": 2.0}  # of a weight
US, MS = 1e-6, 1e-3


def product(
    unit: str, rows: int, columns: int, tokens: int, format: str = "w4", order: Order = "best", device: Device = PHONE
) -> float:
    """Seconds of a weight matrix [rows, columns] times [columns, tokens]."""
    nbytes = rows * columns * BYTES[format]
    i = Instruction("matmul", unit, rows, columns, tokens, format=format, nbytes=nbytes, order=order)
    return time(i, device)


# HeteroLLM, table 3: weight, tokens, GPU us, NPU us
HETERO = [
    (4096, 4096, 1, 511, 693),
    (28672, 4096, 1, 1903, 3886),
    (4096, 14336, 1, 1467, 6506),
    (4096, 4096, 128, 7306, 912),
    (4096, 4096, 256, 10841, 1884),
    (4096, 14336, 256, 35231, 23445),
]


@pytest.mark.parametrize(("rows", "columns", "tokens", "gpu", "npu"), HETERO)
def test_table_3_of_heterollm(rows: int, columns: int, tokens: int, gpu: float, npu: float) -> None:
    assert product("gpu", rows, columns, tokens) == pytest.approx(gpu * US, rel=0.05)
    assert product("npu", rows, columns, tokens) == pytest.approx(npu * US, rel=0.10)


def test_ranges_of_table_3_of_heterollm() -> None:
    for tokens, gpu, npu in ((193, 9000, 1200), (255, 11000, 1900), (272, 11000, 1900)):
        assert product("gpu", 4096, 4096, tokens) == pytest.approx(gpu * US, rel=0.06)
        if tokens < 256:
            assert 1.1e-3 < product("npu", 4096, 4096, tokens) < 2.0e-3, npu
    assert product("gpu", 4096, 14336, 384) == pytest.approx(50e-3, rel=0.06)
    assert product("npu", 4096, 14336, 384) == pytest.approx(32e-3, rel=0.12)


# llm.npu, table 3: tokens, columns, rows; ms on NPU INT8, CPU INT8, GPU FP16, NPU FP16
LLM_NPU = [
    (64, 2048, 2048, 0.9, 4.2, 1.7, 252),
    (64, 2048, 8192, 1.5, 6.8, 4.8, 986),
    (64, 2048, 11008, 2.0, 11.6, 6.9, 1207),
    (32, 4096, 4096, 1.7, 7.5, 3.1, 1054),
    (32, 4096, 8192, 2.9, 13.1, 7.7, 2009),
    (32, 4096, 11008, 4.1, 19.6, 10.4, 3112),
]
COLUMNS = [
    ("npu", "int8", 0.08, 0.06),
    ("cpu", "int8", 0.22, 0.12),
    ("gpu", "f16", 0.25, 0.10),
    ("npu", "f16_sdk", 0.15, 0.07),
]


@pytest.mark.parametrize("column", range(4))
def test_table_3_of_llm_npu(column: int) -> None:
    unit, format, worst, on_average = COLUMNS[column]
    errors = []
    for tokens, columns, rows, *times in LLM_NPU:
        errors.append(abs(product(unit, rows, columns, tokens, format, "weights") / (times[column] * MS) - 1))
    assert max(errors) < worst
    assert mean(errors) < on_average


def test_an_npus_time_goes_in_steps_of_32() -> None:
    times = [product("npu", 4096, 4096, tokens, "int8") for tokens in range(1, 513)]
    for step in range(16):
        assert len(set(times[32 * step : 32 * step + 32])) == 1
    long = [product("npu", 4096, 4096, 32 * n, "f16") for n in range(8, 33)]
    assert long == sorted(set(long))
    rows = [product("npu", 4096 + n, 4096, 256, "f16", "weights") for n in range(1, 33)]
    assert len(set(rows)) == 1
    gpu = [product("gpu", 4096, 4096, tokens) for tokens in range(128, 160)]
    assert gpu == sorted(set(gpu))


def test_swapping_operands_makes_about_six_times() -> None:
    """[14336, 4096] x [4096, K] against [K, 4096] x [4096, 14336]: the paper does not say for which K."""

    def times(tokens: int) -> float:
        big_still = product("npu", 14336, 4096, tokens, "f16", "weights")
        return big_still / product("npu", 14336, 4096, tokens, "f16", "activations")

    assert times(512) == pytest.approx(6, rel=0.05)
    assert [times(k) for k in (256, 512, 1024, 2048)] == sorted(
        (times(k) for k in (256, 512, 1024, 2048)), reverse=True
    )
    assert product("npu", 14336, 4096, 512, "f16") == product("npu", 14336, 4096, 512, "f16", "activations")


def test_an_npu_is_little_better_than_a_gpu_at_ffn_down() -> None:
    for tokens in (256, 512, 1024, 2048):
        assert 0.5 <= product("gpu", 4096, 14336, tokens) / product("npu", 4096, 14336, tokens) <= 1.5
        assert product("gpu", 14336, 4096, tokens) / product("npu", 14336, 4096, tokens) > 4
    for tokens in (1, 2):  # and worse for few
        assert product("gpu", 4096, 14336, tokens) < product("npu", 4096, 14336, tokens)


def test_order_of_magnitude_of_peaks() -> None:
    """About 1 TFLOPS on the GPU, up to about 10 on the NPU (HeteroLLM, section 1)."""
    operations = 2.0 * 28672 * 4096 * 4096
    assert operations / product("gpu", 28672, 4096, 4096) == pytest.approx(1e12, rel=0.2)
    assert 7e12 < operations / product("npu", 28672, 4096, 4096, "f16") < 10e12


def reading(unit: str, format: str) -> Instruction:
    """A 7B model's weights times a vector, as one product: launches do not count."""
    rows = 1_600_000
    return Instruction("matmul", unit, rows, 4096, 1, format=format, nbytes=rows * 4096 * BYTES[format])


ALONE = {"cpu": ("w4", 43.9e9), "gpu": ("w4", 43.3e9), "npu": ("int4", 56e9)}


def test_bandwidth_alone_and_together() -> None:
    costs = {unit: cost(reading(unit, format), PHONE) for unit, (format, _) in ALONE.items()}
    for unit, (format, rate) in ALONE.items():
        i = reading(unit, format)
        assert i.nbytes / time(i, PHONE) == pytest.approx(rate, rel=0.02)
        assert 40e9 <= i.nbytes / time(i, PHONE) <= 56e9
    for pair in itertools.combinations(costs.values(), 2):
        wants = [each.bytes_per_s for each in pair]
        rate = sum(want * share for want, share in zip(wants, shared(wants, PHONE.together), strict=True))
        assert rate == pytest.approx(59.6e9, rel=0.01)
        assert rate <= 60e9


def test_bandwidth_is_shared_fairly() -> None:
    assert shared([10.0, 20.0], 40.0) == [1.0, 1.0]
    assert shared([10.0, 50.0, 60.0], 40.0) == pytest.approx([1.0, 0.3, 0.25])
    assert shared([0.0, 50.0], 25.0) == pytest.approx([1.0, 0.5])
    assert shared([], 1.0) == []


def test_several_cores_that_read_are_40_percent_slower() -> None:
    one = Instruction("read", "flash", nbytes=1 << 26, pattern="random", block=4096, span=128 << 20)
    several = Instruction("read", "flash", nbytes=1 << 26, pattern="random", block=4096, span=128 << 20, readers=4)
    assert time(one, PHONE) / time(several, PHONE) == pytest.approx(0.6)
    cores = [
        time(
            Instruction("read", "flash", nbytes=1 << 26, pattern="random", block=4096, span=128 << 20, core=core), PHONE
        )
        for core in ("big", "mid", "little")
    ]
    assert cores == sorted(cores)


def test_synchronisation_costs() -> None:
    gpu = PHONE.unit("gpu")
    assert gpu.fence == pytest.approx(400 * US)
    assert 10 * US <= (gpu.queued or 0) <= 20 * US
    assert 50 * US <= (gpu.drained or 0) <= 100 * US
    assert time(Instruction("sync", "gpu"), PHONE) <= 10 * US
    assert time(Instruction("copy", "gpu", nbytes=1.0), PHONE) == pytest.approx(400 * US, rel=0.01)


def test_parts_of_rows_are_whole_steps_and_the_whole_again() -> None:
    whole = Instruction("matmul", "gpu", 4096, 4096, 1, format="w4", nbytes=9437184.0)
    parts = [part(whole, share, unit, 32) for unit, share in (("gpu", 0.75), ("npu", 0.25))]
    assert [i.rows for i in parts] == [3072, 1024]
    assert sum(i.nbytes for i in parts) == whole.nbytes
    assert all(i.rows % 32 == 0 for i in parts)


def test_what_is_not_there_is_said() -> None:
    kinds: tuple[Kind, ...] = ("matmul", "norm", "copy", "sync")
    for kind in kinds:
        with pytest.raises(UsageError, match="has no unit 'tpu'; it has cpu, gpu, npu"):
            time(Instruction(kind, "tpu"), PHONE)


@pytest.mark.parametrize("name", ["orin", "rk3588", "core-ultra", "dimensity-9300", "snapdragon-8-elite"])
def test_other_devices_give_sensible_times(name: str) -> None:
    device = load_soc(name)
    for unit, model in device.units.items():
        one, many = (product(unit, 4096, 4096, tokens, "int8", device=device) for tokens in (1, 256))
        assert 0 < one <= many < 1, (unit, model.kind)
