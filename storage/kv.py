"""The key/value cache: float16, in blocks of 256 positions that sequences take as they grow."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coterie.errors import PlanError, UsageError
from coterie.kernels.shapes import SPAN
from coterie.models.spec import ModelSpec
from coterie.storage.arena import Arena, BufferRef, round_up
from coterie.storage.mapping import HUGE


@dataclass(frozen=True)
class KVLayout:
    """Where a layer's keys and values lie in a block (docs/packed-format.md)."""

    layers: int
    kv_heads: int
    dim: int

    @classmethod
    def of(cls, spec: ModelSpec) -> "KVLayout":
        return cls(len(spec.layers), spec.n_kv_heads, spec.head_dim)

    @property
    def values(self) -> int:
        """Bytes from a layer's keys to its values."""
        return self.kv_heads * SPAN * self.dim * 2

    def layer(self, index: int) -> int:
        """Bytes from a block's start to a layer's keys."""
        return index * 2 * self.values

    @property
    def stride(self) -> int:
        """Bytes from one block to the next."""
        return round_up(self.block, 64)

    @property
    def positions(self) -> int:
        """Positions of a block."""
        return SPAN

    @property
    def block(self) -> int:
        """Bytes of a block."""
        return self.layers * 2 * self.values

    def region(self, positions: int) -> int:
        """Bytes that hold `positions` positions of one sequence, block table included."""
        return -(-positions // SPAN) * self.stride + HUGE


class KVCache:
    """Blocks cut from the arena's `kv` region, and block tables from `state`, handed to sequences and taken
    back. `sequences` can live at once; together they hold `positions` positions, in whole blocks."""

    def __init__(self, arena: Arena, layout: KVLayout, positions: int, sequences: int) -> None:
        self.arena, self.layout, self.positions = arena, layout, positions
        self._free: list[BufferRef] = []
        size = -(-positions // SPAN)
        self._tables = [arena.allocate("state", size, np.int64) for _ in range(sequences)]

    def sequence(self) -> "Sequence":
        """A new, empty sequence. Raises UsageError when too many live."""
        if not self._tables:
            raise UsageError("too many generations at once; close or finish one")
        return Sequence(self, self._tables.pop())

    def take(self) -> BufferRef:
        """A block: a used one, or a new one. Raises PlanError when the region is full."""
        return self._free.pop() if self._free else self.arena.allocate("kv", self.layout.block)

    def give_back(self, blocks: list[BufferRef]) -> None:
        self._free.extend(blocks)

    def retire(self, table: BufferRef) -> None:
        self._tables.append(table)

    @property
    def nbytes(self) -> int:
        """Bytes of blocks that were ever taken: what the cache costs in memory."""
        return self.arena.usage()["kv"]


class Sequence:
    """One token sequence's place in the cache: `length` positions are filled."""

    def __init__(self, cache: KVCache, table: BufferRef) -> None:
        self.cache, self.length = cache, 0
        self._blocks: list[BufferRef] = []
        self._ref: BufferRef | None = table
        self._table: npt.NDArray[np.int64] = cache.arena.numpy(table)
        self.table_address = cache.arena.address(table)

    def reserve(self, positions: int) -> None:
        """Make room for the first `positions` positions."""
        if positions > self.cache.positions:
            raise UsageError(f"{positions} positions do not fit the context of {self.cache.positions}; raise -c")
        while len(self._blocks) * SPAN < positions:
            try:
                block = self.cache.take()
            except PlanError:
                raise UsageError(
                    f"open generations hold all {self.cache.positions} positions of the context; close one, or raise -c"
                ) from None
            self._table[len(self._blocks)] = self.cache.arena.address(block)
            self._blocks.append(block)

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        """The bytes of a block that was reserved, uint8[layout.block]: keys and values of SPAN positions."""
        return self.cache.arena.numpy(self._blocks[index])

    @property
    def closed(self) -> bool:
        return self._ref is None

    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        if self._ref is not None:
            self.cache.give_back(self._blocks)
            self.cache.retire(self._ref)
            self._blocks, self._ref, self.length = [], None, 0
