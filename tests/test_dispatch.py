"""The dispatcher of a prompt's tasks: orders, losses and failures whatever comes; and a prompt of an engine with it."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_graphs import PlainGraphs
from tiny_models import write_tiny

from coterie import others
from coterie.actors.unit import Rows
from coterie.divergence import divergences
from coterie.engine import Engine
from coterie.opening import open_model
from coterie.prompts import to_cpu
from coterie.scheduler.dispatch import Chunk, Dispatcher, Policy, Subgraph, Task, in_order
from coterie.scheduler.plan import Wishes
from coterie.stepping import Again

NEAR = 1e-6


def a_chunk(number: int, heads: int = 1, units: tuple[str, ...] = ("cpu", "npu"), tokens: int = 128) -> Chunk:
    """As an engine has them."""
    program = "prefill@128" if "npu" in units else "prefill"
    rows = range(128 * number, 128 * number + tokens)
    layers = Subgraph("layers", program, rows, units, (Task(number - 1, 0),) if number else ())
    return layers, *(Subgraph(f"head {i}", "head", range(8), ("cpu",), (Task(number, 0),)) for i in range(heads))


def prompt(*heads: int, policy: Policy = in_order) -> Dispatcher:
    return Dispatcher((a_chunk(i, count) for i, count in enumerate(heads)), to_cpu, policy)


def feed_npu(can_start: Sequence[Task], dispatcher: Dispatcher) -> Task | None:
    """The task whose end gives the NPU most to do; of the NPU's own, the one whose end gives others least (llm.npu,
    section 3.4). It shows that tasks may run out of order."""

    def gain(task: Task) -> float:
        then = [dispatcher.subgraph(released) for released in dispatcher.released(task)]
        if "npu" in dispatcher.subgraph(task).units:
            return -sum(subgraph.seconds for subgraph in then)
        return sum(subgraph.seconds for subgraph in then if "npu" in subgraph.units)

    return max(can_start, key=gain, default=None)


def run(dispatcher: Dispatcher, at: float) -> float:
    """Run all that is ordered, to the end, each in 10 ms; when that is."""
    while ordered := dispatcher.orders(dispatcher.idle, at):
        for task in ordered:
            dispatcher.started(task, at)
            dispatcher.ended(task, at := at + 0.01)
    return at


def test_tasks_come_in_the_prompts_order() -> None:
    dispatcher = prompt(0, 2, 1)
    run(dispatcher, 0)
    ordered = [event.about[0] for event in dispatcher.record if event.kind == "order"]
    assert ordered == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert all(dispatcher.chunk_done(number) for number in range(3))


def test_in_order_nothing_runs_beside_anything() -> None:
    dispatcher = Dispatcher([a_chunk(0, 2), a_chunk(1, units=("gpu",))], to_cpu)
    assert dispatcher.orders({"cpu", "gpu"}, 0) == []  # the first needs the NPU unit
    assert dispatcher.orders(dispatcher.idle, 0) == [Task(0, 0)]
    assert dispatcher.orders(dispatcher.idle, 0) == []
    dispatcher.started(Task(0, 0), 0)
    dispatcher.ended(Task(0, 0), 1)
    assert dispatcher.orders({"gpu"}, 1) == []  # chunk 1 is ready, but not the next


def test_the_story_of_a_failure_and_a_loss() -> None:
    dispatcher = prompt(0, 1)
    (task,) = dispatcher.orders({"cpu", "npu"}, 0)
    dispatcher.started(task, 0)
    dispatcher.ended(task, 0.012)
    (task,) = dispatcher.orders({"cpu", "npu"}, 0.012)
    dispatcher.started(task, 0.012)
    dispatcher.failed(task, 0.015)
    dispatcher.lost("npu", 0.015)
    dispatcher.refit(1, (a_chunk(1, 0, ("cpu",), 100), a_chunk(2, 1, ("cpu",), 28)), 0.015)
    run(dispatcher, 0.02)
    assert dispatcher.story().splitlines() == [
        "   0.000 s: chunks from number 0 on have 128, 128 rows",
        "   0.000 s: chunk 0 layers is next: prefill@128, 128 rows, cpu+npu",
        "   0.000 s: chunk 0 layers starts",
        "   0.012 s: chunk 0 layers has ended after 12.0 ms",
        "   0.012 s: chunk 1 layers is next: prefill@128, 128 rows, cpu+npu",
        "   0.012 s: chunk 1 layers starts",
        "   0.015 s: chunk 1 layers has failed after 3.0 ms: chunk 1 is to be computed again",
        "   0.015 s: npu is lost; tasks that others have now: 1",
        "   0.015 s: chunks from number 1 on have 100, 28 rows",
        "   0.020 s: chunk 1 layers is next: prefill, 100 rows, cpu",
        "   0.020 s: chunk 1 layers starts",
        "   0.030 s: chunk 1 layers has ended after 10.0 ms",
        "   0.030 s: chunk 2 layers is next: prefill, 28 rows, cpu",
        "   0.030 s: chunk 2 layers starts",
        "   0.040 s: chunk 2 layers has ended after 10.0 ms",
        "   0.040 s: chunk 2 head 0 is next: head, 8 rows, cpu",
        "   0.040 s: chunk 2 head 0 starts",
        "   0.050 s: chunk 2 head 0 has ended after 10.0 ms",
    ]
    assert Dispatcher.replay(dispatcher.record, to_cpu).story() == dispatcher.story()


def test_a_head_that_fails_has_its_chunk_computed_again() -> None:
    dispatcher = prompt(2, 0)
    for seconds in range(2):
        (task,) = dispatcher.orders(dispatcher.idle, seconds)
        dispatcher.started(task, seconds)
        dispatcher.ended(task, seconds)
    (task,) = dispatcher.orders(dispatcher.idle, 2)
    assert task == (0, 2)
    dispatcher.started(task, 2)
    dispatcher.failed(task, 3)
    assert not dispatcher.done
    assert dispatcher.orders(dispatcher.idle, 3) == [Task(0, 0)]


def test_what_was_made_of_a_failed_chunk_is_undone_too_and_what_is_under_way_is_for_nothing() -> None:
    chunks = [a_chunk(0, 1, ("gpu",)), a_chunk(1, 0, ("gpu",)), a_chunk(2, 0, ("gpu",))]
    dispatcher = Dispatcher(chunks, to_cpu, feed_npu)
    for number in range(2):
        (task,) = dispatcher.orders({"gpu"}, number)
        assert task == (number, 0)
        dispatcher.started(task, number)
        dispatcher.ended(task, number)
    assert dispatcher.orders({"cpu", "gpu"}, 2) == [Task(0, 1), Task(2, 0)]
    for task in (Task(0, 1), Task(2, 0)):
        dispatcher.started(task, 2)
    dispatcher.failed(Task(0, 1), 3)
    assert not dispatcher.done
    assert dispatcher.ready == [Task(0, 0)]
    dispatcher.ended(Task(2, 0), 4)
    assert not dispatcher.done
    assert dispatcher.story().endswith("chunk 2 layers has ended after 2000.0 ms, for nothing")
    run(dispatcher, 5)
    assert len(dispatcher.done) == 4
    assert Dispatcher.replay(dispatcher.record, to_cpu, feed_npu).record == dispatcher.record


def test_a_lost_units_tasks_are_others() -> None:
    dispatcher = Dispatcher([a_chunk(0, 1, ("gpu",)), a_chunk(1, 1, ("gpu",))], to_cpu)
    (task,) = dispatcher.orders({"gpu"}, 0)
    dispatcher.started(task, 0)
    dispatcher.ended(task, 1)
    dispatcher.lost("gpu", 1)
    assert dispatcher.subgraph(Task(0, 0)).units == ("gpu",)  # it was
    assert dispatcher.subgraph(Task(1, 0)).units == ("cpu",)
    assert dispatcher.idle == {"cpu"}
    (task,) = dispatcher.orders({"cpu"}, 2)
    assert task == (0, 1)
    dispatcher.started(task, 2)
    dispatcher.failed(task, 2)
    assert dispatcher.subgraph(Task(0, 0)).units == ("cpu",)  # it is to be computed again
    run(dispatcher, 3)
    assert len(dispatcher.done) == 4


def test_events_that_make_no_sense_are_refused_and_change_nothing() -> None:
    dispatcher = prompt(0, 1)
    dispatcher.orders(dispatcher.idle, 1)
    nonsense: list[tuple[Callable[[], object], str]] = [
        (lambda: dispatcher.ended(Task(0, 0), 1), "chunk 0 layers has ended, but was not started"),
        (lambda: dispatcher.failed(Task(1, 1), 1), "chunk 1 head 0 has failed, but was not started"),
        (lambda: dispatcher.started(Task(1, 0), 1), "chunk 1 layers starts, but was not ordered"),
        (lambda: dispatcher.ended(Task(7, 3), 1), "chunk 7 3 has ended, but was not started"),
        (lambda: dispatcher.started(Task(0, 0), 0.5), "started at 0.5 s, but it was 1 s before"),
        (lambda: dispatcher.orders({"npu"}, 1), "npu: not free, or not there"),
        (lambda: dispatcher.orders({"tpu"}, 1), "tpu: not free, or not there"),
        (lambda: dispatcher.refit(0, (), 1), "chunk 0 is cut anew, but has begun"),
        (lambda: dispatcher.refit(3, (), 1), "chunk 3 is cut anew, but has begun, or is not there"),
        (lambda: dispatcher.refit(1, (a_chunk(2),), 1), "layers of chunk 1 needs what is not there before it"),
        (lambda: dispatcher.refit(1, (a_chunk(1, 0, ()),), 1), "layers of chunk 1 has no unit"),
        (lambda: dispatcher.lost("cpu", 1), "layers of chunk 0 has no unit, or one that is lost"),
    ]
    before, ready = list(dispatcher.record), list(dispatcher.ready)
    for event, said in nonsense:
        with pytest.raises(ValueError, match=re.escape(said)):
            event()
    assert (dispatcher.record, dispatcher.ready) == (before, ready)
    dispatcher.started(Task(0, 0), 1)
    with pytest.raises(ValueError, match="has started before"):
        dispatcher.started(Task(0, 0), 1)
    dispatcher.lost("npu", 1)
    with pytest.raises(ValueError, match="was lost before"):
        dispatcher.lost("npu", 1)
    with pytest.raises(ValueError, match="layers of chunk 1 has no unit, or one that is lost"):
        dispatcher.refit(1, (a_chunk(1),), 1)


# --- whatever comes -----------------------------------------------------------------------------------

UNITS = ("cpu", "gpu", "npu")


@st.composite
def graphs(draw: st.DrawFn) -> list[Chunk]:
    """Any chunks of any subgraphs, each with any needs before it."""
    chunks, before = list[Chunk](), list[Task]()
    for i in range(draw(st.integers(1, 4))):
        made = list[Subgraph]()
        for j in range(draw(st.integers(1, 4))):
            needs = draw(st.lists(st.sampled_from(before), max_size=3, unique=True)) if before else []
            units = draw(st.lists(st.sampled_from(UNITS), min_size=1, max_size=2, unique=True))
            seconds = draw(st.floats(0, 1))
            made.append(Subgraph(f"part {j}", "any", range(1), tuple(units), tuple(needs), seconds))
            before.append(Task(i, j))
        chunks.append(tuple(made))
    return chunks


def moves(dispatcher: Dispatcher, choices: list[int]) -> Iterator[None]:
    """Something that may happen now, as chosen, and then whatever leads to the end."""
    for seconds, choice in enumerate([*choices, *[0] * 200]):
        since = dispatcher.under_way.items()
        ordered, running = [t for t, s in since if s is None], [t for t, s in since if s is not None]
        can: list[tuple[str, Task | str]] = [("ended", task) for task in running]
        can += [("started", task) for task in ordered]
        can += [("orders", "")] if dispatcher.ready or not can else []
        if seconds < len(choices):
            can += [("failed", task) for task in running]
            can += [("lost", unit) for unit in UNITS[1:] if unit not in dispatcher.lost_units]
        kind, about = can[choice % len(can)]
        if kind == "orders":
            dispatcher.orders(dispatcher.idle, seconds)
        else:
            getattr(dispatcher, kind)(about, seconds)
        yield


POLICIES: list[Policy] = [in_order, feed_npu, lambda can_start, _: can_start[-1] if can_start else None]


@settings(max_examples=500, deadline=None)
@given(graphs(), st.sampled_from(POLICIES), st.lists(st.integers(0, 99), max_size=40))
def test_no_task_runs_before_what_it_needs_whatever_ends_fails_or_is_lost(
    chunks: list[Chunk], policy: Policy, choices: list[int]
) -> None:
    dispatcher = Dispatcher(chunks, to_cpu, policy)
    for _ in moves(dispatcher, choices):
        begun = dispatcher.under_way.keys() | dispatcher.done
        for task in begun - dispatcher._void:
            assert dispatcher.done.issuperset(dispatcher.subgraph(task).needs)
        every = {Task(i, j) for i, chunk in enumerate(chunks) for j in range(len(chunk))} - begun
        ready = [task for task in sorted(every) if dispatcher.done.issuperset(dispatcher.subgraph(task).needs)]
        assert dispatcher.ready == ready
        busy = [unit for task in dispatcher.under_way for unit in dispatcher.subgraph(task).units]
        assert dispatcher.lost_units or len(busy) == len(set(busy))
    assert all(map(dispatcher.chunk_done, range(len(chunks))))
    again = Dispatcher.replay(dispatcher.record, to_cpu, policy)
    assert again.record == dispatcher.record
    assert again.story() == dispatcher.story()


def simulated(policy: Policy) -> tuple[float, float]:
    """Seconds for a prompt of four chunks of three layers each, attention on the CPU unit and products on the NPU unit
    (llm.npu, figure 13), and those of them in which the NPU unit had nothing to do."""
    chunks = list[Chunk]()
    for i in range(4):
        made = list[Subgraph]()
        for layer in range(3):
            before = [Task(k, 2 * layer - 1) for k in range(i + 1) if layer]  # keys and values of chunks so far
            made.append(Subgraph("attention", "a", range(1), ("cpu",), tuple(before), 0.1 * (1 + i)))
            made.append(Subgraph("products", "p", range(1), ("npu",), (Task(i, 2 * layer),), 0.5))
        chunks.append(tuple(made))
    dispatcher, now, ends = Dispatcher(chunks, to_cpu, policy), 0.0, dict[Task, float]()
    while True:
        for task in dispatcher.orders(dispatcher.idle, now):
            dispatcher.started(task, now)
            ends[task] = now + dispatcher.subgraph(task).seconds
        if not ends:
            return now, now - sum(s.seconds for chunk in chunks for s in chunk if s.units == ("npu",))
        task = min(ends, key=ends.__getitem__)
        now = ends.pop(task)
        dispatcher.ended(task, now)


def test_out_of_order_the_npu_is_fed() -> None:
    (slow, idle), (fast, little) = simulated(in_order), simulated(feed_npu)
    assert fast < 0.8 * slow
    assert little < 0.2 * idle


# --- an engine's prompts ------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf", formats="F32")


def computed(engine: Engine, rows: list[int] | None) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Logits of a prompt of 300 tokens, and the sequence's length and the chunk each time one was done."""
    ids = np.random.default_rng(1).integers(0, engine.spec.vocab, 300).tolist()
    sequence, told = engine.sequence(), list[tuple[int, int]]()
    logits = engine.prefill(sequence, ids, rows, lambda: told.append((sequence.length, len(told))))
    sequence.close()
    return logits, told


def orders_of(engine: Engine) -> list[tuple[str, str]]:
    """What was ordered, as the story has it."""
    assert engine.dispatcher is not None
    return re.findall(r"s: (.*) is next: (.*)", engine.dispatcher.story())


def wishes(chunk: int = 128, units: tuple[str, ...] = ("cpu",)) -> Wishes:
    return Wishes(threads=2, context=512, chunk=chunk, units=units)


def test_a_prompt_of_300_tokens(model: Path) -> None:
    progress = list[tuple[int, int]]()
    engine = Engine(
        open_model(model),
        wishes(),
        progress=lambda label, done=0, total=0: progress.append((done, total)) if label == "prompt" else None,
    )
    try:
        _, told = computed(engine, [0, *range(120, 140), 299])
        assert told == [(128, 0), (256, 1), (300, 2)]
        assert progress == [(128, 300), (256, 300), (300, 300)]
        assert orders_of(engine) == [
            ("chunk 0 layers", "prefill, 128 rows, cpu"),
            ("chunk 0 head 0", "head, 8 rows, cpu"),
            ("chunk 0 head 1", "head, 1 rows, cpu"),
            ("chunk 1 layers", "prefill, 128 rows, cpu"),
            ("chunk 1 head 0", "head, 8 rows, cpu"),
            ("chunk 1 head 1", "head, 4 rows, cpu"),
            ("chunk 2 layers", "prefill, 44 rows, cpu"),
            ("chunk 2 head 0", "head, 1 rows, cpu"),
        ]
        assert engine.dispatcher is not None
        assert Dispatcher.replay(engine.dispatcher.record, to_cpu).story() == engine.dispatcher.story()
    finally:
        engine.close()


def test_a_graph_that_fails_in_a_prompt_is_in_the_story(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "Graphs", PlainGraphs)
    engine, alone = Engine(open_model(model), wishes(256, ("cpu", "npu"))), Engine(open_model(model), wishes())
    try:
        assert engine.others is not None
        assert isinstance(engine.others.graphs, PlainGraphs)
        graph = engine.others.graphs.graphs[-2]
        fails_at, block = graph.runs + 2, graph.block

        def block_of_the_second_chunk(x: np.ndarray) -> np.ndarray:
            if graph.runs == fails_at:
                raise RuntimeError("the device went away")
            return block(x)

        graph.block = block_of_the_second_chunk
        (found, told), (wanted, _) = (computed(each, list(range(300))) for each in (engine, alone))
        assert divergences(wanted, found).max() < NEAR
        assert told == [(128, 0), (256, 1), (300, 2)]
        assert engine.dispatcher is not None
        story = engine.dispatcher.story()
        layers = [order for order in orders_of(engine) if "layers" in order[0]]
        assert layers == [
            ("chunk 0 layers", "prefill@128, 128 rows, cpu+npu"),
            ("chunk 1 layers", "prefill@128, 128 rows, cpu+npu"),
            ("chunk 1 layers", "prefill, 128 rows, cpu"),
            ("chunk 2 layers", "prefill, 44 rows, cpu"),
        ]
        assert re.search(r"chunk 1 layers has failed after .* ms: chunk 1 is to be computed again", story)
        assert re.search(r"npu is lost; tasks that others have now: 1", story)
        assert Dispatcher.replay(engine.dispatcher.record, to_cpu).record == engine.dispatcher.record
    finally:
        engine.close()
        alone.close()


def test_a_chunk_whose_head_fails_is_computed_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(open_model(model), wishes())
    try:
        wanted, _ = computed(engine, [5, 140, 299])
        run, heads = engine._run, list[int]()

        def lost_once(name: str, rows: Rows, *, more: bool = False) -> None:
            if name == "head":
                heads.append(int(np.asarray(rows.positions)[0]))
                if len(heads) == 2:
                    raise Again
            run(name, rows, more=more)

        monkeypatch.setattr(engine, "_run", lost_once)
        found, told = computed(engine, [5, 140, 299])
        assert (found.view(np.int32) == wanted.view(np.int32)).all()
        assert told == [(128, 0), (256, 1), (300, 2)]
        assert heads == [0, 128, 128, 256]
        assert [name for name, _ in orders_of(engine)[2:6]] == ["chunk 1 layers", "chunk 1 head 0"] * 2
    finally:
        engine.close()
