"""What stands before a model's weights: metadata and the tensors' descriptions, with nothing in them taken on trust.

The form is GGUF's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): counts, metadata (key, type, value),
tensor descriptions. A packed file keeps the same bytes, so both kinds of file are read by one parser.
"""

import os
import stat
import struct
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ModelError

# ggml's number of a format: its name, values in a block, bytes of a block.
FORMATS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
BLOCKS = {name: (values, size) for name, values, size in FORMATS.values()}

SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9

# Far above any real model, and low enough that a hostile file costs little memory.
MAX_KEYS = MAX_TENSORS = 1 << 16
MAX_ELEMENTS = 1 << 22  # of all metadata arrays together
MAX_TEXT = 1 << 26  # bytes of all metadata strings together
MAX_NAME = 1 << 10
MAX_ALIGNMENT = 1 << 16


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and how it is coded; a vector is a matrix of one row."""

    name: str
    format: str
    rows: int
    cols: int
    offset: int  # from the start of a GGUF file, bytes; a packed file has its weights elsewhere
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows


def open_regular(path: Path, flags: int = 0) -> int:
    """A descriptor to read a model file with; ModelError where there is no such regular file."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"cannot open the model {str(path)!r}: {reason}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelError(f"cannot open the model {str(path)!r}: it is not a regular file")
    return fd


class ModelHeader(ABC):
    """A model's metadata and its tensors' descriptions."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @abstractmethod
    def vector(self, name: str) -> NDArray[np.float32]:
        """A float32 vector that belongs to the model's shape, not to its weights (rotary factors)."""

    def tensor(self, name: str) -> TensorInfo:
        """The description of a tensor that the model must have."""
        if name not in self.tensors:
            raise ModelError(f"{self.path.name}: tensor {name!r} is missing; the model is incomplete")
        return self.tensors[name]

    def expect(self, name: str, rows: int, cols: int) -> None:
        """Require a tensor of this shape; vectors (rows == 1) must be F32."""
        tensor = self.tensor(name)
        if (tensor.rows, tensor.cols) != (rows, cols):
            raise ModelError(
                f"{self.path.name}: tensor {name!r} is {tensor.rows} x {tensor.cols}, "
                f"but the metadata call for {rows} x {cols}"
            )
        if rows == 1 and tensor.format != "F32":
            raise ModelError(f"{self.path.name}: vector {name!r} is {tensor.format}; only F32 is supported")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """The whole number under `key`, within [low, high]."""
        value = self.metadata.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(key, value, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """The finite number under `key`, within [low, high]."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self._wrong(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """The string under `key`."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def _wrong(self, key: str, value: object, wanted: str) -> ModelError:
        found = "missing" if value is None else f"{str(value)[:40]!r}"
        return ModelError(f"{self.path.name}: metadata {key!r} is {found}, but must be {wanted}")


class OpenModel(ModelHeader):
    """A model that is open, whatever files it is in."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise ModelError if a file was written to or cut since it was opened. Its name may go: it stays open."""

    @abstractmethod
    def close(self) -> None:
        """A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class OpenFile:
    """A file of a model, open for reading. Raises ModelError where it cannot be opened."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd = open_regular(self.path)
        self._close = weakref.finalize(self, os.close, self._fd)
        self.status = os.fstat(self._fd)

    def read_into(self, out: NDArray[Any], offset: int, what: str) -> None:
        """Fill a contiguous array from `offset` on; `what` it is, for the ModelError where that fails."""
        view = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        while view:
            try:
                count = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise ModelError(f"{self.path.name}: cannot read {what}: {error.strerror}") from None
            if count == 0:
                raise ModelError(f"{self.path.name}: the file became shorter while {what} was read")
            view, offset = view[count:], offset + count

    def forget(self) -> None:
        """Take what was read out of the page cache."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns):
            raise ModelError(f"{self.path}: the file was changed while it was in use")

    def close(self) -> None:
        self._close()
        self._fd = -1


class ModelFile(OpenFile, OpenModel):
    """A model that is one open file."""


class HeaderParser:
    """Parses everything before the tensors' bytes: `metadata`, `tensors`, and how many bytes it was (`consumed`).

    `size` is the file's, whose data section follows; without `data` there is none, and the header is all there is.
    """

    def __init__(self, stream: BinaryIO, size: int, name: str, *, data: bool = True) -> None:
        self.stream, self.size, self.name, self.data = stream, size, name, data
        self.left = size  # bytes of the file not yet read
        self.elements_left, self.text_left = MAX_ELEMENTS, MAX_TEXT
        if size < 24 or self.take(4) != b"GGUF":
            raise self.broken("it is not a GGUF file")
        version = self.scalar("<I")
        if version not in (2, 3):
            raise self.broken(f"GGUF version {version} is not supported (2 and 3 are)")
        n_tensors = self.count(MAX_TENSORS, 24, "tensors")
        n_keys = self.count(MAX_KEYS, 13, "metadata keys")
        self.metadata = self.read_metadata(n_keys)
        self.tensors = self.read_tensors(n_tensors)
        if self.left and not data:
            raise self.broken(f"{self.left} bytes follow its header, which must be all; the file is damaged")

    @property
    def consumed(self) -> int:
        return self.size - self.left

    def broken(self, what: str) -> ModelError:
        return ModelError(f"{self.name}: {what}")

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise self.broken(f"the file ends within its header (at byte {self.size}); download it again")
        self.left -= size
        data = self.stream.read(size)
        if len(data) != size:
            raise self.broken("the file became shorter while it was read")
        return data

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, most: int, least_bytes: int, what: str) -> int:
        """A 64-bit count of things that take at least `least_bytes` each."""
        count: int = self.scalar("<Q")
        if count > most or count * least_bytes > self.left:
            raise self.broken(f"it claims {count} {what}, which cannot be; the file is damaged")
        return count

    def string(self, most: int = MAX_TEXT) -> str:
        length = self.count(most, 1, "bytes in a string")
        self.text_left -= length
        if self.text_left < 0:
            raise self.broken(f"its metadata hold more than {MAX_TEXT >> 20} MiB of text")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.broken(f"a string before byte {self.size - self.left} is not UTF-8") from None

    def read_metadata(self, n_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string(MAX_NAME)
            if key in metadata:
                raise self.broken(f"metadata key {key[:60]!r} occurs twice")
            metadata[key] = self.value(key, self.scalar("<I"))
        return metadata

    def value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            raise self.broken(f"metadata {key[:60]!r} has the unknown type {kind}")
        return self.scalar(SCALARS[kind])

    def array(self, key: str) -> list[Any]:
        kind = self.scalar("<I")
        if kind != STRING and kind not in SCALARS:
            raise self.broken(f"metadata {key[:60]!r} is an array of type {kind}, which is not supported")
        size = 8 if kind == STRING else struct.calcsize(SCALARS[kind])
        count = self.count(self.elements_left, size, f"elements in {key[:60]!r}")
        self.elements_left -= count
        if kind != STRING:
            numbers: list[Any] = np.frombuffer(self.take(count * size), np.dtype(SCALARS[kind])).tolist()
            return numbers
        return self.strings(count)

    def strings(self, count: int) -> list[str]:
        """As `string`, `count` times; written out because vocabularies have 10^5 of them."""
        read: Callable[[int], bytes] = self.stream.read
        length_of = struct.Struct("<Q").unpack
        left, start, strings = min(self.left, self.text_left), self.left, []
        try:
            for _ in range(count):
                (length,) = length_of(read(8))
                left -= length + 8
                if left < 0:
                    raise self.broken("an array of strings runs past the end of the file; it is damaged")
                strings.append(read(length).decode())
        except (UnicodeDecodeError, struct.error):
            raise self.broken(f"string {len(strings)} of an array is cut off or not UTF-8") from None
        used = min(start, self.text_left) - left
        self.left -= used
        self.text_left -= used
        return strings

    def read_tensors(self, n_tensors: int) -> dict[str, TensorInfo]:
        relative: list[TensorInfo] = []
        for _ in range(n_tensors):
            name = self.string(MAX_NAME)
            n_dims = self.scalar("<I")
            if not 1 <= n_dims <= 2:
                raise self.broken(f"tensor {name[:60]!r} has {n_dims} dimensions; 1 and 2 are supported")
            shape = [self.scalar("<Q") for _ in range(n_dims)]
            cols, rows = shape[0], shape[1] if n_dims == 2 else 1
            number, offset = self.scalar("<I"), self.scalar("<Q")
            if number not in FORMATS:
                raise self.broken(f"tensor {name[:60]!r} has weight format {number}; supported are {', '.join(BLOCKS)}")
            format_name, block, block_bytes = FORMATS[number]
            if min(rows, cols) < 1 or cols % block:
                raise self.broken(f"tensor {name[:60]!r}: {rows} x {cols} are no {format_name} blocks")
            nbytes = rows * (cols // block) * block_bytes
            relative.append(TensorInfo(name, format_name, rows, cols, offset, nbytes))
        return self.place(relative)

    def place(self, relative: list[TensorInfo]) -> dict[str, TensorInfo]:
        """Make offsets in the data section offsets in the file; prove that tensors lie in it, apart."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.broken(f"general.alignment is {str(alignment)[:40]}; it must be a power of two from 8")
        start = -(-self.consumed // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        end = 0
        for tensor in sorted(relative, key=lambda tensor: tensor.offset):
            name = tensor.name[:60]
            if tensor.name in tensors:
                raise self.broken(f"tensor {name!r} occurs twice")
            if tensor.offset % alignment:
                raise self.broken(f"tensor {name!r} is not aligned to {alignment} bytes")
            if tensor.offset < end:
                raise self.broken(f"tensor {name!r} overlaps the tensor before it")
            end = tensor.offset + tensor.nbytes
            if self.data and start + end > self.size:
                raise self.broken(
                    f"tensor {name!r} ends at byte {start + end}, the file at {self.size}; download it again"
                )
            tensors[tensor.name] = TensorInfo(
                tensor.name, tensor.format, tensor.rows, tensor.cols, start + tensor.offset, tensor.nbytes
            )
        return tensors
