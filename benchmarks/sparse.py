"""Sparse models against llama.cpp's dense one of the same shape, in alternation.

    LLAMA_BENCH=.../llama-bench python benchmarks/sparse.py compare GATED.coterie PREDICTED.coterie DENSE.gguf
        [--memory MIB] [--pairs 5] [--json FILE]
    python benchmarks/sparse.py run MODEL.coterie [--memory MIB] [--tokens 200] [--skip 100]
    python benchmarks/sparse.py sweep MODEL.coterie 7168,9216,... [--tokens 200] [--skip 100] [--json FILE]

Models: make_packed.py (bamboo-7b, bamboo-7b-predicted); the peer's is a dense GGUF of that shape with random weights.
Protocol: a pair is one process each of ours with Gates first, ours with predictors, and the peer, 2 threads. Ours feeds
a topical stream of tokens (stream.py), another seed every pair, and counts the tokens behind the first `skip`, which
warm the neuron cache. With --memory ours has that ceiling and the peer runs in a memory cgroup of that + 200 MB, mmap,
no repacked copy, 8 MiB read-ahead (its best on this shape). Medians over pairs; all runs go into the JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cgroup
import numpy as np
from stream import topical

from coterie.engine import Engine
from coterie.opening import open_model
from coterie.scheduler.plan import OVERHEAD, Wishes

READ_AHEAD = 8192  # KiB, of the peer's file
PEER_TOKENS = 10
TIMEOUT = 300.0  # seconds of a peer's run
Figures = dict[str, Any]


def run(model: Path, memory: int | None, tokens: int, skip: int, seed: int) -> Figures:
    """One engine's decode: seconds a token, and what became of neurons."""
    ceiling = None if memory is None else memory << 20
    engine = Engine(open_model(model), Wishes(threads=2, context=tokens + 8, memory=ceiling))
    try:
        sequence = engine.sequence()
        seconds, live, missed = [], [], []
        before, reader = engine.unit.neuron_counts(), engine.stream.neurons if engine.stream else None
        busy = stalled = 0.0
        for i, token in enumerate(topical(tokens, engine.spec.vocab, seed)):
            if i == skip:
                busy = reader.counters()["busy"] if reader else 0.0
                stalled = engine.unit.stalled_seconds()
            begun = time.perf_counter()
            engine.decode([sequence], [token])
            seconds.append(time.perf_counter() - begun)
            now = engine.unit.neuron_counts()
            live.append(now[0] - before[0])
            missed.append(now[1] - before[1])
            before = now
        ms = 1e3 * np.array(seconds[skip:])
        every = len(engine.spec.layers) * engine.spec.ffn_dim
        return {
            "tokens_per_s": 1e3 / ms.mean(),
            "ms": {"mean": ms.mean(), **{f"p{p}": float(np.percentile(ms, p)) for p in (50, 90, 99)}},
            "live_share": float(np.mean(live[skip:])) / every,
            "missed_per_token": float(np.mean(missed[skip:])),
            "miss_rate": sum(missed[skip:]) / sum(live[skip:]),
            "reading_share": (reader.counters()["busy"] - busy) / ms.sum() * 1e3 if reader else 0.0,
            "stalled_share": (engine.unit.stalled_seconds() - stalled) / ms.sum() * 1e3,
            "pinned_neurons": engine.plan.pinned_neurons,
            "slots": engine.plan.slots,
            "seed": seed,
        }
    finally:
        engine.close()


def ours(model: Path, arguments: argparse.Namespace, seed: int) -> Figures:
    """The same in a process of its own."""
    memory = [] if arguments.memory is None else ["--memory", str(arguments.memory)]
    options = ["--tokens", str(arguments.tokens), "--skip", str(arguments.skip), "--seed", str(seed)]
    command = [sys.executable, __file__, "run", str(model), *memory, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    figures: Figures = json.loads(done.stdout)
    return figures


def peer(model: Path, arguments: argparse.Namespace) -> Figures:
    command = [os.environ["LLAMA_BENCH"], "-m", str(model), "-p", "0", "-t", "2", "-r", "1", "-o", "json"]
    if arguments.memory is None:
        done = subprocess.run([*command, "-n", "64"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        return {"tokens_per_s": json.loads(done.stdout)[0]["samples_ts"][0]}
    command += ["-n", str(PEER_TOKENS), "-lm", "mmap", "--repack", "0", "-b", "16", "-ub", "16", "--no-warmup"]
    limit = (arguments.memory << 20) + OVERHEAD
    with cgroup.memory_cgroup(limit) as group, cgroup.read_ahead(model, READ_AHEAD):
        cgroup.drop_page_cache()
        done = cgroup.run([*command, "--progress"], group, "generation run 1/", TIMEOUT)
    return {"error": done.error} if done.error else {"tokens_per_s": json.loads(done.output)[0]["samples_ts"][0]}


def compare(arguments: argparse.Namespace) -> None:
    rounds: list[dict[str, Figures]] = []
    for seed in range(arguments.pairs):
        found = {
            "gate first": ours(arguments.gated, arguments, seed),
            "predictor": ours(arguments.predicted, arguments, seed),
            "llama.cpp": peer(arguments.dense, arguments),
        }
        rounds.append(found)
        print({name: round(each.get("tokens_per_s", 0), 2) for name, each in found.items()}, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"memory": arguments.memory, "rounds": rounds}, indent=1))
    for name in ("gate first", "predictor"):
        ratios = [each[name]["tokens_per_s"] / each["llama.cpp"]["tokens_per_s"] for each in rounds]
        speed = statistics.median(each[name]["tokens_per_s"] for each in rounds)
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{name}: {speed:.2f} tokens/s, {middle:.2f} times ({low:.2f} to {high:.2f})")


def sweep(arguments: argparse.Namespace) -> None:
    """Several ceilings, from the lowest to the highest."""
    rows = []
    for memory in map(int, arguments.sizes.split(",")):
        arguments.memory = memory
        rows.append({"memory": memory} | ours(arguments.model, arguments, 0))
        row = rows[-1]
        print(
            f"{memory} MiB: {row['tokens_per_s']:.2f} tokens/s, {row['missed_per_token']:.0f} read a token", flush=True
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    one, many, several = (commands.add_parser(name) for name in ("run", "compare", "sweep"))
    for each in (one, several):
        each.add_argument("model", type=Path)
    several.add_argument("sizes", help="MiB, with commas between them")
    for name in ("gated", "predicted", "dense"):
        many.add_argument(name, type=Path)
    for each in (one, many):
        each.add_argument("--memory", type=int, help="MiB; by default all is in memory")
    for each in (one, many, several):
        each.add_argument("--tokens", type=int, default=200)
        each.add_argument("--skip", type=int, default=100)
    one.add_argument("--seed", type=int, default=0)
    many.add_argument("--pairs", type=int, default=5)
    for each in (many, several):
        each.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        figures = run(arguments.model, arguments.memory, arguments.tokens, arguments.skip, arguments.seed)
        print(json.dumps(figures))
    elif arguments.command == "sweep":
        sweep(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
