"""CUDA on a machine that has it: every operator and format against numpy, then decode's share of the memory bandwidth.

    pip install -c constraints.txt -e '.[cuda,dev]'
    python benchmarks/cuda_check.py [--mib 512] [--only-correct | --only-speed]

Ends with exit code 1 if a case differs. The second part reads a matrix of `--mib` MiB again and again with one row, as
decode does, and compares bytes a second with those of a copy within the device's memory (read and written), which is
100 %. The aim is 60 % or more.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import cuda_bench
import cuda_simulation
from test_cuda import CASES

from coterie.actors.cuda import CudaDevice
from coterie.actors.cuda_driver import Driver
from coterie.kernels.formats import FORMATS
from coterie.kernels.gpu.signatures import BLOCK, SIGNATURES
from coterie.kernels.record import HEADER_WORDS, OPERANDS, TOKENS, WORDS
from coterie.storage.arena import Arena, round_up

COLUMNS = 4096


def check() -> int:
    """Run all cases of the tests on the device; how many failed."""
    cuda_bench.make_driver = lambda integrated: Driver()
    failed = 0
    for case in (case for cases in CASES.values() for case in cases if case != "complaints"):
        name, *arguments = case.split(":")
        try:
            getattr(cuda_simulation, name)(*arguments)
            print(f"equal    {case}")
        except Exception:
            failed += 1
            print(f"DIFFERS  {case}\n{traceback.format_exc(limit=-3)}")
    return failed


def seconds(enqueue: Callable[[], None], finish: Callable[[], None], times: int = 20) -> float:
    """Seconds of one of `times` calls in a row, after two to warm up; the best of three."""
    best = float("inf")
    for _ in range(3):
        for _ in range(2):
            enqueue()
        finish()
        start = time.perf_counter()
        for _ in range(times):
            enqueue()
        finish()
        best = min(best, (time.perf_counter() - start) / times)
    return best


def copy_rate(driver: Driver, nbytes: int) -> float:
    """Bytes a second of a copy within the device's memory, read and written."""
    source, target = driver.allocate(nbytes), driver.allocate(nbytes)
    took = seconds(
        lambda: driver._call("cuMemcpyDtoDAsync", target, source, nbytes, driver._stream),
        lambda: driver.synchronize("copy"),
    )
    driver.free(source)
    driver.free(target)
    return 2 * nbytes / took


def decode_rate(name: str, nbytes: int) -> float:
    """Bytes of weights a second that `matmul:NAME:1` reads."""
    f = FORMATS[name]
    group = f.group_bytes(COLUMNS)
    groups = min(nbytes // group, 65535)
    arena = Arena({"weights": round_up(groups * group, 4096), "state": 1 << 16, "activations": 64 * groups + (1 << 20)})
    weights = arena.allocate("weights", groups * group, align=4096)
    header = arena.allocate("state", HEADER_WORDS, np.int64)
    x, y = (arena.allocate("activations", n, np.float32) for n in (COLUMNS // 32 * BLOCK, 16 * groups))
    arena.numpy(header)[TOKENS] = 1
    arena.numpy(x)[:] = np.random.default_rng(1).integers(-127, 128, x.shape)
    row = 4 * (COLUMNS if f.is_float else COLUMNS // 32 * BLOCK)
    values = {
        "step": header.offset, "select": 0, "weights": weights.offset, "groups": groups, "blocks": COLUMNS // f.columns,
        "group": group, "per": groups, "stride": weights.nbytes, "x": x.offset, "x_row": row, "planes": 1,
        "y": y.offset, "y_row": 64 * groups,
    }  # fmt: skip
    words = np.zeros((1, WORDS), np.int64)
    for i, parameter in enumerate(SIGNATURES["matmul"], OPERANDS):
        words[0, i] = values[parameter.name]
    device = CudaDevice(arena)
    loaded = device.load(words, [f"matmul:{name}:1"])
    device.before_step([header, x])
    took = seconds(lambda: loaded.run(1, 0), device.finish)
    device.close()
    arena.close()
    return groups * group / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="size of the matrix, larger than the device's caches")
    parser.add_argument("--only-correct", action="store_true")
    parser.add_argument("--only-speed", action="store_true")
    options = parser.parse_args()
    driver = Driver()
    print(f"{driver.name}, {driver.memory >> 20} MiB, compute capability {driver.capability}, {driver.integrated=}")
    failed = 0 if options.only_speed else check()
    if not options.only_correct:
        copied = copy_rate(driver, options.mib << 20)
        print(f"copy: {copied / 1e9:.1f} GB/s\n| format | GB/s | of the copy |\n|---|---|---|")
        for name in FORMATS:
            rate = decode_rate(name, options.mib << 20)
            print(f"| {name} | {rate / 1e9:.1f} | {rate / copied:.0%} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
