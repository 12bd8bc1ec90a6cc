"""GPU kernels on an OpenCL device against what the device can do, in alternation.

    python benchmarks/gpu.py [--pairs 5] [--only prefill|decode] [--json FILE]

Prefill: our product of packed weights and 256 rows, against the faster of two float32 matrix products in OpenCL:
CLBlast's (Debian: libclblast1) and one of our own, tiled by registers for this purpose. Decode: bytes of packed weights
a second, out of cache, against bytes that a copy kernel reads and writes a second. The bar is half in both.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from coterie.actors.opencl import OpenCLDevice
from coterie.errors import CoterieError
from coterie.kernels import record as r
from coterie.kernels.formats import COLUMNS, FORMATS, ROWS
from coterie.kernels.gpu.signatures import BLOCK, SIGNATURES, TOKENS, operands
from coterie.storage.arena import Arena

BAR = 0.5
TOKENS_PREFILL = 256
SHAPES = [(576, 1536), (2048, 8192), (4096, 14336)]  # rows, columns
DECODE = (65536, 8192)  # rows, columns: at least 300 MB in every format measured
CLBLAST = "libclblast.so.1"

# C[m][n] = A[m][k] * B[k][n]: a work-item has 8 rows and 32 columns in registers. B is packed in panels of 32 columns,
# k by k, as a product's packing would leave it; packing is not timed.
PEERS = """
#define N 2
kernel void gemm(global const float *a, global const float *b, global float *c, int n, int k) {
    const size_t i = get_global_id(0) * 8, j = get_global_id(1) * 16 * N;
    global const float *panel = b + j * k;
    a += i * k;
    float16 sum[8][N];
    #pragma unroll
    for (int r = 0; r < 8; r++) for (int s = 0; s < N; s++) sum[r][s] = 0;
    for (int p = 0; p < k; p++) {
        float16 row[N];
        #pragma unroll
        for (int s = 0; s < N; s++) row[s] = vload16(p * N + s, panel);
        #pragma unroll
        for (int r = 0; r < 8; r++) {
            const float16 v = a[r * k + p];
            #pragma unroll
            for (int s = 0; s < N; s++) sum[r][s] = fma(v, row[s], sum[r][s]);
        }
    }
    #pragma unroll
    for (int r = 0; r < 8; r++) for (int s = 0; s < N; s++) vstore16(sum[r][s], s, c + (i + r) * n + j);
}

kernel void copy(global const uint *from, global uint *to) {
    const size_t first = get_global_id(0) * 256;
    for (size_t i = first; i < first + 256; i++) vstore16(vload16(i, from), i, to);
}
"""


class Bench:
    """An arena that the device shares: weights, rows, results."""

    def __init__(self, size: int) -> None:
        self.arena = Arena({"all": size})
        self.device = OpenCLDevice(self.arena)
        self.cl: Any = self.device._cl
        self.step = self.arena.allocate("all", r.HEADER_WORDS, np.int64)
        self.peers = self.device._builder._compiled(self.cl.Program(self.device._context, PEERS))
        self.rng = np.random.default_rng(0)
        self.begin = self.arena.regions["all"].used

    def room(self, shape: tuple[int, ...], kind: Any = np.float32) -> Any:
        return self.arena.allocate("all", shape, kind, 4096)

    def floats(self, *shape: int) -> Any:
        """A buffer of random float32."""
        ref = self.room(shape)
        self.arena.numpy(ref)[:] = self.rng.standard_normal(shape, np.float32)
        return ref

    def weights(self, name: str, rows: int, columns: int) -> Any:
        """Random packed weights; scales are what bits make of them, but no infinities."""
        f = FORMATS[name]
        ref = self.room((rows // ROWS * columns // f.columns, f.block), np.uint8)
        packed = self.arena.numpy(ref)
        pool = self.rng.integers(0, 256, (min(len(packed), 4096), f.block), np.uint8)
        pool[:, 1 : 64 if f.has_minimum else 32 : 2] = 0x20  # the upper bytes of float16s
        for first in range(0, len(packed), len(pool)):
            part = packed[first : first + len(pool)]
            part[:] = pool[: len(part)]
        return ref

    def ours(self, name: str, t: int, rows: int, columns: int, tokens: int) -> tuple[Callable[[], None], int]:
        """A call that multiplies, and the bytes of packed weights."""
        f = FORMATS[name]
        weights = self.weights(name, rows, columns)
        row = columns if f.is_float else columns // COLUMNS * BLOCK
        x, y = self.floats(tokens, row), self.room((tokens, rows))
        blocks, groups = columns // f.columns, rows // ROWS
        sizes = {"groups": groups, "blocks": blocks, "group": blocks * f.block, "per": groups, "stride": 0}
        places = {"step": self.step.offset, "weights": weights.offset, "x": x.offset, "y": y.offset}
        values = sizes | places | {"select": 0, "planes": 1, "x_row": 4 * row, "y_row": 4 * rows}
        assert set(values) == {p.name for p in SIGNATURES["matmul"]}
        words = np.zeros((1, r.WORDS), np.int64)
        for word, value in operands("matmul", values).items():
            words[0, word] = value
        self.arena.numpy(self.step)[r.TOKENS] = tokens
        loaded = self.device.load(words, [f"matmul:{name}:{t}"])

        def run() -> None:
            loaded.run(tokens, 0)
            self.device.finish()

        return run, weights.nbytes

    def kernel(self, name: str, size: tuple[int, ...], *arguments: Any) -> Callable[[], None]:
        """A call of a peer's kernel, with buffers for refs."""
        made = self.cl.Kernel(self.peers, name)
        made.set_args(*(np.int32(v) if isinstance(v, int) else self.part(v) for v in arguments))

        def run() -> None:
            self.cl.enqueue_nd_range_kernel(self.device.queue, made, size, (1,) * len(size))
            self.device.finish()

        return run

    def part(self, ref: Any) -> Any:
        return self.device.buffer.get_sub_region(ref.offset, ref.nbytes)

    def forget(self) -> None:
        """Cut the next buffers where those of before lie."""
        self.arena.regions["all"].used = self.begin

    def clblast(self, rows: int, columns: int, tokens: int) -> Callable[[], None] | str:
        """A call of CLBlast's product y[tokens][rows] = x w^T of float32 weights; or why there is none."""
        try:
            library = ctypes.CDLL(CLBLAST)
        except OSError as error:
            return str(error)
        w, x, y = (self.part(self.floats(*shape)) for shape in ((rows, columns), (tokens, columns), (tokens, rows)))
        size, memory, one = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_float
        gemm = library.CLBlastSgemm
        gemm.argtypes = [*[ctypes.c_int] * 3, *[size] * 3, one, memory, size, size, memory, size, size, one, memory]
        gemm.argtypes += [size, size, memory, memory]
        queue = ctypes.c_void_p(self.device.queue.int_ptr)
        sizes = (101, 111, 112, tokens, rows, columns)  # row-major, as it is, transposed

        def run() -> None:
            code = gemm(
                *sizes, 1.0, x.int_ptr, 0, columns, w.int_ptr, 0, columns, 0.0, y.int_ptr, 0, rows,
                ctypes.byref(queue), None,
            )  # fmt: skip
            if code:
                raise RuntimeError(f"CLBlastSgemm returned {code}")
            self.device.finish()

        try:
            run()
        except RuntimeError as error:
            return str(error)
        return run


def alternate(calls: dict[str, Callable[[], None]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each call, in turn, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(pairs + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def show(title: str, unit: str, amounts: dict[str, float], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Print all runs; the medians of amount / seconds / 1e9, of which the first is ours."""
    rates = {name: [amounts[name] / s / 1e9 for s in runs] for name, runs in seconds.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours, *others = medians
    best = max(others, key=lambda name: medians[name])
    ratio = medians[ours] / medians[best]
    print(f"{title}: {ratio:.2f} of {best} ({'holds' if ratio >= BAR else 'FAILS'})")
    for name, values in rates.items():
        print(f"    {name:<12} {medians[name]:8.2f} {unit}   {' '.join(f'{v:.2f}' for v in values)}", flush=True)
    return {"title": title, "unit": unit, "ratio": ratio, "peer": best, "runs": rates, "medians": medians}


def prefill(bench: Bench, pairs: int) -> list[dict[str, Any]]:
    results = []
    for rows, columns in SHAPES:
        for name in ("Q4_0", "Q8_0"):
            bench.forget()
            run, _ = bench.ours(name, TOKENS, rows, columns, TOKENS_PREFILL)
            a, b = bench.floats(TOKENS_PREFILL, columns), bench.floats(rows, columns)
            c = bench.room((TOKENS_PREFILL, rows))
            peer = bench.kernel("gemm", (TOKENS_PREFILL // 8, rows // 32), a, b, c, rows, columns)
            calls = {f"ours {name}": run, "our GEMM": peer}
            blast = bench.clblast(rows, columns, TOKENS_PREFILL)
            if isinstance(blast, str):
                print(f"no CLBlast: {blast}")
            else:
                calls["CLBlast"] = blast
            amounts = dict.fromkeys(calls, 2.0 * rows * columns * TOKENS_PREFILL)
            title = f"prefill {name} {TOKENS_PREFILL} x {rows} x {columns}"
            results.append(show(title, "GFLOP/s", amounts, alternate(calls, pairs)))
    return results


def decode(bench: Bench, pairs: int) -> list[dict[str, Any]]:
    results = []
    for name in FORMATS:
        bench.forget()
        rows, columns = DECODE
        rows = rows // 4 if FORMATS[name].is_float else rows
        run, nbytes = bench.ours(name, 1, rows, columns, 1)
        one, two = (bench.room((256 << 20,), np.uint8) for _ in range(2))
        copy = bench.kernel("copy", (one.nbytes // (256 * 64),), one, two)
        calls = {f"ours {name}": run, "copy": copy}
        amounts = {f"ours {name}": float(nbytes), "copy": 2.0 * one.nbytes}
        results.append(show(f"decode {name}, {nbytes >> 20} MiB", "GB/s", amounts, alternate(calls, pairs)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", choices=["prefill", "decode"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    try:
        bench = Bench(2 << 30)
    except CoterieError as error:
        sys.exit(str(error))
    about = bench.device.describe()
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    results = [] if arguments.only == "decode" else prefill(bench, arguments.pairs)
    results += [] if arguments.only == "prefill" else decode(bench, arguments.pairs)
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": about, "results": results}, indent=1))
    bench.device.close()
    sys.exit(0 if all(result["ratio"] >= BAR for result in results) else 1)


if __name__ == "__main__":
    main()
