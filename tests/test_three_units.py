"""Prompts that three units compute at once: the GPU the first tokens, CPU and NPU the products of the others."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from plain_graphs import PlainGraphs
from reference import same_bits
from split_engines import NEAR, cuts, engine, interrupted, logits, needs_gpu, put_in
from tiny_models import write_tiny

from coterie import others
from coterie.divergence import divergences
from coterie.engine import Engine
from coterie.errors import UnitError
from coterie.scheduler.placement import DECODE, GPU_PARTS, PARTS, Placement

LENGTHS = (5, 200, 400)  # of prompts; graphs have 128 rows
CHUNK = 192
ALL = ("cpu", "gpu", "npu")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(others, "Graphs", PlainGraphs)
    return write_tiny(tmp_path / "tiny.gguf", "llama", formats="F32")


def programs(engine: Engine) -> list[tuple[str, int]]:
    """Of the last prompt: what computed its chunks, and their tokens."""
    assert engine.dispatcher is not None
    return [(layers.program, len(layers.rows)) for layers, *_ in engine.dispatcher.chunks]


@needs_gpu
@pytest.mark.parametrize("fast", [True, False])
def test_every_cut_between_three_is_near(fast: bool, path: Path) -> None:
    with closing(engine(path, chunk=CHUNK)) as alone, closing(engine(path, *ALL, fast=fast, chunk=CHUNK)) as three:
        assert three.plan.numerics == "near"
        wanted = logits(alone, LENGTHS)
        whole = [("prefill@128+gpu", 128 + first) for first in (8, 32, 48)]
        for tokens, matmul, ffn in ((1, 4, 5), (7, 0, 2), (9, 6, 0)):
            cuts(three, tokens=tokens, matmul=matmul, ffn=ffn, rows=3)
            found = logits(three, LENGTHS)
            assert divergences(wanted, found).max() < NEAR, tokens
            assert programs(three)[:2] == [whole.pop(0)] * 2
        cuts(three, tokens=10, matmul=0, ffn=0)  # the NPU has nothing, and the GPU is exact
        assert same_bits(wanted, logits(three, LENGTHS))
        cuts(three, tokens=0, matmul=4, ffn=4)
        assert divergences(wanted, logits(three, LENGTHS)).max() < NEAR
        assert programs(three)[:3] == [("prefill@128", 128)] * 3
        assert not three.supervisor.losses


@needs_gpu
def test_the_first_tokens_are_exact(path: Path) -> None:
    with closing(engine(path, chunk=CHUNK)) as alone, closing(engine(path, *ALL, chunk=CHUNK)) as three:
        cuts(three, tokens=10, matmul=PARTS // 2, ffn=PARTS // 2)
        wanted, found = logits(alone, (184,)), logits(three, (184,))
        assert programs(three) == [("prefill@128+gpu", 184)]
        assert same_bits(wanted[:56], found[:56])
        assert not same_bits(wanted[56:], found[56:])
        assert three.others is not None
        gpu, npu = three.others.describe()
        assert gpu["parts"]["tokens"] == [10, GPU_PARTS]
        assert npu["parts"] == {"matmul": [4, PARTS], "ffn": [4, PARTS]}


@needs_gpu
@pytest.mark.parametrize("which", ["gpu", "npu"])
def test_one_of_three_that_vanishes(which: str, path: Path) -> None:
    with closing(engine(path, chunk=CHUNK)) as alone, closing(engine(path, *ALL, chunk=CHUNK)) as three:
        assert three.others is not None
        if which == "gpu":
            put_in(three, "prefill+gpu", UnitError("OpenCL device failed"))
        else:
            assert isinstance(three.others.graphs, PlainGraphs)
            three.others.graphs.graphs[-1].fails = True
        cuts(three, tokens=8, matmul=PARTS // 2, ffn=PARTS - 2)
        assert divergences(logits(alone, LENGTHS), logits(three, LENGTHS)).max() < NEAR
        (loss,) = three.supervisor.losses
        assert (loss.unit, loss.by) == (which, "cpu")
        assert same_bits(logits(alone, LENGTHS), logits(three, LENGTHS))  # from then on


@needs_gpu
def test_an_interrupt_of_three(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(engine(path, chunk=CHUNK)) as alone, closing(engine(path, *ALL, chunk=CHUNK)) as three:
        cuts(three, tokens=8, matmul=4, ffn=4, rows=0)
        wanted = logits(alone, (160,))
        for turn in range(3):
            sequence = three.sequence()
            with monkeypatch.context() as patch:
                patch.setattr(three.unit, "_look_on", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    three.prefill(sequence, list(range(160)))
            sequence.close()
            assert divergences(wanted, logits(three, (160,))).max() < NEAR, turn
        assert not three.supervisor.losses


@needs_gpu
def test_a_gpu_without_tokens_is_tried_again(path: Path) -> None:
    with closing(engine(path, *ALL, chunk=CHUNK)) as three:
        assert three.others is not None
        balance = three.others.balance
        assert balance is not None
        balance.parts["tokens"] = 1
        balance.observe({"tokens": (0.2, 0.1)})
        assert balance.parts["tokens"] == 0
        for _ in range(60):
            logits(three, (300,))
            if any(move.kind == "tokens" and move.before == 0 for move in balance.moves):
                return
        raise AssertionError(balance.story())


@pytest.mark.parametrize("chunk", [136, 192, 256])
def test_graphs_are_full_where_a_gpu_takes_the_rest(chunk: int) -> None:
    placement = Placement.of(ALL, chunk, "tensor")
    cut = placement.cuts["tokens"]
    assert cut.points[-1] <= (chunk - 128) * GPU_PARTS / chunk
    for parts in (0, *cut.points, GPU_PARTS):
        for tokens in range(1, 3 * chunk):
            piece = placement.piece(tokens, chunk, parts)
            first = placement.first_tokens(piece, parts)
            assert 0 < piece <= min(tokens, chunk)
            assert first % 8 == 0
            assert first == 0 or (parts and piece - first == 128)
            if parts and tokens >= 136:
                assert first


@pytest.mark.parametrize("length", [8, 16, 24, 32])
def test_graphs_of_few_tokens_are_used_too(length: int) -> None:
    placement = replace(Placement.of(ALL, 256, "tensor"), lengths=(length,))
    for parts in (1, 10, 16):
        for tokens in range(length, 256):
            piece = placement.piece(tokens, 256, parts)
            first = placement.first_tokens(piece, parts)
            assert placement.length_for(piece - first) == length


@pytest.mark.parametrize("chunk", [64, 128])
def test_a_chunk_that_a_graph_takes_has_no_other_tokens(chunk: int) -> None:
    assert Placement.of(ALL, chunk, "tensor").cuts.keys() == {"matmul", "ffn", *DECODE}
