"""What plans with GPU and NPU units are expected to take (coterie plan --explain), against whole steps that are timed.

    python benchmarks/expected.py MODEL.gguf ... [--rounds 3] [--json FILE]

A round measures the machine as `coterie profile` does (the model's products on each unit, alone and beside each other),
and then times steps: prompts of 128 and 256 tokens, and tokens behind the longer one, medians
of a few, with cuts where they begin, which do not move. Each way runs in a process of its own, since a GPU stand-in has
one number of threads in each. Quoted: the median over rounds of expected / timed - 1.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from coterie.auto import Here
from coterie.engine import Engine
from coterie.models.load import read_spec
from coterie.opening import begun_wishes, open_file, open_to_run
from coterie.scheduler.plan import Wishes

WAYS = (("gpu", "layer"), ("cpu,npu", "layer"), ("cpu,gpu", "tensor"), ("cpu,npu", "tensor"))
PROMPTS, TOKENS, TURNS = (128, 256), 24, 5


def measured(model: str) -> None:
    """Have the machine measured anew for this model."""
    beside = [["--shapes", model, "--again", "--split", "tensor", "--on", units] for units in ("cpu,gpu", "cpu,npu")]
    for words in (["--shapes", model, "--again"], *beside):
        subprocess.run(["coterie", "profile", *words], check=True, capture_output=True)


def timed(path: Path, units: str, split: str) -> dict[str, tuple[float, float]]:
    """Seconds of steps, expected and timed, by what they are."""
    wishes = begun_wishes(path, Wishes(context=1024, units=tuple(units.split(",")), split=split))
    engine = Engine(open_to_run(path, wishes, lambda *a: None), wishes)
    assert engine.others is not None
    engine.others.adapts = False
    rng, found, samples = np.random.default_rng(0), dict[str, tuple[float, float]](), dict[str, list[float]]()
    for turn in range(TURNS + 1):
        for length in PROMPTS:
            sequence, ids = engine.sequence(), rng.integers(0, engine.spec.vocab, length).tolist()
            started = time.perf_counter()
            engine.prefill(sequence, ids)
            samples.setdefault(f"prompt of {length}", []).append(time.perf_counter() - started)
            for token in ids[:TOKENS] if length == PROMPTS[-1] and turn else []:
                started = time.perf_counter()
                engine.decode([sequence], [token])
                samples.setdefault("token", []).append(time.perf_counter() - started)
            sequence.close()
    for length in PROMPTS:
        with open_file(path) as file:
            here = Here(file, read_spec(file), wishes, length)
            expected = here.placed(wishes.units, engine.plan.placement, engine.plan.lanes, told=True)
        name = f"prompt of {length}"
        found[name] = expected.prefill, statistics.median(samples[name][1:])
        if "gpu" in units or split == "tensor":  # else it is the CPU unit's alone
            found["token"] = expected.token, statistics.median(samples["token"])
    engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", help="one way, in this process")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(timed(given.models[0], *given.way.split())))
        return
    cells = dict[str, list[tuple[float, float]]]()
    for _ in range(given.rounds):
        for model in given.models:
            measured(str(model))
            for way in WAYS:
                words = [sys.executable, __file__, str(model), "--way", " ".join(way)]
                found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
                for name, pair in found.items():
                    cells.setdefault(f"{model.name}, {way[0]} {way[1]}, {name}", []).append(tuple(pair))
                    print(f"{model.name}, {way}, {name}: {1e3 * pair[0]:.1f} of {1e3 * pair[1]:.1f} ms", flush=True)
    rows, sizes = list[dict[str, Any]](), list[float]()
    print("| cell | timed, ms | expected | error |\n|---|---|---|---|")
    for name, pairs in cells.items():
        error = statistics.median(expected / taken - 1 for expected, taken in pairs)
        expected, taken = (1e3 * statistics.median(values) for values in zip(*pairs, strict=True))
        sizes.append(abs(error))
        rows.append({"cell": name, "error": error, "pairs": pairs})
        print(f"| {name} | {taken:.1f} | {expected:.1f} | {100 * error:+.1f} % |")
    p90 = sorted(sizes)[math.ceil(0.9 * len(sizes)) - 1]
    said = f"median {100 * statistics.median(sizes):.1f} %, p90 {100 * p90:.1f} %, worst {100 * max(sizes):.1f} %"
    print(f"\n{len(sizes)} cells: {said}")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
