"""The flash unit reads what the tape says, checks it, keeps off memory in use, and fails in plain words."""

import ctypes
import errno
import fcntl
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from harness import post_flag, until

from coterie.actors import reading
from coterie.actors.flash import FlashUnit, ReadFailure
from coterie.actors.host import ThreadActor
from coterie.actors.reading import ENGINES
from coterie.actors.uring import Uring
from coterie.errors import ModelError, UnitError, UsageError
from coterie.kernels import tape as t
from coterie.kernels.record import Opcode
from coterie.storage.arena import Arena
from coterie.storage.checksum import checksum
from coterie.storage.direct import open_direct
from coterie.storage.flash_buffers import lay_out_flash
from coterie.trace.chrome import read_rings

PAGE = t.PAGE
PAGES = 512  # of the test file

DATA = np.random.default_rng(1).integers(0, 256, PAGES * PAGE, np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "weights"
    DATA.tofile(file)
    return file


def direct(path: Path) -> int:
    try:
        return open_direct(path)
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "io_uring":
        try:
            Uring(1).close()
        except OSError as error:
            pytest.skip(f"no io_uring here: {error}")
    return str(request.param)


class Desk:
    """An arena, a flash unit over a file, and what a consumer does."""

    def __init__(
        self,
        path: Path,
        *,
        engine: str | None = "preadv",
        pages: int = PAGES,
        ring: bool = False,
        depth: int = 4,
        block: int = 4 * PAGE,
        reader: Any = None,
        tracing: bool = False,
    ) -> None:
        self.arena = Arena({"weights": pages * PAGE, "flash": 4 << 20, "other": PAGE})
        self.memory = self.arena.allocate("weights", pages * PAGE, align=PAGE)
        self.buffers = lay_out_flash(
            self.arena, entries=4 * PAGES, ring_bytes=self.memory.nbytes, depth=depth, tracing=tracing
        )
        self.abort = self.arena.allocate("other", 1, np.int64)
        fd = direct(path) if reader is None else os.open(path, os.O_RDONLY)
        self.unit = FlashUnit(
            self.arena,
            self.buffers,
            fd,
            depth=depth,
            block=block,
            ring=self.memory if ring else None,
            abort=self.arena.address(self.abort),
            engine=engine,
            reader=ctypes.cast(reader, ctypes.c_void_p).value if reader is not None else None,
        )
        os.close(fd)
        self.tape = np.zeros(0, t.READ)

    def set(self, offsets: npt.ArrayLike, places: npt.ArrayLike, pages: npt.ArrayLike = 1) -> None:
        """A tape of reads, given in pages of the file and of memory."""
        offsets, places = np.asarray(offsets), np.asarray(places)
        self.tape = np.zeros(offsets.size, t.READ)
        self.tape["offset"], self.tape["nbytes"] = offsets * PAGE, np.asarray(pages) * PAGE
        self.tape["address"] = self.arena.address(self.memory) + places * PAGE
        self.tape["checksum"] = [checksum(self.wanted(i)) for i in range(self.tape.size)]
        self.unit.set_tape(self.tape)

    def wanted(self, position: int) -> npt.NDArray[np.uint8]:
        entry = self.tape[position]
        return DATA[entry["offset"] : entry["offset"] + entry["nbytes"]]

    def got(self, position: int) -> npt.NDArray[np.uint8]:
        entry = self.tape[position]
        at = int(entry["address"]) - self.arena.address(self.memory)
        memory: npt.NDArray[np.uint8] = self.arena.numpy(self.memory)[at : at + entry["nbytes"]]
        return memory

    def await_arrival(self, seq: int) -> None:
        assert until(lambda: self.unit.wait(seq) or self.unit.failure()) is True

    def consume(self, start: int, first: int, end: int, free: bool = True) -> None:
        """What a step does with positions first..end-1; position 0 has number `start`."""
        for position in range(first, end):
            self.await_arrival(start + position + 1)
            assert (self.got(position) == self.wanted(position)).all()
            if free:
                post_flag.ctypes(self.unit.freed, start + position + 1)

    def await_failure(self) -> ReadFailure:
        failure = until(self.unit.failure)
        assert isinstance(failure, ReadFailure)
        return failure


@pytest.fixture
def desk(path: Path) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(**options: Any) -> Desk:
        desks.append(Desk(path, **options))
        return desks[-1]

    yield make
    for each in desks:
        each.unit.close()
        each.arena.close()


READER = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


KEPT: list[Any] = []


class Reader:
    """A reader that does what `fault(call, offset)` says; calls are counted from 0 for each offset.

    None: read; 0, -errno: return it; another number: read, and say it were so many bytes; "wrong": spoil a byte;
    "more": say it were more.
    """

    def __init__(self, fault: Callable[[int, int], int | str | None]) -> None:
        self.fault, self.calls = fault, dict[int, int]()
        self.lock = threading.Lock()
        self.function = READER(self._read)
        KEPT.append(self.function)  # compiled threads call it by its address

    def _read(self, fd: int, address: int, nbytes: int, offset: int) -> int:
        with self.lock:
            call = self.calls.get(offset, 0)
            self.calls[offset] = call + 1
        what = self.fault(call, offset)
        if isinstance(what, int) and what <= 0:
            return what
        memory = (ctypes.c_uint8 * nbytes).from_address(address)
        count = os.preadv(fd, [memory], offset)
        if what == "wrong":
            memory[nbytes // 2] ^= 1
        if what == "more":
            return 2 * count
        return min(count, what) if isinstance(what, int) else count


# --- what arrives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_random_tapes_arrive_exactly(desk: Callable[..., Desk], engine: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = desk(engine=engine, depth=int(rng.integers(1, 33)), block=PAGE * int(rng.integers(1, 65)))
    sizes = rng.integers(1, 17, PAGES // 17)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    order = rng.permutation(sizes.size) if seed else np.arange(sizes.size)
    offsets = rng.integers(0, PAGES - 16, sizes.size) if seed else starts
    d.set(offsets, starts[order], sizes[order] if seed else sizes)
    start = d.unit.begin(0, d.tape.size)
    d.await_arrival(start + d.tape.size)
    for position in range(d.tape.size):
        assert (d.got(position) == d.wanted(position)).all()
    assert d.unit.arrived_count() == start + d.tape.size
    assert d.unit.counters()["bytes"] == d.tape["nbytes"].sum()


def test_neighbours_are_one_request(desk: Callable[..., Desk], engine: str) -> None:
    d = desk(engine=engine, block=4 * PAGE)
    d.set(range(32), range(32))
    d.await_arrival(d.unit.begin(0, 10, ahead=(10, 32)) + 32)
    assert d.unit.counters()["requests"] == 3 + 6  # 4 + 4 + 2 of the step, 5 x 4 + 2 of the next
    d.set([0, 1, 3, 4, 5, 6], [0, 1, 2, 3, 5, 6])
    before = d.unit.counters()["requests"]
    d.await_arrival(d.unit.begin(0, 6) + 6)
    assert d.unit.counters()["requests"] - before == 3  # apart in the file, apart in memory


def test_a_large_read_is_one_request(desk: Callable[..., Desk], engine: str) -> None:
    d = desk(engine=engine, block=PAGE)
    d.set([3], [0], pages=300)
    d.consume(d.unit.begin(0, 1), 0, 1)
    assert d.unit.counters()["requests"] == 1


# --- the ring ---------------------------------------------------------------------------------------


def ring_tape(d: Desk, rng: np.random.Generator, reads: int, ring_pages: int) -> None:
    """Reads of 1 to 4 pages, one behind the other, around and around."""
    sizes = rng.integers(1, 5, reads)
    places, at = [], 0
    for size in sizes:
        at = 0 if at + size > ring_pages else at
        places.append(at)
        at += size
    d.set(rng.integers(0, PAGES - 4, reads), places, sizes)


@pytest.mark.parametrize("seed", range(3))
def test_many_laps_through_a_small_ring(desk: Callable[..., Desk], engine: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = desk(engine=engine, pages=16, ring=True, depth=int(rng.integers(1, 9)))
    ring_tape(d, rng, 61, 16)
    expected = 0
    for _ in range(8):
        start = d.unit.begin(0, 61, ahead=(0, 61))
        assert start == expected
        d.consume(start, 0, 61)
        expected += 61


def test_memory_in_use_is_not_written(desk: Callable[..., Desk], engine: str) -> None:
    d = desk(engine=engine, pages=8, ring=True)
    d.set(range(20, 40), [i % 8 for i in range(20)])
    start = d.unit.begin(0, 20)
    d.await_arrival(8)
    naps = d.unit.counters()["naps"]
    until(lambda: d.unit.counters()["naps"] > naps)  # it has nothing to do but to wait
    assert d.unit.arrived_count() == start + 8
    for position in range(8):
        assert (d.got(position) == d.wanted(position)).all()
    post_flag.ctypes(d.unit.freed, start + 3)
    d.await_arrival(start + 11)
    for position in (3, 7, 8, 10):
        assert (d.got(position) == d.wanted(position)).all()
    until(lambda: d.unit.counters()["blocked"] > 0)
    assert d.unit.arrived_count() == start + 11
    post_flag.ctypes(d.unit.freed, start + 12)
    d.consume(start, 12, 20)


# --- steps that follow each other -------------------------------------------------------------------


def test_another_step_than_expected_drops_what_was_read(desk: Callable[..., Desk], engine: str) -> None:
    d = desk(engine=engine, pages=8, ring=True)
    d.set(range(24), [i % 8 for i in range(24)])
    assert d.unit.begin(0, 16, ahead=(0, 24)) == 0
    d.consume(0, 0, 16)
    start = d.unit.begin(3, 9, ahead=(9, 24))  # positions 0 to 23 were expected
    assert start == 16 + 24 - 3
    d.consume(start, 3, 9)
    assert d.unit.begin(9, 24) == start
    d.consume(start, 9, 24)
    assert d.unit.begin(2, 4) + 2 == start + 24


def test_body_and_head(desk: Callable[..., Desk], engine: str) -> None:
    """Prefill in chunks without the head, then the head, then decoding: nothing is read twice."""
    d = desk(engine=engine, pages=8, ring=True)
    d.set(range(24), [i % 8 for i in range(24)])
    steps = [((0, 16), (0, 16)), ((0, 16), (16, 24)), ((16, 24), (0, 24)), ((0, 24), (0, 24)), ((0, 24), (0, 24))]
    seq = 0
    for (first, end), ahead in steps:
        start = d.unit.begin(first, end, ahead=ahead)
        assert start + first == seq
        d.consume(start, first, end)
        seq += end - first
    assert d.unit.begin(0, 16, ahead=(16, 24)) == seq  # as expected, if not in one step
    d.consume(seq, 0, 16)
    assert d.unit.counters()["bytes"] >= (seq + 16) * PAGE
    assert d.unit.begin(0, 5) == seq + 16 + 8  # 16 to 23 were expected


def test_redirects_in_every_state(desk: Callable[..., Desk], engine: str) -> None:
    rng = np.random.default_rng(7)
    d = desk(engine=engine, pages=8, ring=True, depth=3)
    d.set(rng.integers(0, PAGES, 40), [i % 8 for i in range(40)])
    for _ in range(200):
        first, end = sorted(rng.integers(0, 41, 2))
        ahead = sorted(rng.integers(0, 41, 2))
        start = d.unit.begin(first, end, ahead=(ahead[0], ahead[1]), redirect=bool(rng.integers(0, 2)))
        stop = int(rng.integers(first, end + 1))  # an abandoned step has consumed a part
        d.consume(start, first, stop)
        if stop < end:
            start = d.unit.begin(first, end, redirect=True)
            d.consume(start, first, min(end, first + 3))
            d.unit.begin(0, 0, redirect=True)
        if rng.integers(0, 4) == 0:
            d.unit.halt()
            assert d.unit.arrived_count() == d.unit.begin(0, 0)


def test_halt_waits_for_reads_in_flight(desk: Callable[..., Desk]) -> None:
    gate = threading.Event()
    reader = Reader(lambda call, offset: gate.wait() and None)
    d = desk(reader=reader.function)
    d.set(range(0, 16, 2), range(8))
    d.unit.begin(0, 8)
    until(lambda: len(reader.calls) == 4)
    halted = threading.Thread(target=d.unit.halt)
    halted.start()
    assert d.unit.wait(1, 0.01) is False
    assert halted.is_alive()
    gate.set()
    halted.join()
    assert len(reader.calls) == 4
    assert d.unit.arrived_count() == 8
    d.consume(d.unit.begin(0, 8), 0, 8)


def test_a_new_tape(desk: Callable[..., Desk], engine: str) -> None:
    d = desk(engine=engine, pages=8, ring=True)
    for shift in range(5):
        d.set(np.arange(20) + shift, [(i + shift) % 8 for i in range(20)])
        d.consume(d.unit.begin(0, 20, ahead=(0, 20)), 0, 20)


# --- faults -----------------------------------------------------------------------------------------

HEALED: dict[str, Callable[[int, int], int | str | None]] = {
    "short reads": lambda call, offset: 2 * PAGE if call == 0 else None,
    "short reads that end in a page": lambda call, offset: PAGE + 100,
    "an empty read": lambda call, offset: 0 if call == 0 else None,
    "EIO once": lambda call, offset: -errno.EIO if call == 0 else None,
    "interrupted": lambda call, offset: -errno.EINTR if call < 2 else None,
    "not now": lambda call, offset: -errno.EAGAIN if call < 3 else None,
    "wrong bytes once": lambda call, offset: "wrong" if call == 0 else None,
}


@pytest.mark.parametrize("fault", HEALED.values(), ids=HEALED)
def test_a_passing_fault_costs_a_retry(
    desk: Callable[..., Desk], fault: Callable[[int, int], int | str | None]
) -> None:
    d = desk(reader=Reader(fault).function)
    d.set(range(0, 64, 8), range(0, 64, 8), pages=5)
    d.consume(d.unit.begin(0, 8), 0, 8)
    assert d.unit.counters()["retries"] >= 8
    assert d.unit.failure() is None
    assert d.arena.numpy(d.abort)[0] == 0


LASTING: dict[str, tuple[Callable[[int, int], int | str | None], str, int]] = {
    "EIO": (lambda call, offset: -errno.EIO if offset == 24 * PAGE else None, "io", errno.EIO),
    "an end of file": (lambda call, offset: 0 if offset == 24 * PAGE else None, "short", 0),
    "wrong bytes": (lambda call, offset: "wrong" if offset == 24 * PAGE else None, "checksum", 0),
    "too many bytes": (lambda call, offset: "more" if offset == 24 * PAGE else None, "io", errno.EIO),
}


@pytest.mark.parametrize(("fault", "code", "number"), LASTING.values(), ids=LASTING)
def test_a_lasting_fault_ends_the_step(
    desk: Callable[..., Desk], fault: Callable[[int, int], int | str | None], code: str, number: int
) -> None:
    reader = Reader(fault)
    d = desk(reader=reader.function)
    d.set(range(0, 64, 8), range(0, 64, 8), pages=5)
    start = d.unit.begin(0, 8)
    failure = d.await_failure()
    assert failure == (code, 3, number)
    assert failure.reason
    until(lambda: d.arena.numpy(d.abort)[0] == 1)
    assert reader.calls[24 * PAGE] == 1 + t.RETRIES_ALLOWED
    assert d.unit.arrived_count() <= start + 3
    assert d.unit.wait(start + 8) is False
    reader.fault = lambda call, offset: None
    start = d.unit.begin(0, 8)
    d.arena.numpy(d.abort)[0] = 0  # not before: until then a failed lane sets it again and again
    d.consume(start, 0, 8)
    assert d.unit.failure() is None
    assert d.arena.numpy(d.abort)[0] == 0


def test_the_wrong_entry_of_a_request_is_named(desk: Callable[..., Desk], engine: str) -> None:
    d = desk(engine=engine, block=8 * PAGE)
    d.set(range(8), range(8))
    d.tape["checksum"][5] ^= 1
    d.unit.set_tape(d.tape)
    d.unit.begin(0, 8)
    assert d.await_failure() == ("checksum", 5, 0)
    assert d.unit.counters()["bytes"] == 0


def test_a_step_after_an_unseen_failure_is_ended_too(desk: Callable[..., Desk]) -> None:
    d = desk(reader=Reader(lambda call, offset: -errno.EIO if offset else None).function)
    d.set([0, 8], [0, 8])
    d.unit.begin(0, 1, ahead=(1, 2))
    d.await_failure()
    d.arena.numpy(d.abort)[0] = 0  # as if a step began just then
    until(lambda: d.arena.numpy(d.abort)[0] == 1)


def test_a_file_that_is_cut_in_use(desk: Callable[..., Desk], engine: str, path: Path) -> None:
    d = desk(engine=engine)
    d.set(range(0, 64, 8), range(0, 64, 8), pages=5)
    d.consume(d.unit.begin(0, 2), 0, 2)
    os.truncate(path, 26 * PAGE + 10)
    d.unit.begin(2, 8)
    assert d.await_failure().code == "short"
    until(lambda: d.arena.numpy(d.abort)[0] == 1)


def test_a_file_that_is_changed_in_use(desk: Callable[..., Desk], engine: str, path: Path) -> None:
    d = desk(engine=engine)
    d.set(range(8), range(8))
    with path.open("r+b") as file:
        file.seek(3 * PAGE + 5)
        file.write(b"\0\0\0\0")
        os.fsync(file.fileno())
    d.unit.begin(0, 8)
    assert d.await_failure() == ("checksum", 3, 0)


def test_a_file_that_is_removed_in_use_stays_readable(desk: Callable[..., Desk], engine: str, path: Path) -> None:
    d = desk(engine=engine)
    d.set(range(8), range(8))
    path.unlink()
    d.consume(d.unit.begin(0, 8), 0, 8)


# --- ends -------------------------------------------------------------------------------------------


def threads_of(d: Desk) -> list[threading.Thread]:
    actor = d.unit.actor
    assert isinstance(actor, ThreadActor)
    return actor.lanes["flash"].threads


def test_closing_does_not_wait_for_a_dead_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LAST_WAIT", 0.05)
    gate = threading.Event()
    reader = Reader(lambda call, offset: gate.wait() and None)
    d = Desk(path, reader=reader.function)
    d.set(range(0, 16, 2), range(8))
    d.unit.begin(0, 8)
    until(lambda: len(reader.calls) == 4)
    threads = threads_of(d)
    d.unit.close()
    d.arena.close()
    assert threads[0].is_alive()
    with pytest.raises(UnitError, match=r"^this model has been closed$"):
        d.unit.begin(0, 1)
    gate.set()
    until(lambda: not any(thread.is_alive() for thread in threads))
    assert len(reader.calls) == 4


def test_a_dropped_unit_stops(path: Path, engine: str) -> None:
    d = Desk(path, engine=engine)
    d.set(range(8), range(8))
    d.unit.begin(0, 8, ahead=(0, 8))
    threads = threads_of(d)
    del d
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)


def test_descriptors_are_given_back(path: Path, engine: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        d = Desk(path, engine=engine)
        d.unit.close()
        d.unit.close()
        d.arena.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_idle_lane_sleeps(desk: Callable[..., Desk], engine: str) -> None:
    d = desk(engine=engine)
    d.set(range(8), range(8))
    d.consume(d.unit.begin(0, 8), 0, 8)
    before, began = d.unit.counters(), time.monotonic()
    until(lambda: d.unit.counters()["naps"] >= before["naps"] + 2)
    after, took = d.unit.counters(), time.monotonic() - began
    assert after["naps"] - before["naps"] <= 2 + took / 0.05
    assert after["requests"] == before["requests"]
    assert after["busy"] == before["busy"]


def test_nothing_is_written(desk: Callable[..., Desk], engine: str, path: Path) -> None:
    before = path.stat()
    d = desk(engine=engine)
    d.set(range(8), range(8))
    d.consume(d.unit.begin(0, 8), 0, 8)
    after = path.stat()
    assert (before.st_mtime_ns, before.st_ctime_ns, before.st_size) == (
        after.st_mtime_ns,
        after.st_ctime_ns,
        after.st_size,
    )
    assert fcntl.fcntl(int(d.unit._control[t.FD]), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


# --- what it says and refuses -----------------------------------------------------------------------


def test_the_trace_has_every_request(desk: Callable[..., Desk], engine: str) -> None:
    d = desk(engine=engine, tracing=True, block=2 * PAGE)
    d.set(range(9), range(9))
    d.tape["layer"] = [-1, -1, 0, 0, 1, 1, 2, 2, 3]
    d.unit.set_tape(d.tape)
    d.consume(d.unit.begin(0, 9), 0, 9)
    assert d.buffers.trace is not None
    (events,) = read_rings(d.arena.numpy(d.buffers.trace))
    assert set(events["opcode"]) == {int(Opcode.READ)}
    assert sorted(events["layer"].tolist()) == [0, 1, 2, 3, 0xFFFF]
    assert events["pieces"].sum() == 9 * PAGE
    assert (events["start"] < events["end"]).all()


def test_the_engine_is_chosen_once(desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(entries: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(reading, "Uring", refuse)
    assert desk(engine=None).unit.describe()["runtime"] == "4 threads with preadv, O_DIRECT"
    with pytest.raises(UnitError, match=r"^io_uring cannot be used here: Operation not permitted$"):
        desk(engine="io_uring")
    with pytest.raises(UsageError, match="there is no flash engine mmap here"):
        desk(engine="mmap")


@pytest.mark.parametrize("options", [{"depth": 0}, {"block": 100}])
def test_an_impossible_unit_is_refused(desk: Callable[..., Desk], options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="a flash unit cannot have"):
        desk(**options)


BAD: dict[str, tuple[dict[str, int], str]] = {
    "an odd offset": ({"offset": 100}, "whole pages"),
    "an odd address": ({"address": 8}, "whole pages"),
    "no bytes": ({"nbytes": 0}, "whole pages"),
    "fewer than no bytes": ({"nbytes": -PAGE}, "whole pages"),
    "very many bytes": ({"nbytes": 1 << 62}, "whole pages"),
    "before the arena": ({"address": -PAGE}, "outside of its memory"),
    "behind the arena": ({"address": 1 << 40}, "outside of its memory"),
    "over the edge of the ring": ({"address": 7 * PAGE, "nbytes": 2 * PAGE}, "outside of its memory"),
    "the unit's own memory": ({"address": (2 << 20)}, "outside of its memory"),
    "a negative offset": ({"offset": -PAGE}, "fewer than its reads need"),
    "behind the file": ({"offset": PAGES * PAGE}, "fewer than its reads need"),
    "an offset that overflows": ({"offset": (1 << 63) - PAGE}, "fewer than its reads need"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_a_bad_tape_is_refused(desk: Callable[..., Desk], words: dict[str, int], message: str) -> None:
    d = desk(pages=8, ring=True)
    flash_region = d.arena.regions["flash"].offset
    tape = np.zeros(3, t.READ)
    tape["nbytes"], tape["address"] = PAGE, d.arena.address(d.memory)
    for word, value in words.items():
        if word == "address":
            value = flash_region if value == 2 << 20 else value
            tape[word][1] = d.arena.base + value
        else:
            tape[word][1] = value
    with pytest.raises((UnitError, ModelError), match=message):
        d.unit.set_tape(tape)


def test_a_tape_of_something_else_is_refused(desk: Callable[..., Desk]) -> None:
    d = desk()
    for tape in (np.zeros(3), np.zeros(4 * PAGES + 1, t.READ), np.zeros((2, 2), t.READ)):
        with pytest.raises(UnitError, match="a tape must be"):
            d.unit.set_tape(tape)
    for ranges in ((0, 1), (-1, 0), (1, 0)):
        with pytest.raises(UnitError, match="positions"):
            d.unit.begin(*ranges)


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[int]:
    fd = open_direct(path, **options)
    try:
        yield fd
    finally:
        os.close(fd)


def test_files_are_opened_for_direct_reads(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.close(direct(path))
    with opened(path) as fd:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    with opened(path, buffered=True) as fd:
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    with pytest.raises(ModelError, match=r"nothing: No such file or directory$"):
        open_direct(tmp_path / "nothing")

    def refuse(*arguments: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(UsageError, match=r"direct reads are refused here \(Invalid argument\); keep"):
        open_direct(path)
