"""The arena: one mapping, seen by numpy, Arrow and other processes without a copy."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny

from coterie.engine import Engine
from coterie.errors import PlanError
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes
from coterie.storage.arena import LINE, Arena, Ledger
from coterie.storage.mapping import HUGE

REGIONS = {"weights": 3 * HUGE, "state": 5000}


@pytest.fixture(params=["private", "memfd"])
def arena(request: pytest.FixtureRequest) -> Any:
    made = Arena(REGIONS, shared=request.param == "memfd")
    yield made
    made.close()


def resident(arena: Arena) -> int:
    """Bytes of physical memory behind the arena's mapping."""
    text = Path("/proc/self/smaps").read_text()
    total, inside = 0, False
    for line in text.splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(edge, 16) for edge in span.groups())
            inside = first <= arena.base < last or arena.base <= first < arena.base + arena.size
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_arrow_numpy_and_the_arena_name_the_same_bytes(arena: Arena) -> None:
    ref = arena.allocate("weights", (3, 5), np.float32)
    array, tensor, buffer = arena.numpy(ref), arena.arrow(ref), arena.buffer(ref)
    assert array.ctypes.data == buffer.address == arena.address(ref) == tensor.to_numpy().ctypes.data
    assert (array.shape, tensor.shape, buffer.size) == ((3, 5), (3, 5), 60)
    assert array.dtype == np.float32
    assert array.flags.writeable
    assert buffer.is_mutable
    array[2, 4] = 7
    assert tensor.to_numpy()[2, 4] == 7
    assert np.frombuffer(buffer, np.float32)[14] == 7
    np.frombuffer(buffer, np.float32)[0] = 3  # through Arrow too
    assert array[0, 0] == 3


def test_an_arrow_array_over_a_buffer_is_no_copy(arena: Arena) -> None:
    import pyarrow as pa

    ref = arena.allocate("state", 10, np.int32)
    arena.numpy(ref)[:] = range(10)
    array = pa.Array.from_buffers(pa.int32(), 10, [None, arena.buffer(ref)])
    assert array.to_pylist() == list(range(10))
    assert array.to_numpy(zero_copy_only=True).ctypes.data == arena.address(ref)


def test_buffers_are_aligned_apart_and_zero(arena: Arena) -> None:
    refs = [arena.allocate("weights", size) for size in (1, 63, 64, 65, 4096, 0, 7)]
    refs.append(arena.allocate("weights", 10, align=4096))
    assert all(arena.address(ref) % LINE == 0 for ref in refs)
    assert arena.address(refs[-1]) % 4096 == 0
    ends = [ref.offset + ref.nbytes for ref in refs]
    assert all(end <= after.offset for end, after in zip(ends, refs[1:], strict=False))
    assert not any(arena.numpy(ref).any() for ref in refs)
    assert arena.base % 4096 == 0


def test_views_outlive_close(arena: Arena) -> None:
    ref = arena.allocate("state", 4, np.int64)
    array, buffer = arena.numpy(ref), arena.buffer(ref)
    array[:] = 5
    arena.close()
    assert array.tolist() == np.frombuffer(buffer, np.int64).tolist() == [5] * 4


def test_a_full_region_is_a_plan_error(arena: Arena) -> None:
    size = arena.regions["state"].size
    arena.allocate("state", size - LINE)
    arena.allocate("state", LINE)
    with pytest.raises(PlanError, match="region state is full"):
        arena.allocate("state", 1)
    with pytest.raises(PlanError, match="no region"):
        arena.allocate("staging", 1)
    assert arena.allocate("weights", 1).region == "weights"  # the others have room


def test_memory_that_cannot_be_had_is_a_plan_error() -> None:
    with pytest.raises(PlanError, match="MiB of memory"):
        Arena({"weights": 1 << 60})


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": -64},
        {"offset": 1 << 40},
        {"offset": (1 << 63) - 8},
        {"nbytes": 8},
        {"nbytes": -16},
        {"shape": (5,)},
        {"shape": (-2, -2)},
        {"shape": (1 << 62, 4)},
        {"region": "staging"},
        {"region": "weights"},
        {"dtype": "<f8"},
        {"dtype": "|O"},
        {"dtype": "nonsense"},
    ],
    ids=str,
)
def test_wrong_buffer_refs_are_refused(arena: Arena, wrong: dict[str, Any]) -> None:
    arena.allocate("state", 8)
    good = arena.allocate("state", 4, np.int32)
    assert arena.numpy(good).tolist() == [0] * 4
    for view in (arena.numpy, arena.buffer, arena.arrow):
        with pytest.raises(PlanError, match="buffer"):
            view(replace(good, **wrong))


def test_the_tail_of_a_buffer_stays_inside(arena: Arena) -> None:
    ref = arena.allocate("state", 32, np.int32)
    arena.numpy(ref)[:] = range(32)
    assert arena.numpy(ref.tail(120)).view(np.int32).tolist() == [30, 31]
    assert arena.numpy(ref.tail(128)).size == 0
    for outside in (-1, 129, 1 << 40):
        with pytest.raises(PlanError, match="outside"):
            ref.tail(outside)


def test_release_gives_memory_back(arena: Arena) -> None:
    before = resident(arena)
    kept, ref = arena.allocate("state", 8), arena.allocate("weights", 3 * HUGE)
    arena.numpy(kept)[:] = 9
    array = arena.numpy(ref)
    array[:] = 1
    assert resident(arena) >= before + 3 * HUGE
    arena.release("weights")
    assert resident(arena) <= before + HUGE  # the other region's page may be a huge one
    assert not array.any()  # old views see zeros
    again = arena.allocate("weights", 3 * HUGE)
    assert again.offset == ref.offset
    arena.numpy(again)[:] = 2
    assert array[0] == 2
    assert arena.numpy(kept).tolist() == [9] * 8


def test_release_keeps_what_it_is_told_to(arena: Arena) -> None:
    first, second = arena.allocate("weights", HUGE + 64), arena.allocate("weights", 2 * HUGE - 64)
    arena.numpy(first)[:] = 1
    arena.numpy(second)[:] = 2
    before = resident(arena)
    arena.release("weights", keep=first.nbytes)
    assert arena.usage()["weights"] == first.nbytes
    assert arena.numpy(first).all()
    assert resident(arena) <= before - HUGE  # the third huge page
    again = arena.allocate("weights", HUGE)
    assert again.offset == second.offset
    assert not arena.numpy(again)[HUGE - 64 :].any()
    arena.release("weights", keep=3 * HUGE)
    assert arena.numpy(first).all()


# --- between processes -------------------------------------------------------------------------------

CHILD = """
import sys
import numpy as np
from coterie.storage.arena import Arena, BufferRef
description, offset = eval(sys.argv[1]), int(sys.argv[2])
arena = Arena.attach(description)
ref = BufferRef("weights", offset, 32, "<i8", (4,))
array = arena.numpy(ref)
assert array.tolist() == [1, 2, 3, 4], array
assert arena.buffer(ref).address == arena.address(ref)
array[:] = array * 10
print(arena.address(ref))
"""


def test_another_process_attaches_and_both_see_all_writes() -> None:
    arena = Arena(REGIONS, shared=True)
    arena.allocate("weights", 1000)
    ref = arena.allocate("weights", 4, np.int64)
    arena.numpy(ref)[:] = [1, 2, 3, 4]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", CHILD, repr(arena.describe()), str(ref.offset)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == arena.address(ref)  # so tables of addresses hold in both
    assert arena.numpy(ref).tolist() == [10, 20, 30, 40]
    arena.close()


def test_attaching_to_something_smaller_is_refused() -> None:
    arena = Arena(REGIONS, shared=True)
    before = len(os.listdir("/proc/self/fd"))
    for size in (0, 4096, 3 * HUGE + 8192):
        fd = os.memfd_create("small")
        os.ftruncate(fd, size)
        small = arena.describe() | {"fd": fd, "inode": os.fstat(fd).st_ino}
        with pytest.raises(PlanError, match="smaller than its regions"):
            Arena.attach(small)
        os.close(fd)
    arena.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_attaching_to_something_else_is_refused() -> None:
    arena = Arena(REGIONS, shared=True)
    good = arena.describe()
    with pytest.raises(PlanError, match="its owner has gone"):
        Arena.attach(good | {"inode": good["inode"] + 1})
    with pytest.raises(PlanError, match="cannot open"):
        Arena.attach(good | {"fd": 9999})
    with pytest.raises(PlanError, match="cannot lie at"):  # where the owner's own mapping lies
        Arena.attach(good)
    with pytest.raises(PlanError, match="outside"):
        Arena.attach(good | {"regions": {"weights": (0, good["size"] + 4096)}})
    arena.close()


def test_two_shared_arenas_lie_apart() -> None:
    first, second = Arena(REGIONS, shared=True), Arena(REGIONS, shared=True)
    ref = first.allocate("state", 8, np.int64)
    first.numpy(ref)[:] = 1
    assert not second.numpy(second.allocate("state", 8, np.int64)).any()
    assert abs(first.base - second.base) >= first.size
    first.close()
    second.close()


def test_a_shared_arena_takes_memory_for_what_is_cut_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena({"weights": 1 << 40, "state": 5000}, shared=True)
    arena.allocate("weights", 3 * HUGE)
    assert 3 * HUGE <= resident(arena) <= 4 * HUGE
    monkeypatch.setattr("coterie.storage.mapping.available_memory", lambda: HUGE)
    with pytest.raises(PlanError, match="more than there is"):
        arena.allocate("weights", 2 * HUGE)
    arena.close()


def test_nothing_is_left_behind() -> None:
    before = set(os.listdir("/dev/shm")), set(os.listdir("/proc/self/fd"))
    arena = Arena(REGIONS, shared=True)
    arena.numpy(arena.allocate("state", 8))[:] = 1
    assert set(os.listdir("/dev/shm")) == before[0]
    arena.close()
    assert len(os.listdir("/proc/self/fd")) == len(before[1])
    arena.close()  # again: nothing happens


# --- the plan's figures --------------------------------------------------------------------------------


def test_a_ledger_counts_what_an_arena_cuts() -> None:
    def cut(ledger: Ledger) -> None:
        for i in range(10):
            ledger.allocate("weights", (i, 7), np.float16)
            ledger.allocate("state", i + 1)

    paper = Ledger()
    cut(paper)
    arena = Arena(paper.usage())
    cut(arena)
    assert arena.usage() == paper.usage()
    with pytest.raises(PlanError, match="full"):
        arena.allocate("state", 4096)
    arena.close()


@pytest.mark.parametrize("tracing", [False, True])
def test_the_plan_has_just_what_a_model_takes(tracing: bool, tmp_path: Path) -> None:
    """Every region but the KV cache, which grows, is full to its last line once all programs are loaded."""
    path = write_tiny(tmp_path / "m.gguf", "gemma3", layers=6, formats="Q4_0", context=600)
    trace = tmp_path / "trace.json" if tracing else None
    engine = Engine(open_model(path), Wishes(threads=2, context=600), trace=trace)
    sequence = engine.sequence()
    for name in engine.layout.programs:
        engine.unit.load(engine.layout.programs[name])
    engine.cache.take()
    used = engine.arena.usage()
    assert set(engine.plan.regions) == set(used)
    for name, size in engine.plan.regions.items():
        slack = size - used[name]
        assert 0 <= slack < (LINE * 16 if name != "kv" else size), name
    sequence.reserve(600)
    assert engine.cache.nbytes <= engine.plan.regions["kv"]
    sequence.close()
    engine.close()
