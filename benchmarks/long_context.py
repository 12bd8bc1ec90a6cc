"""Decode at long context: does a token cost what its KV cache takes to read? Row 7 of the engine's bars.

    python benchmarks/long_context.py MODEL.gguf [--positions 32768] [--pairs 5]

The cache is filled with random keys and values (prefill would take long and change nothing), then tokens are decoded
at short and at full context in turn, with a read loop between. Bound: the KV bytes a token reads, at the read loop's
bytes/s. Quoted: (time at full context - time at short context) over the bound, medians over pairs.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from coterie.engine import Engine
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes
from coterie.storage.kv import Sequence


def fill(engine: Engine, sequence: Sequence, positions: int) -> None:
    """Random float16 of ordinary size in the first `positions` positions."""
    sequence.reserve(positions)
    region = engine.arena.regions["kv"]
    values = engine.arena.numpy(engine.arena.whole("kv"))[: region.used // 2 * 2].view(np.float16)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(1 << 20).astype(np.float16)
    for first in range(0, values.size, noise.size):
        part = values[first : first + noise.size]
        part[:] = noise[: part.size]
    sequence.length = positions


def seconds_a_token(engine: Engine, sequence: Sequence, tokens: int) -> float:
    length = sequence.length
    start = time.perf_counter()
    for token in range(tokens):
        engine.decode([sequence], [token])
    taken = (time.perf_counter() - start) / tokens
    sequence.length = length
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--positions", type=int, default=32768)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    context = arguments.positions + 512
    engine = Engine(open_model(arguments.model), Wishes(threads=arguments.threads, context=context))
    full, short = engine.sequence(), engine.sequence()
    fill(engine, full, arguments.positions - arguments.tokens - 1)
    engine.prefill(short, [1, 2, 3])
    layout = engine.cache.layout
    bytes_read = 2 * layout.layers * layout.kv_heads * layout.dim * 2 * full.length
    for sequence in (full, short):
        seconds_a_token(engine, sequence, 2)
    ratios = []
    for _ in range(arguments.pairs):
        base = seconds_a_token(engine, short, arguments.tokens)
        bandwidth = engine.read_bandwidth()
        long = seconds_a_token(engine, full, arguments.tokens)
        bandwidth = (bandwidth + engine.read_bandwidth()) / 2
        bound = bytes_read / bandwidth
        ratios.append((long - base) / bound)
        print(
            f"short {base * 1e3:.2f} ms, at {full.length} positions {long * 1e3:.2f} ms, KV {bytes_read / 1e6:.0f} MB, "
            f"read loop {bandwidth / 1e9:.1f} GB/s, bound {bound * 1e3:.2f} ms, ratio {ratios[-1]:.2f}"
        )
    print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    engine.close()


if __name__ == "__main__":
    main()
