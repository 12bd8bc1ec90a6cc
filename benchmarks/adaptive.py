"""Cuts that follow: another program takes half of one core, and the cut moves; against every fixed cut under the same
load, in alternation.

    python benchmarks/adaptive.py MODEL.gguf [--other npu|gpu] [--decode] [--rounds 5] [--json FILE]

The CPU unit has one lane on the first core, the other unit the last one. A load is a busy process pinned to one of
them. Ten steps after it has begun the cut is where it is; then it goes on following while steps are timed, one with
it and one with each fixed cut by turns: prompts, or tokens (`--decode`). Of tokens the fixed cuts give a GPU all
products, or only the head, the same share.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from coterie.engine import Engine
from coterie.opening import open_to_run
from coterie.scheduler.placement import DECODE, ROW_KINDS
from coterie.scheduler.plan import Wishes

STEPS = 10
TOKENS = 3  # timed together
CONTEXT = 1024


def burn(core: int) -> None:
    os.sched_setaffinity(0, {core})
    while True:
        pass


@contextmanager
def load(core: int | None) -> Iterator[None]:
    if core is None:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=burn, args=(core,), daemon=True)
    process.start()
    time.sleep(1)
    try:
        yield
    finally:
        process.kill()
        process.join()


class Bench:
    def __init__(self, path: Path, other: str, decodes: bool) -> None:
        chunk = 128 if other == "npu" else 256
        wishes = Wishes(threads=1, context=CONTEXT, chunk=chunk, units=("cpu", other), split="tensor")
        self.engine = Engine(open_to_run(path, wishes, lambda *a: None), wishes)
        others = self.engine.others
        assert others is not None
        assert others.balance is not None
        self.others, self.balance = others, others.balance
        kinds = {"npu": (("matmul", "ffn"), tuple(ROW_KINDS)), "gpu": (("tokens",), tuple(DECODE))}
        self.kinds: tuple[str, ...] = kinds[other][decodes]
        self.rng, self.chunk = np.random.default_rng(0), chunk
        self.step = self.decode if decodes else self.prefill
        self.sequence = self.engine.sequence()

    def decode(self) -> float:
        """Seconds of one token."""
        if self.sequence.length + TOKENS > CONTEXT // 2:
            self.sequence.close()
            self.sequence = self.engine.sequence()
        started = time.perf_counter()
        for token in self.rng.integers(0, self.engine.spec.vocab, TOKENS).tolist():
            self.engine.decode([self.sequence], [token])
        return (time.perf_counter() - started) / TOKENS

    def prefill(self) -> float:
        """Seconds of one chunk."""
        ids = self.rng.integers(0, self.engine.spec.vocab, self.chunk).tolist()
        sequence = self.engine.sequence()
        started = time.perf_counter()
        self.engine.prefill(sequence, ids)
        taken = time.perf_counter() - started
        sequence.close()
        return taken

    def fixed(self, parts: dict[str, int]) -> float:
        """A step with a cut that stays, after which the cut is what it was."""
        before, self.others.adapts = dict(self.balance.parts), False
        self.balance.parts |= parts
        taken = self.step()
        self.balance.parts, self.others.adapts = before, True
        return taken

    def cuts(self) -> list[dict[str, int]]:
        points = {kind: (0, *self.balance.given[kind].points) for kind in self.kinds}
        if self.kinds == tuple(DECODE):
            none = dict.fromkeys(DECODE, 0)
            return [*(dict.fromkeys(DECODE, n) for n in range(0, 25, 4)), *(none | {"head": n} for n in (8, 16))]
        if len(self.kinds) == 1:
            return [{"tokens": parts} for parts in points["tokens"][:13]]
        one, two = self.kinds
        return [{one: m, two: f} for m in points[one][:4] for f in points[two]]

    def measure(self, core: int | None, rounds: int) -> dict[str, Any]:
        with load(core):
            for _ in range(-(-STEPS // TOKENS) if self.step == self.decode else STEPS):
                self.step()
            after = {kind: self.balance.parts[kind] for kind in self.kinds}
            followed = list[float]()
            times: dict[str, list[float]] = {json.dumps(cut): [] for cut in self.cuts()}
            for _ in range(rounds):
                for cut in times:
                    times[cut].append(self.fixed(json.loads(cut)))
                    followed.append(self.step())
        medians = {cut: statistics.median(each) for cut, each in times.items()}
        best = min(medians, key=lambda cut: medians[cut])
        found = {
            "load on core": core,
            "cut after ten steps": after,
            "followed": statistics.median(followed),
            "best fixed": {"cut": best, "seconds": medians[best]},
            "ratio": medians[best] / statistics.median(followed),
            "fixed": medians,
        }
        print({name: value for name, value in found.items() if name != "fixed"}, flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--other", choices=("npu", "gpu"), default="npu")
    parser.add_argument("--decode", action="store_true", help="tokens instead of prompts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    bench, cores = Bench(given.model, given.other, given.decode), sorted(os.sched_getaffinity(0))
    found = [bench.measure(core, given.rounds) for core in (None, cores[-1], cores[0])]
    print(bench.balance.story())
    bench.engine.close()
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
