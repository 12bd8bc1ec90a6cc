"""Links between parts: frames that are refused change nothing, at either end; steps can be sent again; a process that
shares no memory gives the same ids."""

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cut_models import cut, part_engine, part_model
from damage import damaged_bytes, survives
from exact_models import CONTEXT, decoded, opened, prefilled, some_tokens
from link_process import part_process
from reference import same_bits
from test_frames import packed, sealed
from tiny_models import write_tiny

from coterie.actors import frames as f
from coterie.actors.link import Call, Chain, Link
from coterie.actors.part_server import Server
from coterie.cut import PartActor, contract_of, serve
from coterie.errors import UnitError
from coterie.part_engine import PartEngine
from coterie.scheduler.plan import Wishes

LAYERS, DIM, N = 7, 64, 20
TOKENS = some_tokens(N)


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    return write_tiny(folder / "m.gguf", "gemma3", formats="Q4_0", layers=LAYERS, context=CONTEXT, window=9)


@pytest.fixture(scope="module")
def expected(path: Path) -> Any:
    with opened(path) as engine:
        return prefilled(engine, TOKENS)


class End:
    """A server with two open sequences, one of which has had all tokens but the last, and a good step for it."""

    def __init__(self, engine: PartEngine, entering: f.Floats | None) -> None:
        part = engine.spec.part
        assert part is not None
        self.engine, self.entering = engine, entering
        self.contract = contract_of(engine, part.first, part.last)
        self.server = serve(engine)
        for sequence in (1, 2):
            self.opening = f.Open(number=1, sequence=sequence, **vars(self.contract))
            assert isinstance(self.ask(self.opening), f.Opened)
        self.chunk = self.step("prefill", range(N - 1))
        self.answer = self.ask(self.chunk)
        self.last = self.step("decode", [N - 1])
        self.leaving = self.ask(self.last)
        assert isinstance(self.leaving, f.Hidden)

    def step(self, phase: str, positions: Any) -> f.Step:
        at = np.asarray(positions)
        ids = b"" if self.entering is not None else np.array(TOKENS, "<i4")[at].tobytes()
        hidden = b"" if self.entering is None else self.entering[at].astype("<f4").tobytes()
        return f.Step(7, phase, np.ones(at.size, "<i8").tobytes(), at.astype("<i4").tobytes(), ids, hidden)

    def ask(self, frame: f.Frame) -> f.Frame:
        return f.decode(self.server.handle(f.encode(frame)), f.size_limit(256, DIM))

    def state(self) -> Any:
        """What a refused frame must leave alone."""
        lengths = {number: sequence.length for number, sequence in self.server.sequences.items()}
        return lengths, self.engine.unit._epoch

    def as_good_as_before(self) -> bool:
        answer = self.ask(self.last)
        assert isinstance(answer, f.Hidden)
        assert isinstance(self.leaving, f.Hidden)
        return answer.hidden == self.leaving.hidden


@pytest.fixture(scope="module", params=["front", "middle"])
def end(request: pytest.FixtureRequest, path: Path) -> Iterator[End]:
    with part_engine(part_model(path, 0, 3)) as front:
        if request.param == "front":
            yield End(front, None)
            return
        entering = front.hidden("prefill", [front.sequence()], TOKENS)
        with part_engine(part_model(path, 3, 5)) as middle:
            yield End(middle, entering)


# --- the end that computes ---------------------------------------------------------------------------


def impossible(end: End) -> Iterator[f.Frame]:
    """Frames that are well made, and ask for what cannot be."""
    contract, step, chunk = end.contract, end.last, end.chunk
    assert isinstance(chunk, f.Step)
    n = N - 1

    def i4(*values: int) -> bytes:
        return np.array(values, "<i4").tobytes()

    def i8(*values: int) -> bytes:
        return np.array(values, "<i8").tobytes()

    differing: tuple[tuple[str, Any], ...] = (
        ("model", "ba" * 16), ("model", ""), ("first", contract.first + 1), ("last", contract.last + 1),
        ("layers", LAYERS + 1), ("dim", DIM * 2), ("vocab", 301), ("context", CONTEXT - 1), ("numerics", "near"),
    )  # fmt: skip
    yield from (replace(end.opening, **{name: value}) for name, value in differing)
    yield from (end.answer, end.leaving, f.Opened(1, 1, 1, 1), f.Closed(1, 1), f.Error(1, "no"))
    for at in (-1, N + 1, N + 100, CONTEXT, CONTEXT + 1, 2**31 - 1, -(2**31)):
        yield replace(step, positions=i4(at))
        if -(2**20) < at < 2**20:
            yield replace(chunk, positions=i4(*range(at, at + n)))
    for name in (0, 3, -1, 2**62):
        yield replace(step, sequences=i8(name))
        yield replace(chunk, sequences=i8(*[name] * n))
        yield replace(chunk, sequences=i8(*[1] * (n - 1), name))
    yield replace(chunk, sequences=i8(*[1] * (n - 1), 2))
    yield replace(chunk, positions=i4(*reversed(range(n))))
    yield replace(chunk, positions=i4(*[0] * n))
    yield replace(chunk, phase="decode")
    two = end.step("decode", [N - 1, N - 1])
    yield replace(two, sequences=i8(1, 1))
    yield replace(two, sequences=i8(1, 2))  # the second one is not that far
    for key in ("sequences", "positions", "ids", "hidden"):
        for frame in (step, chunk):
            data = getattr(frame, key)
            others = [data + b"\x00", data + bytes(8), data[:-1], data[:-4], data * 2, b"x"]
            yield from (f.Step(**(vars(frame) | {key: other})) for other in others if other != data)
    yield from (replace(step, phase=phase) for phase in ("", "train", "prefill "))
    yield replace(step, sequences=b"", positions=b"", ids=b"", hidden=b"")
    if end.entering is None:
        yield from (replace(step, ids=i4(wrong)) for wrong in (-1, 300, 301, 2**31 - 1))
        yield replace(chunk, ids=i4(*[1] * (n - 1), 300))
        yield replace(step, hidden=bytes(4 * DIM))
        yield replace(step, ids=b"", hidden=bytes(4 * DIM))
    else:
        for wrong in (np.nan, np.inf, -np.inf):
            states = np.frombuffer(chunk.hidden, "<f4").copy()
            states[-1] = wrong
            yield replace(chunk, hidden=states.tobytes())
        yield replace(step, ids=i4(1))
        yield replace(step, ids=i4(1), hidden=b"")


def refused(end: End, data: bytes) -> None:
    before = end.state()
    answer = f.decode(end.server.handle(data), f.size_limit(0, DIM))
    assert isinstance(answer, f.Error)
    assert answer.text
    assert end.state() == before


def test_frames_that_ask_for_the_impossible_change_nothing(end: End) -> None:
    count = 0
    for frame in impossible(end):
        refused(end, f.encode(frame))
        count += 1
    assert count > 70
    assert end.as_good_as_before()


def test_ten_thousand_mutated_frames_change_nothing(end: End) -> None:
    """Bytes as they may be damaged on the way, and frames with one key forged, sealed anew. Those that still make
    sense are left out: such a frame is one that the other end could have sent."""
    chance, count = random.Random(2), 0
    good = [f.encode(frame) for frame in (end.opening, end.chunk, end.last, f.Close(9, 2))]
    while count < 5200:
        data = chance.choice(good)
        bad = damaged_bytes(chance, data, len(data))
        if bad != data:
            refused(end, bad)
            count += 1
    junk: list[Any] = [None, True, -1, 1 << 63, 2.5, [], {}, "x" * 401, "\n", b"", b"x" * 7, msgpack_nested(), "step"]
    wrong, frames = list(impossible(end)), (end.opening, end.chunk, end.last)
    while count < 10_400:
        if chance.random() < 0.5:
            content = packed(frames[chance.randrange(3)])
            key = chance.choice([key for key in content if key not in ("number", "sequence")])
            others = [other for other in junk if not makes_sense(end, content, key, other)]
            content[key] = chance.choice(others)
        else:
            content = packed(chance.choice(wrong))
            content["number"] = chance.randrange(1 << 63)
        refused(end, sealed(content))
        count += 1
        if count % 1000 == 0:
            assert end.as_good_as_before()
    assert end.as_good_as_before()


def msgpack_nested() -> Any:
    return {"a": {"a": {"a": {}}}}


def makes_sense(end: End, content: dict[str, Any], key: str, other: Any) -> bool:
    """An empty input is right where the part takes the other one."""
    return other == content[key] or (content["kind"] == "step" and key == "kind" and other == "step")


def test_a_good_step_after_a_failed_one(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where computing fails the sequence ends before the step, whose keys and values may be half written."""

    def fail(*arguments: Any, **more: Any) -> None:
        raise UnitError("the disk is on fire\nand so is the rest" + "!" * 1000)

    with monkeypatch.context() as patch:
        patch.setattr(end.engine.unit, "run", fail)
        answer = end.ask(end.step("prefill", range(5, 9)))
    assert isinstance(answer, f.Error)
    assert answer.text.startswith("the disk is on fire and so")
    assert end.server.sequences[1].length == 5
    refused(end, f.encode(end.last))
    assert isinstance(end.ask(end.step("prefill", range(5, N - 1))), f.Hidden)
    assert end.as_good_as_before()


def test_a_defect_is_named_and_no_more(end: End, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(end.engine, "hidden", lambda *arguments: 1 / 0)
        answer = end.ask(end.last)
    assert answer == f.Error(7, "a defect of the part: ZeroDivisionError")
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert end.as_good_as_before()


def test_frames_can_be_sent_again(end: End) -> None:
    for frame in (end.opening, end.chunk, end.last, f.Close(9, 77), f.Close(9, 77)):
        one, other = end.ask(frame), end.ask(frame)
        assert type(one) is type(other)
        if isinstance(one, f.Hidden) and isinstance(other, f.Hidden):
            assert one.hidden == other.hidden
    assert end.as_good_as_before()


def test_too_many_sequences_are_refused(path: Path) -> None:
    with part_engine(part_model(path, 0, 3)) as engine:
        end = End(engine, None)
        answers = [end.ask(replace(end.opening, sequence=number)) for number in range(100)]
        assert isinstance(answers[-1], f.Error)
        opened = [number for number, answer in enumerate(answers) if isinstance(answer, f.Opened)]
        assert len(end.server.sequences) == len({1, 2, *opened}) < 20
        assert isinstance(end.ask(f.Close(1, opened[0])), f.Closed)
        assert isinstance(end.ask(replace(end.opening, sequence=99)), f.Opened)
        assert end.as_good_as_before()


# --- the end that asks -------------------------------------------------------------------------------


class Carrier:
    """A link on which answers can be lost or changed."""

    def __init__(self) -> None:
        self.change: Any = None
        self.asked: list[f.Frame] = []

    def __call__(self, server: Server) -> Call:
        def call(data: bytes) -> bytes:
            self.asked.append(f.decode(data, 1 << 20))
            answer = server.handle(data)
            return answer if self.change is None else self.change(answer)

        return call


def test_answers_that_are_lost_or_damaged_change_nothing(path: Path, expected: Any) -> None:
    """More than 10,000: of each the engine's caller hears in one line, and may ask again."""
    carrier, chance, hidden = Carrier(), random.Random(3), 0
    with cut(path, 3, carry=carrier) as engine:
        sequence = engine.sequence()
        engine.prefill(sequence, TOKENS[: N - 1])
        link = engine.front.links[0]  # type: ignore[union-attr]
        step = "decode", np.ones(1, np.int64), np.array([N - 1]), np.array([TOKENS[-1]]), None
        good: list[bytes] = []

        def keep(answer: bytes) -> bytes:
            good.append(answer)
            return answer

        carrier.change = keep
        assert same_bits(engine.decode([sequence], [TOKENS[-1]])[0], expected[-1])
        answer = f.decode(good[0], 1 << 20)
        assert isinstance(answer, f.Hidden)
        states = np.frombuffer(answer.hidden, "<f4").copy()
        states[5] = np.nan
        content = packed(answer)
        wrong: list[f.Frame] = [
            f.Opened(answer.number, 1, 1, 1), f.Closed(answer.number, 1), f.Error(answer.number, "no"),
            replace(answer, hidden=b""), replace(answer, hidden=answer.hidden + bytes(4)),
            replace(answer, number=999_999), replace(answer, hidden=answer.hidden[:-4]),
            replace(answer, hidden=states.tobytes()),
        ]  # fmt: skip
        forged = [f.encode(frame) for frame in wrong]
        junks: list[Any] = [None, -1, [], {}, "\n", 2.5, True]
        forged += [sealed({**content, key: junk}) for key in content for junk in junks]
        forged += [sealed(content | {"more": 1}), sealed([content]), b"", b"\x00" * 100, bytes(1 << 20)]
        for number in range(10_200):
            bad = forged[number] if number < len(forged) else damaged_bytes(chance, good[0], len(good[0]))
            if bad == good[0]:
                continue
            carrier.change = lambda answer, bad=bad: bad
            sequence.length = N - 1
            if number % 50:  # the link alone, which is fast
                link._numbers = iter([answer.number])
                assert not survives(link.step, *step)
            else:
                link._numbers = iter([answer.number] * 9)
                with pytest.raises(UnitError, match=r"^the part with layers 0 to 2: "):
                    engine.decode([sequence], [TOKENS[-1]])
            assert sequence.length == N - 1
            hidden += 1
        assert hidden > 10_000
        carrier.change, link._numbers = None, iter(range(1, 100))
        assert same_bits(engine.decode([sequence], [TOKENS[-1]])[0], expected[-1])


def test_a_lost_answer_is_asked_for_again(path: Path, expected: Any) -> None:
    carrier = Carrier()
    with cut(path, 3, carry=carrier) as engine:
        sequence = engine.sequence()
        engine.prefill(sequence, TOKENS[:10])

        def lose(answer: bytes) -> bytes:
            raise UnitError("nobody there")

        for position in range(10, N):
            carrier.change = lose
            with pytest.raises(UnitError, match="nobody there"):
                engine.decode([sequence], [TOKENS[position]])
            carrier.change = None
            assert same_bits(engine.decode([sequence], [TOKENS[position]])[0], expected[position])


def test_answers_to_opening_and_closing_that_are_lost_leave_no_sequence_behind(path: Path, expected: Any) -> None:
    carrier = Carrier()
    with cut(path, 3, carry=carrier) as engine:
        for _ in range(12):  # more than can live at once
            sequence = engine.sequence()
            for kind in (f.Opened, f.Closed):

                def lose(answer: bytes, kind: type[f.Frame] = kind) -> bytes:
                    if isinstance(f.decode(answer, 1 << 20), kind):
                        raise UnitError("nobody there")
                    return answer

                carrier.change = lose
                with suppress(UnitError):
                    engine.prefill(sequence, TOKENS)
            carrier.change, sequence.length = None, 0
            assert same_bits(engine.prefill(sequence, TOKENS)[0], expected[-1])
            sequence.close()


def test_closed_sequences_are_closed_there_before_the_next_step(path: Path) -> None:
    carrier = Carrier()
    with cut(path, 2, 4, carry=carrier) as engine:
        for _ in range(30):  # more than can live at once
            sequence = engine.sequence()
            engine.prefill(sequence, TOKENS)
            sequence.close()
        assert [type(frame) for frame in carrier.asked[-6:]] == [f.Close, f.Close, f.Open, f.Open, f.Step, f.Step]


def test_parts_of_another_model_or_another_cut_are_refused(path: Path, folder: Path) -> None:
    other = write_tiny(folder / "o.gguf", "gemma3", formats="Q4_0", layers=LAYERS, context=CONTEXT, window=9, seed=1)
    with part_engine(part_model(path, 3, LAYERS)) as back:
        contract = contract_of(back, 0, 3)
        for wrong, said in (
            (part_model(other, 0, 3), "model is"),
            (part_model(path, 0, 2), "last is 3 there and 2 here"),
        ):
            with part_engine(wrong) as front, pytest.raises(UnitError, match=said):
                Link(serve(front).handle, contract).check()
        with part_engine(part_model(path, 0, 3)) as front:
            Link(serve(front).handle, contract).check()
            with pytest.raises(UnitError, match="numerics is exact, version 2 there"):
                Link(serve(front).handle, replace(contract, numerics="exact, version 2")).check()


def test_a_peer_with_smaller_chunks_gets_smaller_ones(path: Path, expected: Any) -> None:
    with part_engine(part_model(path, 0, 3), chunk=8) as front, part_engine(part_model(path, 3, LAYERS)) as back:
        assert front.plan.chunk < N < back.plan.chunk
        back.front = Chain([Link(serve(front).handle, contract_of(back, 0, 3))])
        assert same_bits(prefilled(back, TOKENS), expected)


def test_what_a_link_costs_is_counted(path: Path) -> None:
    with cut(path, 3) as engine:
        assert engine.front is not None
        sequence = engine.sequence()
        engine.prefill(sequence, TOKENS)
        for token in TOKENS[:4]:
            engine.decode([sequence], [token])
        report = engine.front.report()
        assert report["prefill"]["rows"] == N
        assert report["decode"]["rows"] == 4
        assert 4 * DIM + 2 * f.SEAL < report["decode"]["bytes"] < 4 * DIM + 400
        assert report["decode"]["added_ms"] > 0
        engine.count_anew()
        assert engine.front.report()["decode"]["rows"] == 0
        assert engine.front.lines() == [
            "layers 0 to 2 of 7 run in another process (0 MiB of weights); their hidden states come in frames"
        ]


# --- two processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_two_processes_that_share_no_memory_give_the_same_bits(architecture: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", architecture, formats="Q4_0", layers=LAYERS, context=CONTEXT)
    with opened(path) as engine:
        logits = prefilled(engine, TOKENS)
    with part_process(path, 0, 3, CONTEXT) as (call, pid), part_engine(part_model(path, 3, LAYERS)) as back:
        link = Link(call, contract_of(back, 0, 3))
        back.front = Chain([link])
        link.check()
        assert pid != os.getpid()
        assert same_bits(prefilled(back, TOKENS, (7,)), logits)
        assert same_bits(decoded(back, TOKENS), logits)


def test_a_process_that_ends_is_named(path: Path) -> None:
    with part_process(path, 0, 3, CONTEXT) as (call, pid), part_engine(part_model(path, 3, LAYERS)) as back:
        back.front = Chain([Link(call, contract_of(back, 0, 3))])
        sequence = back.sequence()
        back.prefill(sequence, TOKENS)
        os.kill(pid, 9)
        with pytest.raises(UnitError, match="the other process has ended"):
            back.decode([sequence], [1])
        assert sequence.length == N
        sequence.close()


def test_what_keeps_a_part_from_opening_is_its_answer(folder: Path, path: Path) -> None:
    for missing, first, last, said in (
        (folder / "no.gguf", 0, 3, "cannot open the model"),
        (path, 0, 99, "has layers 0 to 6"),
    ):
        actor = PartActor(str(missing), first, last, 1, CONTEXT, None)
        answer = f.decode(actor.handle(b"whatever"), 1 << 12)
        assert isinstance(answer, f.Error)
        assert said in answer.text


def test_wishes_of_a_part_are_those_of_a_model(path: Path) -> None:
    actor = PartActor(str(path), 0, 3, 1, 512, "100%")
    assert actor._server is not None
    assert actor._server.contract.context == 512
    engine = actor._server.part
    assert isinstance(engine, PartEngine)
    assert engine._wishes == replace(Wishes(), threads=1, context=512, memory=engine._wishes.memory)
    engine.close()
