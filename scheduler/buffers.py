"""Buffers that programs are compiled to use."""

from dataclasses import dataclass
from typing import NamedTuple

from coterie.kernels.formats import Format
from coterie.models.spec import ModelSpec, Rope
from coterie.storage.arena import BufferRef, Ledger
from coterie.storage.weights import Weights


@dataclass(frozen=True)
class Tiles:
    """Input of a matrix: int8 tiles, float tiles, or both, as its readers want; `lane` bytes apart if each lane
    has its own (0: shared)."""

    ints: BufferRef | None
    floats: BufferRef | None
    subs: int
    int_lane: int
    float_lane: int

    def of(self, weights: Format) -> tuple[BufferRef, int]:
        """The tiles that weights of this format read, and their distance between lanes."""
        ref, lane = (self.floats, self.float_lane) if weights.is_float else (self.ints, self.int_lane)
        assert ref is not None
        return ref, lane


@dataclass(frozen=True)
class Shared:
    """What all programs of a model share. `ropes`: float32[context][2][dims/2]; `logits`:
    float32[rows][vocabulary, padded]; `error`: the word kernels complain into. Of a sparse model, `cache`: the neuron
    cache's control block (None: all bundles stay in memory), `uses`: int32[layers][neurons], in how many steps each was
    live (None: not counted)."""

    lanes: int
    context: int
    error: BufferRef
    ropes: dict[Rope, BufferRef]
    logits: BufferRef
    cache: BufferRef | None = None
    uses: BufferRef | None = None


class Laid(NamedTuple):
    """A model that is laid out, and the ledger that programs cut their own buffers from."""

    spec: ModelSpec
    weights: Weights
    shared: Shared
    ledger: Ledger
