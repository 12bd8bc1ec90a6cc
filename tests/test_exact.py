"""The exact class: a token's logits are the same bits however they are computed (design section 1)."""

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_models import ALL, Floats, decoded, opened, prefilled, some_tokens, write_model
from reference import nmse, same_bits
from tiny_models import write_tiny

from coterie.engine import Engine
from coterie.kernels import target
from coterie.models.load import ARCHITECTURES
from coterie.opening import open_model

N = 40
HASWELL = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+cx16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    for name in ALL:
        write_model(made, name)
    return made


@pytest.fixture(scope="module")
def avx2(folder: Path) -> Iterator[Callable[[], Any]]:
    """Logits of all models by a process that is told its CPU is a Haswell; it runs beside the other tests."""
    out = folder / "avx2.npz"
    paths = [str(Path(__file__).parent), *(p for p in sys.path if p)]
    env = os.environ | {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": HASWELL,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, str(Path(__file__).with_name("exact_models.py")), str(folder), str(out)]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:

        def result() -> Any:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            return np.load(out)

        yield result
        process.kill()


@dataclass
class Case:
    path: Path
    engine: Engine  # with one lane
    tokens: list[int]
    logits: Floats  # of one-shot prefill, which all else is compared with


@pytest.fixture(scope="module", params=ALL)
def case(request: pytest.FixtureRequest, folder: Path) -> Iterator[Case]:
    path, tokens = folder / f"{request.param}.gguf", some_tokens(N)
    with opened(path) as engine:
        yield Case(path, engine, tokens, prefilled(engine, tokens))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is x86-64's")
@pytest.mark.skipif(target.path() != "vnni", reason="this process takes the AVX2 path itself")
def test_avx2_process_starts(avx2: Callable[[], Any]) -> None:
    """First, so that it compiles while the other tests run; the comparison comes last."""


@pytest.mark.parametrize("chunks", [(1,), (7, 13), (8, 8, 8), (33,), (1, 2, 3, 5, 9)], ids=str)
def test_chunked_prefill(case: Case, chunks: tuple[int, ...]) -> None:
    assert same_bits(prefilled(case.engine, case.tokens, chunks), case.logits)


def test_token_by_token(case: Case) -> None:
    assert same_bits(decoded(case.engine, case.tokens), case.logits)


def test_every_row_of_a_batch(case: Case) -> None:
    """Eight sequences at different positions, two steps, and a smaller batch in another order."""
    engine, lengths = case.engine, [1, 3, 8, 15, 16, 17, 22, 30]
    texts = [some_tokens(length + 3, seed=10 + i) for i, length in enumerate(lengths)]
    expected = [prefilled(engine, text)[-3:] for text in texts]
    sequences = [engine.sequence() for _ in texts]
    for text, sequence in zip(texts, sequences, strict=True):
        engine.prefill(sequence, text[:-3])
    for step, chosen in enumerate((list(range(8)), list(range(8)), [6, 0, 3])):
        got = engine.decode([sequences[i] for i in chosen], [texts[i][step - 3] for i in chosen])
        for row, i in enumerate(chosen):
            assert same_bits(got[row], expected[i][step]), (step, i)
    for sequence in sequences:
        sequence.close()


@pytest.mark.parametrize("lanes", [2, 3])
def test_lanes(case: Case, lanes: int) -> None:
    with opened(case.path, threads=lanes) as engine:
        assert same_bits(prefilled(engine, case.tokens, (21,)), case.logits)
        assert same_bits(decoded(engine, case.tokens[:12]), case.logits[:12])


def test_close_to_the_float_oracle(case: Case) -> None:
    """What 8-bit activations and a float16 cache cost."""
    model = case.engine.model

    oracle: Floats = ARCHITECTURES[model.spec.architecture].forward(model.spec, model.source.floats, case.tokens)
    floats_only = case.path.stem.split()[-1] in ("F16", "BF16", "F32", "sizes")
    assert nmse(case.logits, oracle) < (1e-6 if floats_only else 2e-3)


LONG: dict[str, dict[str, Any]] = {
    "llama Q4_0": {"architecture": "llama", "formats": "Q4_0"},
    "llama F16": {"architecture": "llama", "formats": "F16"},
    "gemma3 Q4_0": {"architecture": "gemma3", "formats": "Q4_0", "layers": 6},  # the sixth layer has no window
    "gemma3 Q8_0, wide window": {"architecture": "gemma3", "formats": "Q8_0", "layers": 1, "window": 257},
}


@pytest.mark.parametrize("name", LONG)
def test_across_blocks_of_the_cache_and_windows(name: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", context=2560, **LONG[name])
    tokens = some_tokens(530, seed=3)
    with opened(path) as engine:
        whole = prefilled(engine, tokens)
        assert same_bits(prefilled(engine, tokens, (255, 2, 100)), whole)
    with opened(path, threads=2) as engine:
        for length in (15, 255, 256, 511):
            sequence = engine.sequence()
            engine.prefill(sequence, tokens[:length])
            for position in range(length, length + 4):
                assert same_bits(engine.decode([sequence], [tokens[position]])[0], whole[position])
            sequence.close()
        sequences = [engine.sequence() for _ in range(3)]
        for sequence, length in zip(sequences, (3, 255, 513), strict=True):
            engine.prefill(sequence, tokens[:length])
        got = engine.decode(sequences, [tokens[3], tokens[255], tokens[513]])
        assert same_bits(got.copy(), whole[[3, 255, 513]])


# --- after an abandoned step -------------------------------------------------------------------------


def interrupt(engine: Engine, monkeypatch: pytest.MonkeyPatch, records: int) -> None:
    """Let Ctrl-C come when lane 0 has gone past so many records of the next step."""
    real, cycles = engine.unit._part, engine.unit._cycles

    def sliced(step: int, lane: int, first: int, deadline: int) -> int:
        at, budget = first, 2_000  # cycles: one instruction, or a few
        while at < records:
            before, at = at, real(step, lane, at, cycles() + budget)
            assert at >= 0
            budget *= 2 if at == before else 1  # a slow call from Python may have used it up
        signal.raise_signal(signal.SIGINT)
        return at

    monkeypatch.setattr(engine.unit, "_part", sliced)


@pytest.mark.parametrize("records", [0, 1, 2, 5, 20])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_after_an_abandoned_step(lanes: int, records: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny(tmp_path / "m.gguf", "gemma3", formats="Q4_0", layers=6, context=2560)
    tokens = some_tokens(200, seed=4)
    with opened(path, threads=lanes) as engine:
        expected = prefilled(engine, tokens)
        sequence = engine.sequence()
        engine.prefill(sequence, tokens[:100])
        steps: list[Callable[[], Floats]] = [
            lambda: engine.prefill(sequence, tokens[100:199]),
            lambda: engine.decode([sequence], [tokens[100]]),
        ]
        for step in steps:
            with monkeypatch.context() as patch:
                interrupt(engine, patch, records)
                with pytest.raises(KeyboardInterrupt):
                    step()
            assert sequence.length == 100
        assert same_bits(engine.prefill(sequence, tokens[100:199], range(99)), expected[100:199])
        assert same_bits(engine.decode([sequence], [tokens[199]])[0], expected[199])


@pytest.mark.parametrize("moment", ["before", "after"])
def test_interrupted_while_the_go_flag_is_raised(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny(tmp_path / "m.gguf", formats="Q4_0", context=2560)
    tokens = some_tokens(20, seed=5)
    with opened(path, threads=2) as engine:
        expected, real = prefilled(engine, tokens), engine.unit._begin

        def begin(*arguments: int) -> int:
            patch.undo()
            if moment == "after":
                real(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine.unit, "_begin", begin)
            with pytest.raises(KeyboardInterrupt):
                prefilled(engine, tokens)
        assert same_bits(prefilled(engine, tokens), expected)


# --- the other instruction set -----------------------------------------------------------------------


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is x86-64's")
@pytest.mark.skipif(target.path() != "vnni", reason="this process takes the AVX2 path itself")
def test_avx2_gives_the_same_bits(avx2: Callable[[], Any], folder: Path) -> None:
    results = avx2()
    assert sorted(results) == sorted(ALL)
    for name in ALL:
        with opened(folder / f"{name}.gguf") as engine:
            logits = prefilled(engine, some_tokens(N))
        assert same_bits(results[name][0], logits), name
        assert same_bits(results[name][1], logits), f"{name}, decoded"


def test_models_of_these_cases_have_their_formats(folder: Path) -> None:
    for name, options in ALL.items():
        model = open_model(folder / f"{name}.gguf")
        found = {tensor.format for tensor in model.file.tensors.values()}
        wanted = options["formats"]
        assert found >= ({wanted} if isinstance(wanted, str) else set(wanted.values()) - {wanted["output"]})
        model.close()
