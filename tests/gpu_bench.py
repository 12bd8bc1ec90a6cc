"""A bench for GPU kernels: a small arena, an OpenCL device, and records put together by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gpu_reference import blocks_of

from coterie.actors.opencl import Loaded, OpenCLDevice
from coterie.kernels import record as r
from coterie.kernels.formats import COLUMNS, FORMATS, ROWS
from coterie.kernels.gpu.signatures import NONE, operands
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.pack import pack, padded_columns

NAN = np.float32(np.nan)
EPOCH = 77


class GpuBench:
    """Records of one kernel are loaded and run; `step` is the step header."""

    def __init__(self, *, wide: bool | None, share: float = 1.0, size: int = 24 << 20) -> None:
        self.arena = Arena({"all": size})
        self.device = OpenCLDevice(self.arena, share=share, wide=wide)
        self.begin()

    def begin(self) -> None:
        """Forget all buffers; memory keeps what it holds."""
        self.arena.rewind("all")
        self.step = self.put(np.zeros(r.HEADER_WORDS, np.int64))
        self.look(self.step)[r.EPOCH] = EPOCH

    def put(self, values: npt.ArrayLike, align: int = 64) -> BufferRef:
        array = np.asarray(values)
        ref = self.arena.allocate("all", array.shape, array.dtype, align)
        self.arena.numpy(ref)[...] = array
        return ref

    def room(self, *shape: int) -> BufferRef:
        """float32 not-a-numbers: what a kernel leaves alone stays one."""
        return self.put(np.full(shape, NAN))

    def look(self, ref: BufferRef) -> npt.NDArray[Any]:
        return self.arena.numpy(ref)

    def address(self, ref: BufferRef) -> int:
        return self.arena.address(ref)

    def record(self, family: str, **values: object) -> npt.NDArray[np.int64]:
        """int64[1][WORDS]; buffers become offsets, None becomes NONE. `step` and `base` need not be given."""
        given = {"step": self.step} | values
        words = np.zeros((1, r.WORDS), np.int64)
        if family in ("rope", "attend"):
            given["base"] = 0
        for word, value in operands(family, given).items():
            if isinstance(value, BufferRef):
                words[0, word] = value.offset
            elif value is None:
                words[0, word] = NONE
            elif isinstance(value, float):
                words[0, word] = r.float_bits(value)
            else:
                assert isinstance(value, int)
                words[0, word] = value
        return words

    def load(self, kernel: str, **values: object) -> Loaded:
        return self.device.load(self.record(kernel.partition(":")[0], **values), [kernel])

    def run(self, kernel: str, rows: int, wanted: int = 0, /, **values: object) -> None:
        """Run one record for a step of so many rows, of which `wanted` want logits."""
        self.look(self.step)[[r.TOKENS, r.OUTPUTS]] = rows, wanted
        self.load(kernel, **values).run(rows, wanted)
        self.device.finish()

    def matrix(self, name: str, raw: npt.NDArray[np.uint8], columns: int, per: int, gap: int) -> dict[str, Any]:
        """Raw rows packed in extents of `per` groups with `gap` bytes of rubbish between them, as operands."""
        f, groups = FORMATS[name], -(-len(raw) // ROWS)
        blocks = padded_columns(name, columns) // f.columns
        packed = np.empty((groups, blocks, f.block), np.uint8)
        pack(name, raw, packed)
        group = blocks * f.block
        weights = self.put(in_extents(packed.reshape(groups, group), per, gap))
        return {
            "weights": weights,
            "groups": groups,
            "blocks": blocks,
            "group": group,
            "per": per,
            "stride": per * group + gap,
        }

    def rows(self, values: npt.NDArray[np.float32], name: str = "F32", more: int = 3) -> BufferRef:
        """Rows as products with weights of format `name` read them: float32 filled up with zeros to a multiple of 32,
        or blocks of whole numbers; and some rows of not-a-numbers behind them."""
        n, columns = values.shape
        made = np.pad(values, ((0, 0), (0, -columns % COLUMNS))) if FORMATS[name].is_float else blocks_of(values)
        ref = self.room(n + more, made.shape[1])
        self.look(ref)[:n] = made
        return ref

    def close(self) -> None:
        self.device.close()
        self.arena.close()


def in_extents(items: npt.NDArray[np.uint8], per: int, gap: int) -> npt.NDArray[np.uint8]:
    """Items uint8[n][bytes], `per` to an extent, extents `gap` bytes of 255 apart."""
    parts: list[npt.NDArray[np.uint8]] = []
    for first in range(0, len(items), per):
        parts += [items[first : first + per].ravel(), np.full(gap, 255, np.uint8)]
    return np.concatenate(parts)


def untouched(values: npt.NDArray[np.float32] | Sequence[float]) -> bool:
    return bool(np.isnan(values).all())
