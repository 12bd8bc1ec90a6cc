"""The NPU unit's graphs beside bare int8 graphs of the same runtimes: speed, lengths, memory, times of building.

    python benchmarks/npu.py [speed] [lengths] [memory] [--pairs 11] [--threads 2] [--json FILE]

speed    a chain of Up and Down, 576 x 1536 (8 pairs) and 4096 x 14336 (1 pair), 256 rows, as our runtimes build
         w8a8 blocks of it (one graph a matrix, floats between them), against one bare graph of the whole chain as
         OpenVINO's or ONNX Runtime's own quantiser would write it; and a SwiGLU network, one graph each. In turn, in
         this process; quoted are medians over pairs, the ratio's too. Bar: the faster of ours >= 0.9 x the faster
         bare graph.
lengths  a w8a8 SwiGLU network at 32, 64, 128, 256 rows: rate of each length.
memory   the same network: what a process grows by for each length, time to build and to load.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import npu_bare
import numpy as np

from coterie.actors import npu_onnx, npu_openvino
from coterie.actors.npu_cache import GraphCache
from coterie.actors.npu_fastest import sample
from coterie.actors.npu_graphs import Graph, Runtime
from coterie.storage.npu_block import Form, Seen, make_block

SHAPES = (576, 1536, 8), (4096, 14336, 1)
ROWS, LENGTHS, BAR = 256, (32, 64, 128, 256), 0.9
NETWORKS = (576, 1536), (2048, 8192)
Floats = npu_bare.Floats


def speed(pairs: int, runtimes: dict[str, Runtime], threads: int) -> dict[str, Any]:
    """By shape and name, GFLOP/s of every run, and the bar."""
    found: dict[str, Any] = {}
    for k, n, count in SHAPES:
        weights = npu_bare.weights(k, n, count)
        runs = {f"ours, {name}": our_chain(runtime, weights) for name, runtime in runtimes.items()}
        runs |= npu_bare.chains(weights, ROWS, threads)
        found[f"{k}x{n}"] = compare(f"{count} x Up and Down, {k} x {n}", runs, 4 * ROWS * k * n * count, pairs)
        runs = {f"ours, {name}": bound(runtime, ROWS, k, n).run for name, runtime in runtimes.items()}
        runs["bare OpenVINO, int8"] = npu_bare.openvino_network(k, n, ROWS, threads)
        found[f"{k}x{n} network"] = compare(f"SwiGLU network, {k} x {n}", runs, 6 * ROWS * k * n, pairs)
    return found


def compare(title: str, runs: dict[str, Callable[[], Any]], flop: int, pairs: int) -> dict[str, Any]:
    """Run all in turn, so many times; the best of ours beside the best bare one."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(pairs):
        for name, run in runs.items():
            rates[name].append(flop / seconds(run) / 1e9)
    print(f"\n{title}, {ROWS} rows, GFLOP/s")
    for name, each in rates.items():
        print(f"  {name:34} {statistics.median(each):7.0f}   runs {' '.join(f'{rate:.0f}' for rate in each)}")
    sides = {side: [rates[name] for name in runs if name.startswith(side)] for side in ("ours", "bare")}
    best = {side: max(map(statistics.median, each)) for side, each in sides.items()}
    by_pairs = [
        max(ours) / max(bare)
        for ours, bare in zip(zip(*sides["ours"], strict=True), zip(*sides["bare"], strict=True), strict=True)
    ]
    ratio, middle = best["ours"] / best["bare"], statistics.median(by_pairs)
    spread = f"{middle:.2f} ({min(by_pairs):.2f}-{max(by_pairs):.2f})"
    verdict = "met" if ratio >= BAR else "MISSED"
    print(f"  best of ours over best bare: {ratio:.2f}; by pairs {spread}: {verdict} (bar {BAR})")
    return {"rates": rates, "ratio": ratio, "ratio_by_pairs": by_pairs}


def seconds(run: Callable[[], Any], least: float = 0.05) -> float:
    """Of a run: the median of as many as take this long, 3 at least."""
    times, end = list[float](), time.perf_counter() + least
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def our_chain(runtime: Runtime, weights: list[Floats]) -> Callable[[], None]:
    """A graph a matrix, one after the other, each bound once."""
    graphs: list[Graph] = []
    x = np.random.default_rng(1).standard_normal((ROWS, weights[0].shape[1])).astype(np.float32)
    for w in weights:
        form = Form("out", 0, ROWS, w.shape[1], w.shape[0], "w8a8")
        seen = Seen(np.full(w.shape[1], 4, np.float32), np.ones(w.shape[1], np.float32))
        graph = runtime.build(make_block(form, [w], [seen]))
        y = np.empty((ROWS, w.shape[0]), np.float32)
        graph.bind(x, y)
        graphs.append(graph)
        x = y

    def run() -> None:
        for graph in graphs:
            graph.run()

    return run


def lengths(runtimes: dict[str, Runtime], pairs: int) -> dict[str, Any]:
    """By network, runtime and rows: GFLOP/s, medians in turn."""
    found: dict[str, Any] = {}
    for dim, hidden in NETWORKS:
        graphs = {(name, n): bound(runtime, n, dim, hidden) for name, runtime in runtimes.items() for n in LENGTHS}
        rates: dict[tuple[str, int], list[float]] = {key: [] for key in graphs}
        for _ in range(pairs):
            for (name, n), graph in graphs.items():
                rates[name, n].append(6 * n * dim * hidden / seconds(graph.run, 0.05) / 1e9)
        print(f"\nSwiGLU {dim} x {hidden}, GFLOP/s (of {max(LENGTHS)} rows' rate)")
        for name in runtimes:
            medians = {n: statistics.median(rates[name, n]) for n in LENGTHS}
            whole = medians[max(LENGTHS)]
            print(f"  {name:14}", "   ".join(f"{n}: {rate:.0f} ({rate / whole:.0%})" for n, rate in medians.items()))
            found[f"{dim}x{hidden} {name}"] = {n: rates[name, n] for n in LENGTHS}
    return found


def bound(runtime: Runtime, n: int, dim: int, hidden: int) -> Graph:
    graph = runtime.build(sample(n, dim, hidden))
    x = np.random.default_rng(2).standard_normal((n, dim)).astype(np.float32)
    graph.bind(x, np.empty((n, dim), np.float32))
    graph.run()
    return graph


def memory(runtimes: dict[str, Runtime]) -> dict[str, Any]:
    """By runtime and rows: bytes that anonymous memory and all resident memory grow by for a loaded graph that has
    run, bytes of weights, what the graph says; seconds to build, and to load."""
    found: dict[str, Any] = {}
    dim, hidden = NETWORKS[-1]
    print(f"\nSwiGLU {dim} x {hidden}, from the cache: MB anonymous, MB with mapped files, MB as computed; s")
    for name, runtime in runtimes.items():
        with tempfile.TemporaryDirectory() as folder:
            kept = []
            for n in LENGTHS:
                block = sample(n, dim, hidden)
                weights, form, digest = block.nbytes, block.form, block.digest()
                start = time.perf_counter()
                GraphCache(runtime, Path(folder)).graph(block)
                built = time.perf_counter() - start
                del block
                before = resident()
                start = time.perf_counter()
                graph = GraphCache(runtime, Path(folder)).open(form, digest, _unexpected)
                loaded = time.perf_counter() - start
                x, y = np.ones((n, dim), np.float32), np.ones((n, dim), np.float32)
                graph.bind(x, y)
                graph.run()
                grown = [after - early for after, early in zip(resident(), before, strict=True)]
                kept.append((graph, x, y))
                print(f"  {name:14} {n:4} rows: {grown[0] / 1e6:6.1f} {grown[1] / 1e6:6.1f} {graph.nbytes / 1e6:6.1f} "
                      f"(weights {weights / 1e6:.1f}); build and keep {built:.2f}, load {loaded:.2f}")  # fmt: skip
                found[f"{name} {n}"] = {
                    "anonymous": grown[0], "resident": grown[1], "computed": graph.nbytes, "weights": weights,
                    "build_s": built, "load_s": loaded,
                }  # fmt: skip
    return found


def _unexpected() -> Any:
    raise AssertionError("the graph was not in the cache")


def resident() -> tuple[int, int]:
    """Anonymous and all resident bytes of this process, after freed memory was given back."""
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return kib["RssAnon"] << 10, kib["VmRSS"] << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", default=["speed", "lengths", "memory"])
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    runtimes: dict[str, Runtime] = {
        "OpenVINO": npu_openvino.open_device("CPU", arguments.threads),
        "ONNX Runtime": npu_onnx.open_device("CPU", arguments.threads),
    }
    for runtime in runtimes.values():
        print(runtime.describe())
    found = {
        what: {
            "speed": lambda: speed(arguments.pairs, runtimes, arguments.threads),
            "lengths": lambda: lengths(runtimes, arguments.pairs),
            "memory": lambda: memory(runtimes),
        }[what]()
        for what in arguments.what
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
