"""Whether `--preset auto --allow-near` takes the best: its choice against every plan that it could have taken, in
alternation.

    coterie profile --shapes MODEL.gguf; coterie profile --shapes MODEL.gguf --split tensor --on cpu,npu
    python benchmarks/auto.py MODEL.gguf [--rounds 5] [--json FILE]

A round is a prompt of 256 tokens and an answer of 64 with each. Quoted: the medians, and the best plan's over that of
auto's choice; the bar is 0.98.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from coterie.auto import APART, BESIDE
from coterie.engine import Engine
from coterie.errors import CoterieError
from coterie.opening import begun_wishes, open_to_run, preset_wishes
from coterie.scheduler.plan import Wishes
from coterie.scheduler.sharing import PROMPT, TOKENS, way


def opened(path: Path, wishes: Wishes) -> Engine:
    return Engine(open_to_run(path, wishes, lambda *a: None), wishes)


def timed(engine: Engine, rng: np.random.Generator) -> float:
    """Seconds of a prompt and an answer."""
    ids = rng.integers(0, engine.spec.vocab, PROMPT + TOKENS).tolist()
    sequence = engine.sequence()
    started = time.perf_counter()
    engine.prefill(sequence, ids[:PROMPT])
    for token in ids[PROMPT:]:
        engine.decode([sequence], [token])
    taken = time.perf_counter() - started
    sequence.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    wishes = Wishes(context=PROMPT + TOKENS + 1)
    chosen = preset_wishes(given.model, "auto", wishes, near=True)
    engines = dict[str, Engine]()
    for units, split in (*((units, "layer") for units in APART), *((units, "tensor") for units in BESIDE)):
        if split == "tensor" and "gpu" in units:  # a stand-in has one number of threads a process
            continue
        asked = begun_wishes(given.model, Wishes(context=wishes.context, units=units, split=split))
        try:
            engines[way(units, split)] = opened(given.model, asked)
        except CoterieError as error:
            print(f"{way(units, split)}: {error}")
    rng, times = np.random.default_rng(0), {name: list[float]() for name in engines}
    for turn in range(given.rounds + 1):
        for name, engine in engines.items():
            taken = timed(engine, rng)
            if turn:  # the first one warms up
                times[name].append(taken)
    choice = way(chosen.units, chosen.split)
    found: dict[str, Any] = {"choice": choice, "reasons": chosen.reasons, "seconds": times}
    medians = {name: statistics.median(each) for name, each in times.items()}
    found |= {"medians": medians, "ratio": min(medians.values()) / medians[found["choice"]]}
    print(json.dumps(found, indent=1))
    for engine in engines.values():
        engine.close()
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
