"""Products that several units compute together: the same model wherever it is cut; what is lost; cuts that move."""

from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from exact_models import CASES
from packed_models import pack
from plain_graphs import PlainGraphs
from reference import same_bits
from split_engines import NEAR, Faulty, cuts, engine, interrupted, logits, needs_gpu, put_in
from tiny_models import write_tiny

from coterie import others
from coterie.actors import gpu as gpu_unit
from coterie.actors.opencl import OpenCLDevice
from coterie.divergence import divergences
from coterie.engine import Engine
from coterie.errors import UnitError, UsageError
from coterie.kernels.record import LINE_PART, LINE_REST, PRODUCTS, WHOLE
from coterie.opening import open_model
from coterie.scheduler.balance import Given
from coterie.scheduler.layout import decode_name
from coterie.scheduler.placement import DECODE, GPU_PARTS, PARTS, ROW_KINDS, Placement
from coterie.scheduler.plan import Wishes
from coterie.storage.kv import Sequence

SOME = ("llama Q4_0", "gemma3 Q6_K", "floats and integers")
WAYS = [(name, how) for name in SOME for how in ("narrow", "slow", "shared") if (name, how) != ("llama Q4_0", "narrow")]


# --- CPU and NPU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_cut_between_cpu_and_npu_is_near(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "Graphs", PlainGraphs)
    path = write_tiny(tmp_path / "tiny.gguf", family, formats="F32", window=24)
    with closing(engine(path)) as alone, closing(engine(path, "cpu", "npu")) as both:
        wanted = logits(alone)
        assert both.others is not None
        points = (0, *both.others.placement.cuts["ffn"].points)
        assert PARTS // 2 in points
        for matmul, ffn in [*zip(points, points, strict=True), (0, points[-1]), (points[-1], 0)]:
            cuts(both, matmul=matmul, ffn=ffn)
            assert divergences(wanted, logits(both)).max() < NEAR, (matmul, ffn)
        assert not both.supervisor.losses


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_cut_of_a_token_between_cpu_and_npu_is_near(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "Graphs", PlainGraphs)
    path = write_tiny(tmp_path / "tiny.gguf", family, formats="F32", window=24, ffn=512)
    with closing(engine(path)) as alone, closing(engine(path, "cpu", "npu")) as both:
        wanted = logits(alone)
        assert both.others is not None
        assert isinstance(both.others.graphs, PlainGraphs)
        ffns, heads = ((0, *both.others.placement.cuts[kind].points) for kind in ROW_KINDS)
        for ffn, head in [*product(ffns[:3], heads[:2]), (ffns[-1], heads[-1])]:
            cuts(both, matmul=0, ffn=0, row_ffn=ffn, row_head=head)
            before = [graph.runs for graph in both.others.graphs.graphs]
            assert divergences(wanted, logits(both)).max() < NEAR, (ffn, head)
            ran = [graph.runs - then for graph, then in zip(both.others.graphs.graphs, before, strict=True)]
            pieces = both.others.placement.cuts["row_ffn"].pieces_of(ffn) * len(both.spec.layers)
            pieces += both.others.placement.cuts["row_head"].pieces_of(head)
            assert sum(ran) == 12 * pieces  # in each of the tokens, and in no prompt
        assert not both.supervisor.losses


def test_parts_that_are_no_power_of_two_and_pieces_without_neurons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "Graphs", PlainGraphs)
    path = write_tiny(tmp_path / "tiny.gguf", "llama", formats="F32", ffn=224)  # 7 clusters
    usual = Placement.of(("cpu", "npu"), 64, "tensor")
    with closing(engine(path)) as alone:
        wanted = logits(alone)
        for cut in (Given(5, 7, (2, 5)), Given(2, 3, (1, 2)), Given(60, 100, (1, 60))):
            placement = replace(usual, cuts=dict.fromkeys(usual.cuts, cut))
            asked = Wishes(threads=2, context=512, chunk=64, units=("cpu", "npu"), placement=placement)
            with closing(Engine(open_model(path), asked)) as both:
                cuts(both)
                assert divergences(wanted, logits(both)).max() < NEAR, cut


@pytest.mark.parametrize("rows", [64, 1])
def test_a_graph_that_fails_in_a_cut_product(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "Graphs", PlainGraphs)
    path = write_tiny(tmp_path / "tiny.gguf", "llama", formats="F32")
    with closing(engine(path)) as alone, closing(engine(path, "cpu", "npu")) as both:
        assert both.others is not None
        assert isinstance(both.others.graphs, PlainGraphs)
        [graph for graph in both.others.graphs.graphs if len(graph.x) == rows][-3].fails = True
        cuts(both, **{kind: cut.points[-1] for kind, cut in both.others.placement.cuts.items()})
        assert divergences(logits(alone), logits(both)).max() < NEAR
        (loss,) = both.supervisor.losses
        assert (loss.unit, loss.by) == ("npu", "cpu")


# --- CPU and GPU ------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_every_cut_between_cpu_and_gpu_has_the_cpu_units_bits(name: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", window=24, **CASES[name])
    with closing(engine(path)) as alone, closing(engine(path, "cpu", "gpu")) as both:
        assert both.plan.numerics == "exact"
        lengths = (40, 90)
        wanted = logits(alone, lengths)
        for parts in (0, 1, 16, 27, GPU_PARTS) if name in SOME else (5,):
            cuts(both, tokens=parts, rows=parts)
            assert same_bits(wanted, logits(both, lengths)), parts
        few: list[dict[str, int]] = [{"up": 20, "head": 1}]
        for some in [{"head": 9}, {"down": 7}, {"out": 30}, {"qkv": 3, "up": 14}] * (name in SOME) + few:
            cuts(both, **dict.fromkeys(DECODE, 0) | some)
            assert same_bits(wanted, logits(both, lengths)), some
        assert not both.supervisor.losses


@needs_gpu
@pytest.mark.parametrize(("name", "how"), WAYS)
def test_so_it_has_in_other_ways_to_run(name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the shape for real GPUs, with runtimes' own calls instead of flags, with a share of the GPU's time."""
    begin, more = OpenCLDevice.__init__, {"narrow": {"wide": False}, "shared": {"share": 0.7}}.get(how, {})
    monkeypatch.setattr(OpenCLDevice, "__init__", lambda *a, **given: begin(*a, **given | more))
    path = write_tiny(tmp_path / "tiny.gguf", window=24, **CASES[name])
    with closing(engine(path)) as alone, closing(engine(path, "cpu", "gpu", fast=how != "slow")) as both:
        for parts in (5, 11):
            cuts(both, tokens=parts, rows=parts)
            assert same_bits(logits(alone, (40, 70)), logits(both, (40, 70))), parts
        assert not both.supervisor.losses


@needs_gpu
def test_a_packed_model_in_memory_is_shared_as_any_other(tmp_path: Path) -> None:
    path = pack(write_tiny(tmp_path / "tiny.gguf", window=24, **CASES["gemma3 Q6_K"]))
    with closing(engine(path)) as alone, closing(engine(path, "cpu", "gpu")) as both:
        cuts(both, tokens=9, rows=11)
        assert same_bits(logits(alone, (40, 90)), logits(both, (40, 90)))
        assert both.unit._header[list(PRODUCTS)].tolist() == [WHOLE * 11 // GPU_PARTS] * len(PRODUCTS)
        assert not both.supervisor.losses


@needs_gpu
def test_a_gpu_may_take_part_in_decode_only(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", window=24, **CASES["llama Q4_0"])
    placed = replace(Placement.of(("cpu", "gpu"), 64, "tensor"), prefill="cpu", decode="cpu")
    placed = replace(placed, cuts={"up": placed.cuts["up"], "head": placed.cuts["head"]})
    wanted = Wishes(threads=2, context=512, chunk=64, units=("cpu", "gpu"), split="tensor", placement=placed)
    with closing(engine(path)) as alone, closing(Engine(open_model(path), wanted)) as both:
        assert same_bits(logits(alone), logits(both))
        assert both.others is not None
        (gpu,) = both.others.describe()
        assert set(gpu["parts"]) == {"up", "head"}
        computed = (both.unit.seconds()[LINE_PART:LINE_REST] > 0).tolist()
        assert computed == [kind in ("up", "head") for kind in DECODE]


@needs_gpu
def test_a_unit_that_was_given_nothing_is_tried_again(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", window=24, **CASES["llama Q4_0"])
    with closing(engine(path)) as alone, closing(engine(path, "cpu", "gpu")) as both:
        wanted = logits(alone, (5,))
        assert both.others is not None
        assert both.others.balance is not None
        for kind in DECODE:
            both.others.balance.parts[kind] = 1
            both.others.balance.observe({kind: (0.1, 0.1)})
        assert both.others.decode_program() is None
        for _ in range(80):
            assert same_bits(wanted, logits(both, (5,)))
        assert both.others.gpu is not None
        assert {move.kind for move in both.others.balance.moves if move.before == 0} == set(DECODE)


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_work_groups_and_parts_of_products_are_the_same_numbers(name: str, tmp_path: Path) -> None:
    """Else the GPU unit would write into the CPU unit's part, which is the same bits but where two planes are added."""
    path = write_tiny(tmp_path / "tiny.gguf", window=24, **CASES[name])
    with closing(engine(path, "cpu", "gpu")) as both:
        assert both.others is not None
        assert both.others.gpu is not None
        for kinds in both.others.placement.decode_kinds:
            program, loaded = both.others.gpu._programs[decode_name(kinds)]
            assert {share.word for share in program.shares.values()} == {DECODE[kind] for kind in kinds}
            for record, share in program.shares.items():
                following = program.shares.get(record + 1)
                more = following is not None and following.word == share.word and following.before > share.before
                end = following.before if more and following else share.whole
                assert loaded.units(record) == (end - share.before) * share.units, (record, share)


@needs_gpu
@pytest.mark.parametrize("phase", ["prefill+gpu", decode_name(DECODE)])
def test_a_gpu_that_vanishes_in_a_step_of_both(phase: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", formats="Q4_0")
    with closing(engine(path)) as alone, closing(engine(path, "cpu", "gpu")) as both:
        put_in(both, phase, UnitError("OpenCL device failed at kernel norm: DEVICE_NOT_AVAILABLE (-2)"))
        assert same_bits(logits(alone), logits(both))
        (loss,) = both.supervisor.losses
        assert (loss.unit, loss.by) == ("gpu", "cpu")


@needs_gpu
@pytest.mark.parametrize("phase", ["prefill+gpu", decode_name(DECODE)])
def test_an_interrupt_while_a_step_is_put_into_the_queue(phase: str, tmp_path: Path) -> None:
    """What is in the queue already waits for nobody; nothing is waited for that was never put there."""
    path = write_tiny(tmp_path / "tiny.gguf", "llama", formats="Q4_0")
    with closing(engine(path)) as alone, closing(engine(path, "cpu", "gpu")) as both:
        put_in(both, phase, KeyboardInterrupt())
        assert both.others is not None
        assert both.others.gpu is not None
        programs = both.others.gpu._programs
        program, faulty = programs[phase]
        assert isinstance(faulty, Faulty)
        with pytest.raises(KeyboardInterrupt):
            logits(both)
        programs[phase] = program, faulty.loaded
        assert same_bits(logits(alone), logits(both))
        assert not both.supervisor.losses


@needs_gpu
@pytest.mark.parametrize("phase", ["prefill+gpu", decode_name(DECODE)])
def test_a_gpu_that_never_answers_is_not_waited_for(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may still write, so nobody takes over; but nothing hangs."""
    path = write_tiny(tmp_path / "tiny.gguf", "llama", formats="Q4_0")
    with closing(engine(path, "cpu", "gpu")) as both:
        monkeypatch.setattr(gpu_unit, "PATIENCE", 0.5)
        put_in(both, phase, None)
        with pytest.raises(UnitError, match=r"a step has not ended in .* seconds; end this process"):
            logits(both)


@needs_gpu
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_step_of_both_that_is_interrupted(
    phase: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue waits for nobody any more, and the next step begins behind it."""
    path = write_tiny(tmp_path / "tiny.gguf", "llama", formats="Q4_0")
    with closing(engine(path)) as alone, closing(engine(path, "cpu", "gpu", fast=fast)) as both:
        cuts(both, tokens=8, rows=8)
        for turn in range(3):
            sequence = both.sequence()
            both.prefill(sequence, list(range(40)))
            with monkeypatch.context() as patch:
                patch.setattr(both.unit, "_look_on", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    compute(both, sequence, phase)
            sequence.close()
            assert same_bits(logits(alone, (40,)), logits(both, (40,))), turn
        assert not both.supervisor.losses


def compute(both: Engine, sequence: Sequence, phase: str) -> None:
    if phase == "prefill":
        both.prefill(sequence, list(range(50)))
    else:
        both.decode([sequence], [7])


@needs_gpu
def test_prompts_cut_with_one_unit_and_decode_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "Graphs", PlainGraphs)
    path = write_tiny(tmp_path / "tiny.gguf", "llama", formats="F32")
    with closing(engine(path)) as alone, closing(engine(path, "cpu", "gpu", "npu")) as all_three:
        wanted = logits(alone)
        for rows in (0, 9, GPU_PARTS):
            cuts(all_three, matmul=4, ffn=5, rows=rows)
            assert divergences(wanted, logits(all_three)).max() < NEAR, rows
        assert all_three.others is not None
        gpu, npu = all_three.others.describe()
        assert gpu["parts"] == {kind: [GPU_PARTS, GPU_PARTS] for kind in DECODE}
        assert npu["parts"] == {"matmul": [4, PARTS], "ffn": [5, PARTS]}
        cuts(all_three, rows=0)
        assert not all_three.others.on_gpu("decode")  # but the CPU unit's alone


# --- who takes part ---------------------------------------------------------------------------------------------------


def test_a_split_needs_two_units() -> None:
    with pytest.raises(UsageError, match="cpu alone shares its products with no unit"):
        Placement.of(("cpu",), 256, "tensor")
    with pytest.raises(UsageError, match="split is 'row': there are layer and tensor"):
        Placement.of(("cpu", "gpu"), 256, "row")


@pytest.mark.parametrize("chunk", [64, 256])
def test_a_gpus_tokens_are_whole_tiles(chunk: int) -> None:
    placement = Placement.of(("cpu", "gpu"), chunk, "tensor")
    for tokens in range(1, chunk + 1):
        for parts in range(GPU_PARTS + 1):
            first = placement.first_tokens(tokens, parts)
            assert first % 8 == 0 or first == tokens
            assert 0 <= first <= tokens
            assert first == 0 or tokens >= 32
