"""Where weights come from before they are packed: a file's tensors, or what is made of them on the way."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ModelError
from coterie.models.dequant import dequantise, finite
from coterie.models.gguf_header import header_bytes
from coterie.models.header import BLOCKS, OpenModel, TensorInfo

Bytes = NDArray[np.uint8]


class WeightSource(OpenModel):
    """An open model whose tensors' own bytes can be read."""

    @abstractmethod
    def read(self, name: str, first: int = 0, last: int | None = None) -> Bytes:
        """Rows `first` to `last` (excluded) of a tensor as uint8[rows, row bytes], in memory of their own."""

    @abstractmethod
    def header_bytes(self) -> bytes:
        """The model as a GGUF's bytes before its tensors' data."""

    @abstractmethod
    def key(self) -> bytes:
        """32 bytes that change when the weights do, as far as can be seen without reading them all."""

    def origin(self) -> bytes:
        """32 bytes that change when the files it is made of do, however it is made of them."""
        return self.key()

    @abstractmethod
    def forget(self) -> None:
        """Take what was read out of the page cache."""

    def rows(self, name: str, first: int, last: int | None) -> range:
        """The rows asked for, checked. Raises IndexError."""
        tensor = self.tensor(name)
        last = tensor.rows if last is None else last
        if not 0 <= first <= last <= tensor.rows:
            raise IndexError(f"rows {first} to {last} of {name}, which has {tensor.rows}")
        return range(first, last)

    def read_finite(self, name: str, first: int = 0, last: int | None = None) -> Bytes:
        """The same; ModelError where a weight is not a number."""
        raw = self.read(name, first, last)
        if not finite(raw, self.tensors[name].format):
            raise ModelError(
                f"{self.path.name}: tensor {name!r} holds a weight that is not a number; the file is damaged"
            )
        return raw

    def floats(self, name: str) -> NDArray[np.float32]:
        """A matrix, or a vector, as float32: what `forward` of an architecture wants. Raises as `read_finite`."""
        floats = dequantise(self.read_finite(name), self.tensors[name].format)
        return floats[0] if len(floats) == 1 else floats

    def stored_format(self, name: str) -> str:
        """The format that `floats` come in."""
        return self.tensor(name).format

    def vector(self, name: str) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = self.read(name).view(np.float32)[0]
        return vector


@dataclass(frozen=True)
class Made:
    """A tensor that is computed: `read` gives its rows as uint8[rows, row bytes]."""

    format: str
    shape: tuple[int, int]  # rows, columns
    read: Callable[[range], Bytes]

    def info(self, name: str) -> TensorInfo:
        """Its description; it lies nowhere."""
        values, size = BLOCKS[self.format]
        rows, cols = self.shape
        return TensorInfo(name, self.format, rows, cols, 0, rows * (cols // values * size))


class DerivedModel(WeightSource):
    """Another model with some tensors made anew: `made` are added or replace its own, `dropped` are left out,
    `metadata` are added to its metadata. `salt` says what was done, for the key. Closes what it was made of."""

    def __init__(
        self,
        base: WeightSource,
        made: Mapping[str, Made],
        *,
        dropped: frozenset[str] = frozenset(),
        metadata: Mapping[str, Any] = {},
        salt: str,
    ) -> None:
        self.base, self.path, self._made, self._salt = base, base.path, dict(made), salt
        self.metadata = base.metadata | dict(metadata)
        kept = {name: tensor for name, tensor in base.tensors.items() if name not in dropped}
        self.tensors = kept | {name: tensor.info(name) for name, tensor in made.items()}

    def read(self, name: str, first: int = 0, last: int | None = None) -> Bytes:
        if name not in self._made:
            return self.base.read(name, first, last)
        return self._made[name].read(self.rows(name, first, last))

    def header_bytes(self) -> bytes:
        return header_bytes(self.metadata, self.tensors.values())

    def key(self) -> bytes:
        return sha256(self.base.key() + self._salt.encode()).digest()

    def origin(self) -> bytes:
        return self.base.origin()

    def forget(self) -> None:
        self.base.forget()

    def check_unchanged(self) -> None:
        self.base.check_unchanged()

    def close(self) -> None:
        self.base.close()
