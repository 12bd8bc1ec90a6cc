"""Reading safetensors files: eight bytes of length, a JSON header, the tensors' bytes
(https://huggingface.co/docs/safetensors).

Read by hand and not by the package of that name, which maps a file into memory, so that one that is cut while in use
ends the process; whose arrays know no bfloat16; and which leaves what it has read in the page cache.
"""

import hashlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ModelError
from coterie.models.dequant import dequantise
from coterie.models.header import MAX_NAME, MAX_TENSORS, OpenFile
from coterie.models.json_object import entry, parse_object

MAX_HEADER = 16 << 20  # bytes; a thousand tensors take 100 KB
MAX_SIZE = 1 << 40  # of a dimension: products stay exact
FORMATS = {"F32": ("F32", 4), "F16": ("F16", 2), "BF16": ("BF16", 2)}  # GGUF's name, bytes of a value


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: rows x cols values at `offset`, in bytes from the file's start; vectors have one row."""

    file: "SafetensorsFile"
    name: str
    format: str
    rows: int
    cols: int
    offset: int

    def floats(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows `first` to `last` (excluded) as float32[rows, cols]."""
        row = self.cols * FORMATS[self.format][1]
        raw = np.empty((last - first, row), np.uint8)
        self.file.read_into(raw, self.offset + first * row, f"tensor {self.name[:60]!r}")
        return dequantise(raw, self.format)


class SafetensorsFile(OpenFile):
    """An open file: the `tensors` in it. Raises ModelError for what is damaged or not supported."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        try:
            self.tensors = self._parse()
        except BaseException:
            self.close()
            raise

    def stamp(self) -> bytes:
        """Changes with the file's name, size, time of change and header."""
        return f"{self.path.name} {self.status.st_size} {self.status.st_mtime_ns} {self._header.hex()}\n".encode(
            errors="surrogateescape"
        )

    def _parse(self) -> dict[str, Stored]:
        start = self._bytes(8, 0)
        length = int.from_bytes(start, "little")
        if not 2 <= length <= min(MAX_HEADER, self.status.st_size - 8):
            raise self._broken(f"it claims a header of {length} bytes, which cannot be")
        data = self._bytes(length, 8)
        self._header = hashlib.sha256(data).digest()
        described = parse_object(data, f"{self.path.name}: the header")
        described.pop("__metadata__", None)
        if len(described) > MAX_TENSORS:
            raise self._broken(f"it claims {len(described)} tensors")
        tensors = {name: self._tensor(name, about, 8 + length) for name, about in described.items()}
        end, before = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise self._broken(f"tensor {name[:60]!r} overlaps {before[:60]!r}")
            end, before = tensor.offset + tensor.rows * tensor.cols * FORMATS[tensor.format][1], name
        return tensors

    def _tensor(self, name: str, about: Any, start: int) -> Stored:
        where = f"{self.path.name}: tensor {name[:60]!r}"
        if not isinstance(about, dict) or len(name) > MAX_NAME:
            raise self._broken(f"tensor {name[:60]!r} is not described")
        dtype, shape = entry(about, "dtype", str, where), entry(about, "shape", list, where)
        if dtype not in FORMATS:
            raise ModelError(f"{where} is of type {dtype[:40]!r}; supported are {', '.join(FORMATS)}")
        if not 1 <= len(shape) <= 2 or not all(type(n) is int and 1 <= n <= MAX_SIZE for n in shape):
            raise ModelError(f"{where} has the shape {repr(shape)[:60]}; vectors and matrices are supported")
        offsets = entry(about, "data_offsets", list, where)
        if len(offsets) != 2 or not all(type(n) is int for n in offsets):
            raise self._broken(f"tensor {name[:60]!r} lies nowhere")
        (begin, end), (format, size) = offsets, FORMATS[dtype]
        if begin < 0 or end - begin != prod(shape) * size or start + end > self.status.st_size:
            raise self._broken(f"tensor {name[:60]!r} is not where it should be")
        return Stored(self, name, format, shape[0] if len(shape) == 2 else 1, shape[-1], start + begin)

    def _bytes(self, count: int, offset: int) -> bytes:
        out = np.empty(count, np.uint8)
        self.read_into(out, offset, "its header")
        return out.tobytes()

    def _broken(self, what: str) -> ModelError:
        return ModelError(f"{self.path.name}: {what}; download it again")
