"""GPU and NPU units beside the CPU unit: the same model within rounding, whatever the lengths; losses; ceilings."""

from pathlib import Path

import numpy as np
import pytest
from plain_graphs import PlainGraphs
from tiny_models import write_tiny

from coterie import others
from coterie.divergence import divergences
from coterie.engine import Engine
from coterie.errors import PlanError, UsageError
from coterie.opening import open_model
from coterie.scheduler.placement import Placement, parse_units
from coterie.scheduler.plan import Wishes

NEAR = 1e-6  # KL of units that differ by float rounding only


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf", request.param, formats="F32", window=24)


def prompts(engine: Engine, lengths: list[int]) -> np.ndarray:
    """Logits of every position of prompts of these lengths, each with three decoded tokens."""
    rng, found = np.random.default_rng(1), []
    for length in lengths:
        ids = rng.integers(0, engine.spec.vocab, length + 3).tolist()
        sequence = engine.sequence()
        found += [engine.prefill(sequence, ids[:length], range(length))]
        found += [engine.decode([sequence], [token])[:1].copy() for token in ids[length:]]
        sequence.close()
    return np.concatenate(found)


@pytest.mark.parametrize("split", ["layer", "tensor"])
def test_prompts_with_graphs_are_near_those_without(model: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "Graphs", PlainGraphs)
    lengths = [1, 2, 20, 76, 77, 127, 128, 129, 200]
    wishes = Wishes(threads=2, context=512, chunk=128, units=("cpu", "npu"), split=split)
    with_graphs = Engine(open_model(model), wishes)
    alone = Engine(open_model(model), Wishes(threads=2, context=512, chunk=128))
    try:
        found, wanted = prompts(with_graphs, lengths), prompts(alone, lengths)
        assert divergences(wanted, found).max() < NEAR
        assert with_graphs.others is not None
        graphs = with_graphs.others.graphs
        assert isinstance(graphs, PlainGraphs)
        assert sum(graph.runs > 0 for graph in graphs.graphs) >= len(graphs.graphs) // 3  # of those a cut may need
        assert with_graphs.divergence is not None
        assert with_graphs.divergence.worst < NEAR
        assert with_graphs.plan.numerics == "near"
    finally:
        with_graphs.close()
        alone.close()


def test_a_graph_that_fails_is_replaced_by_the_cpu_unit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "Graphs", PlainGraphs)
    engine = Engine(open_model(model), Wishes(threads=2, context=512, chunk=128, units=("cpu", "npu")))
    alone = Engine(open_model(model), Wishes(threads=2, context=512, chunk=128))
    try:
        assert engine.others is not None
        assert isinstance(engine.others.graphs, PlainGraphs)
        engine.others.graphs.graphs[-2].fails = True
        found, wanted = prompts(engine, [150, 128]), prompts(alone, [150, 128])
        assert divergences(wanted, found).max() < NEAR
        (loss,) = engine.supervisor.losses
        assert (loss.unit, loss.by) == ("npu", "cpu")
        assert "the device went away" in loss.reason
    finally:
        engine.close()
        alone.close()


def test_units_are_read() -> None:
    assert parse_units("npu, cpu") == ("cpu", "npu")
    assert Placement.of(("cpu", "npu"), 64).lengths == (64,)
    assert Placement.of(("cpu", "gpu", "npu"), 256).describe() == {
        "cpu": "the rest of prompts",
        "gpu": "decode",
        "npu": "prompts' matrix products",
    }
    for text, told in (("cpu,tpu", "there are cpu, gpu, npu"), ("npu", "needs the CPU unit"), ("", "there are")):
        with pytest.raises(UsageError, match=told):
            parse_units(text)


@pytest.mark.parametrize("tokens", range(1, 300))
def test_prompts_are_cut_into_what_graphs_take(tokens: int) -> None:
    placement, left, steps = Placement.of(("cpu", "npu"), 256), tokens, []
    while left:
        steps.append(placement.piece(left, 256))
        left -= steps[-1]
    assert sum(steps) == tokens
    for step in steps:
        length = placement.length_for(step)
        assert length in (None, 128)
        assert length is None or step <= length < step / 0.6 + 1
        assert length is not None or step < 77  # the CPU unit computes only what fills no graph


def test_a_ceiling_too_low_for_the_copies_is_refused(model: Path) -> None:
    with pytest.raises(PlanError, match=r"needs .* MiB, more than the ceiling of 64 MiB"):
        Engine(open_model(model), Wishes(context=512, memory=64 << 20, units=("cpu", "npu")))
    with pytest.raises(UsageError, match="--memory must be a size"):
        Engine(open_model(model), Wishes(context=512, memory="auto", units=("cpu", "npu")))
