"""Opening a file for direct reads, which go past the page cache."""

import mmap
import os
from pathlib import Path

from coterie.errors import ModelError, UsageError


def open_direct(path: Path | str, *, buffered: bool = False) -> int:
    """A descriptor for reading with O_DIRECT, which the caller closes; with `buffered`, through the page cache.

    Raises ModelError where the file cannot be opened, UsageError where its filesystem refuses direct reads.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"cannot open {path}: {error.strerror}") from None
    if buffered:
        return fd
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        raise _refusal(path, error) from None
    finally:
        os.close(fd)
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:  # some filesystems open the file and then refuse to read
            os.preadv(direct, [page], 0)
    except OSError as error:
        os.close(direct)
        raise _refusal(path, error) from None
    return direct


def _refusal(path: Path | str, error: OSError) -> UsageError:
    return UsageError(f"{path}: direct reads are refused here ({error.strerror}); keep the packed model on a disk")
