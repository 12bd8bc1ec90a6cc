"""The journal of a session: its format, and what is believed of a damaged one."""

import os
import random
import struct
import time
from dataclasses import asdict, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgpack
import pytest
from damage import damaged_bytes, little_memory_and_no_hang, survives

from coterie.errors import CoterieError, ModelError, UsageError
from coterie.storage import journal as module
from coterie.storage.journal import Journal, Request, delete_journal, kv_path, parse, read_journal

REQUEST = Request(
    model="smollm2",
    path="/models/smollm2.gguf",
    identity="ab" * 32,
    numerics="exact, version 1",
    prompt=[1, 300, 70_000],
    sampling={"temperature": 0.8, "top_k": 40, "seed": 2**64 - 1},
    stop=["END", "Grüße\n"],
    max_tokens=-1,
    context=512,
    kv=False,
)
TOKENS = [0, 5, 127, 128, 65_535, 70_000, 2**32 - 1]
NOWHERE = Path("s.journal")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.journal"


def write(path: Path, tokens: list[int] = TOKENS, reason: str | None = "stop", request: Request = REQUEST) -> bytes:
    journal = Journal.create(path, request)
    for token in tokens:
        journal.append(token)
    if reason is not None:
        journal.end(reason)
    journal.close()
    return path.read_bytes()


def framed(*payloads: Any, raw: bytes | None = None) -> bytes:
    """A file of these records, written as docs/sessions.md says; `raw`: the last payload as bytes."""
    seal = data = b"COTERIEJ" + struct.pack("<I", 1)
    for payload in [msgpack.packb(each) for each in payloads] + ([] if raw is None else [raw]):
        length = struct.pack("<I", len(payload))
        seal = blake2b(seal + length + payload, digest_size=8).digest()
        data += length + seal + payload
    return data


def fields(**changed: Any) -> dict[str, Any]:
    return asdict(REQUEST) | {"prompt": struct.pack("<3I", *REQUEST.prompt)} | changed


# --- the file ----------------------------------------------------------------------------------------


def test_the_format_is_the_documented_one(path: Path) -> None:
    assert write(path) == framed(fields(), *TOKENS, "stop")
    assert write(path.with_name("t"), [], None) == framed(fields())


@pytest.mark.parametrize("reason", [None, "stop", "length", "context"])
def test_what_was_written_is_read(path: Path, reason: str | None) -> None:
    size = len(write(path, reason=reason))
    found = read_journal(path)
    assert (found.request, found.tokens, found.finish_reason) == (REQUEST, TOKENS, reason)
    assert (found.size, found.found) == (size, size)


def test_a_journal_goes_on_where_it_ended(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, TOKENS[:3], None)
    for token in TOKENS[3:]:
        journal = Journal.resume(path)
        journal.append(token)
        journal.close()
    journal = Journal.resume(path)
    assert (journal.request, journal.tokens, journal.finish_reason) == (REQUEST, TOKENS, None)
    journal.end("length")
    assert path.read_bytes() == framed(fields(), *TOKENS, "length")
    assert capsys.readouterr().err == ""


def test_journals_are_private_and_new(path: Path) -> None:
    before = os.umask(0)
    try:
        data = write(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="exists already: continue it with --resume"):
        Journal.create(path, REQUEST)
    assert path.read_bytes() == data


def test_each_token_is_one_write_and_there_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.create(path, REQUEST)
    writes, write = [], os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(data) or write(fd, data))  # type: ignore[func-returns-value]
    for n, token in enumerate(TOKENS, start=1):
        journal.append(token)
        assert len(writes) == n
        assert read_journal(path).tokens == TOKENS[:n]


def test_the_disk_is_waited_for_every_two_seconds_and_at_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, syncs = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    journal = Journal.create(path, REQUEST)
    monkeypatch.setattr(os, "fdatasync", lambda fd: syncs.append(now[0]))
    for _ in range(50):
        now[0] += 0.25
        journal.append(1)
    assert syncs == [102.0, 104.0, 106.0, 108.0, 110.0, 112.0]
    journal.end("stop")
    assert len(syncs) == 7


# --- damage ------------------------------------------------------------------------------------------


def check_cut(path: Path, size: int, notes: str) -> None:
    """Resuming cuts a file behind a true beginning, says so if there was something to cut, and goes on from there."""
    kept = parse(path.read_bytes(), path)
    assert kept.tokens == TOKENS[: len(kept.tokens)]
    whole = framed(fields(), *kept.tokens, *([kept.finish_reason] if kept.finish_reason else []))
    assert path.read_bytes() == whole
    assert len(whole) <= size
    assert notes.count("\n") == (len(whole) < size)
    assert len(whole) == size or f"{size - len(whole)} damaged bytes" in notes


def test_a_journal_torn_at_any_byte_is_cut(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, header = write(path), len(framed(fields()))
    for size in range(len(data)):
        path.write_bytes(data[:size])
        if size < header:
            with pytest.raises(ModelError, match=r"^[^\n]+$"):
                Journal.resume(path)
            assert path.read_bytes() == data[:size]
            continue
        Journal.resume(path).close()
        check_cut(path, size, capsys.readouterr().err)
        journal = Journal.resume(path)
        journal.append(9)
        assert read_journal(path).tokens == [*journal.tokens, 9]
        journal.close()


def true_beginning(data: bytes) -> None:
    """Raises, or finds what was asked and the first ids of the answer."""
    found = parse(data, NOWHERE)
    assert found.request == REQUEST
    assert found.tokens == TOKENS[: len(found.tokens)]
    assert found.finish_reason in (None, "stop")
    assert found.finish_reason is None or found.tokens == TOKENS


def test_every_flipped_bit_is_noticed(path: Path) -> None:
    data, header = write(path), len(framed(fields()))
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            if at < header:
                with pytest.raises(ModelError):
                    parse(bytes(damaged), NOWHERE)
            else:
                assert parse(bytes(damaged), NOWHERE).size <= at
                true_beginning(bytes(damaged))


def test_mutants_are_refused_or_cut_to_a_true_beginning(path: Path) -> None:
    data = write(path, TOKENS)
    chance = random.Random(1)
    sound = 0
    with little_memory_and_no_hang():
        for _ in range(3000):
            sound += survives(true_beginning, damaged_bytes(chance, data, len(data)))
    assert 100 < sound < 2900  # of both kinds there are enough


def test_records_that_were_lost_doubled_or_moved_end_it() -> None:
    whole = framed(fields(), *TOKENS)
    ends = [len(framed(fields(), *TOKENS[:n])) for n in range(len(TOKENS) + 1)]
    records = [whole[a:b] for a, b in pairwise(ends)]
    head = whole[: ends[0]]
    for order, kept in (((0, 2, 3), 1), ((0, 0, 1), 1), ((1, 0, 2), 0), ((0, 1, 1, 2), 2), ((3,), 0)):
        found = parse(head + b"".join(records[i] for i in order), NOWHERE)
        assert found.tokens == TOKENS[:kept], order


@pytest.mark.parametrize(
    "value", [-1, 2**32, 2**63, True, None, 1.0, "end", "", b"stop", [1], [["stop"]], {"a": 1}, msgpack.Timestamp(1)]
)
def test_a_well_sealed_record_of_nonsense_ends_it(value: Any) -> None:
    found = parse(framed(fields(), 1, 2, value, 3), NOWHERE)
    assert (found.tokens, found.finish_reason) == ([1, 2], None)
    assert found.size == len(framed(fields(), 1, 2))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",  # arrays, maps and bytes that claim to be large
        b"\xdf\x00\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x01\x02",
        b"\x91" * 5000,
        b"\xa1\xff",
        b"\x81\x90\x01",
        b"\xc7\xff\x05",
    ],
)
def test_what_is_no_msgpack_ends_it(raw: bytes) -> None:
    def use() -> None:
        assert parse(framed(fields(), 7, raw=raw), NOWHERE).tokens == [7]

    with little_memory_and_no_hang():
        assert survives(use)
        assert not survives(parse, framed(raw=raw), NOWHERE)


def test_nothing_behind_the_end_is_believed() -> None:
    found = parse(framed(fields(), 1, "length", 2, "stop"), NOWHERE)
    assert (found.tokens, found.finish_reason) == ([1], "length")
    assert found.size == len(framed(fields(), 1, "length"))


WRONG: dict[str, list[Any]] = {
    "model": [1, None, b"x"],
    "path": [["/"]],
    "identity": [b"ab"],
    "numerics": [None],
    "prompt": [b"", b"123", [1, 2], "1234", bytes(4 * 513)],
    "sampling": [None, [], {"seed": "1"}, {"seed": True}, {"seed": None}, {"top_k": [1]}],
    "stop": ["END", [1], [b"END"], {"a": 1}],
    "max_tokens": [-2, 1.5, "1", True, None],
    "context": [0, 2, -1, 1.0, None],
    "kv": [0, None, "yes"],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_request_of_nonsense_is_refused(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(ModelError, match=r"^[^\n]*request, is damaged"):
            parse(framed(fields(**{name: value}), 1), NOWHERE)


def test_a_request_with_other_fields_is_refused() -> None:
    fewer = fields()
    del fewer["stop"]
    for value in (fewer, fields(more=1), list(fields()), 1, None):
        with pytest.raises(ModelError, match="request, is damaged"):
            parse(framed(value, 1), NOWHERE)


def test_other_files_and_versions_are_refused(path: Path) -> None:
    for data in (b"", b"GGUF" + bytes(100), b"COTERIEJ"):
        with pytest.raises(ModelError, match="does not begin as a session does"):
            parse(data, NOWHERE)
    with pytest.raises(ModelError, match="format 2 is not this Coterie's 1"):
        parse(b"COTERIEJ\2\0\0\0", NOWHERE)
    with path.open("wb") as file:
        file.truncate(module.LARGEST_FILE + 1)
    with pytest.raises(ModelError, match="64 MiB and is no session"):
        Journal.resume(path)


# --- files -------------------------------------------------------------------------------------------


def test_one_process_has_a_journal_at_a_time(path: Path) -> None:
    journal = Journal.create(path, REQUEST)
    for use in (Journal.resume, delete_journal):
        with pytest.raises(UsageError, match="in use by another process"):
            use(path)
    journal.append(1)
    assert read_journal(path).tokens == [1]  # looking is no use
    journal.close()
    journal.close()
    again = Journal.resume(path)
    del again  # dropped is closed
    Journal.resume(path).close()


def test_deleting_takes_the_kv_file_along(path: Path) -> None:
    write(path)
    kv_path(path).write_bytes(b"x")
    delete_journal(path)
    assert list(path.parent.iterdir()) == []
    with pytest.raises(UsageError, match="there is no session"):
        delete_journal(path)
    path.write_bytes(b"damaged")
    delete_journal(path)
    assert list(path.parent.iterdir()) == []


def test_what_is_no_file_is_refused(path: Path) -> None:
    os.mkfifo(path.with_name("fifo"))
    for wrong, said in (
        (path, "there is no session"),
        (path.parent, "Is a directory|not a regular file"),
        (path.with_name("fifo"), "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (path / "\0", "null"),
    ):
        for use in (Journal.resume, read_journal):
            with pytest.raises(UsageError, match=said):
                use(wrong)
    with pytest.raises(UsageError, match="there is no folder"):
        Journal.create(path / "s", REQUEST)


def test_a_disk_that_is_full_is_one_line_and_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = os.write, [1 << 20]

    def limited(fd: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        count = write(fd, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(os, "write", limited)
    for left in (0, 1, 12):
        room[0] = 1 << 20
        journal = Journal.create(path, REQUEST)
        journal.append(1)
        room[0] = left
        with pytest.raises(UsageError, match=r"cannot write .*(No space left|is full)"):
            journal.append(2)
        journal.close()
        assert read_journal(path).tokens == [1]
        path.unlink()
    with pytest.raises(UsageError, match="cannot write"):
        Journal.create(path, REQUEST)
    assert not path.exists()


def test_what_no_journal_can_hold_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrongs: tuple[dict[str, Any], ...] = (
        {"prompt": []},
        {"prompt": [2**32]},
        {"sampling": {"top_k": 2**64}},
        {"stop": ["\ud800"]},
        {"context": 2},
    )
    for wrong in wrongs:
        with pytest.raises(UsageError, match=r"^this request cannot be kept"):
            Journal.create(path, replace(REQUEST, **wrong))
    monkeypatch.setattr(module, "LARGEST_RECORD", 100)
    with pytest.raises(UsageError, match="too long for a session"):
        Journal.create(path, REQUEST)
    assert not path.exists()
    monkeypatch.undo()
    journal = Journal.create(path, REQUEST)
    monkeypatch.setattr(module, "LARGEST_FILE", path.stat().st_size + 20)
    journal.append(1)
    with pytest.raises(CoterieError, match="begin a new one"):
        journal.append(2)
    assert read_journal(path).tokens == [1]
