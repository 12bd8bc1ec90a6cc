"""HeteroInfer's printed ratios, predicted for a Snapdragon 8 Gen 3 that was described, not fitted to them.

    python benchmarks/phone.py [--json]

Llama-8B in 4 bits on GPU and NPU, in virtual time. One set of constants (configs/soc/snapdragon-8gen3.toml), which
comes from printed times of single operators, bandwidths and synchronisation; none of the ratios below was used for it.
Layer: products of a prompt on the NPU, all else on the GPU. Tensor: products cut by the partition solver.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from coterie.commands.measure_units import Shape, made_up
from coterie.models.header import ModelHeader
from coterie.scheduler.cutting import LENGTHS
from coterie.scheduler.device_model import Instruction
from coterie.scheduler.operators import Operator, Rows
from coterie.scheduler.simulate import Question, Simulation
from coterie.scheduler.soc_file import load_soc

LLAMA_8B = Shape(4096, 32, 8, 14336, 32, 128256)
PHONE = load_soc("snapdragon-8gen3")
UNITS = "gpu", "npu"
PROMPTS = (64, 128, 256, 512, 1024)
ODD, LONGEST = 525, 1280
ROUND = 32  # tokens of which a chunk is a multiple
BUILD = ((135, 0.4084), (1000, 2.050))  # tokens, and seconds that building a graph online takes (HeteroInfer, 5.3.2)


class HeteroInfer(Simulation):
    """The phone's model with products as the paper cuts them, each for itself: our programs join queries, keys and
    values, and Gate and Up, so that units meet less often."""

    def operators(self, name: str, rows: Rows) -> list[Operator]:
        found, numbers = list[Operator](), list[tuple[int, ...]]()
        for each in super().operators(name, rows):
            waits = tuple(number for wait in each.waits for number in numbers[wait])
            for n, piece in enumerate(self._pieces(each.instruction)):
                found.append(replace(each, instruction=piece, waits=waits, prepares=() if n else each.prepares))
                waits = (len(found) - 1,)
            numbers.append(waits)
        return found

    def _pieces(self, i: Instruction) -> list[Instruction]:
        heads = [count * self.spec.head_dim for count in (self.spec.n_heads, *2 * (self.spec.n_kv_heads,))]
        joined = {("matmul", sum(heads)): heads, ("ffn", 2 * self.spec.ffn_dim): 2 * [self.spec.ffn_dim]}
        parts = joined.get((i.kind, i.rows), [i.rows])
        return [replace(i, rows=part, nbytes=i.nbytes * part / i.rows) for part in parts] if i.rows else [i]


@dataclass(frozen=True)
class Ratio:
    """What the paper printed, and what comes out here."""

    name: str
    printed: float
    found: float

    @property
    def error(self) -> float:
        return self.found / self.printed - 1


def ratios() -> list[Ratio]:
    """All of them."""
    mean = statistics.mean
    layer, tensor = {n: prefill(n) for n in PROMPTS}, {n: prefill(n, cut=UNITS) for n in PROMPTS}
    slow = {n: prefill(n, cut=UNITS, slowly=True) for n in PROMPTS}
    fast = decode(cut=UNITS)
    odd = prefill(ODD, cut=UNITS)
    padded = prefill(ODD, cut=("npu",), lengths=LENGTHS[-1:])
    pipe = prefill(ODD, cut=("npu",))
    (few, short), (many, long) = BUILD
    built = short + (long - short) / (many - few) * (ODD - few)
    return [
        Ratio("prefill, tensor over layer", 1.30, mean(layer[n] / tensor[n] for n in PROMPTS)),
        Ratio("decode, tensor over layer", 1.22, decode() / fast),
        Ratio("prefill, fast synchronisation", 1.24, mean(slow[n] / tensor[n] for n in PROMPTS)),
        Ratio("decode, fast synchronisation", 4.01, decode(cut=UNITS, slowly=True) / fast),
        Ratio("525 tokens, over a graph built online", 2.24, (prefill(ODD) + built) / odd),
        Ratio("525 tokens, over padding", 2.21, padded / odd),
        Ratio("525 tokens, over graphs one after the other", 1.35, pipe / odd),
    ]


def prefill(prompt: int, **how: Any) -> float:
    """Seconds of a prompt."""
    return made(prompt=prompt, tokens=0, chunk=-(-prompt // ROUND) * ROUND, **how).prefill()[0].seconds


def decode(**how: Any) -> float:
    """Seconds of a token behind 256."""
    return made(prompt=256, tokens=8, chunk=256, **how).decode()[0].seconds


def made(*, slowly: bool = False, **asked: Any) -> Simulation:
    """The phone with the model; `slowly`: cut as with flags, but units meet by their runtimes' calls and copies."""
    spec, tensors = made_up(LLAMA_8B, "Q4_0")
    file = cast(ModelHeader, SimpleNamespace(tensors=tensors, path=Path("llama-8b")))
    question = Question(1 << 34, UNITS, fence=slowly, context=LONGEST, threads=2, **asked)
    simulation = HeteroInfer(file, spec, PHONE, question)
    if simulation.cutter is not None:
        simulation.cutter = replace(simulation.cutter, fence=False)
    return simulation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    found = ratios()
    if parser.parse_args().json:
        print(json.dumps([vars(each) | {"error": each.error} for each in found], indent=1))
        return
    print("| ratio | printed | predicted | off by |\n|---|---|---|---|")
    for each in found:
        print(f"| {each.name} | {each.printed:.2f} | {each.found:.2f} | {100 * each.error:+.0f} % |")
    print(
        f"\nprefill of 256: {256 / prefill(256, cut=UNITS):.1f} tokens/s, decode {1 / decode(cut=UNITS):.2f} tokens/s"
    )


if __name__ == "__main__":
    main()
