"""Programs, claims, flags and lanes; and the FFN's neuron-cluster instructions, whose lists and flags are data."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from harness import Machine, lanewise, machine
from numba import cfunc, types
from reference import BLOCK, Bytes, Floats, product, random_raw, same_bits

from coterie.errors import UnitError
from coterie.kernels import library, mathematics
from coterie.kernels import operands as o
from coterie.kernels import record as r
from coterie.kernels.atomics import fetch_add
from coterie.kernels.formats import FORMATS as PACKED
from coterie.kernels.formats import ROWS
from coterie.kernels.library import kernel_name
from coterie.kernels.record import OPERANDS, Opcode
from coterie.kernels.shapes import CLUSTER_FLAG, CLUSTER_ROW, CLUSTER_WANTED, TILE_TOKENS
from coterie.kernels.sync import SLEEPERS, claim, finish, post, prepare, word
from coterie.kernels.vector import i64_at, set_i64
from coterie.scheduler.program import Operand, ProgramBuilder
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.pack import pack
from coterie.storage.weights import ClusterLayout

Ints = Any

PATIENCE = 30.0  # seconds after which something that waits is taken for hung
COUNTS, TOTAL, STAMPS, BEFORE, BEFORE_TOTAL = range(OPERANDS, OPERANDS + 5)
ADDED = 2**40  # what the tally adds to its ERROR word when it sees stamps of another step
KERNEL = types.int64(types.int64, types.int64, types.int64)


@cfunc(KERNEL)  # type: ignore[untyped-decorator]
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


@cfunc(KERNEL)  # type: ignore[untyped-decorator]
def count_lane(record, step, lane):  # type: ignore[no-untyped-def]
    """A preparation that counts how often each lane has run it."""
    fetch_add(word(record, COUNTS) + 64 * lane, 1)
    return 1


@cfunc(types.int64(types.int64, types.int64))  # type: ignore[untyped-decorator]
def post_flag(flag, value):  # type: ignore[no-untyped-def]
    post(flag, value)
    return value


TESTED = {"tally": tally.address, "count_lane": count_lane.address}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs name the kernels of this file."""
    real = library.address
    monkeypatch.setattr(library, "address", lambda name: TESTED.get(name) or real(name))


def until(done: Callable[[], Any]) -> Any:
    """Poll until something is true; fail when it takes for ever."""
    end = time.monotonic() + PATIENCE
    while not (value := done()):
        assert time.monotonic() < end, "this never happened"
        time.sleep(0)
    return value


@dataclass
class Tally:
    """An instruction that counts its pieces."""

    number: int
    counts: Ints
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


def test_epochs_beyond_32_bits(m: Machine) -> None:
    """A counter is compared with one less than 2**31 steps older."""
    name, tallies = chain(m)
    steps = 0
    for start in (2**31 - 5, 2**32 - 5, 2**32 + 2**31 - 5, 2**33 - 5):
        m.unit._epoch = start
        for _ in range(10):
            m.step(name)
        steps += 10
        check(tallies, steps)


def test_a_program_loaded_in_a_late_epoch(m: Machine) -> None:
    first, tallies = chain(m)
    m.unit._epoch = 2**31 - 10
    m.step(first)
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
    program, table = m.unit._programs[name]
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
            assert attend(m.unit._programs[name][1], m.arena.address(late), lane) == 0


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
        kernels = {"tally": 111, "count_lane": 222}
        here, there = (program.bound(base, base + 4096, kernels) for base in (1 << 30, 1 << 40))
        assert (here.shape, program.length, program.kernels) == ((3, r.WORDS), 2, ["tally", "tally", "count_lane"])
        assert here[:, r.KERNEL].tolist() == [111, 111, 222]
        assert here[1, STAMPS] == (1 << 30) + buffer.offset
        assert here[1, TOTAL] == there[1, TOTAL] == 5
        assert np.int32(here[1, BEFORE]).view(np.float32) == 0.5
        assert here[1, r.WAIT] == here[0, r.SET] != 0
        assert here[0, r.WAIT] == here[0, r.WAIT + 1] == here[0, r.PREPARE] == 0
        assert here[1, r.PREPARE] == (1 << 30) + 4096 + 2 * r.RECORD_BYTES
        assert (here[1, r.OPCODE] & 0xFFFF, here[1, r.OPCODE] >> 16) == (Opcode.FFN_UP, 7)
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
        assert not any(thread.is_alive() for thread in m.unit._threads)
        with pytest.raises(UnitError, match="closed"):
            m.step(name)


# --- flags ---------------------------------------------------------------------------------------------


def flag_and_naps(m: Machine, seconds: int) -> tuple[BufferRef, BufferRef, BufferRef]:
    """A flag, an abort word, and the time a sleeper sleeps before it looks at that."""
    return m.room(64, region="flags"), m.room(64, region="flags"), m.put(np.array([seconds, 1000]))


def waiter(m: Machine, flag: BufferRef, abort: BufferRef, nap: BufferRef, wanted: int) -> tuple[threading.Thread, list[int]]:
    """A thread that sleeps on a flag at once; its result."""
    wait, results = library.function("lane_wait", 5), list[int]()
    at = [m.arena.address(ref) for ref in (flag, abort, nap)]
    thread = threading.Thread(target=lambda: results.append(wait(at[0], wanted, 0, at[1], at[2])))
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
from coterie.storage.arena import Arena, BufferRef
arena = Arena.attach(int(sys.argv[1]), {"state": 4096})
flag, abort, nap = (arena.base + 64 * i for i in range(3))
sys.exit(0 if library.function("lane_wait", 5)(flag, 3, 0, abort, nap) == 1 else 1)
"""


def test_a_post_wakes_another_process() -> None:
    arena = Arena({"state": 4096}, shared=True)
    words = arena.numpy(arena.allocate("state", 512, np.int64))
    words[16] = 1000  # seconds of a nap
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", CHILD, str(arena.fd)], env=env, pass_fds=[arena.fd]) as child:
        until(lambda: words[SLEEPERS // 8] == 1 or child.poll() is not None)
        post_flag.ctypes(arena.base, 3)
        assert child.wait(PATIENCE) == 0
    assert words[SLEEPERS // 8] == 0
    arena.close()


# --- neuron clusters -----------------------------------------------------------------------------------

FFNS = {  # Gate, Up, Down, columns of the input, neurons
    "Q4_0": ("Q4_0", "Q4_0", "Q4_0", 64, 160),
    "Q4_1, Q8_0, Q5_0": ("Q4_1", "Q8_0", "Q5_0", 96, 130),
    "Q4_K, Q6_K": ("Q4_K", "Q4_K", "Q6_K", 256, 1024),
    "F16, BF16, F32": ("F16", "BF16", "F32", 40, 100),
    "Q8_0 into F16": ("Q8_0", "Q8_0", "F16", 64, 96),
}


@dataclass
class Network:
    """One FFN in a machine. `raw`: Gate, Up and Down as the file has them, Down's columns whole clusters."""

    m: Machine
    layout: ClusterLayout
    raw: tuple[Bytes, Bytes, Bytes]
    list: BufferRef
    table: BufferRef
    gate_up: BufferRef
    x: BufferRef
    y: BufferRef
    name: str

    def choose(self, clusters: list[int]) -> None:
        self.m.look(self.list)[: 1 + len(clusters)] = [len(clusters), *clusters]

    def run(self, x: Floats) -> Floats:
        self.m.look(self.x)[: len(x), : x.shape[1]] = x
        self.m.look(self.y)[...] = np.nan
        self.m.step(self.name, len(x))
        return np.array(self.m.look(self.y)[: len(x), : self.layout.dim])

    def expected(self, x: Floats, clusters: list[int]) -> Floats:
        """The same by the reference: Down's columns taken in the list's order."""
        layout, n = self.layout, self.layout.neurons
        gate, up = (product(f.name, raw, x) for f, raw in ((layout.gate, self.raw[0]), (layout.up, self.raw[1])))
        hidden = np.zeros((len(x), layout.clusters * n), np.float32)
        hidden[:, : layout.ffn_dim] = silu(gate) * up
        chosen = [c * n + i for c in clusters for i in range(n)]
        per_cluster = self.raw[2].reshape(layout.dim, layout.clusters, -1)
        down = np.ascontiguousarray(per_cluster[:, clusters]).reshape(layout.dim, -1)
        return product(layout.down.name, down, np.ascontiguousarray(hidden[:, chosen]))


silu = lanewise(mathematics.silu)


def network(m: Machine, kind: str, tile: int) -> Network:
    gate, up, down, dim, ffn_dim = FFNS[kind]
    layout = ClusterLayout(PACKED[gate], PACKED[up], PACKED[down], dim, ffn_dim)
    rng, clusters, n = np.random.default_rng(0), layout.clusters, layout.neurons
    size, per = BLOCK[down]
    raw = random_raw(rng, gate, ffn_dim, dim), random_raw(rng, up, ffn_dim, dim), random_raw(rng, down, dim, clusters * n)
    raw[2].reshape(dim, -1)[:, -(-ffn_dim // per) * size :] = 0  # columns of padding
    gate_up = m.room((clusters, layout.gate_up_stride), region="weights")
    down_ref = m.room((clusters, layout.down_stride), region="weights")
    blocks = -(-dim // layout.gate.columns)
    for c in range(clusters):
        for f, rows, first in ((layout.gate, raw[0], 0), (layout.up, raw[1], layout.gate_bytes)):
            area = m.look(gate_up)[c, first : first + n // ROWS * blocks * f.block]
            pack(f.name, rows[c * n : (c + 1) * n], area.reshape(n // ROWS, blocks, f.block))
        area = m.look(down_ref)[c, : layout.down_groups * layout.down.block]
        column = raw[2].reshape(dim, clusters, -1)[:, c]
        pack(down, np.ascontiguousarray(column), area.reshape(layout.down_groups, 1, layout.down.block))
    table = m.room((clusters, CLUSTER_ROW // 8), np.int64, "weights")
    for word_, ref, stride in ((0, gate_up, layout.gate_up_stride), (1, down_ref, layout.down_stride)):
        m.look(table)[:, word_] = m.arena.address(ref) + np.arange(clusters) * stride
    ids = m.room(1 + clusters, np.int32, "weights")

    x_subs, hidden_subs = blocks * layout.gate.subs, clusters * n // 32
    x, width = m.room((m.rows, -(-dim // 32) * 32), np.float32), -(-dim // ROWS) * ROWS
    tiles, hidden = m.tiles(layout.gate.is_float, x_subs), m.tiles(layout.down.is_float, hidden_subs)
    y, scratch = m.room((m.rows + 8, width), np.float32), m.rows * 2 * n * 4
    up_operands: dict[int, Operand] = {
        o.UP_TABLE: table,
        o.UP_LIST: ids,
        o.UP_NEURONS: n,
        o.UP_BLOCKS: blocks,
        o.UP_X: tiles,
        o.UP_X_SUBS: x_subs,
        o.UP_OUT: hidden,
        o.UP_OUT_SUBS: hidden_subs,
        o.UP_OUT_FLOAT: int(layout.down.is_float),
        o.UP_CHUNK: 1,
        o.UP_PANEL: 1,
        o.UP_SCRATCH: m.room(m.lanes * scratch),
        o.UP_SCRATCH_LANE: scratch,
        o.UP_UP_OFFSET: layout.gate_bytes,
    }
    down_operands: dict[int, Operand] = {
        o.DOWN_TABLE: table,
        o.DOWN_LIST: ids,
        o.DOWN_GROUPS: layout.down_groups,
        o.DOWN_X: hidden,
        o.DOWN_X_SUBS: hidden_subs,
        o.DOWN_Y: y,
        o.DOWN_Y_ROW: 4 * width,
        o.DOWN_CHUNK: 2,
        o.DOWN_PANEL: 2,
    }
    ints, floats = (None, tiles) if layout.gate.is_float else (tiles, None)
    b = m.builder()
    b.add("merge", Opcode.MERGE, m.emit(x, x_subs, tile, ints, floats))
    b.add(kernel_name("ffn_up", gate, up, "silu", tile), Opcode.FFN_UP, up_operands)
    b.add(kernel_name("ffn_down", down, tile), Opcode.FFN_DOWN, down_operands)
    return Network(m, layout, raw, ids, table, gate_up, x, y, m.load(b))


@pytest.mark.parametrize("kind", FFNS)
@pytest.mark.parametrize("lanes", [1, 3])
def test_clusters_of_the_list_run_in_its_order(kind: str, lanes: int) -> None:
    for tile, rows in ((1, [1, 3]), (TILE_TOKENS, [1, 5, TILE_TOKENS + 1, 3 * TILE_TOKENS])):
        with machine(lanes, rows=3 * TILE_TOKENS) as m:
            net = network(m, kind, tile)
            every = list(range(net.layout.clusters))
            for n in rows:
                x = np.random.default_rng(n).standard_normal((n, net.layout.dim), np.float32)
                for chosen in (every, every[::2], every[-1:], every[::-1], [every[-1], every[0], every[1]], []):
                    net.choose(chosen)
                    assert same_bits(net.run(x), net.expected(x, chosen) + np.float32(0)), (tile, n, chosen)


def test_a_part_of_the_list_is_as_if_other_neurons_were_zero() -> None:
    with machine(2, rows=8) as m:
        net = network(m, "Q4_0", TILE_TOKENS)
        x = np.random.default_rng(1).standard_normal((3, net.layout.dim), np.float32)
        net.choose([0, 2, 3])
        partial_result = net.run(x)
        size, per = BLOCK["Q4_0"]
        for missing in (1, 4):  # Up's rows of these clusters become zero
            rows = net.raw[1][missing * 32 : missing * 32 + 32]
            rows.reshape(len(rows), -1, size)[..., :2] = 0
        assert per == 32
        assert same_bits(net.expected(x, [0, 1, 2, 3, 4]), partial_result)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_clusters_that_arrive_late(lanes: int) -> None:
    """Weights and flags come in any order, each only once a lane sleeps for want of one; the bits are right."""
    with machine(lanes, rows=8) as m:
        m.unit._header[r.SPIN] = 0  # sleep at once
        net = network(m, "Q4_0", TILE_TOKENS)
        n = net.layout.clusters
        x = np.random.default_rng(2).standard_normal((3, net.layout.dim), np.float32)
        net.choose(list(range(n)))
        expected = net.expected(x, list(range(n)))
        flags = m.room((n, 64), region="flags")
        counters = m.look(flags).view(np.int64)
        m.look(net.table)[:, CLUSTER_FLAG // 8] = m.arena.address(flags) + 64 * np.arange(n)
        weights = m.look(net.gate_up)
        whole = weights.copy()
        for epoch in (1, 2, 3):
            m.look(net.table)[:, CLUSTER_WANTED // 8] = epoch
            weights[...] = 0xAA
            posted: list[int] = []

            def bring(epoch: int, posted: list[int]) -> None:
                while len(posted) < n:
                    asleep = until(
                        lambda: [c for c in range(n) if counters[c, 0] < epoch and counters[c, SLEEPERS // 8] > 0]
                    )
                    weights[asleep[-1]] = whole[asleep[-1]]
                    posted.append(asleep[-1])
                    post_flag.ctypes(m.arena.address(flags) + 64 * asleep[-1], epoch)

            thread = threading.Thread(target=partial(bring, epoch, posted))
            thread.start()
            got = net.run(x)
            thread.join(PATIENCE)
            assert sorted(posted) == list(range(n))
            assert same_bits(got, expected)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_step_that_waits_for_clusters_can_be_abandoned(lanes: int) -> None:
    with machine(lanes, rows=8) as m:
        m.unit._header[r.SPIN] = 0
        net = network(m, "Q4_0", TILE_TOKENS)
        n = net.layout.clusters
        x = np.random.default_rng(3).standard_normal((2, net.layout.dim), np.float32)
        net.choose(list(range(n)))
        flags = m.room((n, 64), region="flags")
        counters = m.look(flags).view(np.int64)
        m.look(net.table)[:, CLUSTER_FLAG // 8] = m.arena.address(flags) + 64 * np.arange(n)
        m.look(net.table)[:, CLUSTER_WANTED // 8] = 1
        counters[0, 0] = 1  # the first is there, the others never come

        def abort() -> None:
            until(lambda: counters[:, SLEEPERS // 8].sum() == min(lanes, n - 1))
            m.unit._abort_word[0] = 1

        thread = threading.Thread(target=abort)
        thread.start()
        with pytest.raises(UnitError, match="abandoned"):
            net.run(x)
        thread.join(PATIENCE)
        counters[:, 0] = 1
        assert same_bits(net.run(x), net.expected(x, list(range(n))))
