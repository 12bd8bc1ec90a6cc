"""Repacking a GGUF's tensors into extents, a run at a time: for the flash file, or straight into memory."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Lock

import numpy as np
import numpy.typing as npt

from coterie.kernels.formats import FORMATS, ROWS, Format
from coterie.kernels.shapes import CLUSTER, SUPERBLOCK
from coterie.models.source import WeightSource
from coterie.models.spec import ModelSpec
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.pack import pack, padded_columns, raw_bytes
from coterie.storage.runs import Run, cluster_layout, neuron_layout, norm_places, projection_names
from coterie.storage.weights import Weights

Bytes = npt.NDArray[np.uint8]


def half_split_rows(head_dim: int, rope_dims: int, heads: int) -> npt.NDArray[np.intp]:
    """The row order that turns rotary pairs (2i, 2i+1) into (i, i + dims/2), for `heads` heads."""
    order = np.arange(head_dim)
    order[:rope_dims] = np.concatenate([np.arange(0, rope_dims, 2), np.arange(1, rope_dims, 2)])
    return (np.arange(heads)[:, None] * head_dim + order).ravel()


def pack_rows(name: str, raw: Bytes, out: Bytes) -> None:
    """Rows of single neurons: raw uint8[rows, row bytes] into uint8[rows, superblocks * bytes], which may be a view."""
    f = FORMATS[name]
    block, supers = raw_bytes(name, f.columns), out.shape[1] // f.block
    blocks = np.zeros((len(raw), supers * SUPERBLOCK * block), np.uint8)
    blocks[:, : raw.shape[1]] = raw
    packed = np.empty((len(raw) * supers, 1, f.block), np.uint8)
    pack(name, blocks.reshape(-1, block), packed)
    out[:] = packed.reshape(len(raw), -1)


class RunPacker:
    """Makes the extents of one run. Raises ModelError where the file holds weights that are no numbers."""

    def __init__(self, file: WeightSource, spec: ModelSpec, run: Run) -> None:
        self.file, self.spec, self.run = file, spec, run
        self._down: Bytes | None = None  # of an FFN: a cluster is a block column, so all rows are needed at once

    def fill(self, extent: int, out: Bytes) -> None:
        """Pack an extent into uint8[extent_bytes] that holds zeros."""
        first = extent * self.run.per
        count = self.run.items_of(extent)
        items = out[: count * self.run.item_bytes].reshape(count, self.run.item_bytes)
        match self.run.kind:
            case "norms":
                self._norms(items[0].view(np.float32))
            case "ffn":
                self._clusters(first, items)
            case "gate" | "scores":
                self._deciding(first, items)
            case "neurons":
                self._bundles(first, items)
            case _:
                self._groups(first, items)

    def _norms(self, out: npt.NDArray[np.float32]) -> None:
        """All norm vectors, float32 in the file too; the padding stays 0."""
        for name, (at, size) in norm_places(self.spec).items():
            out[at : at + size] = self.file.read_finite(name)[0].view(np.float32)

    def _names(self) -> tuple[str, ...]:
        match self.run.kind:
            case "embedding" | "lookup":
                return ("token_embd.weight",)
            case "output":
                return ("output.weight",)
            case "attention":
                return (f"blk.{self.run.layer}.attn_output.weight",)
            case "predictor":
                return (f"blk.{self.run.layer}.fc1.weight",)
            case _:
                return projection_names(self.file.tensors, self.run.layer)[self.run.part]

    def _groups(self, first: int, out: Bytes) -> None:
        """Row groups from number `first` on; the run's tensors lie one below the other, each on whole groups."""
        f = FORMATS[self.run.format]
        out = out.reshape(len(out), -1, f.block)
        begin = 0  # the tensor's first group
        for name in self._names():
            tensor = self.file.tensors[name]
            end = begin + -(-tensor.rows // ROWS)
            low, high = max(begin, first), min(end, first + len(out))
            if low < high:
                rows = (low - begin) * ROWS, min(tensor.rows, (high - begin) * ROWS)
                pack(f.name, self._rows(name, *rows), out[low - first : high - first])
            begin = end

    def _rows(self, name: str, first: int, last: int) -> Bytes:
        """Rows of a matrix in packed order: queries' and keys' rotary pairs are split."""
        rotary = name.endswith(("attn_q.weight", "attn_k.weight")) and self.spec.interleaved_rope
        if not rotary:
            return self.file.read_finite(name, first, last)
        dim = self.spec.head_dim
        low, high = first // dim * dim, -(-last // dim) * dim  # whole heads
        order = low + half_split_rows(dim, self.spec.layers[self.run.layer].rope.dims, (high - low) // dim)
        return self.file.read_finite(name, low, high)[order[first - low : last - low] - low]

    def _clusters(self, first: int, out: Bytes) -> None:
        """Bundles of the clusters from number `first` on."""
        layer = self.run.layer
        layout = cluster_layout(self.file.tensors, self.spec, layer)
        rows = first * layout.neurons, min(layout.ffn_dim, (first + len(out)) * layout.neurons)
        self._projection(f"blk.{layer}.ffn_gate.weight", layout.gate, rows, out[:, : layout.gate_bytes])
        self._projection(f"blk.{layer}.ffn_up.weight", layout.up, rows, out[:, layout.gate_bytes : layout.down_offset])
        if self._down is None:
            self._down = self.file.read_finite(f"blk.{layer}.ffn_down.weight")
        block = self._down.shape[1] * layout.neurons // layout.ffn_dim  # raw bytes of a row's block
        column = self._down[:, first * block : (first + len(out)) * block]
        size = layout.down_groups * layout.down.block
        bundles = out[:, layout.down_offset : layout.down_offset + size]
        area = bundles.reshape(len(out), layout.down_groups, layout.down.block)
        pack(layout.down.name, np.ascontiguousarray(column), area.transpose(1, 0, 2))

    def _deciding(self, first: int, out: Bytes) -> None:
        """Gate rows, or a predictor's, of the clusters of neurons from number `first` on."""
        part = "ffn_gate" if self.run.kind == "gate" else "fc2"
        self._neuron_rows(part, FORMATS[self.run.format], first, out.reshape(len(out) * CLUSTER, -1))

    def _bundles(self, first: int, out: Bytes) -> None:
        """The same clusters' bundles."""
        layout = neuron_layout(self.file.tensors, self.spec, self.run.layer)
        bundles = out.reshape(len(out) * CLUSTER, layout.bundle)
        up, down = layout.up_offset, layout.down_offset
        end = down + layout.supers * layout.down.block
        if up:
            self._neuron_rows("ffn_gate", layout.gate, first, bundles[:, :up])
        self._neuron_rows("ffn_up", layout.up, first, bundles[:, up:down])
        self._neuron_rows("ffn_down_t", layout.down, first, bundles[:, down:end])

    def _neuron_rows(self, part: str, f: Format, first: int, out: Bytes) -> None:
        """Rows of single neurons: 16 blocks of a row are packed as a block of 16 rows is."""
        low, high = first * CLUSTER, min(self.spec.ffn_dim, first * CLUSTER + len(out))
        raw = self.file.read_finite(f"blk.{self.run.layer}.{part}.weight", low, high)
        pack_rows(f.name, raw, out[: high - low])

    def _projection(self, name: str, f: Format, rows: tuple[int, int], out: Bytes) -> None:
        """Gate or Up rows into their places in the bundles."""
        blocks = padded_columns(f.name, self.spec.dim) // f.columns
        groups = out.shape[1] // (blocks * f.block)
        packed = np.empty((len(out) * groups, blocks, f.block), np.uint8)
        pack(f.name, self.file.read_finite(name, *rows), packed)
        out[:, : groups * blocks * f.block] = packed.reshape(len(out), -1)


def pack_into(
    arena: Arena,
    weights: Weights,
    packers: Sequence[RunPacker],
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Fill the pinned extents of each run from its packer, several runs at a time: copying releases the GIL.
    `progress` is told the bytes packed so far."""
    lock, stopped, done = Lock(), False, 0

    def fill(index: int) -> None:
        nonlocal done
        run = weights.runs[index]
        for extent, offset in enumerate(weights.where[weights.extents.of_run(index)].tolist()):
            if stopped:
                return
            size = run.extent_bytes(extent)
            packers[index].fill(extent, arena.numpy(BufferRef("weights", offset, size, "|u1", (size,))))
            with lock:
                done += size
                progress(done)

    pool = ThreadPoolExecutor(workers)
    try:
        for job in as_completed([pool.submit(fill, i) for i in range(len(weights.runs))]):
            job.result()
    except BaseException:
        stopped = True  # jobs under way end with the extent they are packing
        raise
    finally:
        pool.shutdown(cancel_futures=True)
