"""Opening a file for direct reads, which go past the page cache."""

import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path

from coterie.errors import ModelError, UsageError

LEAST_SECTOR = 512  # bytes


def sector_bytes(path: Path) -> int:
    """What direct reads of a file at `path`, or of one in the folder that will hold it, must be multiples of."""
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (folder / "queue", folder.resolve().parent / "queue"):  # a partition's disk has it
        with suppress(OSError, ValueError):
            return max(LEAST_SECTOR, int((queue / "logical_block_size").read_text()))
    return mmap.PAGESIZE


def open_direct(path: Path | str, *, buffered: bool = False, name: Path | str | None = None) -> int:
    """A descriptor for reading with O_DIRECT, which the caller closes; with `buffered`, through the page cache. Errors
    call the file `name`, by default its path.

    Raises ModelError where the file cannot be opened, UsageError where its filesystem refuses direct reads.
    """
    name = path if name is None else name
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"cannot open {name}: {error.strerror}") from None
    try:
        if not buffered:
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
            with mmap.mmap(-1, mmap.PAGESIZE) as page:  # some filesystems take the flag and then refuse to read
                os.preadv(fd, [page], 0)
    except OSError as error:
        os.close(fd)
        raise UsageError(
            f"{name}: direct reads are refused here ({error.strerror}); keep the packed model on another disk "
            "(coterie pack -o)"
        ) from None
    return fd
