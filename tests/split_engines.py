"""Engines whose units share products, with cuts that stay where they are put, and GPUs that fail."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gpu_bench import GpuBench
from reference import Floats

from coterie.actors.gpu import Loaded
from coterie.engine import Engine
from coterie.errors import UnitError
from coterie.opening import open_model
from coterie.scheduler.placement import DECODE, Placement
from coterie.scheduler.plan import Wishes

try:
    GpuBench(wide=None, size=1 << 20).close()
    no_gpu = ""
except UnitError as missing:
    no_gpu = str(missing)
needs_gpu = pytest.mark.skipif(bool(no_gpu), reason=no_gpu)

NEAR = 1e-6  # KL of units that differ by float rounding only


def engine(path: Path, *units: str, fast: bool = True, chunk: int = 64) -> Engine:
    split = "tensor" if len(units) > 1 else "layer"
    placement = replace(Placement.of(units, chunk, split), fast=False) if not fast else None
    wanted = Wishes(threads=2, context=512, chunk=chunk, units=units or ("cpu",), split=split, placement=placement)
    return Engine(open_model(path), wanted)


def logits(engine: Engine, lengths: tuple[int, ...] = (5, 33, 150)) -> Floats:
    """Of every position of prompts of these lengths, each with four decoded tokens."""
    rng, found = np.random.default_rng(1), list[Floats]()
    for length in lengths:
        ids = rng.integers(0, engine.spec.vocab, length + 4).tolist()
        sequence = engine.sequence()
        found.append(engine.prefill(sequence, ids[:length], range(length)))
        found += [engine.decode([sequence], [token])[:1].copy() for token in ids[length:]]
        sequence.close()
    return np.concatenate(found)


def cuts(engine: Engine, rows: int | None = None, **parts: int) -> None:
    """Have an engine's cuts stay where they are put; `rows`: of all of decode's products."""
    assert engine.others is not None
    parts |= {} if rows is None else dict.fromkeys(DECODE, rows)
    assert engine.others.balance is not None
    engine.others.adapts = False
    engine.others.balance.parts |= parts


class Faulty:
    """A program that fails half-way, or is swallowed, from its `last`-th step on."""

    def __init__(self, loaded: Loaded, last: int, error: BaseException | None, half: range) -> None:
        self.loaded, self.left, self.error, self.half = loaded, last, error, half

    def run(self, tokens: int, outputs: int, records: range | None = None) -> None:
        self.left -= 1
        if self.left >= 0:
            self.loaded.run(tokens, outputs, records)
        elif self.error is not None:
            self.loaded.run(tokens, outputs, self.half)  # with waits that nobody would answer
            raise self.error

    def units(self, record: int) -> int:
        return self.loaded.units(record)

    def limit(self, record: int, first: int, units: int) -> None:
        self.loaded.limit(record, first, units)


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def put_in(both: Engine, phase: str, error: BaseException | None) -> None:
    """Have the GPU unit fail in its third step of that program."""
    assert both.others is not None
    assert both.others.gpu is not None
    programs = both.others.gpu._programs
    program, loaded = programs[phase]
    programs[phase] = program, Faulty(loaded, 2, error, range(program.length // 2))
    cuts(both, tokens=8, rows=8)
