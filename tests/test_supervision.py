"""Units of the thread host that are lost: what can be replaced is, what cannot is said; and what actors are told."""

import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_models import decoded, opened, prefilled, some_tokens, write_model
from harness import machine, until
from numba import cfunc, types
from packed_models import streaming
from sparse_models import reader_of, write_gated

from coterie.actors import cpu
from coterie.actors.flash import _announce
from coterie.actors.host import Crew, UnitLost
from coterie.actors.messages import pack, raise_complaint, unpack
from coterie.actors.unit_process import UnitProcess
from coterie.engine import Engine
from coterie.errors import CoterieError, ModelError, PlanError, UnitError
from coterie.kernels import cache as c
from coterie.kernels import library
from coterie.kernels import record as r
from coterie.kernels import tape as t
from coterie.kernels.atomics import acquire
from coterie.kernels.sync import claim, finish, word
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.unit import ENDED

N = 20
GATE = r.OPERANDS  # the operand of `hang`: a word's address


@cfunc(types.int64(types.int64, types.int64, types.int64))
def hang(record, step, lane):  # type: ignore[no-untyped-def]
    """Stay inside until a word is set."""
    pieces = 0
    while claim(record, step, lane, 1) >= 0:
        while acquire(word(record, GATE)) == 0:
            pass
        pieces += 1
    return finish(record, step, pieces, 1)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return write_model(folder, "llama Q4_0")


@pytest.fixture(scope="module")
def gated(many_extents: None, folder: Path) -> Path:
    return write_gated(folder / "gated.gguf")


def results(engine: Engine) -> Any:
    tokens = some_tokens(N)
    return np.concatenate([prefilled(engine, tokens, (7,)), decoded(engine, tokens)])


def end_lanes(engine: Engine) -> None:
    """Have the CPU unit's lanes leave, as if their threads had died."""
    unit = engine.unit
    unit._header[r.STOP] = 1
    unit._epoch += 1
    unit._publish()
    until(lambda: unit._lines[unit._first :, ENDED].all())
    unit._header[r.STOP] = 0


@pytest.fixture(params=["whole", "llama", "gated"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    path = request.getfixturevalue(request.param)
    with opened(path, 2) if request.param == "whole" else streaming(path, 0.6) as engine:
        yield engine


def test_lanes_that_end_are_replaced(engine: Engine) -> None:
    expected = results(engine)
    for count in (1, 2):
        end_lanes(engine)
        np.testing.assert_array_equal(results(engine), expected)
        assert [loss.unit for loss in engine.supervisor.losses] == ["cpu"] * count
    assert len([t for t in threading.enumerate() if t.name.startswith("coterie-lane")]) == 2 - engine.unit._first


def test_a_reader_that_ends_is_replaced(llama: Path) -> None:
    with streaming(llama, 0.5) as engine:
        expected = results(engine)
        assert engine.stream is not None
        unit = engine.stream.unit
        _announce(unit._announce, unit._control, (0, 0, 0, 0), True, stop=True)
        until(lambda: unit._control[t.ENDED])
        np.testing.assert_array_equal(results(engine), expected)
        assert [loss.reason for loss in engine.supervisor.losses] == ["its lane has ended"]


def test_a_reader_of_neurons_that_ends_is_replaced(gated: Path) -> None:
    with streaming(gated, 0.6) as engine:
        expected = results(engine)
        neurons = reader_of(engine)
        neurons._cache[c.STOP] = 1
        library.function("neuron_wake", 1)(neurons._cache.ctypes.data)
        until(lambda: neurons._reader[t.ENDED])
        np.testing.assert_array_equal(results(engine), expected)
        assert [loss.unit for loss in engine.supervisor.losses] == ["neurons"]


@pytest.mark.parametrize("detached", [False, True])
def test_a_lane_that_hangs_is_named(detached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = library.address
    monkeypatch.setattr(library, "address", lambda name: hang.address if name == "hang" else real(name))
    monkeypatch.setattr(cpu, "HUNG", 0.2)
    with machine(2, detached=detached) as m:
        gate, b = m.room(1, np.int64), m.builder()
        b.add("hang", r.Opcode.NORM, {GATE: gate})
        name = m.load(b)
        if not detached:  # else the asking thread would be the one that hangs
            monkeypatch.setattr(m.unit, "_part", lambda step, lane, at, deadline: 1)
        with pytest.raises(UnitLost, match=r"lane [01] has been at one piece of work for 0 seconds") as caught:
            m.step(name)
        assert caught.value.hangs
        with pytest.raises(UnitError, match="end this process"):
            m.step(name)
        m.unit.close()  # does not wait for it
        m.look(gate)[0] = 1
        until(lambda: m.unit._lines[m.unit._first :, ENDED].all())


def test_a_recovery_that_is_interrupted_is_done_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every place where it may be."""
    expected = results(engine)
    owners: list[tuple[Any, str]] = [
        (engine.unit, "_open_lanes"),
        (engine.unit, "_bind"),
        (engine.unit, "_forget_pieces"),
    ]
    if engine.stream is not None:
        owners += [(engine.stream, "end_neurons"), (engine, "_fill_tables"), (engine.stream, "lose")]
    for owner, name in owners:
        real = getattr(owner, name)
        for before in (True, False):
            left = [1]

            def interrupted(*arguments: Any, real: Any = real, before: bool = before, left: list[int] = left) -> Any:
                if before and left and left.pop():
                    raise KeyboardInterrupt
                done = real(*arguments)
                if left and left.pop():
                    raise KeyboardInterrupt
                return done

            end_lanes(engine)
            monkeypatch.setattr(owner, name, interrupted)
            with suppress(KeyboardInterrupt):
                results(engine)
            monkeypatch.setattr(owner, name, real)
            np.testing.assert_array_equal(results(engine), expected)


def test_a_thread_that_hangs_is_an_error(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(whole, 2) as engine:
        lost = UnitLost("cpu", "lane 1 has been at one piece of work for 20 seconds", hangs=True)
        real = engine.unit.run

        def run(*arguments: Any, **more: Any) -> None:
            raise lost

        monkeypatch.setattr(engine.unit, "run", run)
        with pytest.raises(UnitError, match="a thread cannot be replaced, so end this process"):
            decoded(engine, [1])
        monkeypatch.setattr(engine.unit, "run", real)
        decoded(engine, [1])


# --- orders --------------------------------------------------------------------------------------------

REF = BufferRef("state", 64, 32, "<i8", (4,))


def test_messages_come_back_as_they_were() -> None:
    message = ["open", {"kind": "flash", "control": REF, "more": (REF, REF), "file": (1, 2), "engine": None}]
    assert unpack(pack(message)) == ("open", message[1])


@pytest.mark.parametrize("error", [PlanError("no room"), ModelError("damaged"), UnitError("gone")])
def test_errors_come_back_as_they_were(error: CoterieError) -> None:
    from coterie.actors.messages import complaint

    with pytest.raises(type(error), match=str(error)):
        raise_complaint(unpack(pack(complaint(error))))


def test_objects_do_not_travel() -> None:
    with pytest.raises(TypeError, match="no place in a message"):
        pack(["open", {"arena": object()}])
    with pytest.raises(UnitError, match="too long"):
        unpack(bytes(1 << 21))


def test_what_is_no_order_is_answered_by_an_error() -> None:
    """Damaged messages, and whole ones that ask for what there is not."""
    process, arena = UnitProcess(), Arena({"state": 1 << 16, "programs": 1 << 16})
    table = arena.allocate("programs", (2, r.WORDS), np.int64)
    control, wrong = arena.allocate("state", 16, np.int64), BufferRef("state", 1 << 40, 32, "<i8", (4,))
    process._crew = Crew(arena)
    lanes = {"header": REF, "steps": REF, "control": REF, "first": 0, "lanes": 1 << 40, "seen": 0}
    reading = {"lane": "flash_lane", "control": control, "file": (1, 0), "engine": None, "depth": 4}
    orders: list[Any] = [
        ["open", {"kind": "gpu"}],
        ["open", {"kind": "cpu", **lanes}],
        ["open", {"kind": "cpu"}],
        ["open", {"kind": "flash", **reading, "lane": "rm -rf"}],
        ["open", {"kind": "flash", **reading, "depth": 1 << 40}],
        ["open", {"kind": "flash", **reading}],
        ["open", {"kind": "flash", **reading, "control": wrong}],
        ["load", {"table": table, "kernels": []}],
        ["load", {"table": wrong, "kernels": ["merge"]}],
        ["load", {"table": control, "kernels": ["merge"]}],
        ["__init__", {"arena": 0}],
        ["attach", {"home": "/", "arena": {}, "pulse": REF}],
        ["attach", {"home": "/", "arena": {"pid": -1}, "pulse": REF}],
        ["attach", {}],
        ["open", 7],
        [["open"], {}],
        {"open": {}},
        None,
        17,
    ]
    for order in orders:
        answer = unpack(process.handle(pack(order)))
        assert set(answer) == {"error", "kind"}, order
        assert "\n" not in answer["error"]
    chance = random.Random(0)
    good = pack(["load", {"table": table, "kernels": ["x", "y"]}])
    for _ in range(2000):
        damaged = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        cut = bytes(damaged[: chance.randrange(len(damaged) + 1)])
        assert "error" in unpack(process.handle(cut)), cut
    assert not process._crew.lanes
