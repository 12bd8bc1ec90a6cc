"""Compiled kernels are kept, named by their source, and made again when damaged."""

import os
import re
import shutil
import signal
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from coterie.errors import UnitError
from coterie.kernels import apart, library, target
from coterie.kernels.apart import CompilerProcess


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own, and no kernel linked yet."""
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path / "home"))
    for name in ("cache_folder", "address"):
        monkeypatch.setattr(library, name, getattr(library, name).__wrapped__)
    return library.cache_folder()


def cycles() -> int:
    return library.function("lane_cycles", 0)()


def test_the_cache_s_name_follows_every_kernel_source(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(Path(library.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(library, "__file__", str(copy / "library.py"))
    assert library.cache_folder() == cache  # the same sources elsewhere
    seen = {cache}
    for source in sorted(copy.glob("*.py")):
        text = source.read_text()
        source.write_text(text + "# edited\n")
        seen.add(library.cache_folder())
        source.write_text(text)
    assert len(seen) == 1 + len(list(copy.glob("*.py")))
    assert library.cache_folder() == cache
    monkeypatch.setattr(target, "features", lambda: frozenset({"avx2"}))
    assert library.cache_folder() not in seen


def test_kernels_are_kept_and_damaged_ones_compiled_again(cache: Path) -> None:
    assert not library.is_cached("lane_cycles")
    assert cycles() <= cycles()
    (file,) = cache.iterdir()
    assert library.is_cached("lane_cycles")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    good = file.read_bytes()
    assert cycles() <= cycles()
    assert file.read_bytes() == good
    middle = len(good) // 2
    for bad in (b"", b"nonsense", good[:-1], good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]):
        file.write_bytes(bad)
        assert cycles() <= cycles()
        assert library._read("lane_cycles") is not None  # whole again
        assert [path.name for path in cache.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_costs_only_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    assert cycles() <= cycles()
    assert not library.is_cached("lane_cycles")


def test_the_compiler_is_started_again_when_it_has_ended() -> None:
    compiler = CompilerProcess()
    first = compiler.compile("lane_cycles")
    assert compiler._process is not None
    os.kill(compiler._process.pid, signal.SIGKILL)
    assert compiler.compile("lane_cycles") == first
    compiler.end()
    assert compiler._process is None
    compiler.end()


NAMES = ["lane_cycles", "lane_post", "lane_pulse", "lane_event", "lane_await", "lane_watch"]


def test_many_kernels_are_compiled_by_two_processes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, start = list[int](), apart._start

    def counted() -> Any:
        process = start()
        started.append(process.pid)
        return process

    library.COMPILER.end()
    monkeypatch.setattr(apart, "_start", counted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    said = list[int]()
    library.compile_missing(NAMES, lambda label, done, total: said.append(done), 1 << 40)
    assert all(map(library.is_cached, NAMES))
    assert said == sorted(said)
    assert len(started) == 2
    assert library.COMPILER._process is None
    for path in cache.iterdir():
        path.unlink()
    library.compile_missing(NAMES, lambda label, done, total: None, 1 << 29)
    assert len(started) == 3


def test_an_error_in_the_second_process_is_everybody_s(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(UnitError, match="cannot compile kernel no_such_family: KeyError"):
        library.compile_missing([*NAMES, "no_such_family"], lambda label, done, total: None, 1 << 40)
    assert library.COMPILER._process is None


def test_functions_within_kernels_have_symbols_of_their_own() -> None:
    """Also when two kernels come from two processes: linked into one, they must not take each other's."""
    symbols = []
    for name in ("flash_lane:io_uring", "flash_lane:preadv"):
        compiler = CompilerProcess()
        _, code = compiler.compile(name)
        compiler.end()
        symbols.append(set(re.findall(rb"_ZN7coterie7kernels5flash10flash_lane\w*", code)))
        assert symbols[-1]
    assert not symbols[0] & symbols[1]


def test_what_cannot_be_compiled_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = CompilerProcess()
    with pytest.raises(UnitError, match="cannot compile kernel no_such_family: KeyError"):
        compiler.compile("no_such_family")
    assert compiler.compile("lane_cycles")  # by the same process
    compiler.end()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UnitError, match="cannot compile kernel lane_cycles: the compiler ended with status 1"):
        compiler.compile("lane_cycles")
    monkeypatch.setattr(sys, "executable", "/nowhere")
    with pytest.raises(UnitError, match="cannot start the compiler, /nowhere: No such file"):
        compiler.compile("lane_cycles")
