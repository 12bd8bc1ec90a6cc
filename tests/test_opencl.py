"""The OpenCL runtime: the arena as the device's memory, builds, errors, the share of a GPU that others use too."""

import ctypes
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_bench import EPOCH, GpuBench

from coterie.actors import opencl
from coterie.actors.opencl import Loaded, OpenCLDevice
from coterie.errors import UnitError
from coterie.kernels import opencl_queue as oq
from coterie.kernels import record as r
from coterie.kernels.gpu.signatures import TOKENS
from coterie.kernels.gpu.source import source
from coterie.storage.arena import Arena

try:
    GpuBench(wide=None, size=1 << 20).close()
except UnitError as missing:
    pytest.skip(str(missing), allow_module_level=True)

Enqueue = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 9)


def address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@pytest.fixture
def bench() -> Iterator[GpuBench]:
    made = GpuBench(wide=None)
    yield made
    made.close()


def norms(bench: GpuBench, rows: int = 9) -> dict[str, Any]:
    """Operands of a norm of rows of 64, of which the result is 1 everywhere."""
    none = dict.fromkeys(("outputs", "y", "x_out", "post", "rounded"))
    x, ones = bench.put(np.full((rows, 64), 3, np.float32)), bench.put(np.ones(64, np.float32))
    common = {
        "select": 0,
        "row": 256,
        "dim": 64,
        "eps": 0.0,
        "out_row": 256,
        "rounded_row": 0,
        "planes": 1,
        "width": 64,
    }
    return {"x": x, "weight": ones, "out": bench.room(rows, 64)} | common | none


def product(bench: GpuBench, groups: int = 300) -> dict[str, Any]:
    """Operands of a product of float32 weights, all 1, of 16 * groups rows and 32 columns, for up to 9 rows."""
    weights = bench.put(np.ones((groups, 32, 16), np.float32))
    x, y = bench.put(np.ones((9, 32), np.float32)), bench.room(9, 16 * groups)
    sizes = {"groups": groups, "blocks": 1, "group": 2048, "per": groups, "stride": 0}
    rows = {"x": x, "x_row": 128, "planes": 1, "y": y, "y_row": 64 * groups}
    return {"select": 0, "weights": weights} | rows | sizes


# --- the arena is the device's memory ----------------------------------------------------------------


def test_the_buffer_is_the_arena(bench: GpuBench) -> None:
    cl, device = opencl._pyopencl(), bench.device
    assert device.buffer.size == bench.arena.size
    mapped, _ = cl.enqueue_map_buffer(
        device.queue, device.buffer, cl.map_flags.READ, 0, (bench.arena.size,), np.uint8, is_blocking=True
    )
    assert mapped.__array_interface__["data"][0] == bench.arena.base
    mapped.base.release(device.queue)


def test_a_kernel_sees_and_writes_the_very_bytes(bench: GpuBench) -> None:
    values = norms(bench)
    loaded = bench.load("norm", **values)
    out = bench.look(values["out"])
    for weight in (1, 2):  # written without a word to the driver
        bench.look(values["weight"])[:] = weight
        bench.look(bench.step)[r.TOKENS] = 9
        loaded.run(9, 0)
        bench.device.finish()
        assert (out == weight).all()


def test_it_says_what_it_is(bench: GpuBench) -> None:
    said = bench.device.describe()
    assert said["runtime"] == "OpenCL"
    assert said["stand_in"] == (said["shape"] == "wide") == bench.device.is_cpu
    assert said["name"]
    assert said["driver"]
    assert said["largest_buffer"] >= bench.arena.size


def test_an_arena_that_is_too_large_for_a_buffer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena({"all": 1 << 20})
    monkeypatch.setattr(arena, "size", 1 << 50)
    with pytest.raises(UnitError, match=r"^the arena's 1073741824 MiB are more than .* takes as one buffer, \d+ MiB"):
        OpenCLDevice(arena)


def test_a_device_that_computes_in_a_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opencl, "_shares", lambda *_: False)
    with pytest.raises(UnitError, match=r"has memory of its own .* CUDA is for such$"):
        GpuBench(wide=None)


def test_a_share_that_makes_no_sense_is_refused() -> None:
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(UnitError, match="cannot have a share"):
            GpuBench(wide=None, share=share)


# --- what is missing ---------------------------------------------------------------------------------


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyopencl", None)
    with pytest.raises(UnitError, match=r"^a GPU unit needs pyopencl: pip install 'coterie\[gpu\]'$"):
        GpuBench(wide=None)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cl = opencl._pyopencl()

    def none() -> list[Any]:
        raise cl.LogicError("clGetPlatformIDs failed: PLATFORM_NOT_FOUND_KHR")

    for get in (none, list):
        monkeypatch.setattr(cl, "get_platforms", get)
        with pytest.raises(UnitError, match=r"^no OpenCL driver is installed: .*pip install pocl-binary-distribution$"):
            GpuBench(wide=None)


# --- builds ------------------------------------------------------------------------------------------

STARTED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_opencl import GpuBench, norms
bench = GpuBench(wide=None)
values = norms(bench)
bench.run("norm", 9, **values)
assert (bench.look(values["out"]) == 1).all()
print(bench.device.builds)
bench.close()
"""


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
def test_the_compiler_has_nothing_to_remark(wide: bool, bench: GpuBench) -> None:
    """Its warnings are turned off, since the driver prints them; there are none."""
    names = ["norm", "rope", "attend", "post", "embed:Q4_0", "embed:F16", "matmul:F32:1", "ffn_down:Q6_K:1"]
    names += [f"ffn_up:Q4_1:Q4_0:silu:{TOKENS}"]
    program = bench.device._cl.Program(bench.device._context, source(names, wide))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pyopencl's cache, which is not used
        program.compile(options=["-cl-std=CL1.2", "-Werror"])


def started() -> int:
    """Builds of a process of its own that runs a norm."""
    command = [sys.executable, "-W", "ignore", "-c", STARTED, str(Path(__file__).parent)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_second_start_builds_nothing(own_home: Path) -> None:
    assert [started(), started()] == [1, 0]


def test_a_damaged_binary_is_built_again(own_home: Path) -> None:
    bench = GpuBench(wide=None)
    bench.load("norm", **norms(bench))
    assert bench.device.builds == 1
    (binary,) = (own_home / "gpu").iterdir()
    whole = binary.read_bytes()
    for damage in (whole[:-1], b"", whole[:100] + b"\0" + whole[101:], b"no binary" + bytes(64)):
        binary.write_bytes(damage)
        second = GpuBench(wide=None)
        second.run("norm", 9, **norms(second))
        assert second.device.builds == 1
        second.close()
        assert len(binary.read_bytes()) == len(whole)
    bench.close()


def test_no_step_builds_anything(own_home: Path) -> None:
    """Neither this module nor the driver, whose cache is a folder, writes anything once a program is loaded."""
    script = STARTED.replace(
        'bench.run("norm", 9, **values)',
        """
import os
def files(): return sorted((folder, *names) for folder, _, names in os.walk(os.environ["POCL_CACHE_DIR"]))
loaded = bench.load("norm", **values)
before = files()
for rows in (9, 1, 5):
    bench.look(bench.step)[6] = rows
    loaded.run(rows, 0)
    bench.device.finish()
assert len(before) > 1 or not bench.device.is_cpu
assert files() == before
""",
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(Path(__file__).parent)]
    kept = own_home / "pocl"
    kept.mkdir()
    environment = os.environ | {"POCL_CACHE_DIR": str(kept)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.stdout == "1\n", result.stderr


def test_every_kernel_is_built_once(own_home: Path, bench: GpuBench) -> None:
    words = np.concatenate([bench.record("norm", **norms(bench)), bench.record("matmul", **product(bench))] * 3)
    names = ["norm", "matmul:F32:1"] * 3
    bench.device.load(words, names)
    bench.device.load(words[::-1].copy(), names[::-1])
    assert bench.device.builds == 2


def test_an_operand_that_is_too_large_is_named(bench: GpuBench) -> None:
    with pytest.raises(UnitError, match=r"^kernel matmul:F32:1: stride is 2147483648, more than"):
        bench.load("matmul:F32:1", **product(bench) | {"stride": 1 << 31})


# --- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "name"), [(-2, "DEVICE_NOT_AVAILABLE"), (-5, "OUT_OF_RESOURCES"), (-9999, "9999")])
def test_a_device_that_vanishes_is_an_error_with_the_kernels_name(code: int, name: str, bench: GpuBench) -> None:
    words = np.concatenate([bench.record("norm", **norms(bench)), bench.record("matmul", **product(bench))])
    loaded = bench.device.load(words, ["norm", "matmul:F32:1"])
    calls: list[tuple[int, ...]] = []

    def enqueue(*arguments: int) -> int:
        calls.append(arguments)
        return code if len(calls) % 2 == 0 else 0

    patched, real = Enqueue(enqueue), loaded.control[oq.ENQUEUE]
    loaded.control[oq.ENQUEUE] = address(patched)
    with pytest.raises(UnitError, match=rf"failed at kernel matmul:F32:1: .*{name}.* \({code}\)$"):
        loaded.run(1, 0)
    assert len(calls) == 2
    loaded.control[[oq.ENQUEUE, oq.FLUSH]] = real, loaded.control[oq.ENQUEUE]
    calls.clear()
    calls.append(())
    with pytest.raises(UnitError, match=rf"failed at the queue: .*\({code}\)$"):
        loaded.run(1, 0)


def test_closing_twice_does_nothing() -> None:
    made = GpuBench(wide=None)
    made.device.close()
    made.close()


# --- a program ---------------------------------------------------------------------------------------


def test_records_run_in_order_and_the_flag_comes_last(bench: GpuBench) -> None:
    values = norms(bench)
    chained = dict(values) | {"x": values["out"], "out": bench.room(9, 64)}
    flag = bench.put(np.zeros(8, np.int64))
    records = [bench.record("norm", **values), bench.record("norm", **chained), bench.record("post", flag=flag)]
    loaded = bench.device.load(np.concatenate(records), ["norm", "norm", "post"])
    bench.look(bench.step)[[r.TOKENS, r.OUTPUTS]] = 9, 0
    loaded.run(9, 0)
    while not bench.look(flag)[0]:
        pass
    assert bench.look(flag)[0] == EPOCH
    assert (bench.look(chained["out"]) == 1).all()


# --- a share of the device ---------------------------------------------------------------------------


class FakeDriver:
    """In place of the driver: notes slices, and says that a work-group takes so many nanoseconds."""

    def __init__(self, loaded: Loaded, nanoseconds: int) -> None:
        self.slices: list[tuple[int, int, int]] = []  # first unit, units, tiles
        self.each, self.waits, self.released, self.loaded = nanoseconds, 0, 0, loaded
        fakes: dict[int, Any] = {
            oq.ENQUEUE: self.enqueue,
            oq.WAIT: self.wait,
            oq.PROFILE: self.profile,
            oq.RELEASE: self.release,
        }
        self.kept = [Enqueue(fake) for fake in fakes.values()]
        for word, function in zip(fakes, self.kept, strict=True):
            loaded.control[word] = address(function)

    def enqueue(self, queue: int, kernel: int, dims: int, at: int, size: int, local: int, *rest: int) -> int:
        offset, over, group = (list((ctypes.c_int64 * 3).from_address(place)) for place in (at, size, local))
        assert offset[:2] == [0, 0]
        self.slices.append((offset[2], over[2] // group[2], over[0] // group[0]))
        ctypes.c_int64.from_address(rest[2]).value = len(self.slices)
        return 0

    def wait(self, count: int, events: int, *_: int) -> int:
        self.waits += 1
        return 0

    def profile(self, event: int, which: int, size: int, to: int, *_: int) -> int:
        units, tiles = self.slices[event - 1][1:]
        ctypes.c_int64.from_address(to).value = units * tiles * self.each if which == oq.PROFILING_END else 0
        return 0

    def release(self, event: int, *_: int) -> int:
        self.released += 1
        return 0


def covered(slices: list[tuple[int, int, int]], units: int) -> bool:
    """Whether the slices are all units, each once, in order."""
    ends = np.cumsum([0] + [count for _, count, _ in slices])
    return [first for first, _, _ in slices] == ends[:-1].tolist() and int(ends[-1]) == units


def test_long_kernels_are_cut_into_slices() -> None:
    bench = GpuBench(wide=None, share=0.99)
    loaded = bench.load(f"matmul:F32:{TOKENS}", **product(bench, 600 if bench.device.wide else 300))
    assert loaded.table[0, oq.UNITS] == 300
    driver = FakeDriver(loaded, 100_000)  # a whole kernel of one tile is 30 ms
    loaded.run(1, 0)
    assert covered(driver.slices, 300)
    assert [units for _, units, _ in driver.slices[:2]] == [300 // oq.FIRST_SLICE, 40]  # unknown, then 4 ms' worth
    assert loaded.table[0, oq.LONGEST] == opencl.SLICE
    done = len(driver.slices)
    loaded.run(2 * TOKENS, 0)  # two tiles: half of the units
    assert covered(driver.slices[done:], 300)
    assert max(units for _, units, _ in driver.slices[done:]) == 20
    assert loaded.table[0, oq.LONGEST] == opencl.SLICE
    paused = loaded.control[oq.PAUSED]
    loaded.close()
    assert driver.released == loaded.table[0, oq.SLICES]
    total = 300 * 100_000 * 3
    assert abs(int(loaded.control[oq.PAUSED]) - total // 99) < 1000 * driver.waits
    assert loaded.control[oq.PAUSED] > paused
    bench.close()


def test_short_kernels_share_a_slice() -> None:
    bench = GpuBench(wide=None, share=0.5)
    records = [bench.record("norm", **norms(bench))] * 40
    loaded = bench.device.load(np.concatenate(records), ["norm"] * 40)
    driver = FakeDriver(loaded, 50_000)
    loaded.run(1, 0)
    assert driver.waits == 40  # each is unknown
    driver.waits = 0
    loaded.run(2, 0)  # 40 times 100 us
    assert driver.waits == 0
    loaded.run(2, 0)
    assert driver.waits == 1
    assert [units for _, units, _ in driver.slices] == [1] * 120
    loaded.close()
    bench.close()


def test_slices_compute_what_the_whole_does() -> None:
    bench = GpuBench(wide=None, share=0.9)
    values = product(bench)
    loaded = bench.load(f"matmul:F32:{TOKENS}", **values)
    bench.look(bench.step)[r.TOKENS] = 9
    for _ in range(2):
        bench.look(values["y"])[:] = np.nan
        loaded.run(9, 0)
        bench.device.finish()
        assert (bench.look(values["y"]) == 32).all()
        loaded.table[0, oq.PICOSECONDS] = 100_000_000  # next time in slices of 20
    loaded.close()
    assert loaded.table[0, oq.SLICES] >= 4
    bench.close()
