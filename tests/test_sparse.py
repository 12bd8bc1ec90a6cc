"""Sparse models: rows of single neurons, Gate first, predictors; the same bits however they run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_models import CONTEXT, decoded, opened, prefilled, some_tokens
from harness import machine
from packed_models import small_extents, streaming
from reference import floats_of, nmse, product, random_raw, same_bits
from sparse_bench import SparseBench
from sparse_models import reader_of, write_gated, write_predicted
from sparse_reference import network as reference_network
from sparse_reference import neuron_product
from tiny_models import write_tiny

from coterie.engine import Engine
from coterie.errors import ModelError, PlanError
from coterie.models import llama
from coterie.opening import open_model
from coterie.scheduler import planner
from coterie.scheduler.plan import Wishes
from coterie.scheduler.profile import FlashChoice

N = 24  # tokens
CASES: dict[str, dict[str, Any]] = {
    "Q4_0, relu": {"formats": "Q4_0", "activation": "relu"},
    "Q8_0, drelu, odd sizes": {"formats": "Q8_0", "activation": "drelu", "dim": 96, "ffn": 200},
    "Q4_1 and Q5_0 into Q4_0": {
        "formats": {"ffn_gate": "Q4_1", "ffn_up": "Q5_0", "ffn_down_t": "Q4_0", "token_embd": "Q4_0"},
        "activation": "relu",
    },
    "F16, relu2, two superblocks": {"formats": "F16", "activation": "relu2", "dim": 544, "ffn": 130},
    "bamboo": {"formats": "Q4_0", "architecture": "bamboo", "dim": 1024, "ffn": 300},
    "BF16 into F32": {
        "formats": {"ffn_gate": "BF16", "ffn_up": "BF16", "ffn_down_t": "F32"},
        "activation": "relu",
    },
}


def write(folder: Path, name: str, **more: Any) -> Path:
    return write_tiny(folder / "m.gguf", sparse=True, context=CONTEXT, **(CASES[name] | more))


def weights_of(engine: Engine, name: str) -> Any:
    tensor = engine.model.source.tensors[name]
    values = floats_of(tensor.format, engine.model.source.read(name))
    return values[0] if tensor.rows == 1 else values


# --- arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_decode_prefill_and_batches_give_the_same_bits(name: str, tmp_path: Path) -> None:
    tokens, path = some_tokens(N), write(tmp_path, name)
    results = []
    for threads in (1, 2, 3):
        with opened(path, threads) as engine:
            results += [prefilled(engine, tokens, [7, 1]), decoded(engine, tokens)]
            sequences = [engine.sequence() for _ in range(5)]
            rows = [engine.decode(sequences, [t, 3, t, 7, t]).copy() for t in tokens]
            results += [np.stack(rows)[:, i] for i in (0, 2, 4)]
            live, missing = engine.unit.neuron_counts()
            assert 0 < live < 2 * N * 2 * engine.spec.ffn_dim
            assert missing == 0
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_near_a_float_forward(name: str, tmp_path: Path) -> None:
    tokens = some_tokens(N)
    with opened(write(tmp_path, name)) as engine:
        expected = llama.forward(engine.spec, lambda tensor: weights_of(engine, tensor), tokens)
        assert nmse(prefilled(engine, tokens), expected) < 3e-4


NETWORKS = [  # Gate, Up, Down, columns, neurons, activation
    ("Q4_0", "Q4_0", "Q4_0", 512, 128, "relu"),
    ("Q8_0", "Q8_0", "Q8_0", 96, 130, "drelu"),
    ("Q4_1", "Q5_0", "Q4_0", 1056, 64, "relu2"),
    ("Q5_0", "Q4_1", "Q8_0", 544, 70, "relu"),
    ("F16", "BF16", "F32", 544, 65, "relu"),
    ("F32", "F16", "BF16", 32, 1, "drelu"),
]


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: "/".join(map(str, case)))
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_network_is_the_reference_bit_by_bit(case: tuple[str, str, str, int, int, str], lanes: int) -> None:
    """Gate first and all at once; in one part and in random ones (checklist row 1)."""
    *names, columns, neurons, activation = case
    rng = np.random.default_rng(neurons)
    raw = tuple(random_raw(rng, name, neurons, columns) for name in names)
    with machine(lanes) as m:
        for tile, rows in ((1, 1), (4, 4), (4, 7)):
            x = np.abs(rng.standard_normal((rows, columns))).astype(np.float32)
            x[rng.random(x.shape) < 0.1] = 0
            expected = reference_network(tuple(names), raw, activation, x)
            for gated in (True, False):
                network = SparseBench(m, tuple(names), raw, columns, activation, tile, gated=gated)
                assert same_bits(network.run(x, []), expected), (tile, rows, gated)
                if not gated:
                    assert same_bits(network.run(x, [1]), expected), "in parts"


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "F16"])
def test_a_neurons_product_is_near_a_rows(name: str) -> None:
    rng = np.random.default_rng(1)
    raw, x = random_raw(rng, name, 8, 1024), rng.standard_normal((3, 1024)).astype(np.float32)
    assert nmse(neuron_product(name, raw, x), product(name, raw, x)) < 1e-10


# --- from flash --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_extents():
        yield tmp_path_factory.mktemp("sparse")


@pytest.fixture(scope="module")
def gated(folder: Path) -> Path:
    """A packed model whose Gates decide."""
    return write_gated(folder / "gated.gguf")


@pytest.fixture(scope="module")
def predicted(folder: Path) -> Path:
    """One with predictors."""
    return write_predicted(folder / "predicted.gguf")


@pytest.mark.parametrize("share", [1.0, 0.8, 0.6, 0.45])
def test_flash_changes_no_bit(share: float, gated: Path) -> None:
    tokens = some_tokens(N)
    with opened(gated.with_suffix(".gguf")) as engine:
        expected = prefilled(engine, tokens)
    for threads in (1, 2):
        with streaming(gated, share, threads) as engine:
            assert same_bits(prefilled(engine, tokens, [16, 3]), expected)
            assert same_bits(decoded(engine, tokens), expected)
            sequences = [engine.sequence() for _ in range(4)]
            rows = np.stack([engine.decode(sequences, [t] * 4)[3].copy() for t in tokens])
            assert same_bits(rows, expected)
            _, missing = engine.unit.neuron_counts()
            assert (missing > 0) == (engine.plan.slots > 0) == (share < 1)


def test_predictors_give_the_same_bits_at_every_budget(predicted: Path) -> None:
    tokens = some_tokens(N)
    with opened(predicted.with_suffix(".gguf")) as engine:
        exact, expected = prefilled(engine, tokens), decoded(engine, tokens)
    assert nmse(expected, exact) < 1e-3  # the oracle sees Gate's outputs, but for roundings near zero
    for share, threads in ((1.0, 1), (0.6, 2), (0.35, 1), (0.35, 2)):
        with streaming(predicted, share, threads) as engine:
            assert same_bits(prefilled(engine, tokens), exact)  # prompts use no predictor
            assert same_bits(decoded(engine, tokens), expected)


def test_both_engines_read_the_same(gated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = some_tokens(N)
    measured = FlashChoice(1 << 20, 8, None, "profile", "preadv")
    with streaming(gated, 0.5) as engine:
        expected = decoded(engine, tokens)
    monkeypatch.setattr(planner, "flash_choice", lambda profile, path: measured)
    with streaming(gated, 0.5) as engine:
        assert reader_of(engine).engine == "preadv"
        assert same_bits(decoded(engine, tokens), expected)


# --- statistics --------------------------------------------------------------------------------------


def test_uses_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "Q4_0, relu")
    tokens = some_tokens(N)
    engine = Engine(open_model(path), Wishes(threads=2, context=CONTEXT, counting=True))
    decoded(engine, tokens)
    live, _ = engine.unit.neuron_counts()
    assert engine.layout.shared.uses is not None
    uses = engine.arena.numpy(engine.layout.shared.uses)
    assert int(uses.sum()) == live
    assert 0 < uses.max() <= N
    assert uses.shape == (2, 128)
    assert not uses[:, engine.spec.ffn_dim :].any()
    engine.close()


# --- what cannot be ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": "tanh"}, "activation 'tanh' is not supported"),
        ({"activation": "silu"}, "never idle"),
    ],
)
def test_models_that_make_no_sense(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", sparse=True, formats="Q4_0", **changes)
    with pytest.raises(ModelError, match=reason):
        open_model(path)


def test_formats_that_no_kernel_serves(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"dim": 256, "heads": 4, "head_dim": 64, "ffn": 256}
    path = write_tiny(tmp_path / "m.gguf", sparse=True, formats="Q4_K", activation="relu", **sizes)
    model = open_model(path)
    with pytest.raises(PlanError, match="Q4_0 and Q8_0 do"):
        Engine(model)
    model.close()
