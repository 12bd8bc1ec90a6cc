"""`--memory auto`: what the machine can spare, and following it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coterie import pressure
from coterie.errors import PlanError
from coterie.pressure import CALM, STEP, YIELD, Follower, target
from coterie.scheduler.planner import SPARE_LEAST, spare
from coterie.storage import available

MIB, GIB = 1 << 20, 1 << 30


# --- what is available -------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/proc and /sys/fs/cgroup of a machine with 8 GiB available, whose process is in the group /a/b."""
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    for name, file in (("MEMINFO", "meminfo"), ("OWN", "cgroup"), ("MOUNTS", "mounts")):
        monkeypatch.setattr(available, name, tmp_path / file)
    return tmp_path


def group(folder: Path, names: tuple[str, str], limit: object, used: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def test_without_cgroups_the_kernel_says_it(system: Path) -> None:
    assert available.available_memory() == 8 * GIB
    (system / "cgroup").write_text("nonsense\n")
    (system / "mounts").write_text("nonsense\n")
    assert available.available_memory() == 8 * GIB


def test_the_tightest_group_of_version_1_counts(system: Path) -> None:
    mount = system / "memory"
    (system / "cgroup").write_text("5:memory:/a/b\n4:cpu:/x\n0::/\n")
    (system / "mounts").write_text(f"cgroup {mount} cgroup rw,memory 0 0\ncgroup /cpu cgroup rw,cpu 0 0\n")
    group(mount, available.V1[:2], 2**63 - 4096, 6 * GIB)
    group(mount / "a", available.V1[:2], 3 * GIB, 1 * GIB)
    group(mount / "a" / "b", available.V1[:2], 2**63 - 4096, GIB)
    assert available.available_memory() == 2 * GIB
    stat = f"total_inactive_file {100 * MIB}\ntotal_active_file {28 * MIB}\nrss 5\n"
    group(mount / "a" / "b", available.V1[:2], GIB, GIB - 64 * MIB, stat)
    assert available.available_memory() == 192 * MIB
    group(mount / "a" / "b", available.V1[:2], GIB, 2 * GIB)
    assert available.available_memory() == 0


def test_the_tightest_group_of_version_2_counts(system: Path) -> None:
    mount = system / "unified"
    (system / "cgroup").write_text("0::/a/b\n")
    (system / "mounts").write_text(f"cgroup2 {mount} cgroup2 rw 0 0\n")
    group(mount / "a", available.V2[:2], "max", 5 * GIB)
    group(mount / "a" / "b", available.V2[:2], 512 * MIB, 500 * MIB, f"inactive_file {4 * MIB}\nactive_file 0\n")
    assert available.available_memory() == 16 * MIB
    (mount / "a" / "b" / "memory.max").write_text("what?")
    assert available.available_memory() == 8 * GIB


def test_pressure_is_read_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "memory"
    file.write_text("some avg10=12.34 avg60=1.00 avg300=0.00 total=5\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n")
    assert pressure.pressure(file) == 12.34
    for text in ("", "some\n", "some avg10=x\n"):
        file.write_text(text)
        assert pressure.pressure(file) == 0
    assert pressure.pressure(tmp_path / "none") == 0


# --- following ---------------------------------------------------------------------------------------


def test_others_are_left_a_part() -> None:
    assert spare(20 * GIB) == GIB
    assert spare(GIB) == SPARE_LEAST
    assert target(GIB, 9 * GIB, 0) == 10 * GIB - spare(10 * GIB)
    assert target(GIB, 100 * MIB, 0) == GIB + 100 * MIB - SPARE_LEAST
    assert target(GIB, 9 * GIB, 50) == int(GIB * (1 - YIELD))


class FakeEngine:
    """Counts what it is told; below `least` it refuses."""

    def __init__(self, total: int, least: int = 0, streamed: int = 1) -> None:
        self.plan = SimpleNamespace(total=total, streamed_per_token=streamed)
        self.model, self.spec, self.wishes, self.flash = SimpleNamespace(file=None), None, None, None
        self.least, self.told = least, list[int]()

    def set_ceiling(self, ceiling: int, *, urgent: bool = True) -> None:
        if ceiling < self.least:
            raise PlanError("too little")
        self.told.append(ceiling)
        self.plan.total = ceiling


class World:
    def __init__(self, engine: Any) -> None:
        self.available, self.waiting, self.now = 1 * GIB, 0.0, 100.0
        self.engine = engine
        self.follower = Follower(
            engine, available=lambda: self.available, waiting=lambda: self.waiting, clock=lambda: self.now
        )

    def look(self) -> list[int]:
        self.follower.look(self.engine)
        return list(self.engine.told)


def test_it_shrinks_at_once_and_grows_after_a_while() -> None:
    world = World(FakeEngine(2 * GIB))
    world.available = spare(3 * GIB)  # just right
    assert world.look() == []
    world.available = 100 * MIB
    (smaller,) = world.look()
    assert smaller == 2 * GIB + 100 * MIB - SPARE_LEAST
    world.available = 4 * GIB
    assert world.look() == [smaller]
    world.now += CALM / 2
    assert world.look() == [smaller]
    world.now += CALM / 2
    assert world.look() == [smaller, smaller + 4 * GIB - spare(smaller + 4 * GIB)]


def test_plenty_that_does_not_last_is_not_taken() -> None:
    world = World(FakeEngine(2 * GIB))
    world.available = 4 * GIB
    world.look()
    world.now += CALM - 1
    world.available = spare(2 * GIB)
    world.look()
    world.available = 4 * GIB
    world.now += 1
    assert world.look() == []


def test_a_model_that_is_all_in_memory_does_not_grow() -> None:
    world = World(FakeEngine(2 * GIB, streamed=0))
    world.available = 4 * GIB
    world.look()
    world.now += 2 * CALM
    assert world.look() == []


def test_pressure_makes_it_yield_whatever_seems_available() -> None:
    world = World(FakeEngine(2 * GIB))
    world.available, world.waiting = 8 * GIB, 30.0
    assert world.look() == [int(2 * GIB * (1 - YIELD))]


def test_it_keeps_what_it_needs_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    least = GIB
    monkeypatch.setattr(pressure, "least_ceiling", lambda *_: least)
    world = World(FakeEngine(2 * GIB, least))
    world.available = -2 * GIB
    assert world.look() == [least]
    assert world.look() == [least]


def test_small_changes_are_left_alone() -> None:
    world = World(FakeEngine(2 * GIB))
    world.available = spare(3 * GIB) - STEP // 4
    world.look()
    world.now += 2 * CALM
    assert world.look() == []
