"""The journal of a session: what was asked, and the ids of the answer as they come (docs/sessions.md).

Nothing in the file is taken on trust. Each record's checksum is also of the checksum before it, so a record that was
lost, doubled or moved ends what is believed, as a damaged one does. Nothing heavy is imported: reading needs no model.
"""

import fcntl
import os
import stat
import struct
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import msgpack

from coterie.errors import ModelError, UsageError

MAGIC, VERSION = b"COTERIEJ", 1
LARGEST_RECORD = 32 << 20  # bytes: prompts of eight million ids
LARGEST_FILE = 64 << 20  # bytes: about four million ids
MOST_STOPS = 1 << 16
SYNC_SECONDS = 2.0  # what a power failure may take; it is generated again
REASONS = ("stop", "length", "context")

_FRONT = struct.Struct("<8sI")  # magic, version
_FRAME = struct.Struct("<I8s")  # bytes of the payload, checksum


@dataclass(frozen=True)
class Request:
    """What was asked. `model`: as it was named; `path`: the file or folder it was; `identity`: as of
    storage.activations.model_key; `numerics`: the class and its version; `prompt`: ids; `sampling`: SamplingOptions'
    fields, the seed included; `context`: positions; `kv`: whether there is a KV file beside the journal."""

    model: str
    path: str
    identity: str
    numerics: str
    prompt: list[int]
    sampling: dict[str, int | float]
    stop: list[str]
    max_tokens: int
    context: int
    kv: bool

    def encode(self) -> bytes:
        """The first record's payload. Raises UsageError for what no journal can hold."""
        try:
            ids = struct.pack(f"<{len(self.prompt)}I", *self.prompt)
            payload: bytes = msgpack.packb(asdict(self) | {"prompt": ids})
            Request.decode(msgpack.unpackb(payload))
        except (OverflowError, TypeError, ValueError, struct.error) as error:
            raise UsageError(f"this request cannot be kept in a session: {error}") from None
        if len(payload) > LARGEST_RECORD:
            raise UsageError(f"the prompt is too long for a session: {len(payload) >> 20} MiB")
        return payload

    @classmethod
    def decode(cls, fields: Any) -> Self:
        """Raises ValueError unless every field is there and of its type."""
        if not isinstance(fields, dict) or fields.keys() != cls.__dataclass_fields__.keys():
            raise ValueError("it has other fields")
        ids, sampling, stop = fields["prompt"], fields["sampling"], fields["stop"]
        sound = (
            all(isinstance(fields[name], str) for name in ("model", "path", "identity", "numerics"))
            and isinstance(ids, bytes)
            and len(ids) % 4 == 0 < len(ids)
            and isinstance(sampling, dict)
            and all(isinstance(name, str) and type(value) in (int, float) for name, value in sampling.items())
            and isinstance(stop, list)
            and len(stop) <= MOST_STOPS
            and all(isinstance(text, str) for text in stop)
            and type(fields["max_tokens"]) is int
            and fields["max_tokens"] >= -1
            and type(fields["context"]) is int
            and fields["context"] >= len(ids) // 4
            and type(fields["kv"]) is bool
        )
        if not sound:
            raise ValueError("a field is not what it must be")
        return cls(**fields | {"prompt": list(struct.unpack(f"<{len(ids) // 4}I", ids))})


@dataclass(frozen=True)
class Contents:
    """What can be believed of a journal: `size` of its `found` bytes; `seal`: the last record's checksum."""

    request: Request
    tokens: list[int]
    finish_reason: str | None
    size: int
    found: int
    seal: bytes


class Journal:
    """An open journal, for this process alone until it is closed: `request`, `tokens` and `finish_reason` as they were
    when it was opened."""

    def __init__(self, path: Path, fd: int, contents: Contents) -> None:
        self.path, self._fd = path, fd
        self.request, self.tokens, self.finish_reason = contents.request, contents.tokens, contents.finish_reason
        self._size, self._seal = contents.size, contents.seal
        self._synced = time.monotonic()
        self._close = weakref.finalize(self, os.close, fd)

    @classmethod
    def create(cls, path: Path, request: Request) -> Self:
        """A new journal. Raises UsageError where there is one already, or none can be written."""
        payload, front = request.encode(), _FRONT.pack(MAGIC, VERSION)
        fd = _open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        journal = cls(path, fd, Contents(request, [], None, 0, 0, front))
        try:
            _lock(fd, path)
            journal._write(front + journal._framed(payload))
            journal._sync()
            _sync_folder(path.parent)
        except BaseException:
            path.unlink()
            journal.close()
            raise
        return journal

    @classmethod
    def resume(cls, path: Path) -> Self:
        """The journal as it is, cut at its last good record; a note on stderr says what was cut.

        Raises UsageError where there is none or another process has it, ModelError where its beginning is damaged.
        """
        fd = _open(path, os.O_RDWR | os.O_APPEND)
        try:
            _lock(fd, path)
            contents = _contents(fd, path)
            if contents.found > contents.size:
                os.ftruncate(fd, contents.size)
                print(
                    f"coterie: {path}: {contents.found - contents.size} damaged bytes at its end were cut; "
                    f"{len(contents.tokens)} tokens are kept",
                    file=sys.stderr,
                )
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, contents)

    def append(self, token: int) -> None:
        """One more id, by one write: it outlives the process at once, the machine within SYNC_SECONDS.

        Raises UsageError where it cannot be written.
        """
        self._write(self._framed(msgpack.packb(token)))
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def end(self, reason: str) -> None:
        """The answer is complete."""
        self._write(self._framed(msgpack.packb(reason)))
        self._sync()

    def close(self) -> None:
        """Let others have it. A second call does nothing."""
        self._close()

    def _framed(self, payload: bytes) -> bytes:
        self._seal = _seal(self._seal, payload)
        return _FRAME.pack(len(payload), self._seal) + payload

    def _write(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > LARGEST_FILE:
            raise UsageError(f"{self.path}: a session has {LARGEST_FILE >> 20} MiB at most; begin a new one")
        try:
            count = os.write(self._fd, data)
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}; resume it when it can be written") from None
        if count != len(data):
            raise UsageError(f"cannot write {self.path}: the disk is full; resume it when there is room")

    def _sync(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}; resume it when it can be written") from None
        self._synced = time.monotonic()


def read_journal(path: Path) -> Contents:
    """What a journal holds now, whoever has it open. Raises as `Journal.resume`."""
    fd = _open(path, os.O_RDONLY)
    try:
        return _contents(fd, path)
    finally:
        os.close(fd)


def delete_journal(path: Path) -> None:
    """Remove a journal, damaged or not, and its KV file. Raises UsageError where another process has it."""
    fd = _open(path, os.O_RDONLY)
    try:
        _lock(fd, path)
        kv_path(path).unlink(missing_ok=True)
        path.unlink()
    except OSError as error:
        raise UsageError(f"cannot delete {path}: {error.strerror}") from None
    finally:
        os.close(fd)


def kv_path(path: Path) -> Path:
    """Where the KV file of a journal lies."""
    return path.with_name(f"{path.name}.kv")


# --- reading -------------------------------------------------------------------------------------------


def _contents(fd: int, path: Path) -> Contents:
    size = os.fstat(fd).st_size
    if size > LARGEST_FILE:
        raise ModelError(f"{path}: it has {size >> 20} MiB and is no session of Coterie's")
    try:
        data = os.pread(fd, size, 0)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    return parse(data, path)


def parse(data: bytes, path: Path) -> Contents:
    """The records up to the first that is not sound. Raises ModelError where that is the first of all."""
    if len(data) < _FRONT.size or not data.startswith(MAGIC):
        raise ModelError(f"{path}: it does not begin as a session does; delete it, or name another")
    _, version = _FRONT.unpack_from(data)
    if version != VERSION:
        raise ModelError(f"{path}: session format {version} is not this Coterie's {VERSION}")
    records = _records(data)
    try:
        fields, size, seal = next(records)
        request = Request.decode(fields)
    except (StopIteration, ValueError):
        raise ModelError(f"{path}: the session's first record, the request, is damaged; begin anew") from None
    tokens: list[int] = []
    reason: str | None = None
    for value, end, sealed in records:
        if type(value) is int and 0 <= value < 1 << 32:
            tokens.append(value)
        elif value in REASONS:
            reason = value
        else:
            break
        size, seal = end, sealed
        if reason is not None:
            break
    return Contents(request, tokens, reason, size, len(data), seal)


def _records(data: bytes) -> Iterator[tuple[Any, int, bytes]]:
    """Each record that is whole, its end and its checksum, up to the first that is not."""
    at, seal = _FRONT.size, data[: _FRONT.size]
    while len(data) - at >= _FRAME.size:
        length, expected = _FRAME.unpack_from(data, at)
        first, at = at + _FRAME.size, at + _FRAME.size + length
        payload = data[first:at]
        if length > LARGEST_RECORD or at > len(data) or _seal(seal, payload) != expected:
            return
        seal = expected
        try:
            value = msgpack.unpackb(payload, max_array_len=MOST_STOPS, max_map_len=64, max_ext_len=0)
        except ValueError:
            return
        yield value, at, seal


def _seal(before: bytes, payload: bytes) -> bytes:
    """A record's checksum, 8 bytes: of its payload and of all that is before it."""
    return blake2b(before + len(payload).to_bytes(4, "little") + payload, digest_size=8).digest()


# --- files ---------------------------------------------------------------------------------------------


def _open(path: Path, flags: int) -> int:
    """A descriptor of the regular file. Raises UsageError."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its other end. Prompts are private: 0600.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except FileExistsError:
        raise exists_already(path) from None
    except FileNotFoundError:
        what = f"there is no folder {path.parent}" if flags & os.O_CREAT else f"there is no session {path}"
        raise UsageError(f"{what}; coterie sessions lists those there are") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot open the session {path}: {reason}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"cannot open the session {path}: it is not a regular file")
    return fd


def exists_already(path: Path) -> UsageError:
    """Said of a new session that is none."""
    return UsageError(f"the session {path} exists already: continue it with --resume, or name another")


def _lock(fd: int, path: Path) -> None:
    """The lock goes with the descriptor, and so with the process, however that ends."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"the session {path} is in use by another process; wait until that has ended") from None
    except OSError as error:
        raise UsageError(f"cannot lock the session {path}: {error.strerror}") from None
    if os.fstat(fd).st_nlink == 0:
        raise UsageError(f"there is no session {path} any more: it was just deleted")


def _sync_folder(folder: Path) -> None:
    """Make a new file's name outlive the machine."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
