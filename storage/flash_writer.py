"""Writing flash files: streamed, past the page cache, and under their name only once they are whole."""

import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ModelError, UsageError
from coterie.kernels.shapes import CLUSTER
from coterie.models.load import Model, open_source
from coterie.models.source import WeightSource
from coterie.paths import packed_dir, replace_file
from coterie.storage.arena import round_up
from coterie.storage.checksum import checksum
from coterie.storage.flash_file import (
    FACTORS,
    SECTIONS,
    FlashFile,
    FrontPage,
    encode_manifest,
    is_flash_file,
    manifest_table,
    page_buffer,
)
from coterie.storage.packer import RunPacker
from coterie.storage.runs import PAGE, Extents, Run, lay_out_runs

Bytes = NDArray[np.uint8]
Fill = Callable[[Run, int, Bytes], None]  # puts an extent of a run into uint8[its bytes] that holds zeros
Progress = Callable[[str, int, int], None]  # label, bytes done, bytes in all

BLOCK = 8 << 20  # bytes written at a time, where extents are smaller
ROOM = 64 << 20  # bytes that must be free beside the extents: manifest, header, the file system's own
POLL_SECONDS = 0.2


def pack_model(model: Model, out: Path, progress: Progress) -> None:
    """Pack an open model into the flash file `out`, in whose place a packed model may stand.

    Raises UsageError where it cannot be written there, ModelError where the model is damaged.
    """
    with _only_one(out, progress) as fd:
        _pack(model, out, fd, progress)


def check_place(out: Path, progress: Progress) -> None:
    """Raise UsageError where no flash file can be written: for what takes long before it writes one."""
    with _only_one(out, progress):
        pass


def packed_path(file: WeightSource) -> Path:
    """Where the packed copy of a model is kept, in Coterie's cache; it need not be there yet."""
    name = re.sub(r"[^\w.-]", "_", file.path.name.removesuffix(".gguf"), flags=re.ASCII)[:100]
    return packed_dir() / f"{name}-{file.key().hex()[:16]}.coterie"


def packed_copy(model: Model, progress: Progress) -> Path:
    """The packed copy of an open model in the cache, made now if it is not there. Raises as `pack_model`."""
    out = packed_path(model.source)
    if not _is_copy(out, model.source):
        _sweep(out.parent)
        with _only_one(out, progress) as fd:
            if not _is_copy(out, model.source):  # another process may just have made it
                _pack(model, out, fd, progress)
    with suppress(OSError):
        origin = model.source.origin().hex().encode()
        replace_file(_source_note(out), origin + b" " + os.fsencode(os.path.abspath(model.file.path)))
    return out


def _is_copy(path: Path, file: WeightSource) -> bool:
    try:
        with FlashFile(path) as packed:
            return packed.source_key == file.key().hex()
    except ModelError:
        return False


def _pack(model: Model, out: Path, fd: int, progress: Progress) -> None:
    file = model.source
    runs = lay_out_runs(file.tensors, model.spec)
    factors = file.read(FACTORS).tobytes() if FACTORS in file.tensors else b""
    packer = RunPacker(file, model.spec, runs[0])

    def fill(run: Run, extent: int, out: Bytes) -> None:
        nonlocal packer
        if run is not packer.run:
            if run.layer != packer.run.layer:
                file.forget()
            packer = RunPacker(file, model.spec, run)
        packer.fill(extent, out)
        file.check_unchanged()

    def report(done: int) -> None:
        progress(f"packing {file.path.name}", done, runs[-1].end)

    try:
        write_flash_file(out, fd, file.header_bytes(), factors, runs, fill, file.key(), report)
    finally:
        file.forget()


def create_flash_file(
    out: Path, header: bytes, factors: bytes, runs: Sequence[Run], fill: Fill, source: bytes, progress: Progress
) -> None:
    """Write the flash file `out` of extents that `fill` makes; raises UsageError where it cannot be written."""

    def report(done: int) -> None:
        progress(f"writing {out.name}", done, runs[-1].end)

    with _only_one(out, progress) as fd:
        write_flash_file(out, fd, header, factors, runs, fill, source, report)


def write_flash_file(
    out: Path,
    fd: int,
    header: bytes,
    factors: bytes,
    runs: Sequence[Run],
    fill: Fill,
    source: bytes,
    report: Callable[[int], None],
) -> None:
    """Write a flash file into the empty temporary `fd`, then give it the name `out`.

    `header`: a GGUF's bytes before its tensors' data; `factors`: rotary factors, float32, or nothing; `source`:
    FrontPage's; `report` is told the bytes written. The first page is written last, the name given after that.
    """
    _check_room(out, runs[-1].end + len(header) + ROOM)
    sums, bundles = list[int](), list[int]()
    writer = _Writer(fd, out)
    for offset, block in _blocks(runs, fill, sums, bundles):
        writer.write(block, offset)
        report(offset + block.size)
    table = manifest_table(runs, Extents.of(runs), np.array(sums, np.uint64))
    manifest, checksums = encode_manifest(table)
    neurons = np.array(bundles, "<u8").tobytes()
    sections, end = {}, runs[-1].end
    for name, data in zip(SECTIONS, (header, factors, neurons, manifest), strict=True):
        sections[name] = (end, len(data), hashlib.sha256(data).digest())
        writer.write_bytes(data, end)
        end = round_up(end + len(data), PAGE)
    place = sections["manifest"][0] + checksums
    front = FrontPage(end, len(sums), runs[-1].end, place, sections, source)
    writer.write_bytes(front.encode(), 0)
    writer.finish()


def _blocks(runs: Sequence[Run], fill: Fill, sums: list[int], bundles: list[int]) -> Iterator[tuple[int, Bytes]]:
    """The extents of all runs, some MiB at a time: (offset, bytes), each made in a thread while the one before is
    being written. Adds their checksums to `sums`, and those of single neurons' bundles to `bundles`."""
    placed = Extents.of(runs)
    offsets, lengths = placed.offset, placed.nbytes
    extents = [(run, extent) for run in runs for extent in range(run.extents)]
    buffers = [page_buffer(max(BLOCK, int(lengths.max()))) for _ in range(2)]

    def make(first: int, last: int, buffer: Bytes) -> tuple[Bytes, list[int]]:
        start = offsets[first]
        block = buffer[: offsets[last - 1] + lengths[last - 1] - start]
        block[:] = 0
        found = []
        for i in range(first, last):
            out = block[offsets[i] - start :][: lengths[i]]
            fill(*extents[i], out)
            found.append(checksum(out))
            bundles.extend(_bundle_sums(*extents[i], out))
        return block, found

    cuts, ends = [0], offsets + lengths
    while cuts[-1] < len(extents):
        full = int(np.searchsorted(ends, offsets[cuts[-1]] + BLOCK, side="right"))
        cuts.append(max(cuts[-1] + 1, full))
    with ThreadPoolExecutor(1) as pool:
        ahead: Future[tuple[Bytes, list[int]]] | None = None
        for k in range(len(cuts)):
            made = ahead.result() if ahead else None  # `make` is then done with both buffers
            ahead = pool.submit(make, cuts[k], cuts[k + 1], buffers[k % 2]) if k + 1 < len(cuts) else None
            if made:
                sums += made[1]
                yield int(offsets[cuts[k - 1]]), made[0]


def _bundle_sums(run: Run, extent: int, data: Bytes) -> Iterator[int]:
    if run.kind == "neurons":
        size = run.item_bytes // CLUSTER
        for first in range(0, run.items_of(extent) * run.item_bytes, size):
            yield checksum(data[first : first + size])


class _Writer:
    """Writes whole pages at given places, directly where the file system can."""

    def __init__(self, fd: int, out: Path) -> None:
        self.fd, self.out = fd, out
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR | os.O_DIRECT)
        self.direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)

    def write(self, data: Bytes, offset: int) -> None:
        """uint8[n] in pages, n a multiple of PAGE."""
        view, at = memoryview(data), offset  # type: ignore[arg-type]
        try:
            while view:
                count = os.pwrite(self.fd, view, at)
                view, at = view[count:], at + count
            if not self.direct:
                os.fdatasync(self.fd)
                os.posix_fadvise(self.fd, offset, data.size, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise _cannot_write(self.out, error) from None

    def write_bytes(self, data: bytes, offset: int) -> None:
        """Any bytes, padded with zeros to whole pages."""
        if data:
            buffer = page_buffer(round_up(len(data), PAGE))
            buffer[: len(data)] = np.frombuffer(data, np.uint8)
            self.write(buffer, offset)

    def finish(self) -> None:
        """Make the file durable and give it its name."""
        try:
            os.fsync(self.fd)
            os.rename(_temporary(self.out), self.out)
            folder = os.open(self.out.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise _cannot_write(self.out, error) from None


# --- one writer a file ----------------------------------------------------------------------------------------


def _temporary(out: Path) -> Path:
    return out.with_name(f".{out.name}.part")


@contextmanager
def _only_one(out: Path, progress: Progress) -> Iterator[int]:
    """Hold `out`'s temporary file, empty; it goes unless it was renamed.

    It is locked while its writer lives, so that a second one waits, and what a killed one left is taken over.
    """
    if os.path.lexists(out) and not _may_replace(out):
        raise UsageError(f"{out} is there and is no packed model; give another name with -o, or delete it")
    path = _temporary(out)
    try:
        while (fd := _locked(path)) < 0:
            progress(f"waiting for another pack of {out.name}", 0, 0)
            time.sleep(POLL_SECONDS)
    except OSError as error:
        raise _cannot_write(out, error) from None
    try:
        os.ftruncate(fd, 0)
        yield fd
    finally:
        if _is_at(path, fd):
            path.unlink(missing_ok=True)
        os.close(fd)


def _may_replace(out: Path) -> bool:
    """Whether a file is a packed model, of whatever version, sound or not; nothing else is ever replaced."""
    try:
        return stat.S_ISREG(out.lstat().st_mode) and is_flash_file(out)
    except (OSError, ModelError):
        return False


def _locked(path: Path) -> int:
    """A descriptor of the file at `path`, made if need be, with its lock; -1 while another process has that."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, fd):  # else its writer has just renamed or removed it
            return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return -1


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _source_note(copy: Path) -> Path:
    """Where it is written down of which file a copy was made last, and what that was like."""
    return copy.with_suffix(".source")


def _sweep(folder: Path) -> None:
    """Remove from the cache what killed packs left, and copies of files that have changed since."""
    for note in folder.glob("*.source"):
        with suppress(OSError, ModelError):
            origin, _, name = note.read_bytes().partition(b" ")
            if not name:  # an older Coterie's
                continue
            with open_source(os.fsdecode(name)) as source:
                if source.origin().hex().encode() != origin:
                    note.with_suffix(".coterie").unlink(missing_ok=True)
                    note.unlink()
    for path in folder.glob(".*.part"):
        with suppress(OSError):
            fd = _locked(path)
            if fd >= 0:
                path.unlink()
                os.close(fd)


def _check_room(out: Path, needed: int) -> None:
    status = os.statvfs(out.parent)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise UsageError(
            f"packing needs {needed / 2**30:.2f} GiB in {out.parent}, {free / 2**30:.2f} are free; "
            "make room, or name another place (-o, COTERIE_HOME)"
        )


def _cannot_write(out: Path, error: OSError) -> UsageError:
    room = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return UsageError(f"cannot write {out}: {error.strerror}; {room}name another place (-o, COTERIE_HOME)")
