"""The device profile: what is measured is kept, what is damaged or about something else is not used."""

import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from coterie.actors import sweep
from coterie.actors.sweep import Sweep, memory_bandwidth, quick_flash
from coterie.cli import app
from coterie.commands import profile as command
from coterie.errors import ModelError, UsageError
from coterie.scheduler import profile
from coterie.scheduler.profile import (
    ASSUMED,
    DeviceProfile,
    FlashChoice,
    FlashProfile,
    FlashRow,
    file_system,
    flash_choice,
    load_profile,
    profile_path,
    save_profile,
)

ROW = FlashRow("random", "io_uring", 1 << 20, 8, 1 << 30, 2.5e9, 12.5)
FOUND = FlashProfile("io_uring", 1 << 20, 4, 2.4e9, False, (ROW, replace(ROW, pattern="sequential")))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path))
    profile._warn.cache_clear()
    return tmp_path


def known(path: Path) -> DeviceProfile:
    return DeviceProfile(30e9, {file_system(path): FOUND})


def test_a_profile_comes_back_as_it_was_saved(home: Path) -> None:
    assert load_profile() == DeviceProfile()
    assert save_profile(known(home)) == profile_path()
    assert load_profile() == known(home)
    assert [path.name for path in home.iterdir()] == ["profile.json"]


def test_the_choice_is_of_the_files_file_system(home: Path) -> None:
    assert flash_choice(known(home), home) == FlashChoice(1 << 20, 4, 2.4e9, "profile", "io_uring")
    assert flash_choice(known(home), home / "not there") == ASSUMED
    assert flash_choice(known(home), Path("/proc/self")) == ASSUMED
    quick = DeviceProfile(flash={file_system(home): replace(FOUND, quick=True)})
    assert flash_choice(quick, home).source == "quick profile"
    assert flash_choice(DeviceProfile(), home) == FlashChoice(1 << 20, 8, None, "assumed")


def test_a_file_system_has_a_name(home: Path) -> None:
    device = os.stat(home).st_dev
    assert file_system(home).startswith(f"{os.major(device)}:{os.minor(device)} ")
    assert file_system(Path("/proc")).endswith(" proc proc")
    assert file_system(home / "nothing") == ""


def test_machines_that_share_a_folder_keep_their_profiles(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_profile(known(home))
    monkeypatch.setattr(profile, "machine", lambda: "another")
    assert load_profile() == DeviceProfile()
    save_profile(DeviceProfile(7e9))
    monkeypatch.undo()
    monkeypatch.setenv("COTERIE_HOME", str(home))
    assert load_profile() == known(home)
    for n in range(20):
        monkeypatch.setattr(profile, "machine", lambda n=n: f"machine {n}")
        save_profile(DeviceProfile(1e9))
    assert len(json.loads(profile_path().read_text())["machines"]) == profile.MACHINES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[]", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"version": 2}', "is damaged"),
        (b'{"version": 1, "machines": {}}', "is of version 1, and this Coterie knows 2"),
        (b" " * (profile.LARGEST_FILE + 1), "is too large for a device profile"),
    ],
    ids=["empty", "cut", "binary", "a list", "nested", "no machines", "older", "large"],
)
def test_a_damaged_profile_is_named_and_not_used(
    home: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    profile_path().write_bytes(content)
    assert load_profile() == DeviceProfile()
    assert load_profile() == DeviceProfile()
    expected = f"coterie: {profile_path()}: {message}; measure again with coterie profile --flash\n"
    assert capsys.readouterr().err == expected
    save_profile(known(home))
    assert load_profile() == known(home)


def test_every_wrong_value_is_noticed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_profile(known(home))
    right = json.loads(profile_path().read_text())
    name, machine = file_system(home), profile.machine()
    places: list[tuple[Any, ...]] = [("memory_bandwidth",), ("flash",), ("flash", name)]
    places += [("flash", name, key) for key in ("engine", "block", "depth", "bytes_per_s", "rows")]
    places += [("flash", name, "rows", 0, key) for key in ROW.__dict__]
    bad: list[Any] = ["x", -1, 1e300, [[]], True, {"a": 1}]
    for place in places:
        for value in bad:
            wrong = json.loads(json.dumps(right))
            at = wrong["machines"][machine]
            for key in place[:-1]:
                at = at[key]
            at[place[-1]] = value
            profile_path().write_text(json.dumps(wrong))
            profile._warn.cache_clear()
            assert load_profile() == DeviceProfile(), (place, value)
            assert "is damaged; measure again" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    save_profile(known(home))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UsageError, match=r"^cannot write the device profile .*: No space left on device$"):
        save_profile(DeviceProfile())
    assert load_profile() == known(home)
    assert [path.name for path in home.iterdir()] == ["profile.json"]


# --- measuring --------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep of a few points."""
    values: tuple[tuple[str, Any], ...] = (
        ("BLOCKS", (4096, 1 << 16, 1 << 18, 1 << 20)),
        ("DEPTHS", (1, 2, 4, 8)),
        ("NEAR", 1 << 22),
        ("LEAST_FILE", 1 << 23),
        ("POINT", 0.001),
        ("FINALISTS", 2),
        ("TRIALS", 2),
        ("PAUSE", 0.001),
    )
    for name, value in values:
        monkeypatch.setattr(sweep, name, value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 23))
    return path


def swept(path: Path) -> Sweep:
    try:
        return Sweep(path)
    except UsageError as error:
        if "direct reads are refused" not in str(error):
            raise
        pytest.skip(str(error))


def test_a_whole_sweep(short: None, file: Path) -> None:
    said: list[str] = []
    with swept(file) as made:
        found = made.whole(lambda label, done, total: said.append(label))
        points = list(made.points())
    assert found.engine in made.engines
    assert found.block in sweep.BLOCKS
    assert found.depth in (4, 8)
    assert found.bytes_per_s > 0
    assert not found.quick
    assert {(row.engine, row.pattern, row.block, row.depth, row.span) for row in found.rows} <= set(points)
    assert {row.pattern for row in found.rows} == {"sequential", "random"}
    assert {row.span for row in found.rows} == {1 << 22, 1 << 23}
    assert len(said) == len(points) + 2 * 2
    save_profile(DeviceProfile(flash={file_system(file): found}))
    assert load_profile().flash[file_system(file)] == found


def test_a_quick_sweep(short: None, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "QUICK_WAYS", ((1 << 16, 4), (1 << 20, 2)))
    swept(file).__exit__(None, None, None)
    found = quick_flash(file, 0.01)
    assert found.quick
    assert 1 <= len(found.rows) <= 2


def test_as_good_with_fewer_bytes_in_flight_is_better() -> None:
    rates = {("preadv", 1 << 20, 8): 1.0, ("io_uring", 1 << 20, 4): 0.98, ("io_uring", 1 << 18, 16): 0.975}
    found = sweep._chosen(rates | {("io_uring", 4096, 4): 0.5}, [], quick=False)
    assert (found.engine, found.block, found.depth, found.bytes_per_s) == ("io_uring", 1 << 18, 16, 0.975)


def test_what_cannot_be_measured_with_is_refused(short: None, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(bytes(4096))
    for _ in range(2):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(UsageError, match=r"small is too small to measure with; give a file of 8 MiB or more$"):
            swept(small)
        assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ModelError, match="nothing: No such file or directory"):
        Sweep(tmp_path / "nothing")


def test_memory_is_measured() -> None:
    assert memory_bandwidth(2, nbytes=1 << 20, trials=3) > 0


# --- the command ------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["profile", *arguments])


def test_the_command_measures_and_shows(short: None, home: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept(file).__exit__(None, None, None)
    assert run().stdout == "nothing has been measured yet: coterie profile --flash\n"
    monkeypatch.setattr(sweep, "memory_bandwidth", lambda: 30e9)
    result = run("--flash", str(file))
    assert result.exit_code == 0
    assert f"flash {file_system(file)}\n" in result.stdout
    assert "random over 4.0 MiB: MB/s (CPU us a read) by depth\n" in result.stdout
    assert "memory: 30.0 GB/s read by all cores\n" in result.stdout
    assert run().stdout == result.stdout
    shown = json.loads(run("--json").stdout)
    assert shown["path"] == str(profile_path())
    assert shown["flash"][file_system(file)]["block"] == load_profile().flash[file_system(file)].block


def test_without_a_file_one_is_made_and_goes(
    short: None, home: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept(file).__exit__(None, None, None)
    monkeypatch.setattr(command, "FILE_BYTES", 1 << 24)
    monkeypatch.setattr(command, "SPARE_BYTES", 0)
    monkeypatch.setattr(sweep, "memory_bandwidth", lambda: 30e9)
    before = {path.name for path in home.iterdir()}
    result = run("--flash", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["flash"].keys() == {file_system(home)}
    assert {path.name for path in home.iterdir()} - before == {"profile.json"}


def test_a_full_disk_is_named_before_anything_is_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30))
    result = run("--flash")
    assert result.exit_code == UsageError.exit_code
    assert "has 1.0 GiB left, too little for a file of 1.0 GiB" in result.stderr
    assert list(home.iterdir()) == []


def test_bad_arguments_are_refused(short: None, home: Path) -> None:
    assert "give --flash" in run("file").stderr
    assert "nothing: No such file or directory" in run("--flash", str(home / "nothing")).stderr
