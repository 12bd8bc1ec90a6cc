"""Programs, claims, flags and lanes."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from harness import PATIENCE, Machine, machine, post_flag, until, wait_on
from numba import cfunc, types

from coterie.actors.cpu import CpuUnit
from coterie.actors.unit import Unit
from coterie.errors import UnitError
from coterie.kernels import library
from coterie.kernels import operands as o
from coterie.kernels import record as r
from coterie.kernels.atomics import fetch_add
from coterie.kernels.library import kernel_name
from coterie.kernels.record import OPERANDS, SLEEPERS, Opcode
from coterie.kernels.sync import claim, finish, prepare, word
from coterie.kernels.vector import i64_at, set_i64
from coterie.scheduler.program import Operand, ProgramBuilder
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.unit import CONTROL_LINES

COUNTS, TOTAL, STAMPS, BEFORE, BEFORE_TOTAL = range(OPERANDS, OPERANDS + 5)
KERNEL = types.int64(types.int64, types.int64, types.int64)


@cfunc(KERNEL)
def tally(record, step, lane):  # type: ignore[no-untyped-def]
    """Count every piece and stamp it with the epoch; complain if the instruction before has not stamped all."""
    total, pieces = word(record, TOTAL), 0
    piece = claim(record, step, lane, total)
    if piece >= 0:
        prepare(record, step, lane)
        for i in range(word(record, BEFORE_TOTAL)):
            if i64_at(word(record, BEFORE) + 8 * i) != word(step, r.EPOCH):
                fetch_add(word(record, r.ERROR), 1)
    while piece >= 0:
        fetch_add(word(record, COUNTS) + 8 * piece, 1)
        set_i64(word(record, STAMPS) + 8 * piece, word(step, r.EPOCH))
        pieces += 1
        piece = claim(record, step, lane, total)
    return finish(record, step, pieces, total)


@cfunc(KERNEL)
def count_lane(record, step, lane):  # type: ignore[no-untyped-def]
    """A preparation that counts how often each lane has run it."""
    fetch_add(word(record, COUNTS) + 64 * lane, 1)
    return 1


TESTED = {"tally": tally.address, "count_lane": count_lane.address}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs name the kernels of this file."""
    real = library.address
    monkeypatch.setattr(library, "address", lambda name: TESTED.get(name) or real(name))


@dataclass
class Tally:
    """An instruction that counts its pieces."""

    number: int
    counts: Any
    stamps: BufferRef
    total: int


def add_tally(m: Machine, b: ProgramBuilder, total: int, before: Tally | None = None, **options: Any) -> Tally:
    counts, stamps = m.room(total, np.int64), m.room(total, np.int64)
    operands: dict[int, Operand] = {COUNTS: counts, TOTAL: total, STAMPS: stamps}
    if before is not None:
        operands |= {BEFORE: before.stamps, BEFORE_TOTAL: before.total}
    return Tally(b.add("tally", Opcode.MATMUL, operands, **options), m.look(counts), stamps, total)


# --- claims --------------------------------------------------------------------------------------------

TOTALS = (1, 2, 3, 7, 64, 1000)


@pytest.fixture(params=[1, 2, 3, 4], ids="{} lanes".format)
def m(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with machine(request.param) as made:
        yield made


def chain(m: Machine) -> tuple[str, list[Tally]]:
    b, tallies = m.builder(), list[Tally]()
    for total in TOTALS:
        tallies.append(add_tally(m, b, total, tallies[-1] if tallies else None))
    return m.load(b), tallies


def check(tallies: list[Tally], steps: int) -> None:
    for each in tallies:
        assert (each.counts == steps).all(), (each.total, each.counts)


def test_every_piece_is_claimed_once_and_instructions_keep_their_order(m: Machine) -> None:
    name, tallies = chain(m)
    steps = 2000 if m.lanes <= 2 else 200
    for _ in range(steps):
        m.step(name)
    check(tallies, steps)


def jump(m: Machine, name: str, epoch: int) -> None:
    """Run a step as number `epoch`, with no lane left behind: lanes are never 2**31 steps apart."""
    m.unit._epoch = epoch - 1
    m.step(name)
    parked = m.look(m.unit.buffers.control)[CONTROL_LINES + 1 :, 0]
    until(lambda: (parked == epoch).all())


def test_epochs_beyond_32_bits(m: Machine) -> None:
    """A counter is compared with one less than 2**31 steps older."""
    name, tallies = chain(m)
    steps = 0
    for border in (2**31, 2**32, 2**32 + 2**31, 2**33):
        jump(m, name, border - 5)
        for _ in range(10):
            m.step(name)
        steps += 11
        check(tallies, steps)


def test_a_program_loaded_in_a_late_epoch(m: Machine) -> None:
    first, tallies = chain(m)
    jump(m, first, 2**31 - 10)
    later, others = chain(m)
    for _ in range(5):
        m.step(later)
        m.step(first)
    check(tallies, 6)
    check(others, 5)


def header_copy(m: Machine) -> Any:
    """The step header as lane 0 had it in the last step."""
    return m.look(m.unit.buffers.steps)[0].copy()


def test_a_late_lane_finds_nothing(m: Machine) -> None:
    """A lane that wakes up after its step, or after later ones, claims no piece and counts none."""
    name, tallies = chain(m)
    program, ref = m.unit._programs[name]
    table = m.arena.address(ref)
    for _ in range(3):
        m.step(name)
        late = m.put(header_copy(m), "state")
        for steps in range(2):
            if steps:
                m.step(name)
            before = [each.counts.copy() for each in tallies]
            flags = m.arena._bytes[m.arena.regions["flags"].offset :][: m.arena.regions["flags"].used].copy()
            for record in range(program.length):
                for lane in range(m.lanes):
                    found = tally.ctypes(table + record * r.RECORD_BYTES, m.arena.address(late), lane)
                    assert found == 0
            assert all((each.counts == counts).all() for each, counts in zip(tallies, before, strict=True))
            after = m.arena._bytes[m.arena.regions["flags"].offset :][: len(flags)]
            np.testing.assert_array_equal(after, flags)


@pytest.mark.parametrize("ahead", [1, 2, 1000, 2**31 - 2])
def test_a_late_lane_takes_nothing_from_a_step_that_has_begun(m: Machine, ahead: int) -> None:
    name, _ = chain(m)
    m.step(name)
    program, ref = m.unit._programs[name]
    table = m.arena.address(ref)
    late = m.put(header_copy(m), "state")
    flags = m.arena._bytes.view(np.int64)
    for record in range(program.length):
        first = int(program.words[record, r.CLAIM]) // 8
        lines = flags[first : first + 8 * m.lanes : 8]
        lines[:] = (m.unit._epoch + ahead) << 32  # claimed in that step: nothing yet
        before = lines.copy()
        for lane in range(m.lanes):
            assert tally.ctypes(table + record * r.RECORD_BYTES, m.arena.address(late), lane) == 0
        np.testing.assert_array_equal(lines, before)


def test_attention_s_pieces_do_not_follow_the_next_step_s_rows() -> None:
    """A late lane sees positions that are the next step's; its count of pieces must be its own step's."""
    with machine(2) as m:
        b = m.builder()
        operands: dict[int, Operand] = {o.A_HEADS: 1, o.A_KV_HEADS: 1, o.A_DIM: 16, o.A_SPANS: 4}
        table = m.put(np.array([m.arena.address(m.room(1 << 16, region="kv")) for _ in range(3)]))
        operands |= {o.A_QKV: m.room(256), o.A_QKV_ROW: 192, o.A_VALUES: 1 << 13, o.A_SCALE: 1.0, o.A_EPS: 1e-5}
        operands |= {o.A_OUT: m.room(4096), o.A_OUT_ROW: 512, o.A_SCRATCH: m.room(1 << 16), o.A_SCRATCH_LANE: 1 << 15}
        b.add(kernel_name("attend_one"), Opcode.ATTEND, operands)
        name = m.load(b)
        m.step(name, positions=[255], tables=[m.arena.address(table)])
        late = m.put(header_copy(m), "state")
        m.look(m.unit.buffers.rows[r.POSITIONS])[0] = 600  # as the next step's header will say
        attend = library.function(kernel_name("attend_one"), 3)
        for lane in range(2):
            assert attend(m.arena.address(m.unit._programs[name][1]), m.arena.address(late), lane) == 0


# --- programs ------------------------------------------------------------------------------------------


def test_side_by_side_and_joined(m: Machine) -> None:
    b = m.builder()
    first = add_tally(m, b, 20)
    left = add_tally(m, b, 30, first, waits=[first.number])
    right = add_tally(m, b, 40, first, waits=[first.number])
    both = [add_tally(m, b, 50, each, waits=[left.number, right.number]) for each in (left, right)]
    name = m.load(b)
    for _ in range(200):
        m.step(name)
    check([first, left, right, *both], 200)


def test_a_preparation_runs_once_a_lane_and_step(m: Machine) -> None:
    b, counts = m.builder(), m.room((m.lanes, 8), np.int64)
    ready = b.preparation("count_lane", Opcode.NORM, {COUNTS: counts})
    tallies = [add_tally(m, b, 5, prepare=ready) for _ in range(3)]
    name, runs = m.load(b), m.look(counts)[:, 0]
    for step in range(1, 101):
        m.step(name)
        assert (runs <= step).all()
        assert runs.sum() >= step  # whoever took the pieces has prepared
    check(tallies, 100)
    if m.lanes == 1:
        assert runs.tolist() == [100]


def test_records_are_relocated_to_where_the_arena_is() -> None:
    with machine(2) as m:
        b, buffer = m.builder(), m.room(64)
        ready = b.preparation("count_lane", Opcode.NORM, {COUNTS: buffer})
        add_tally(m, b, 3)
        b.add("tally", Opcode.FFN_UP, {TOTAL: 5, STAMPS: buffer, BEFORE: 0.5}, layer=7, prepare=ready)
        program = b.build()
        kernels = ["count_lane", "tally"]
        here, there = (program.bound(base, base + 4096, kernels) for base in (1 << 30, 1 << 40))
        assert (here.shape, program.length, program.kernels) == ((3, r.WORDS), 2, ["tally", "tally", "count_lane"])
        assert here[:, r.KERNEL].tolist() == [1, 1, 0]
        assert here[1, STAMPS] == (1 << 30) + buffer.offset
        assert here[1, TOTAL] == there[1, TOTAL] == 5
        assert np.int32(here[1, BEFORE]).view(np.float32) == 0.5
        assert here[1, r.WAIT] == here[0, r.SET] != 0
        assert here[0, r.WAIT] == here[0, r.WAIT + 1] == here[0, r.PREPARE] == 0
        assert here[1, r.PREPARE] == (1 << 30) + 4096 + 2 * r.RECORD_BYTES
        assert (here[1, r.OPCODE] & 0xFFFF, here[1, r.OPCODE] >> 16 & 0xFFFF) == (Opcode.FFN_UP, 7)
        moved = (there - here != 0) & (np.arange(r.WORDS) != r.PREPARE)
        np.testing.assert_array_equal(moved, program.relocate)
        assert program.nbytes % r.LINE == 0


def test_a_kernel_s_complaint_is_raised_once(m: Machine) -> None:
    name, tallies = chain(m)
    wrong = Tally(0, None, m.put(np.full(1, -1, np.int64)), 1)  # a stamp that no step has made
    b = m.builder()
    add_tally(m, b, 1, wrong)
    broken = m.load(b)
    with pytest.raises(UnitError, match="reported error 1"):
        m.step(broken)
    m.step(name)
    check(tallies, 1)


def test_a_closed_unit_says_so() -> None:
    with machine(3) as m:
        name, _ = chain(m)
        m.step(name)
        m.unit.close()
        m.unit.close()
        assert not any(thread.name.startswith("coterie-lane") for thread in threading.enumerate())
        with pytest.raises(UnitError, match="closed"):
            m.step(name)


# --- flags ---------------------------------------------------------------------------------------------


def flag_and_naps(m: Machine, seconds: int) -> tuple[BufferRef, BufferRef, BufferRef]:
    """A flag, an abort word, and the time a sleeper sleeps before it looks at that."""
    return m.room(64, region="flags"), m.room(64, region="flags"), m.put(np.array([seconds, 1000]))


def waiter(
    m: Machine, flag: BufferRef, abort: BufferRef, nap: BufferRef, wanted: int
) -> tuple[threading.Thread, list[int]]:
    """A thread that sleeps on a flag at once; its result."""
    results, at = list[int](), [m.arena.address(ref) for ref in (flag, abort, nap)]
    thread = threading.Thread(target=lambda: results.append(wait_on.ctypes(at[0], wanted, at[1], at[2])))
    thread.start()
    return thread, results


def sleepers(m: Machine, flag: BufferRef) -> int:
    return int(m.look(flag)[SLEEPERS : SLEEPERS + 8].view(np.int64)[0])


@pytest.mark.parametrize("wanted", [1, 2**31, 2**32, 2**40 + 5])
def test_a_post_wakes_all_who_sleep(wanted: int) -> None:
    with machine() as m:
        flag, abort, nap = flag_and_naps(m, 1000)  # so only the post can wake them
        m.look(flag)[:8].view(np.int64)[0] = wanted - 1
        threads = [waiter(m, flag, abort, nap, wanted) for _ in range(3)]
        until(lambda: sleepers(m, flag) == 3)
        post_flag.ctypes(m.arena.address(flag), wanted)
        for thread, results in threads:
            thread.join(PATIENCE)
            assert results == [1]
        assert sleepers(m, flag) == 0


def test_a_flag_that_was_reached_is_not_waited_for() -> None:
    with machine() as m:
        flag, abort, nap = flag_and_naps(m, 1000)
        m.look(flag)[:8].view(np.int64)[0] = 7
        for wanted in (7, 6, -5):
            thread, results = waiter(m, flag, abort, nap, wanted)
            thread.join(PATIENCE)
            assert results == [1]


def test_a_wait_for_another_unit_that_is_over_at_once_is_expected_to_take_half_as_long() -> None:
    """Else one long wait would be slept through long after waits have become short."""
    arena = Arena({"state": 1 << 12})
    lines = arena.allocate("state", (4, r.LINE // 8), np.int64)
    words, flag = arena.numpy(lines), arena.address(lines)
    wait, usual, expected = library.function("lane_await", 6), r.USUAL // 8, 1000
    for epoch in range(1, 13):
        words[0, 0], words[0, usual] = epoch, expected
        assert wait(flag, epoch, flag + r.LINE, 1000, flag + 2 * r.LINE, 1 << 40)
        expected //= 2
        assert words[0, usual] == expected
    assert expected == 0
    arena.close()


def test_an_abandoned_wait_ends() -> None:
    with machine() as m:
        flag, abort, nap = flag_and_naps(m, 0)
        thread, results = waiter(m, flag, abort, nap, 1)
        until(lambda: sleepers(m, flag) == 1)
        m.look(abort)[:8].view(np.int64)[0] = 1
        thread.join(PATIENCE)
        assert results == [0]


CHILD = """
import sys
from coterie.kernels import library
from coterie.storage.arena import Arena
arena = Arena.attach(eval(sys.argv[1]))
sys.exit(0 if library.function("lane_watch", 4)(arena.base, 3, 0, arena.base + 128) == 1 else 1)
"""


def test_a_post_wakes_another_process() -> None:
    arena = Arena({"state": 4096}, shared=True)
    words = arena.numpy(arena.allocate("state", 512, np.int64))
    words[16] = 1000  # seconds of a nap
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", CHILD, repr(arena.describe())], env=env) as child:
        until(lambda: words[SLEEPERS // 8] == 1 or child.poll() is not None)
        post_flag.ctypes(arena.base, 3)
        assert child.wait(PATIENCE) == 0
    assert words[SLEEPERS // 8] == 0
    arena.close()


def test_the_cpu_unit_does_what_a_unit_does() -> None:
    kind: type[Unit] = CpuUnit  # mypy compares the signatures
    assert {name for name in vars(Unit) if not name.startswith("_")} <= set(dir(kind))
