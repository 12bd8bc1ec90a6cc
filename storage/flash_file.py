"""The flash file: a model's extents as kernels read them, with what is needed to run it (docs/packed-format.md).

Page 0, the extents, and three sections: the GGUF's own header, the rotary factors, and the manifest, an Arrow table
of the extents. Where extents lie follows from the header; of the manifest, opening a file needs only the checksums,
whose column lies uncompressed at a place that page 0 names. So opening costs no Arrow; `manifest` reads the table.
"""

import hashlib
import io
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ModelError, PlanError, UsageError
from coterie.kernels.formats import FORMATS, ROWS
from coterie.kernels.shapes import CLUSTER
from coterie.models.header import HeaderParser, ModelFile, open_regular
from coterie.models.load import read_spec
from coterie.storage.arena import round_up
from coterie.storage.arrow_file import decode_table, encode_table
from coterie.storage.checksum import checksum
from coterie.storage.direct import open_direct
from coterie.storage.runs import PAGE, Extents, Run, lay_out_runs

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC, VERSION = b"COTERIE\0", 2
SECTIONS = ("header", "factors", "neurons", "manifest")
MAX_SECTION = {"header": 256 << 20, "factors": 1 << 20, "neurons": 256 << 20, "manifest": 64 << 20}  # bytes
ROW_BYTES = 40  # of a manifest's row at least
FACTORS = "rope_freqs.weight"
PIECE = 8 << 20  # bytes read at a time when all are checked

_FRONT = struct.Struct("<8sII" + "QQQQ")  # magic, version, 0; file size, extents, their end, checksums' place
_SECTION = struct.Struct("<QQ32s")  # offset, bytes, SHA-256
_DIGEST = 32  # bytes at the page's end: SHA-256 of what is before them

UInt64s = NDArray[np.uint64]


@dataclass(frozen=True)
class FrontPage:
    """What page 0 says. `sections`: (offset, bytes, SHA-256) each; `source`: 32 bytes that name the packed GGUF."""

    size: int
    extents: int
    extents_end: int
    checksums: int
    sections: dict[str, tuple[int, int, bytes]]
    source: bytes

    def encode(self) -> bytes:
        """The page, PAGE bytes."""
        body = _FRONT.pack(MAGIC, VERSION, 0, self.size, self.extents, self.extents_end, self.checksums)
        body += b"".join(_SECTION.pack(*self.sections[name]) for name in SECTIONS) + self.source
        body = body.ljust(PAGE - _DIGEST, b"\0")
        return body + hashlib.sha256(body).digest()

    @classmethod
    def decode(cls, page: bytes, name: str, size: int) -> Self:
        """Raises ModelError for anything but a page of this version that agrees with itself and the file's size."""
        if len(page) != PAGE or not page.startswith(MAGIC):
            raise ModelError(f"{name}: it is not a packed model")
        _, version, _, whole, extents, extents_end, checksums = _FRONT.unpack_from(page)
        if version != VERSION:
            raise ModelError(f"{name}: packed format {version} is not this Coterie's {VERSION}; pack the model again")
        if hashlib.sha256(page[:-_DIGEST]).digest() != page[-_DIGEST:]:
            raise ModelError(f"{name}: its first page is damaged; pack the model again")
        at = _FRONT.size
        sections = {}
        for section in SECTIONS:
            sections[section] = _SECTION.unpack_from(page, at)
            at += _SECTION.size
        made = cls(whole, extents, extents_end, checksums, sections, page[at : at + 32])
        if made.size != size:
            raise ModelError(f"{name}: it has {size} bytes, but was written with {made.size}; pack the model again")
        made._check(name)
        return made

    def _check(self, name: str) -> None:
        end = self.extents_end
        for section, (offset, size, _) in self.sections.items():
            if offset != end or size > MAX_SECTION[section]:
                raise ModelError(f"{name}: its section {section!r} cannot be where it says; pack the model again")
            end = round_up(offset + size, PAGE)
        first, nbytes, _ = self.sections["manifest"]
        inside = first <= self.checksums and self.checksums + 8 * self.extents <= first + nbytes
        if end != self.size or self.extents * ROW_BYTES > nbytes or not inside or self.checksums % 8:
            raise ModelError(f"{name}: the parts of the file do not fit together; pack the model again")


def is_flash_file(path: str | Path) -> bool:
    """Whether a file begins as a packed model does. Raises ModelError where it cannot be read."""
    fd = open_regular(Path(path))
    try:
        return _read(fd, len(MAGIC), 0, str(path)) == MAGIC
    finally:
        os.close(fd)


class FlashFile(ModelFile):
    """An open packed model: the `extents` of its `runs`, and their `checksums`. `identity` names this very packing,
    `source_key` the GGUF it is of.

    Raises ModelError for anything that is not a sound packed model of this version.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        try:
            self.size = self.status.st_size
            page = _read(self._fd, PAGE, 0, self.path.name)
            self.front = FrontPage.decode(page, self.path.name, self.size)
            self.identity = page[-_DIGEST:].hex()
            self.source_key = self.front.source.hex()
            header = self._section("header")
            parser = HeaderParser(io.BytesIO(header), len(header), self.path.name, data=False)
            self.metadata, self.tensors = parser.metadata, parser.tensors
            self._lay_out()
            self.checksums: UInt64s = self._checksums()
            self.neuron_sums: UInt64s = self._neuron_sums()
        except BaseException:
            self.close()
            raise

    def _lay_out(self) -> None:
        try:
            self.runs = lay_out_runs(self.tensors, read_spec(self))
        except PlanError as error:
            raise ModelError(f"{self.path.name}: {error}") from None
        self.extents = Extents.of(self.runs)
        total = self.extents.nbytes.size
        if (total, self.runs[-1].end) != (self.front.extents, self.front.extents_end):
            raise ModelError(
                f"{self.path.name}: its header calls for {total} extents up to byte {self.runs[-1].end}, but it has "
                f"{self.front.extents} up to {self.front.extents_end}; pack the model again"
            )

    def _checksums(self) -> UInt64s:
        manifest = self._section("manifest")
        first = self.front.checksums - self.front.sections["manifest"][0]
        return np.frombuffer(manifest, "<u8", self.front.extents, first).copy()

    def _neuron_sums(self) -> UInt64s:
        """Checksums of all bundles of a sparse model, in the order of the file."""
        data = self._section("neurons")
        if len(data) != 8 * sum(run.items * CLUSTER for run in self.runs if run.kind == "neurons"):
            raise ModelError(f"{self.path.name}: it has not one checksum for each neuron; pack the model again")
        return np.frombuffer(data, "<u8")

    def _section(self, name: str) -> bytes:
        offset, size, digest = self.front.sections[name]
        data = _read(self._fd, size, offset, self.path.name)
        if len(data) != size or hashlib.sha256(data).digest() != digest:
            raise ModelError(f"{self.path.name}: its section {name!r} is damaged; pack the model again")
        return data

    def vector(self, name: str) -> NDArray[np.float32]:
        """The rotary factors: all other weights are in extents."""
        tensor, data = self.tensor(name), self._section("factors")
        if name != FACTORS or tensor.format != "F32" or len(data) != 4 * tensor.cols:
            raise ModelError(f"{self.path.name}: it does not hold vector {name[:60]!r}; pack the model again")
        return np.frombuffer(data, "<f4")

    def manifest(self) -> "pa.Table":
        """The manifest as an Arrow table, one row an extent. Raises ModelError unless it is what the header implies."""
        table = _decode_manifest(self._section("manifest"), self.path.name)
        if not table.equals(manifest_table(self.runs, self.extents, self.checksums)):
            raise ModelError(f"{self.path.name}: its manifest contradicts its header; pack the model again")
        return table

    def open_direct(self, *, buffered: bool = False) -> int:
        """Another descriptor of the open file, which may have lost its name, as from `direct.open_direct`."""
        return open_direct(f"/proc/self/fd/{self._fd}", buffered=buffered, name=self.path)


def page_buffer(nbytes: int) -> NDArray[np.uint8]:
    """uint8[nbytes] of zeros that begins on a page, as direct reads and writes want it."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def damaged_extents(file: FlashFile, progress: Callable[[str, int, int], None]) -> list[int]:
    """Read all extents, past the page cache, and return the numbers of those whose checksum is wrong.

    `progress` gets (label, bytes done, bytes in all). Raises ModelError where they cannot be read.
    """
    bad: list[int] = []
    offsets, sizes = file.extents.offset, file.extents.nbytes
    ends = offsets + sizes
    buffer = page_buffer(max(PIECE, int(sizes.max())))
    try:
        fd, direct = file.open_direct(), True
    except UsageError:
        fd, direct = file.open_direct(buffered=True), False
    try:
        first = 0
        while first < len(ends):
            start = int(offsets[first])
            last = max(first + 1, int(np.searchsorted(ends, start + PIECE, side="right")))
            piece = buffer[: ends[last - 1] - start]
            _read_into(fd, piece, start, file.path.name)
            for i in range(first, last):
                at = offsets[i] - start
                if checksum(piece[at : at + sizes[i]]) != file.checksums[i]:
                    bad.append(i)
            if not direct:
                os.posix_fadvise(fd, start, piece.size, os.POSIX_FADV_DONTNEED)
            progress(f"checking {file.path.name}", start + piece.size, int(ends[-1]))
            first = last
    finally:
        os.close(fd)
    return bad


def _read_into(fd: int, out: NDArray[np.uint8], offset: int, name: str) -> None:
    """Fill uint8[n] in pages. A read that stops within a page goes on from the page's start, as direct reads must."""
    done = 0
    while done < out.size:
        try:
            count = os.preadv(fd, [memoryview(out[done:])], offset + done)  # type: ignore[arg-type]
        except OSError as error:
            raise ModelError(f"{name}: cannot read it at byte {offset + done}: {error.strerror}") from None
        if count < PAGE and done + count < out.size:
            raise ModelError(f"{name}: it became shorter while it was read, at byte {offset + done + count}")
        done = done + count if done + count == out.size else (done + count) // PAGE * PAGE


def _read(fd: int, nbytes: int, offset: int, name: str) -> bytes:
    """Up to `nbytes`, fewer only at the file's end."""
    pieces = []
    try:
        while nbytes and (piece := os.pread(fd, nbytes, offset)):
            pieces.append(piece)
            nbytes, offset = nbytes - len(piece), offset + len(piece)
    except OSError as error:
        raise ModelError(f"{name}: cannot read it: {error.strerror}") from None
    return b"".join(pieces)


# --- the manifest -------------------------------------------------------------------------------------------


def manifest_table(runs: Sequence[Run], extents: Extents, checksums: UInt64s) -> "pa.Table":
    """The manifest of these runs: what an extent is, where it lies, its checksum."""
    import pyarrow as pa

    def each(values: Iterable[int], kind: str) -> Any:
        return np.fromiter(values, kind, len(runs))[extents.run]

    def words(values: Sequence[str]) -> "pa.DictionaryArray":
        known = sorted(set(values))
        return pa.DictionaryArray.from_arrays(each((known.index(value) for value in values), "i4"), known)

    per, items = each((run.per for run in runs), "i4"), each((run.items for run in runs), "i4")
    begin = extents.number * per
    held = np.minimum(per, items - begin)
    columns = {
        "layer": each((run.layer for run in runs), "i4"),
        "kind": words([run.kind for run in runs]),
        "part": each((run.part for run in runs), "i1"),
        "cluster": begin,
        "items": held,
        "rows": held * each((_rows_of_item(run) for run in runs), "i4"),
        "offset": extents.offset,
        "length": extents.nbytes,
        "format": words([run.format for run in runs]),
        "layout": words(["sparse" if run.kind in ("gate", "scores", "neurons") else "dense" for run in runs]),
        "checksum": checksums,
        "hotness": pa.nulls(checksums.size, pa.float32()),
    }
    return pa.table(columns)


def _rows_of_item(run: Run) -> int:
    """Matrix rows of a group, neurons of a cluster."""
    if run.kind == "norms":
        return 0
    if run.kind in ("gate", "scores", "neurons"):
        return CLUSTER
    return FORMATS[run.format.rpartition("/")[2]].columns if run.kind == "ffn" else ROWS


def encode_manifest(table: "pa.Table") -> tuple[bytes, int]:
    """The table as an Arrow file, uncompressed in one batch; and where in it its checksums lie."""
    import pyarrow as pa

    data = encode_table(table)
    batch = pa.ipc.open_file(data).get_batch(0)
    return data.to_pybytes(), batch.column("checksum").buffers()[1].address - data.address


def _decode_manifest(data: bytes, name: str) -> "pa.Table":
    try:
        return decode_table(data)
    except ValueError as error:
        raise ModelError(f"{name}: its manifest {error}; pack the model again") from None
