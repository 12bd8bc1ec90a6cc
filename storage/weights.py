"""A model's weights in the arena: packed matrices, norm vectors, and neuron clusters with their tables."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import numpy.typing as npt

from coterie.errors import ModelError, PlanError
from coterie.kernels.formats import COLUMNS, FORMATS, ROWS, Format
from coterie.kernels.shapes import CLUSTER_DOWN, CLUSTER_GATE_UP, CLUSTER_ROW
from coterie.models.dequant import finite
from coterie.models.gguf_file import GGUFFile, TensorInfo
from coterie.models.spec import ModelSpec
from coterie.storage.arena import LINE, Arena, BufferRef, Ledger, round_up
from coterie.storage.pack import pack, packed_bytes, padded_columns

CHUNK = 1 << 20  # raw bytes packed at a time: what packing needs beside stays in the cache
Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int], None]  # told the raw bytes packed so far


@dataclass(frozen=True)
class Matrix:
    """A packed matrix: the rows of one tensor, or of several of one format, one below the other."""

    names: tuple[str, ...]
    ref: BufferRef
    format: Format
    rows: int
    columns: int

    @property
    def groups(self) -> int:
        """Groups of 16 rows."""
        return -(-self.rows // ROWS)

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return padded_columns(self.format.name, self.columns) // self.format.columns

    @property
    def group_bytes(self) -> int:
        return self.blocks * self.format.block


@dataclass(frozen=True)
class ClusterLayout:
    """How a layer's FFN is cut into neuron clusters (docs/packed-format.md)."""

    gate: Format
    up: Format
    down: Format
    dim: int
    ffn_dim: int

    @property
    def neurons(self) -> int:
        """Neurons of a cluster: one block of Down's columns."""
        return self.down.columns

    @property
    def clusters(self) -> int:
        return -(-self.ffn_dim // self.neurons)

    @property
    def gate_bytes(self) -> int:
        """Bytes of a cluster's Gate rows; its Up rows follow."""
        return packed_bytes(self.gate.name, self.neurons, self.dim)

    @property
    def gate_up_stride(self) -> int:
        return round_up(self.gate_bytes + packed_bytes(self.up.name, self.neurons, self.dim), LINE)

    @property
    def down_groups(self) -> int:
        return -(-self.dim // ROWS)

    @property
    def down_stride(self) -> int:
        """An odd number of lines, so that a row group's blocks do not all fall into one cache set."""
        return (round_up(self.down_groups * self.down.block, LINE) // LINE | 1) * LINE


@dataclass(frozen=True)
class FFN:
    """A layer's clusters. `gate_up`: [clusters][stride]; `down`: [clusters][stride]; `table`:
    int64[clusters][4] (tile.py); `list`: int32[1 + clusters], the count and the ids of those that run."""

    layout: ClusterLayout
    gate_up: BufferRef
    down: BufferRef
    table: BufferRef
    list: BufferRef


@dataclass(frozen=True)
class Layer:
    """A layer's weights. `projections` give queries, keys and values, in this order."""

    projections: tuple[Matrix, ...]
    output: Matrix
    ffn: FFN
    norms: dict[str, BufferRef] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """All weights of a model."""

    embedding: Matrix
    output: Matrix
    output_norm: BufferRef
    layers: tuple[Layer, ...]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one decode token reads."""
        size = self.output.ref.nbytes
        for layer in self.layers:
            size += sum(m.ref.nbytes for m in (*layer.projections, layer.output))
            size += layer.ffn.gate_up.nbytes + layer.ffn.down.nbytes
        return size


def norm_sizes(spec: ModelSpec) -> dict[str, int]:
    """A layer's norm vectors, as GGUF names them, and their lengths."""
    sizes = {"attn_norm": spec.dim, "ffn_norm": spec.dim}
    if spec.qk_norm:
        sizes |= {"attn_q_norm": spec.head_dim, "attn_k_norm": spec.head_dim}
    if spec.post_norms:
        sizes |= {"post_attention_norm": spec.dim, "post_ffw_norm": spec.dim}
    return sizes


def lay_out(file: GGUFFile, spec: ModelSpec, ledger: Ledger) -> Weights:
    """Cut buffers for all weights from the region `weights`. Raises PlanError for a mixture of formats that no
    kernel serves."""

    def matrix(*names: str) -> Matrix:
        tensors = [file.tensors[name] for name in names]
        name, columns = tensors[0].format, tensors[0].cols
        rows = sum(t.rows for t in tensors)
        ref = ledger.allocate("weights", packed_bytes(name, rows, columns))
        return Matrix(names, ref, FORMATS[name], rows, columns)

    def projections(i: int) -> tuple[Matrix, ...]:
        runs: list[list[str]] = []
        for name in (f"blk.{i}.attn_{part}.weight" for part in "qkv"):
            if runs and file.tensors[runs[-1][0]].format == file.tensors[name].format:
                runs[-1].append(name)
            else:
                runs.append([name])
        return tuple(matrix(*run) for run in runs)

    def ffn(i: int) -> FFN:
        names = (f"blk.{i}.ffn_{part}.weight" for part in ("gate", "up", "down"))
        gate, up, down = (FORMATS[file.tensors[name].format] for name in names)
        if gate.subs != up.subs or gate.is_float != up.is_float:
            raise PlanError(f"{file.path.name}: layer {i} mixes Gate {gate.name} with Up {up.name}: not supported")
        layout = ClusterLayout(gate, up, down, spec.dim, spec.ffn_dim)
        return FFN(
            layout,
            gate_up=ledger.allocate("weights", (layout.clusters, layout.gate_up_stride)),
            down=ledger.allocate("weights", (layout.clusters, layout.down_stride)),
            table=ledger.allocate("weights", (layout.clusters, CLUSTER_ROW // 8), np.int64),
            list=ledger.allocate("weights", 1 + layout.clusters, np.int32),
        )

    def vector(size: int) -> BufferRef:
        return ledger.allocate("weights", round_up(size, COLUMNS), np.float32)

    embedding = matrix("token_embd.weight")
    output = embedding if spec.tied else matrix("output.weight")
    layers = (
        Layer(
            projections(i),
            matrix(f"blk.{i}.attn_output.weight"),
            ffn(i),
            {name: vector(size) for name, size in norm_sizes(spec).items()},
        )
        for i in range(len(spec.layers))
    )
    return Weights(embedding, output, vector(spec.dim), tuple(layers))


def half_split_rows(head_dim: int, rope_dims: int, heads: int) -> npt.NDArray[np.intp]:
    """The row order that turns rotary pairs (2i, 2i+1) into (i, i + dims/2), for `heads` heads."""
    order = np.arange(head_dim)
    order[:rope_dims] = np.concatenate([np.arange(0, rope_dims, 2), np.arange(1, rope_dims, 2)])
    return (np.arange(heads)[:, None] * head_dim + order).ravel()


class Packer:
    """Fills laid-out weights from a model file, a few megabytes at a time."""

    def __init__(self, file: GGUFFile, spec: ModelSpec, arena: Arena, progress: Progress) -> None:
        self.file, self.spec, self.arena, self._progress = file, spec, arena, progress
        self._done = 0
        self._lock = Lock()
        self._stopped = False

    def fill(self, weights: Weights, workers: int) -> None:
        """Pack everything, several layers at a time: copying releases the GIL."""
        self.vector("output_norm.weight", weights.output_norm)
        ends = [weights.embedding] if self.spec.tied else [weights.embedding, weights.output]
        pool = ThreadPoolExecutor(workers)
        try:
            jobs = [pool.submit(self.matrix, matrix) for matrix in ends]
            jobs += [pool.submit(self.layer, i, layer) for i, layer in enumerate(weights.layers)]
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            self._stopped = True  # jobs under way end with the piece they are packing
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def layer(self, i: int, layer: Layer) -> None:
        for matrix in (*layer.projections, layer.output):
            self.matrix(matrix, self.spec.layers[i].rope.dims)
        for name, ref in layer.norms.items():
            self.vector(f"blk.{i}.{name}.weight", ref)
        self.ffn(i, layer.ffn)

    def vector(self, name: str, ref: BufferRef) -> None:
        """A norm's weights, float32 in the file too; the padding stays 0."""
        raw = self.file.read(name)
        self._check(self.file.tensors[name], raw)
        values = raw.view(np.float32)[0]
        self.arena.numpy(ref)[: values.size] = values

    def matrix(self, matrix: Matrix, rope_dims: int = 0) -> None:
        f = matrix.format
        out = self.arena.numpy(matrix.ref).reshape(matrix.groups, matrix.blocks, f.block)
        first = 0
        for name in matrix.names:
            groups = -(-self.file.tensors[name].rows // ROWS)
            rotary = name.endswith(("attn_q.weight", "attn_k.weight")) and self.spec.interleaved_rope
            self._rows(name, out[first : first + groups], rope_dims if rotary else 0)
            first += groups

    def ffn(self, i: int, ffn: FFN) -> None:
        """A layer's clusters; all of them run, all of them are there."""
        layout = ffn.layout
        clusters, groups = layout.clusters, layout.neurons // ROWS
        for name, f, first in (("gate", layout.gate, 0), ("up", layout.up, layout.gate_bytes)):
            blocks = padded_columns(f.name, layout.dim) // f.columns
            area = self.arena.numpy(ffn.gate_up)[:, first : first + groups * blocks * f.block]
            self._clusters(f"blk.{i}.ffn_{name}.weight", area.reshape(clusters, groups, blocks, f.block))
        used = layout.down_groups * layout.down.block
        area = self.arena.numpy(ffn.down)[:, :used].reshape(clusters, layout.down_groups, layout.down.block)
        self._rows(f"blk.{i}.ffn_down.weight", area.transpose(1, 0, 2), 0)
        table, numbers = self.arena.numpy(ffn.table), np.arange(clusters)
        table[:, CLUSTER_GATE_UP // 8] = self.arena.address(ffn.gate_up) + numbers * layout.gate_up_stride
        table[:, CLUSTER_DOWN // 8] = self.arena.address(ffn.down) + numbers * layout.down_stride
        self.arena.numpy(ffn.list)[:] = [clusters, *range(clusters)]

    def _rows(self, name: str, out: Bytes, rope_dims: int) -> None:
        """Pack a tensor into out[groups, blocks, bytes]; rotary pairs are split if `rope_dims` is not 0."""
        tensor = self.file.tensors[name]
        unit = np.lcm(ROWS, self.spec.head_dim) if rope_dims else ROWS  # whole heads, whole groups
        step = max(1, CHUNK // (unit * tensor.row_bytes)) * unit
        for row in range(0, tensor.rows, step):
            last = min(tensor.rows, row + step)
            raw = self.file.read(name, row, last)
            self._check(tensor, raw)
            if rope_dims:
                raw = raw[half_split_rows(self.spec.head_dim, rope_dims, (last - row) // self.spec.head_dim)]
            pack(tensor.format, raw, out[row // ROWS : -(-last // ROWS)])
            self._count(raw.nbytes)

    def _clusters(self, name: str, out: Bytes) -> None:
        """Pack a tensor into out[clusters, groups, blocks, bytes]."""
        tensor = self.file.tensors[name]
        clusters, groups, blocks, size = out.shape
        rows = groups * ROWS
        step = max(1, CHUNK // (rows * tensor.row_bytes))
        for c in range(0, clusters, step):
            last = min(clusters, c + step)
            raw = self.file.read(name, c * rows, min(tensor.rows, last * rows))
            self._check(tensor, raw)
            packed = np.empty(((last - c) * groups, blocks, size), np.uint8)
            pack(tensor.format, raw, packed)
            out[c:last] = packed.reshape(last - c, groups, blocks, size)
            self._count(raw.nbytes)

    def _check(self, tensor: TensorInfo, raw: Bytes) -> None:
        if not finite(raw, tensor.format):
            raise ModelError(
                f"{self.file.path.name}: tensor {tensor.name!r} holds a weight that is not a number; "
                "the file is damaged"
            )

    def _count(self, nbytes: int) -> None:
        if self._stopped:
            raise InterruptedError("loading was stopped")
        with self._lock:
            self._done += nbytes
            self._progress(self._done)
