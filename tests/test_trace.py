"""Traces tell what ran: rings filled by lanes, exported as Chrome's JSON."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_models import decoded, prefilled, some_tokens
from harness import machine
from tiny_models import write_tiny

from coterie.actors import cpu
from coterie.engine import Engine
from coterie.errors import UsageError
from coterie.kernels import operands as o
from coterie.kernels.record import EVENT, RING_HEADER, Opcode
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes
from coterie.storage import unit as unit_buffers
from coterie.trace.chrome import read_rings, write_chrome_trace


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("trace") / "m.gguf", "gemma3", layers=3, formats="Q4_0", context=600)


def traced(model: Path, trace: Path, lanes: int) -> tuple[list[dict[str, Any]], Engine]:
    """Events of 40 tokens' prefill with 5 rows of logits, then 3 tokens decoded; and the closed engine."""
    engine = Engine(open_model(model), Wishes(threads=lanes), trace=trace)
    sequence, tokens = engine.sequence(), some_tokens(43)
    engine.prefill(sequence, tokens[:40], range(35, 40))
    for token in tokens[40:]:
        engine.decode([sequence], [token])
    sequence.close()
    engine.close()
    return json.loads(trace.read_text())["traceEvents"], engine


def amounts(engine: Engine) -> list[list[tuple[str, int, int]]]:
    """(name, layer, pieces) of every instruction that each of the five steps should have run."""
    steps = [("prefill", 40), ("head", 5), *[("decode", 1)] * 3]
    rows = {"embed", "norm", "rope", "merge"}
    heads = engine.spec.n_kv_heads

    def pieces(name: str, words: Any, n: int) -> int:
        if name in rows:
            return n
        if name == "attend":
            return heads if n == 1 else heads * -(-n // 8)
        if name == "matmul":
            return -(-int(words[o.MATMUL_GROUPS]) // int(words[o.MATMUL_CHUNK]))
        if name == "ffn_up":
            layout = engine.layout.weights.layers[0].ffn.layout
            return -(-layout.clusters // int(words[o.UP_CHUNK]))
        return -(-int(words[o.DOWN_GROUPS]) // int(words[o.DOWN_CHUNK]))

    expected: list[list[tuple[str, int, int]]] = []
    for program, n in steps:
        loaded = engine.layout.programs[program]
        expected.append([])
        for words in loaded.words[: loaded.length]:
            code = int(words[1])
            name = Opcode(code & 0xFFFF).name.lower()
            expected[-1].append((name, code >> 16, pieces(name, words, n)))
    return expected


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_instruction_of_every_step_is_there_with_all_pieces(model: Path, tmp_path: Path, lanes: int) -> None:
    events, engine = traced(model, tmp_path / "t.json", lanes)
    slices = [event for event in events if event["ph"] == "X" and event["cat"] == "compute"]
    expected = amounts(engine)
    assert {event["args"]["step"] for event in slices} == set(range(1, len(expected) + 1))
    for number, wanted in enumerate(expected, 1):
        done: dict[tuple[str, int], int] = {}
        total: dict[tuple[str, int], int] = {}
        for event in slices:
            if event["args"]["step"] == number:
                key = event["name"], event["args"].get("layer", 0xFFFF)
                done[key] = done.get(key, 0) + event["args"]["pieces"]
        for name, layer, pieces in wanted:
            total[name, layer] = total.get((name, layer), 0) + pieces
        assert done == total, number


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_slices_of_a_lane_follow_each_other(model: Path, tmp_path: Path, lanes: int) -> None:
    events, _ = traced(model, tmp_path / "t.json", lanes)
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["cpu", *(f"lane {i}" for i in range(lanes))]
    for lane in range(lanes):
        slices = [event for event in events if event["ph"] == "X" and event["tid"] == lane]
        spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in slices)
        assert all(first <= last for first, last in spans)
        assert all(before[1] <= after[0] + 0.002 for before, after in pairwise(spans))  # times are rounded
        steps = [event["args"]["step"] for event in slices if event["cat"] == "compute"]
        assert steps == sorted(steps)
    starts = [event["ts"] for event in events if event["ph"] == "X"]
    assert min(starts) >= -1e3
    assert max(starts) < 60e6  # microseconds: the clock's rate is right to an order of magnitude


def test_off_means_no_ring_and_no_file(model: Path, tmp_path: Path) -> None:
    engine = Engine(open_model(model), Wishes(threads=2))
    assert engine.unit.buffers.rings is None
    assert "trace" not in engine.plan.regions
    prefilled(engine, some_tokens(10))
    engine.close()
    assert not list(tmp_path.iterdir())


def test_tracing_does_not_change_bits(model: Path, tmp_path: Path) -> None:
    results: list[Any] = []
    for trace in (None, tmp_path / "t.json"):
        engine = Engine(open_model(model), Wishes(threads=2), trace=trace)
        results.append(decoded(engine, some_tokens(12)))
        engine.close()
    np.testing.assert_array_equal(*results)


def test_a_full_ring_keeps_the_newest(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (unit_buffers, cpu):
        monkeypatch.setattr(module, "TRACE_EVENTS", 50)
    engine = Engine(open_model(model), Wishes(threads=1), trace=tmp_path / "t.json")
    decoded(engine, some_tokens(20))
    rings = engine.unit.buffers.rings
    assert rings is not None
    (events,) = read_rings(engine.arena.numpy(rings))
    length = engine.layout.programs["decode"].length
    assert len(events) == 50
    assert events["epoch"].tolist() == [20 - (49 - i) // length for i in range(50)]
    assert (np.diff(events["start"].astype(np.int64)) > 0).all()
    engine.close()
    written = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert sum(event.get("cat") == "compute" for event in written) == 50


def ring(capacity: int, starts: list[int]) -> Any:
    """A lane's ring after events that began at these cycles."""
    made = np.zeros(RING_HEADER + capacity * EVENT.itemsize, np.uint8)
    made[:16].view(np.int64)[:] = len(starts), capacity
    events = made[RING_HEADER:].view(EVENT)
    for i, start in enumerate(starts):
        events[i % capacity] = (start, start + 5, 2, i, Opcode.NORM, 3, 1)
    return made


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 21])
def test_rings_are_read_oldest_first(count: int) -> None:
    starts = [100 + 10 * i for i in range(count)]
    (events,) = read_rings(ring(8, starts)[None])
    assert events["start"].tolist() == starts[-8:]


def test_times_are_microseconds_from_the_first_event(tmp_path: Path) -> None:
    rings = np.stack([ring(8, [1000, 3000]), ring(8, [])])
    write_chrome_trace(tmp_path / "t.json", [("cpu", rings)], 1e9)
    slices = [e for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"]) for e in slices] == [
        ("wait", 0.0, 0.002),
        ("norm", 0.002, 0.005),
        ("wait", 2.0, 0.002),
        ("norm", 2.002, 0.005),
    ]
    assert slices[1]["args"] == {"step": 0, "pieces": 1, "layer": 3}


def test_a_file_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the trace"):
        write_chrome_trace(tmp_path / "no" / "t.json", [("cpu", ring(8, [1])[None])], 1e9)


def test_a_machine_without_programs_writes_an_empty_trace(tmp_path: Path) -> None:
    with machine(2, tracing=True) as m:
        rings = m.unit.buffers.rings
        assert rings is not None
        write_chrome_trace(tmp_path / "t.json", [("cpu", m.look(rings))], m.unit.cycles_per_second())
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert [event["ph"] for event in events] == ["M"] * 3
