"""Reading GGUF files, with nothing in them taken on trust.

A GGUF file is a header, metadata (key, type, value), tensor descriptions and, aligned, the tensors'
bytes: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Everything is checked when the file is
opened, so that what later code asks for lies inside the file and is as large as its shape says.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.models.header import HeaderParser, ModelFile
from coterie.models.source import WeightSource


class GGUFFile(ModelFile, WeightSource):
    """An open GGUF file: its metadata, its tensors' descriptions, and their bytes on request.

    Raises ModelError for anything that is not a sound GGUF file with formats that Coterie reads.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        try:
            with open(self._fd, "rb", buffering=1 << 18, closefd=False) as stream:
                header = HeaderParser(stream, self.status.st_size, self.path.name)
            self.metadata, self.tensors, self._header_size = header.metadata, header.tensors, header.consumed
        except BaseException:
            self.close()
            raise

    def header_bytes(self) -> bytes:
        return os.pread(self._fd, self._header_size, 0)

    def read(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.uint8]:
        tensor, wanted = self.tensor(name), self.rows(name, first, last)
        rows = np.empty((len(wanted), tensor.row_bytes), np.uint8)
        self.read_into(rows, tensor.offset + wanted.start * tensor.row_bytes, f"tensor {name!r}")
        return rows

    def key(self) -> bytes:
        """Of its size, its time of change, and its header."""
        stamp = f"{self.status.st_size} {self.status.st_mtime_ns} ".encode()
        return hashlib.sha256(stamp + hashlib.sha256(self.header_bytes()).digest()).digest()
