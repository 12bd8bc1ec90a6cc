"""A sparse feed-forward network put together by hand, for its kernels."""

from itertools import pairwise

import numpy as np
from harness import Machine
from reference import Bytes, Floats

from coterie.kernels import operands as o
from coterie.kernels.formats import FORMATS
from coterie.kernels.library import kernel_name
from coterie.kernels.neurons import weave_bytes
from coterie.kernels.record import LINE, Opcode
from coterie.kernels.shapes import (
    CLUSTER,
    LIVE_ROW,
    NEURON_BUNDLES,
    NEURON_GATE,
    NEURON_ROW,
    NEURON_SCORES,
    WOVEN_FLOAT,
)
from coterie.kernels.sparse_down import down_scratch
from coterie.scheduler.program import Operand
from coterie.storage.arena import BufferRef, round_up
from coterie.storage.packer import pack_rows


class SparseBench:
    """`raw`: Gate, Up and Down rows of all neurons, in the formats `names`. Inputs must not be negative: they come
    through the kernel that also takes a predictor's hidden units."""

    def __init__(
        self,
        m: Machine,
        names: tuple[str, ...],
        raw: tuple[Bytes, ...],
        columns: int,
        activation: str,
        tile: int,
        *,
        gated: bool,
    ) -> None:
        self.m, self.names, self.columns, self.activation, self.tile, self.gated = (
            m,
            names,
            columns,
            activation,
            tile,
            gated,
        )
        self.clusters = -(-len(raw[0]) // CLUSTER)
        self.supers = -(-columns // 512)
        rows = [self.supers * FORMATS[name].block for name in names]
        self.gate_row, self.down_offset = rows[0], rows[1]
        self.bundle = round_up(rows[1] + rows[2], 512)
        gate = m.room((self.clusters * CLUSTER, rows[0]), region="weights")
        bundles = m.room((self.clusters * CLUSTER, self.bundle), region="weights")
        n = len(raw[0])
        pack_rows(names[0], raw[0], m.look(gate)[:n])
        pack_rows(names[1], raw[1], m.look(bundles)[:n, : rows[1]])
        pack_rows(names[2], raw[2], m.look(bundles)[:n, rows[1] : rows[1] + rows[2]])
        self.table = m.room((self.clusters, NEURON_ROW // 8), np.int64)
        table, at = m.look(self.table), np.arange(self.clusters) * CLUSTER
        table[:, NEURON_GATE // 8] = table[:, NEURON_SCORES // 8] = m.arena.address(gate) + at * rows[0]
        table[:, NEURON_BUNDLES // 8] = m.arena.address(bundles) + at * self.bundle
        self.addresses = m.put(m.arena.address(bundles) + np.arange(self.clusters * CLUSTER) * self.bundle)
        most = round_up(m.rows, tile)
        self.width = round_up(columns, 32)
        self.x = m.room((most, self.width), np.float32)
        self.woven = m.room((m.lanes, most * self.supers * weave_bytes(FORMATS[names[0]])))
        self.hidden_tile = self.clusters * CLUSTER * tile * 4
        self.hidden = m.room((most // tile, self.hidden_tile))
        self.sums = m.room(most * self.supers * WOVEN_FLOAT)
        self.y = m.room((most, self.width), np.float32)
        self.scratch = m.room((m.lanes, round_up(max(down_scratch(tile), 4 * CLUSTER * tile), LINE)))
        self.live = m.room((self.clusters, LIVE_ROW))

    def run(self, x: Floats, cuts: list[int]) -> Floats:
        """The network's output for rows x; in parts that end before the clusters `cuts`."""
        m, b = self.m, self.m.builder()
        weave: dict[int, Operand] = {
            o.WEAVE_X: self.x,
            o.WEAVE_X_ROW: 4 * self.width,
            o.WEAVE_SUBS: self.width // 32,
            o.WEAVE_OUT: self.woven,
            o.WEAVE_OUT_LANE: self.woven.shape[1],
            o.WEAVE_TILE: self.tile,
            o.WEAVE_FLOAT: int(FORMATS[self.names[0]].is_float),
        }
        ready = b.preparation(kernel_name("weave"), Opcode.NORM, weave)
        ends = [0, *(cut for cut in cuts if cut < self.clusters), self.clusters]
        for first, end in pairwise(ends):
            kind = "neuron_gate" if self.gated else "neuron_all"
            name = kernel_name(kind, self.names[0], self.names[1], self.activation, self.tile)
            b.add(name, Opcode.FFN_UP, self._neurons(first, end - first), prepare=ready)
            down = kernel_name("neuron_down", self.names[2], self.tile)
            b.add(down, Opcode.FFN_DOWN, self._down(first, end - first))
        m.look(self.x)[: len(x), : self.columns] = x
        m.look(self.y)[...] = np.nan
        m.step(m.load(b), len(x))
        return np.array(m.look(self.y)[: len(x), : self.columns])

    def _neurons(self, first: int, count: int) -> dict[int, Operand]:
        shared: dict[int, Operand] = {
            o.N_TABLE: self.table,
            o.N_FIRST: first,
            o.N_COUNT: count,
            o.N_SUPERS: self.supers,
            o.N_ROW: self.gate_row,
            o.N_X: self.woven,
            o.N_X_LANE: self.woven.shape[1],
            o.N_HIDDEN: self.hidden,
            o.N_HIDDEN_TILE: self.hidden_tile,
            o.N_SCRATCH: self.scratch,
            o.N_SCRATCH_LANE: self.scratch.shape[1],
        }
        if not self.gated:
            return shared | {o.N_BUNDLE: self.bundle}
        return shared | {
            o.N_LIVE: self.live,
            o.N_ADDRESSES: self.addresses,
            o.N_LAYERS: 1,
            o.N_SCORE_SUPERS: self.supers,
        }

    def _down(self, first: int, count: int) -> dict[int, Operand]:
        live: BufferRef | None = self.live if self.gated else None
        return {
            o.ND_TABLE: self.table,
            o.ND_FIRST: first,
            o.ND_COUNT: count,
            o.ND_LIVE: live,
            o.ND_ADDRESSES: self.addresses,
            o.ND_BUNDLE: self.bundle,
            o.ND_DOWN: self.down_offset,
            o.ND_SUPERS: self.supers,
            o.ND_CHUNK: 1,
            o.ND_HIDDEN: self.hidden,
            o.ND_HIDDEN_TILE: self.hidden_tile,
            o.ND_SUMS: self.sums,
            o.ND_Y: self.y,
            o.ND_Y_ROW: 4 * self.width,
            o.ND_BLOCKS: self.width // 32,
            o.ND_KEEP: int(first > 0),
            o.ND_LAST: int(first + count == self.clusters),
            o.ND_SCRATCH: self.scratch,
            o.ND_SCRATCH_LANE: self.scratch.shape[1],
        }
