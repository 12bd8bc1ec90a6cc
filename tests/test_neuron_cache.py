"""The neuron cache and its reader: what is in memory, what goes, and that nobody waits for more than must be
(docs/sparse.md; checklist rows 4, 5, 11 to 16, 21)."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from exact_models import decoded, prefilled, some_tokens
from faulty_disk import faulty, honest, use_reader
from harness import until
from packed_models import streaming
from reference import same_bits
from sparse_models import addresses_of, reader_of, write_gated, write_predicted

from coterie.engine import Engine
from coterie.errors import UnitError
from coterie.kernels import cache as c
from coterie.scheduler.residency import pin_order
from coterie.sizes import Share
from coterie.storage.arena import BufferRef
from coterie.storage.checksum import checksum
from coterie.storage.runs import Extents
from coterie.storage.weights import SparseFFN

N = 24  # tokens


pytestmark = pytest.mark.usefixtures("many_extents")


@pytest.fixture(scope="module")
def gated(many_extents: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gated(tmp_path_factory.mktemp("cache") / "gated.gguf")


@pytest.fixture(scope="module")
def predicted(many_extents: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_predicted(tmp_path_factory.mktemp("cache") / "predicted.gguf")


def addresses(engine: Engine) -> npt.NDArray[np.int64]:
    """Of all neurons, int64[layers][neurons]."""
    return np.stack([addresses_of(engine, layer) for layer in range(len(engine.spec.layers))])


def within(engine: Engine, region: str, at: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which addresses lie in a region of the arena."""
    found, offset = engine.arena.regions[region], at - engine.arena.base
    return (offset >= found.offset) & (offset < found.offset + found.size)


# --- the cache ---------------------------------------------------------------------------------------


def test_only_what_is_live_and_missing_is_read(gated: Path) -> None:
    """Checklist rows 14, 15: one read brings a neuron's Up and Down, and only a positive Gate asks for it."""
    with streaming(gated, 0.5) as engine:
        decoded(engine, some_tokens(N))
        live, missing = engine.unit.neuron_counts()
        found, bundle = reader_of(engine).counters(), reader_of(engine).buffers.slots.shape[1]
        assert 0 < missing <= live
        assert found["requests"] == missing
        assert found["bytes"] == missing * bundle
        assert found["evictions"] == missing - found["used"]


def test_what_is_in_memory_is_what_the_file_has(gated: Path) -> None:
    """Every address leads to its neuron's own bundle, whatever was evicted in between."""
    with streaming(gated, 0.5) as engine:
        decoded(engine, some_tokens(N))
        assert engine.stream is not None
        sums = engine.stream.file.neuron_sums
        at = 0
        for layer, weights in enumerate(engine.layout.weights.layers):
            ffn, found = weights.ffn, addresses_of(engine, layer)
            assert isinstance(ffn, SparseFFN)
            for neuron in np.flatnonzero(found > c.PENDING).tolist():
                offset = int(found[neuron]) - engine.arena.base
                regions = engine.arena.regions.items()
                name = next(name for name, r in regions if r.offset <= offset < r.offset + r.size)
                ref = BufferRef(name, offset, ffn.layout.bundle, "|u1", (ffn.layout.bundle,))
                assert checksum(np.array(engine.arena.numpy(ref))) == int(sums[at + neuron])
            at += ffn.layout.neurons


def test_serving_writes_nothing(gated: Path) -> None:
    def written() -> int:
        with open("/proc/self/io") as file:
            return int(dict(line.split(":") for line in file)["write_bytes"])

    with streaming(gated, 0.5) as engine:
        decoded(engine, some_tokens(4))
        before = written()
        decoded(engine, some_tokens(N))
        assert written() == before


def test_a_new_ceiling_moves_the_cache_and_no_bit(gated: Path) -> None:
    tokens = some_tokens(N)
    with streaming(gated, 0.9) as engine:
        expected, slots = decoded(engine, tokens), {engine.plan.slots}
        for share in (0.5, 0.7, 0.45, 1.0, 0.6):
            engine.set_memory(Share(share))
            slots.add(engine.plan.slots)
            assert same_bits(decoded(engine, tokens), expected), share
        assert 0 in slots


def test_a_read_that_fails_ends_the_step_and_the_next_one_works(gated: Path) -> None:
    tokens = some_tokens(N)
    with streaming(gated, 0.5) as engine:
        expected = decoded(engine, tokens)
        engine.set_memory(Share(0.45))
        sums = engine.arena.numpy(reader_of(engine).buffers.sums)
        right = sums.copy()
        sums ^= 1
        with pytest.raises(UnitError, match="checksum"):
            decoded(engine, tokens)
        sums[:] = right
        assert same_bits(decoded(engine, tokens), expected)


# --- regions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pinned", [0, 11])
def test_pinned_neurons_stay_and_the_cache_keeps_its_size(pinned: int, gated: Path) -> None:
    """Checklist row 11: the fixed region is never evicted, single neurons are; bytes never exceed the plan's."""
    with streaming(gated, 0.6) as engine:
        order, runs = pin_order(engine.runs), Extents.of(engine.runs).run
        first = next(i for i, n in enumerate(order) if engine.runs[runs[n]].kind == "neurons")
        told: dict[str, Any] = {"pinned": first + pinned, "ring": engine.plan.ring, "slots": engine.plan.slots}
    with streaming(gated, None, **told) as engine:
        stay = within(engine, "weights", addresses(engine))
        assert np.count_nonzero(stay) == engine.plan.pinned_neurons
        assert (engine.plan.pinned_neurons > 0) == (pinned > 0)
        before, held = addresses(engine), set[int]()
        for token in some_tokens(3 * N):
            decoded(engine, [token])
            now = addresses(engine)
            np.testing.assert_array_equal(now[stay], before[stay])
            cached = now[~stay & (now > c.PENDING)]
            assert cached.size == np.unique(cached).size <= engine.plan.slots
            assert within(engine, "neurons", cached).all()
            held.add(cached.size)
        assert reader_of(engine).counters()["evictions"] > 0
        assert max(held) == engine.plan.slots
        for name, size in engine.plan.regions.items():
            assert engine.arena.regions[name].used <= max(size, 1), name


def test_a_growing_batch_takes_room_from_what_was_used_least(gated: Path) -> None:
    """Checklist row 12: the cache keeps its size, and what a larger batch needs replaces cold neurons."""
    with streaming(gated, 0.6, 1) as engine:
        told: dict[str, Any] = {"pinned": engine.plan.pinned, "ring": engine.plan.ring, "slots": 3400}
    with streaming(gated, None, 1, **told) as engine:
        tokens = some_tokens(2 * N)
        decoded(engine, tokens)
        buffers = reader_of(engine).buffers
        stamps, owners = (engine.arena.numpy(ref) for ref in (buffers.stamps, buffers.owners))
        then, stood = stamps.copy(), owners.copy()
        sequences = [engine.sequence() for _ in range(2)]
        engine.decode(sequences, tokens[:2])
        gone, stayed = owners != stood, owners == stood
        assert gone.any()
        assert np.median(then[gone]) < np.median(then[stayed])
        assert np.count_nonzero(owners > 0) == engine.plan.slots == owners.size


def test_what_a_layer_uses_is_not_given_away(predicted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every live neuron's slot carries the layer's tick, so that it is no victim, also where it was asked for ahead and
    came too late: here the disk takes longer than a layer."""

    def slow(fd: int, address: int, nbytes: int, offset: int) -> int:
        time.sleep(1e-3)
        return honest(fd, address, nbytes, offset)

    use_reader(slow, monkeypatch)
    with streaming(predicted, 0.9, counting=True) as engine:
        assert reader_of(engine).engine == "preadv"
        assert any(name.startswith("neuron_ask") for name in engine.layout.programs["decode"].kernels)
        assert engine.layout.shared.uses is not None
        uses, last = engine.arena.numpy(engine.layout.shared.uses), len(engine.spec.layers) - 1
        buffers, sequence = reader_of(engine).buffers, engine.sequence()
        control, stamps = engine.arena.numpy(buffers.control), engine.arena.numpy(buffers.stamps)
        first, size = engine.arena.address(buffers.slots), buffers.slots.shape[1]
        for token in some_tokens(8):
            before = uses[last].copy()
            engine.decode([sequence], [token])
            at = addresses_of(engine, last)[uses[last] != before]
            assert at.size > 0
            assert within(engine, "neurons", at).all()
            assert (stamps[(at - first) // size] == control[c.TICK]).all()


# --- the pipeline ------------------------------------------------------------------------------------


def test_neurons_are_computed_while_gates_are_on_their_way(gated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checklist row 16: no barrier between matrices. The disk holds back a later part of a layer's Gates; Up and
    Down of what is live in the first part are read all the same."""
    hold, release, held = set[int](), threading.Event(), threading.Event()

    def reader(fd: int, address: int, nbytes: int, offset: int) -> int:
        if any(offset <= place < offset + nbytes for place in hold):
            held.set()
            release.wait()
        return honest(fd, address, nbytes, offset)

    tokens = some_tokens(4)
    with faulty(gated, reader, monkeypatch, 0.45) as engine:
        expected = decoded(engine, tokens)
        weights, last = engine.layout.weights, len(engine.spec.layers) - 1
        index = next(i for i, run in enumerate(weights.runs) if (run.kind, run.layer) == ("gate", last))
        numbers = np.arange(weights.extents.first[index], weights.extents.first[index + 1])
        streamed = numbers[np.isin(numbers, weights.tape)]
        assert streamed.size > 1, "the layer's Gates come in several parts"
        hold.add(int(weights.extents.offset[streamed[-1]]))
        before, found = addresses_of(engine, last).copy(), list[Any]()
        thread = threading.Thread(target=lambda: found.append(decoded(engine, tokens[:1])))
        thread.start()
        held.wait()
        now = addresses_of(engine, last)
        until(lambda: ((now != before) & (now > c.PENDING)).any())
        assert not found, "the Gates are still on their way"
        hold.clear()
        release.set()
        thread.join()
        assert same_bits(found[0], expected[:1])


def events(path: Path, unit: str, name: str) -> list[dict[str, Any]]:
    """A trace's slices of that name of a unit."""
    found = json.loads(path.read_text())["traceEvents"]
    number = next(e["pid"] for e in found if e["name"] == "process_name" and e["args"]["name"] == unit)
    return [e for e in found if e["ph"] == "X" and e["pid"] == number and e["name"] == name]


@pytest.mark.parametrize("kind", ["gated", "predicted"])
def test_stages_of_a_layer_follow_each_other(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Checklist row 16, from the trace: what a layer had to read it asked for after the layer before began,
    and it came before Down ended."""
    trace = tmp_path / "t.json"
    with streaming(request.getfixturevalue(kind), 0.6, trace=trace) as engine:
        decoded(engine, some_tokens(N))
        weights = engine.layout.weights
        stay = all(weights.stays(layer.ffn.deciding) for layer in weights.layers if isinstance(layer.ffn, SparseFFN))
    reads = events(trace, "neurons", "read")
    gates, downs = events(trace, "cpu", "ffn_up"), events(trace, "cpu", "ffn_down")
    assert reads
    steps = sorted({e["args"]["step"] for e in gates})
    begun, ended = dict[tuple[int, int], float](), dict[tuple[int, int], float]()
    for event in gates + downs:
        key = event["args"]["step"], event["args"]["layer"]
        begun[key] = min(event["ts"], begun.get(key, event["ts"]))
        ended[key] = max(event["ts"] + event["dur"], ended.get(key, 0))
    for read in reads:
        layer = read["args"]["layer"]
        asked = max(layer - 1, 0)  # by a predictor, or by Gates that stay in memory
        step = max((s for s in steps if begun[s, asked] <= read["ts"]), default=None)
        assert step is not None, "nothing is read before it can be known"
        if not stay:  # else what is asked for ahead may be in vain
            assert read["ts"] + read["dur"] <= ended[step, layer] + 1


def test_prompts_read_ahead_in_order_and_ask_nobody(predicted: Path, tmp_path: Path) -> None:
    """Checklist rows 4, 5, from the trace: no predictor, no read of a single neuron; the next layer's weights are on
    their way while a layer is computed."""
    trace = tmp_path / "t.json"
    with streaming(predicted, 0.5, trace=trace) as engine:
        prefilled(engine, some_tokens(64))
        assert engine.unit.neuron_counts() == (0, 0)
    found = json.loads(trace.read_text())["traceEvents"]
    assert not [e for e in found if e["ph"] == "X" and e["name"] == "ffn_ask"]
    assert not events(trace, "neurons", "read")
    reads, downs = events(trace, "flash", "read"), events(trace, "cpu", "ffn_down")
    first = min(e["args"]["step"] for e in downs)
    for layer in range(3):
        end = max(e["ts"] + e["dur"] for e in downs if e["args"]["layer"] == layer and e["args"]["step"] == first)
        ahead = [e["ts"] for e in reads if e["args"]["layer"] == layer + 1]
        assert ahead
        assert min(ahead) < end, layer


# --- the tail ----------------------------------------------------------------------------------------


def test_the_tail_is_reported(gated: Path) -> None:
    """Checklist row 21: mean, P50, P90, P99 of steps and of their misses, from counters."""
    with streaming(gated, 0.6) as engine:
        decoded(engine, some_tokens(2))
        engine.count_anew()
        before, tokens = engine.unit.neuron_counts(), some_tokens(N)
        decoded(engine, tokens)
        live, asked = (now - then for now, then in zip(engine.unit.neuron_counts(), before, strict=True))
        report = engine.flash_report()
        assert report is not None
        assert report["live_neurons_per_step"] == live / N
        assert report["read_neurons_per_step"] == asked / N
        for spread in (report["step_ms"], report["miss_rate"]):
            assert 0 <= spread["p50"] <= spread["p90"] <= spread["p99"]
            assert 0 < spread["mean"] <= spread["p99"]
        assert report["miss_rate"]["p99"] <= 1
