"""Where Coterie keeps what it fetches and what it compiles: one folder that can be thrown away."""

import functools
import os
import sys
import tempfile
from pathlib import Path

from coterie.errors import UsageError


def cache_dir() -> Path:
    """The first folder that can be written, created if absent.

    In this order: $COTERIE_HOME, $XDG_CACHE_HOME/coterie (~/.cache/coterie where unset), and a
    folder of this user's under the temporary folder. A note on stderr says where it is not the first.
    Raises UsageError where none can be written.
    """
    wanted = []
    if home := os.environ.get("COTERIE_HOME"):
        wanted.append(Path(home).expanduser().absolute())
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    wanted.append((cache if cache.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "coterie")
    return _choose(tuple(wanted))


def models_dir() -> Path:
    """Where fetched models lie."""
    return _made(cache_dir() / "models")


def kernels_dir() -> Path:
    """Where compiled kernels lie."""
    return _made(cache_dir() / "kernels")


def packed_dir() -> Path:
    """Where packed copies of models lie."""
    return _made(cache_dir() / "packed")


def sessions_dir() -> Path:
    """Where the journals of sessions lie: for their owner's eyes alone."""
    folder = cache_dir() / "sessions"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def check_writable(path: Path) -> None:
    """Raise UsageError where no file can be written: for what takes long before it writes one."""
    if path.is_dir() or not _writable_folder(path.parent):
        raise UsageError(f"cannot write {path}: name a file in a folder that can be written")


def _writable_folder(folder: Path) -> bool:
    """Whether a file can really be made there: mode bits say too little of mounts and of root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and durably. Raises OSError."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _choose(wanted: tuple[Path, ...]) -> Path:
    """The first writable folder, else the temporary one; a note says so, once, where it is not the first."""
    for folder in wanted:
        if folder.is_absolute() and _writable(folder):
            break
    else:
        folder = _temporary()
    if folder != wanted[0]:
        print(f"coterie: cannot write {wanted[0]}; using {folder} (set COTERIE_HOME to choose)", file=sys.stderr)
    return folder


def _temporary() -> Path:
    """A folder under the temporary one that belongs to this user alone.

    Compiled kernels are loaded as code, so a folder that somebody else made there is not used.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"coterie-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and not folder.is_symlink():
            return folder
        return Path(tempfile.mkdtemp(prefix="coterie-"))
    except OSError as error:
        raise UsageError(f"no folder can be written ({error}); set COTERIE_HOME to one that can") from None


def _writable(folder: Path) -> bool:
    """The same of a folder that is made if it is not there."""
    try:
        return _writable_folder(_made(folder))
    except OSError:
        return False
