"""A bench for kernels: a small arena, a CPU unit, and programs put together by hand."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import cfunc, types

from coterie.actors.cpu import CpuUnit
from coterie.kernels import operands as o
from coterie.kernels.formats import FORMATS, ROWS
from coterie.kernels.library import kernel_name
from coterie.kernels.record import LINE, Opcode
from coterie.kernels.shapes import FLOAT_TOKEN, INT8_TOKEN
from coterie.kernels.sync import post, wait_flag
from coterie.kernels.vector import floats_at, set_floats
from coterie.scheduler.program import Draft, Operand, ProgramBuilder
from coterie.storage.arena import Arena, BufferRef, round_up
from coterie.storage.pack import pack, packed_bytes, padded_columns
from coterie.storage.unit import lay_out_unit

PATIENCE = 30.0  # seconds after which something that waits is taken for hung
REGIONS = ("weights", "activations", "state", "flags", "programs", "kv", "trace")


class Machine:
    """An arena with a unit of `lanes` lanes that takes steps of up to `rows` rows."""

    def __init__(
        self, lanes: int = 1, *, rows: int = 64, size: int = 64 << 20, tracing: bool = False, detached: bool = False
    ) -> None:
        self.arena = Arena(dict.fromkeys(REGIONS, size))
        self.lanes, self.rows = lanes, rows
        buffers = lay_out_unit(self.arena, lanes, rows, tracing=tracing)
        self.unit = CpuUnit(self.arena, lanes, buffers, detached=detached)
        self.error = self.arena.allocate("flags", LINE)
        self._programs = 0

    def room(
        self, shape: int | tuple[int, ...], kind: npt.DTypeLike = np.uint8, region: str = "activations"
    ) -> BufferRef:
        """A buffer of zeros."""
        return self.arena.allocate(region, shape, kind)

    def put(self, values: npt.ArrayLike, region: str = "activations") -> BufferRef:
        """A buffer with a copy of `values`."""
        array = np.asarray(values)
        ref = self.arena.allocate(region, array.shape, array.dtype)
        self.arena.numpy(ref)[...] = array
        return ref

    def look(self, ref: BufferRef) -> npt.NDArray[Any]:
        return self.arena.numpy(ref)

    def builder(self, name: str = "") -> ProgramBuilder:
        """A new program; without a name it gets one of its own."""
        self._programs += 1
        return ProgramBuilder(name or f"program {self._programs}", self.arena, self.lanes, self.error)

    def load(self, builder: ProgramBuilder) -> str:
        """Build and load a program; returns its name."""
        self.unit.load(builder.build())
        return builder.name

    def step(
        self,
        name: str,
        rows: int = 1,
        *,
        positions: npt.ArrayLike = (),
        tables: npt.ArrayLike = (),
        outputs: npt.ArrayLike = (),
    ) -> None:
        self.unit.run(name, np.zeros(rows, np.int32), positions, tables, outputs)

    # --- matrices -----------------------------------------------------------------------------------

    def pack(self, name: str, raw: npt.NDArray[np.uint8], columns: int) -> BufferRef:
        """Raw GGUF rows as a packed matrix."""
        groups, blocks = -(-len(raw) // ROWS), padded_columns(name, columns) // FORMATS[name].columns
        ref = self.room(packed_bytes(name, len(raw), columns), region="weights")
        pack(name, raw, self.look(ref).reshape(groups, blocks, FORMATS[name].block))
        return ref

    def tiles(self, is_float: bool, subs: int, *, private: bool = False, planes: int = 1) -> BufferRef:
        """Room for activation tiles of all rows."""
        row = planes * subs * (FLOAT_TOKEN if is_float else INT8_TOKEN)
        return self.room((self.lanes if private else 1, round_up(self.rows, 8) * row))

    def emit(
        self, x: BufferRef, subs: int, tile: int, ints: BufferRef | None, floats: BufferRef | None
    ) -> dict[int, Operand]:
        """Operands of `merge` that only turn rows float32[rows][columns] into tiles of `subs` sub-blocks a row."""
        return {
            o.MERGE_ROWS: x,
            o.MERGE_ROWS_ROW: 4 * x.shape[1],
            o.MERGE_SUBS: x.shape[1] // 32,
            o.MERGE_TILE: tile,
            o.MERGE_OUT: ints,
            o.MERGE_OUT_LANE: lane_bytes(ints),
            o.MERGE_FLOAT_OUT: floats,
            o.MERGE_FLOAT_LANE: lane_bytes(floats),
            o.MERGE_TILE_SUBS: subs,
        }

    def matmul(
        self,
        builder: ProgramBuilder,
        name: str,
        weights: BufferRef,
        rows: int,
        columns: int,
        x: BufferRef,
        tile: int,
        *,
        panel: int = 1 << 20,
        chunk: int = 1,
        planes: int = 1,
        prepare: Draft | None = None,
    ) -> BufferRef:
        """Add y = W x on tiles `x` to a program; returns y, float32[steps' rows][rows, padded]. With two planes it is
        the rows that want logits whose tiles `x` holds."""
        f = FORMATS[name]
        groups, blocks = -(-rows // ROWS), padded_columns(name, columns) // f.columns
        y = self.room((planes * round_up(self.rows, 8), groups * ROWS), np.float32)
        self.look(y)[...] = np.nan  # what is not written is seen
        operands: dict[int, Operand] = {
            o.MATMUL_WEIGHTS: weights,
            o.MATMUL_GROUP: f.group_bytes(blocks * f.columns),
            o.MATMUL_GROUPS: groups,
            o.MATMUL_BLOCKS: blocks,
            o.MATMUL_X: x,
            o.MATMUL_X_LANE: lane_bytes(x),
            o.MATMUL_Y: y,
            o.MATMUL_Y_ROW: 4 * groups * ROWS,
            o.MATMUL_CHUNK: chunk,
            o.MATMUL_PANEL: panel,
            o.MATMUL_OUTPUTS: int(planes > 1),
            o.MATMUL_X_SUBS: blocks * f.subs,
            o.MATMUL_PLANES: planes,
            o.MATMUL_PER: groups,
        }
        builder.add(kernel_name("matmul", name, tile), Opcode.MATMUL, operands, prepare=prepare)
        return y

    def close(self) -> None:
        self.unit.close()
        self.arena.close()


@cfunc(types.int64(types.int64, types.int64))
def post_flag(flag, value):  # type: ignore[no-untyped-def]
    post(flag, value)
    return value


@cfunc(types.int64(types.int64, types.int64, types.int64, types.int64))
def wait_on(flag, wanted, abort, nap):  # type: ignore[no-untyped-def]
    """Sleep on a flag at once; 1 when it was posted, 0 when the word at `abort` was set."""
    return 1 if wait_flag(flag, wanted, 0, abort, nap) else 0


def until(done: Callable[[], Any]) -> Any:
    """Poll until something is true; fail when it takes for ever."""
    end = time.monotonic() + PATIENCE
    while not (value := done()):
        assert time.monotonic() < end, "this never happened"
        time.sleep(0)
    return value


def lane_bytes(tiles: BufferRef | None) -> int:
    """Distance between the lanes' copies of tiles [copies][bytes]; 0 if there is one for all."""
    return tiles.nbytes // tiles.shape[0] if tiles is not None and tiles.shape[0] > 1 else 0


def lanewise(operation: Any) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    """A vector operation of the kernels as a function of float32 arrays."""

    @cfunc(types.void(types.intp, types.intp, types.intp))
    def run(x, out, count):  # type: ignore[no-untyped-def]
        for at in range(0, 4 * count, 64):
            set_floats(out + at, operation(floats_at(x + at)))

    def call(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        padded = np.zeros(-(-x.size // 16) * 16, np.float32)
        padded[: x.size] = x.ravel()
        out = np.empty_like(padded)
        run.ctypes(padded.ctypes.data, out.ctypes.data, padded.size)
        return out[: x.size].reshape(x.shape)

    return call


@contextmanager
def machine(lanes: int = 1, **options: Any) -> Iterator[Machine]:
    made = Machine(lanes, **options)
    try:
        yield made
    finally:
        made.close()
