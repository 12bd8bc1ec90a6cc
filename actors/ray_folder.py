"""The folders of Ray sessions: who holds one, and what is left of those that nobody holds.

    <runtime or temporary folder>/coterie-ray-<uid>/<name>/    a session; its keeper holds a lock on the folder itself
        session.json    address, processes: written once Ray answers
        token           what a connection must show
        log             what the head said while it started
        r/              Ray's own: sockets, logs

All of it is this user's alone. A lock goes with its process, however that ends, so a folder that can be locked has no
keeper any more: whoever starts or looks next ends what is left of its processes, and removes it.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coterie.errors import UnitError, UsageError

CLUSTER = "cluster"  # the session that stays until it is stopped; others have random names
MARK = "COTERIE_RAY_FOLDER"  # in the environment of every process of a session
SOCKET = "r/s/sockets/plasma_store"  # the longest path of a socket in a session
SOCKET_LIMIT = 107  # bytes
NAME_BYTES = 4
STRAGGLE = 10.0  # seconds that killed processes may take to go


def base() -> Path:
    """Where this user's sessions are; it need not exist. Raises UsageError where socket paths would be too long."""
    places = [Path(os.environ.get("XDG_RUNTIME_DIR", "")), Path(tempfile.gettempdir()), Path("/tmp")]
    for place in places:
        folder = place / f"coterie-ray-{os.getuid()}"
        longest = max(len(CLUSTER), 2 * NAME_BYTES) + len(SOCKET) + 2
        if place.is_absolute() and len(os.fsencode(folder)) + longest <= SOCKET_LIMIT and os.access(place, os.W_OK):
            return folder
    raise UsageError("no folder for Ray's sockets: set TMPDIR to one that can be written, of 50 letters at most")


def claim(cluster: bool) -> tuple[Path, int]:
    """A new session's folder, and the descriptor that locks it until it is closed.

    What sessions without a keeper have left is removed first. Raises UnitError where the cluster is there already,
    or the folder belongs to somebody else.
    """
    with _alone(make=True) as folder:
        assert folder is not None
        _sweep(folder)
        path = folder / (CLUSTER if cluster else secrets.token_hex(NAME_BYTES))
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            raise UnitError("a cluster of yours runs already: coterie cluster status, coterie cluster stop") from None
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path, lock


def sweep() -> None:
    """Remove what sessions without a keeper have left: processes, sockets, folders."""
    with _alone(make=False) as folder:
        if folder is not None:
            _sweep(folder)
            with contextlib.suppress(OSError):  # others are left
                folder.rmdir()


def discard(path: Path) -> None:
    """Remove a session's folder, and the folder of all if it was the last."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def read_session(name: str = CLUSTER) -> dict[str, Any] | None:
    """What a running session's keeper wrote down; None where none of that name runs, or it is still starting."""
    path = base() / name
    if not held(path):
        return None
    try:
        session = json.loads((path / "session.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return session if isinstance(session, dict) else None


def write_session(path: Path, session: dict[str, Any]) -> None:
    """Write that down, whole or not at all."""
    temporary = path / "session.json.new"
    temporary.write_text(json.dumps(session), encoding="utf-8")
    temporary.rename(path / "session.json")


def held(path: Path) -> bool:
    """Whether a keeper holds this session."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def members(path: Path) -> list[int]:
    """Ids of the processes that were started for a session and are still there."""
    mark = b"\0" + f"{MARK}={path}".encode() + b"\0"
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if mark in b"\0" + file.read() + b"\0":
                    found.append(int(name))
    return found


@contextlib.contextmanager
def _alone(make: bool) -> Iterator[Path | None]:
    """The folder of all sessions, locked against others that make or remove some; None if there is none to `make`."""
    folder = base()
    while True:
        if make:
            folder.mkdir(mode=0o700, exist_ok=True)
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            if make:
                continue  # removed by a session that ended just now
            yield None
            return
        try:
            status = os.fstat(fd)
            if status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise UnitError(f"{folder} belongs to somebody else, or others may enter it: remove it, or set TMPDIR")
            fcntl.flock(fd, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(folder).st_ino == status.st_ino:
                    yield folder
                    return
        finally:
            os.close(fd)


def _sweep(folder: Path) -> None:
    for path in folder.iterdir():
        if not held(path):
            _end(path)
            shutil.rmtree(path, ignore_errors=True)


def _end(path: Path) -> None:
    """End what is left of a session whose keeper was killed: little, since Ray dies with its keeper."""
    deadline = time.monotonic() + STRAGGLE
    while (pids := members(path)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
