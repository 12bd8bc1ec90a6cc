"""How often each neuron of a sparse model was live: counted, kept in an Arrow file, added up (docs/sparse.md)."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from coterie.errors import ModelError, UsageError
from coterie.models.header import OpenModel
from coterie.models.source import WeightSource
from coterie.models.spec import ModelSpec
from coterie.paths import replace_file
from coterie.storage.arrow_file import decode_table, encode_table

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
LARGEST_FILE = 256 << 20  # bytes
MOST_STEPS = 1 << 40
Int64s = npt.NDArray[np.int64]


def model_key(file: OpenModel) -> str:
    """What says which neuron a number means: packed copies of one source agree."""
    key = file.key().hex() if isinstance(file, WeightSource) else getattr(file, "source_key", "")
    return str(key)


@dataclass(frozen=True)
class Activations:
    """By batch size: `steps`, how many decode steps were counted, and `live`, int64[layers][neurons], in how many of
    them a neuron was live for any of the sequences. `model`: as from model_key."""

    model: str
    steps: dict[int, int]
    live: dict[int, Int64s]

    @property
    def batches(self) -> list[int]:
        return sorted(self.steps)

    def frequencies(self, batch: int) -> npt.NDArray[np.float64]:
        """The share of steps in which each neuron was live, float64[layers][neurons]. More sequences never make fewer
        neurons live, so what smaller batches showed counts too."""
        shares = [self.live[b] / self.steps[b] for b in self.batches if b <= batch]
        most: npt.NDArray[np.float64] = np.maximum.reduce(shares)
        return most

    def order(self) -> Int64s:
        """Each layer's neurons, the most often live first: int64[layers][neurons]."""
        total = sum(self.live[b] / self.steps[b] for b in self.batches)
        return np.argsort(-total, axis=1, kind="stable")

    def merged(self, other: "Activations") -> "Activations":
        """Both counts together. Raises UsageError where they are of different models."""
        if other.model != self.model or other._shape != self._shape:
            raise UsageError("these activations are of different models; count them into files of their own")
        steps, live = dict(self.steps), dict(self.live)
        for batch in other.batches:
            steps[batch] = steps.get(batch, 0) + other.steps[batch]
            live[batch] = live.get(batch, np.int64(0)) + other.live[batch]
        return Activations(self.model, steps, live)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.live[self.batches[0]].shape

    def table(self) -> "pa.Table":
        """One row a batch size and layer, in this order."""
        import pyarrow as pa

        layers = self._shape[0]
        counts = np.concatenate([self.live[batch] for batch in self.batches])
        width = counts.shape[1]
        columns = {
            "batch": pa.array(np.repeat(np.array(self.batches, np.int32), layers)),
            "layer": pa.array(np.tile(np.arange(layers, dtype=np.int32), len(self.batches))),
            "steps": pa.array(np.repeat(np.array([self.steps[batch] for batch in self.batches], np.int64), layers)),
            "live": pa.FixedSizeListArray.from_arrays(pa.array(counts.ravel()), width),
        }
        return pa.table(columns).replace_schema_metadata({"coterie.activations": str(VERSION), "model": self.model})

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises UsageError where it cannot be written."""
        data = encode_table(self.table()).to_pybytes()
        if len(data) > LARGEST_FILE:
            raise UsageError(
                f"{path} would have {len(data) >> 20} MiB, {LARGEST_FILE >> 20} at most; use fewer batch sizes"
            )
        try:
            replace_file(path, data)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from None


def load_activations(path: Path) -> Activations:
    """Read such a file. Raises UsageError where it cannot be read, ModelError for anything but sound counts."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE or not path.is_file():
            raise ValueError(f"is no file of {LARGEST_FILE >> 20} MiB or less")
        return _checked(decode_table(path.read_bytes()))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path}: it {error}; count again with coterie profile --activations") from None


def activations_of(path: Path, spec: ModelSpec, *files: OpenModel) -> Activations:
    """The counts in a file, which must be of one of these models. Raises also ModelError where they are not."""
    found = load_activations(path)
    if found.model not in map(model_key, files) or found._shape != (len(spec.layers), spec.ffn_dim):
        raise ModelError(
            f"{path}: it counts neurons of another model than {files[0].path.name}; count this one's with "
            "coterie profile --activations"
        )
    return found


def _checked(table: "pa.Table") -> Activations:
    """ValueError says what is wrong."""
    import pyarrow as pa

    known = table.schema.metadata or {}
    if known.get(b"coterie.activations") != str(VERSION).encode():
        raise ValueError(f"has no activations of version {VERSION}")
    *numbers, lists = table.schema.types or [None]
    whole = [pa.int32(), pa.int32(), pa.int64()]
    named = table.schema.names == ["batch", "layer", "steps", "live"] and numbers == whole
    if not named or not pa.types.is_fixed_size_list(lists) or lists.value_type != pa.int64():
        raise ValueError("has other columns than batch, layer, steps and live")
    rows, width = table.num_rows, lists.list_size
    columns = table.combine_chunks().to_batches()
    if rows < 1 or width < 1 or len(columns) != 1 or any(column.null_count for column in table.columns):
        raise ValueError("lacks values")
    batch, layer, steps = (columns[0].column(name).to_numpy() for name in ("batch", "layer", "steps"))
    values = columns[0].column("live").flatten()
    if values.null_count or len(values) != rows * width:
        raise ValueError("lacks counts")
    live = values.to_numpy().reshape(rows, width)
    batches = np.unique(batch)
    layers = rows // batches.size
    expected = np.repeat(batches, layers), np.tile(np.arange(layers), batches.size)
    if batches[0] < 1 or not all(np.array_equal(a, b) for a, b in zip(expected, (batch, layer), strict=True)):
        raise ValueError("does not have every layer once for each batch size")
    if (steps < 1).any() or (steps > MOST_STEPS).any() or (live < 0).any() or (live > steps[:, None]).any():
        raise ValueError("has counts that cannot be")
    by_batch = live.reshape(batches.size, layers, width)
    first = steps.reshape(batches.size, layers)
    if (first != first[:, :1]).any():
        raise ValueError("has layers with different numbers of steps")
    names = batches.tolist()
    model = known.get(b"model", b"").decode("ascii", "replace")
    return Activations(
        model, dict(zip(names, first[:, 0].tolist(), strict=True)), dict(zip(names, by_batch, strict=True))
    )
