"""Whole tiny models on a GPU unit: the CPU unit's logits, bit by bit, in all formats, for prompts, tokens, batches.

PoCL stands in where there is no GPU. The narrow shape runs a few of them: its kernels are compared in all formats in
test_gpu_kernels.py.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from exact_models import CASES
from gpu_bench import GpuBench
from reference import Floats, same_bits
from tiny_models import write_tiny

from coterie.actors.opencl import OpenCLDevice
from coterie.engine import Engine
from coterie.errors import UnitError
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes

try:
    GpuBench(wide=None, size=1 << 20).close()
except UnitError as missing:
    pytest.skip(str(missing), allow_module_level=True)

LENGTHS = (1, 2, 7, 9, 38, 129)  # of prompts; chunks have 37 rows
NARROW = ("gemma3 Q6_K", "floats and integers")


def logits(engine: Engine) -> Iterator[tuple[str, Floats]]:
    """What is computed, and its logits: prompts, tokens, and batches of all sequences, of which some drop out."""
    rng = np.random.default_rng(1)
    sequences = [engine.sequence() for _ in LENGTHS]
    for sequence, length in zip(sequences, LENGTHS, strict=True):
        ids = rng.integers(0, engine.spec.vocab, length).tolist()
        yield f"a prompt of {length}", engine.prefill(sequence, ids, range(length))
    for turn in range(4):
        some = sequences[turn:]
        ids = rng.integers(0, engine.spec.vocab, len(some)).tolist()
        yield f"a batch of {len(some)}", engine.decode(some, ids)[: len(some)].copy()
    yield "one token", engine.decode(sequences[:1], [7])[:1].copy()
    for sequence in sequences:
        sequence.close()


def compare(path: Path) -> None:
    with (
        closing(Engine(open_model(path), Wishes(threads=2, context=512, chunk=37))) as cpu,
        closing(Engine(open_model(path), Wishes(threads=2, context=512, chunk=37, units=("gpu",)))) as gpu,
    ):
        for (what, wanted), (_, found) in zip(logits(cpu), logits(gpu), strict=True):
            assert same_bits(wanted, found), what
        assert not gpu.supervisor.losses
        assert gpu.divergence is not None
        assert gpu.divergence.worst == 0


@pytest.mark.parametrize("name", CASES)
def test_a_gpu_unit_has_the_cpu_units_bits(name: str, tmp_path: Path) -> None:
    compare(write_tiny(tmp_path / "tiny.gguf", window=24, **CASES[name]))


@pytest.mark.parametrize("name", NARROW)
def test_so_it_has_in_the_shape_for_real_gpus(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = OpenCLDevice.__init__
    monkeypatch.setattr(OpenCLDevice, "__init__", lambda *a, **more: begin(*a, **more | {"wide": False}))
    compare(write_tiny(tmp_path / "tiny.gguf", window=24, **CASES[name]))
