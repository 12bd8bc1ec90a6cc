"""Two units on one model against each of them alone, in alternation: the CPU unit's one lane on the first core, an NPU
stand-in or PoCL on the last one.

    python benchmarks/together.py MODEL.gguf --other npu [--tokens 256] [--rounds 5] [--json FILE]
    python benchmarks/together.py MODEL.gguf --decode --other gpu [--tokens 16] [--rounds 5] [--json FILE]

`alone`: the CPU unit with one lane. `other`: the other unit computes what it can (all products of prompts, or the
whole step), the CPU unit's lane the rest. `both`: products cut (--split tensor), once the cut has settled. From
traces: T of `alone` and `other` is the time in products, and of `both` the time in which either unit is at one. The
rates' sum is 1/T(alone) + 1/T(other); Amdahl's bound of the step is what `alone` needs beside products, and products
at that sum.

`--decode`: medians of so many tokens. `other`: PoCL computes everything, an NPU stand-in all products; `lanes`: the
CPU unit with two, which is what memory gives two cores here. The bound is the sum of both rates, but no less time than
`lanes` take.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.engine import Engine
from coterie.kernels.record import Opcode
from coterie.opening import open_to_run
from coterie.scheduler.balance import Given
from coterie.scheduler.placement import ROW_KINDS, Placement
from coterie.scheduler.plan import Wishes
from coterie.trace.chrome import read_rings

PRODUCTS = [int(o) for o in (Opcode.MATMUL, Opcode.FFN_UP, Opcode.FFN_DOWN, Opcode.FFN, Opcode.STEP)]
NO_LAYER = 0xFFFF  # the head's: of `both` too it is the CPU unit's
SETTLE = 12  # steps in which cuts move before anything is measured
Spans = npt.NDArray[np.int64]


class Traced:
    """An engine whose events of the last step can be read."""

    def __init__(self, path: Path, other: str, **wishes: Any) -> None:
        wanted = Wishes(threads=1, context=1024, chunk=128 if other == "npu" else 256, **wishes)
        model = open_to_run(path, wanted, lambda *a: None)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            self.engine = Engine(model, wanted, trace=Path(file.name))
        units = self.engine._units
        self._rings = {name: unit.rings for name, unit in units._asdict().items() if unit is not None}
        self._rate = self.engine.unit.cycles_per_second()

    def prefill(self, ids: list[int]) -> float:
        """Seconds."""
        for rings in self._rings.values():
            self.engine.arena.numpy(rings)[:, :8].view(np.int64)[:] = 0
        sequence = self.engine.sequence()
        started = time.perf_counter()
        self.engine.prefill(sequence, ids)
        taken = time.perf_counter() - started
        sequence.close()
        return taken

    def spans(self, unit: str) -> Spans:
        """When a unit was at products of layers, or at its step: int64[n][2], cycles."""
        found = []
        if unit in self._rings:
            for events in read_rings(self.engine.arena.numpy(self._rings[unit])):
                mine = np.isin(events["opcode"], PRODUCTS)
                mine &= (events["layer"] != NO_LAYER) | (events["opcode"] == int(Opcode.STEP))
                found.append(np.stack([events["start"][mine], events["end"][mine]], axis=1).astype(np.int64))
        return merged(np.concatenate(found)) if found else np.zeros((0, 2), np.int64)

    def seconds(self, spans: Spans) -> float:
        return float((spans[:, 1] - spans[:, 0]).sum()) / self._rate


def merged(spans: Spans) -> Spans:
    """The union of intervals."""
    found: list[list[int]] = []
    for start, end in sorted(spans.tolist()):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return np.array(found, np.int64).reshape(-1, 2)


def common(one: Spans, two: Spans) -> Spans:
    """Where intervals of both overlap."""
    found = []
    for start, end in one.tolist():
        for first, last in two[(two[:, 1] > start) & (two[:, 0] < end)].tolist():
            found.append([max(start, first), min(end, last)])
    return np.array(found, np.int64).reshape(-1, 2)


def measure(path: Path, other: str, tokens: int, rounds: int) -> dict[str, Any]:
    units = ("cpu", other)
    engines = {
        "alone": Traced(path, other),
        "other": Traced(path, other, units=units, split="layer"),
        "both": Traced(path, other, units=units, split="tensor"),
    }
    rng = np.random.default_rng(0)
    both = engines["both"].engine
    rows: list[dict[str, float]] = []
    for turn in range(SETTLE + rounds):
        ids = rng.integers(0, both.spec.vocab, tokens).tolist()
        if turn < SETTLE:
            for traced in engines.values() if turn < 2 else [engines["both"]]:
                traced.prefill(ids)
            continue
        row = {name: traced.prefill(ids) for name, traced in engines.items()}
        alone, own = engines["alone"], engines["alone"].spans("cpu")
        row["T alone"] = row["alone"] if other == "gpu" else alone.seconds(own)
        row["T other"] = engines["other"].seconds(engines["other"].spans(other))
        cpu, its = engines["both"].spans("cpu"), engines["both"].spans(other)
        row["T both"] = row["both"] if other == "gpu" else engines["both"].seconds(merged(np.concatenate([cpu, its])))
        overlap = engines["both"].seconds(common(cpu, its))
        row["overlap"] = overlap / max(1e-9, min(engines["both"].seconds(cpu), engines["both"].seconds(its)))
        ideal = row["T alone"] * row["T other"] / (row["T alone"] + row["T other"])
        row["operators"] = ideal / row["T both"]
        row["bound"] = row["alone"] - row["T alone"] + ideal
        row["amdahl"] = row["bound"] / row["both"]
        rows.append(row)
        print({name: round(value, 4) for name, value in row.items()}, flush=True)
    assert both.others is not None
    found: dict[str, Any] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    found |= {"model": path.name, "unit": other, "tokens": tokens, "parts": both.others.parts, "rows": rows}
    assert both.divergence is not None
    found["divergence"] = both.divergence.as_dict()
    for traced in engines.values():
        traced.engine.close()
    return found


def whole(other: str) -> dict[str, Any]:
    """Wishes that leave the CPU unit no product that the other unit can compute."""
    if other == "gpu":
        return {"units": ("gpu",)}
    cuts = dict.fromkeys(("matmul", "ffn", *ROW_KINDS), Given.whole())
    return {"units": ("cpu", "npu"), "placement": Placement("npu", "cpu", (128,), "tensor", cuts, kept=1)}


def measure_decode(path: Path, other: str, tokens: int, rounds: int) -> dict[str, Any]:
    def opened(threads: int, **wishes: Any) -> Engine:
        wanted = Wishes(threads=threads, context=1024, **wishes)
        return Engine(open_to_run(path, wanted, lambda *a: None), wanted)

    both = opened(1, units=("cpu", other), split="tensor")  # the first one, which sets how many threads PoCL has: one
    engines = {"alone": opened(1), "other": opened(1, **whole(other)), "lanes": opened(2), "both": both}
    rows: list[dict[str, float]] = []
    for turn in range(SETTLE + rounds):
        row = {}
        for name, engine in engines.items() if turn >= SETTLE - 1 else [("both", both)]:
            sequence, times = engine.sequence(), []
            engine.prefill(sequence, list(range(8)))
            for token in range(tokens):
                started = time.perf_counter()
                engine.decode([sequence], [token])
                times.append(time.perf_counter() - started)
            sequence.close()
            row[name] = statistics.median(times)
        if turn < SETTLE:
            continue
        row["bound"] = max(row["lanes"], 1 / (1 / row["alone"] + 1 / row["other"]))
        row["ratio"] = row["bound"] / row["both"]
        rows.append(row)
        print({name: round(value, 4) for name, value in row.items()}, flush=True)
    assert both.others is not None
    found: dict[str, Any] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    found |= {"model": path.name, "tokens": tokens, "parts": both.others.parts, "rows": rows}
    for engine in engines.values():
        engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--other", choices=("npu", "gpu"), default="npu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.decode:
        found = measure_decode(given.model, given.other, given.tokens or 16, given.rounds)
    else:
        found = measure(given.model, given.other, given.tokens or 256, given.rounds)
    for name in ("alone", "other", "lanes", "both", "bound"):
        if name in found:
            print(f"{name:9} {1e3 * found[name]:8.1f} ms")
    for name in ("operators", "amdahl", "overlap", "ratio"):
        if name in found:
            print(f"{name:9} {found[name]:8.2f}")
    print(f"parts given away: {found['parts']}")
    if "divergence" in found:
        print(f"KL {found['divergence']['mean']:.2g}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
