"""Larger than memory on a disk that fails: retries, clear errors, and going on afterwards (docs/faults.md)."""

import ctypes
import errno
import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from exact_models import CONTEXT, decoded, some_tokens
from faulty_disk import Reader, faulty, honest
from harness import until
from packed_models import packed, streaming
from reference import same_bits

from coterie import stream
from coterie.actors import reading
from coterie.engine import Engine
from coterie.errors import CoterieError, ModelError, UnitError
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes
from coterie.sizes import Share

N = 24


pytestmark = pytest.mark.usefixtures("many_extents")


def test_passing_faults_cost_only_retries(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def reader(fd: int, address: int, nbytes: int, offset: int) -> int:
        nonlocal count
        count += 1
        match count % 12:
            case 3:
                return -errno.EIO
            case 5:
                return honest(fd, address, nbytes // 2 // 4096 * 4096, offset) or -errno.EINTR
            case 7:
                ctypes.memset(address, 0xAA, nbytes)
                return nbytes
            case 9:
                return -errno.EAGAIN
        return honest(fd, address, nbytes, offset)

    tokens = some_tokens(N)
    with streaming(llama, None) as engine:
        expected = decoded(engine, tokens)
    with faulty(llama, reader, monkeypatch) as engine:
        assert same_bits(decoded(engine, tokens), expected)
        report = engine.flash_report()
    assert report is not None
    assert report["retries"] > 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda *call: -errno.EIO, "Input/output error"),
        (lambda *call: 0, "cut"),
        (lambda fd, address, nbytes, offset: ctypes.memset(address, 0xAA, nbytes) * 0 + nbytes, "wrong checksum"),
    ],
    ids=["EIO", "short", "wrong bytes"],
)
def test_a_disk_that_fails_for_good_is_a_clear_error(
    fault: Reader, message: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = False

    def reader(*call: int) -> int:
        return fault(*call) if broken else honest(*call)

    tokens = some_tokens(N)
    with faulty(llama, reader, monkeypatch) as engine:
        expected = decoded(engine, tokens)
        broken = True
        with pytest.raises(UnitError, match=message) as caught:
            decoded(engine, tokens)
        assert str(llama) in str(caught.value)
        broken = False  # once the disk is well again, so are the tokens
        again = engine.sequence()
        assert same_bits(np.stack([engine.decode([again], [t])[0] for t in tokens]), expected)


def test_a_stalled_disk_can_be_interrupted_and_ends_by_itself(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stalled, release = False, threading.Event()

    def reader(*call: int) -> int:
        if stalled:
            release.wait()
        return honest(*call)

    tokens = some_tokens(N)
    monkeypatch.setattr(stream, "PATIENCE", 0.2)
    with faulty(llama, reader, monkeypatch) as engine:
        expected = decoded(engine, tokens)
        stalled = True
        with pytest.raises(UnitError, match="the disk has not answered"):
            decoded(engine, tokens)
        with pytest.raises(UnitError, match="the disk has not answered"):  # memory is not given away under its reads
            engine.set_memory(Share(0.6))
        release.set()
        stalled = False
        until(lambda: engine.stream is not None and engine.stream.unit.in_flight == 0)
        again = engine.sequence()
        assert same_bits(np.stack([engine.decode([again], [t])[0] for t in tokens]), expected)


def test_a_model_may_be_closed_and_forgotten_while_the_disk_hangs(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thread still works on stays mapped until it is done."""
    stalled, release = False, threading.Event()

    def reader(*call: int) -> int:
        if stalled:
            release.wait()
        return honest(*call)

    monkeypatch.setattr(stream, "PATIENCE", 0.2)
    monkeypatch.setattr(reading, "LAST_WAIT", 0.1)
    with faulty(llama, reader, monkeypatch) as engine:
        decoded(engine, some_tokens(2))
        stalled = True
        with pytest.raises(UnitError, match="the disk has not answered"):
            decoded(engine, some_tokens(N))
    del engine
    gc.collect()
    release.set()
    until(lambda: not any(thread.name.startswith("coterie-") for thread in threading.enumerate()))


@pytest.mark.parametrize("name", ["coterie-flash", "coterie-lane-0"])
def test_an_interrupt_while_threads_start_leaves_none(name: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == name:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Engine(open_model(llama), Wishes(threads=2, memory=Share(0.5)))
    gc.collect()
    until(lambda: not any(thread.name.startswith("coterie-") for thread in threading.enumerate()))


def test_a_model_that_is_dropped_leaves_no_file_open(llama: Path) -> None:
    def use() -> int:
        engine = Engine(open_model(llama), Wishes(threads=2, context=CONTEXT, memory=Share(0.5)))
        decoded(engine, some_tokens(2))
        del engine
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    first = use()
    assert use() == first


def test_a_file_that_loses_its_name_is_read_on(folder: Path) -> None:
    path = packed(folder, "llama Q8_0")
    tokens = some_tokens(N)
    with streaming(path, 0.3) as engine:
        expected = decoded(engine, tokens)
        path.unlink()
        assert same_bits(decoded(engine, tokens), expected)


def test_a_file_that_is_changed_in_use_is_an_error(folder: Path) -> None:
    path = packed(folder, "llama Q5_0")
    tokens = some_tokens(N)
    with streaming(path, 0.3) as engine:
        decoded(engine, tokens)
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 3)
            file.write(bytes(range(256)) * 64)
        with pytest.raises(CoterieError, match="checksum"):
            decoded(engine, tokens)
        with pytest.raises(ModelError, match="changed"):
            engine.set_memory(Share(0.9))
        with pytest.raises(ModelError, match="changed"):  # and nothing is computed before that has been done
            decoded(engine, tokens)


def test_a_file_that_is_cut_in_use_is_an_error(folder: Path) -> None:
    path = packed(folder, "llama Q4_1")
    with streaming(path, 0.3) as engine:
        decoded(engine, some_tokens(N))
        os.truncate(path, 8192)
        with pytest.raises(UnitError, match=r"cut|bytes"):
            decoded(engine, some_tokens(N))


def test_a_change_of_the_ceiling_that_fails_is_done_before_the_next_token(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = some_tokens(N)
    with streaming(llama, 0.3) as engine:
        expected = decoded(engine, tokens)
        assert engine.stream is not None

        def interrupt(*call: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine.stream, "_load", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.set_memory(Share(1.0))
        assert same_bits(decoded(engine, tokens), expected)
        assert engine.plan.streamed_per_token == 0
