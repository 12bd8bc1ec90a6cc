"""The FFN's neuron-cluster instructions, whose lists, weights and arrival flags are data."""

import threading
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from harness import PATIENCE, Machine, lanewise, machine, post_flag, until
from reference import BLOCK, Bytes, Floats, product, random_raw, same_bits

from coterie.errors import UnitError
from coterie.kernels import mathematics
from coterie.kernels import operands as o
from coterie.kernels import record as r
from coterie.kernels.formats import FORMATS as PACKED
from coterie.kernels.formats import ROWS
from coterie.kernels.library import kernel_name
from coterie.kernels.record import SLEEPERS, Opcode
from coterie.kernels.shapes import CLUSTER_FLAG, CLUSTER_ROW, CLUSTER_WANTED, TILE_TOKENS
from coterie.scheduler.program import Operand
from coterie.storage.arena import BufferRef
from coterie.storage.pack import pack
from coterie.storage.runs import ClusterLayout

FFNS = {  # Gate, Up, Down, columns of the input, neurons
    "Q4_0": ("Q4_0", "Q4_0", "Q4_0", 64, 160),
    "Q4_1, Q8_0, Q5_0": ("Q4_1", "Q8_0", "Q5_0", 96, 130),
    "Q4_K, Q6_K": ("Q4_K", "Q4_K", "Q6_K", 256, 1024),
    "F16, BF16, F32": ("F16", "BF16", "F32", 40, 100),
    "Q8_0 into F16": ("Q8_0", "Q8_0", "F16", 64, 96),
}


@dataclass
class Network:
    """One FFN in a machine. `raw`: Gate, Up and Down as the file has them, Down's columns whole clusters."""

    m: Machine
    layout: ClusterLayout
    raw: tuple[Bytes, Bytes, Bytes]
    ids: BufferRef
    table: BufferRef
    bundles: BufferRef
    x: BufferRef
    y: BufferRef
    name: str

    def choose(self, clusters: list[int]) -> None:
        self.m.look(self.ids)[: 1 + len(clusters)] = [len(clusters), *clusters]

    def run(self, x: Floats) -> Floats:
        self.m.look(self.x)[: len(x), : x.shape[1]] = x
        self.m.look(self.y)[...] = np.nan
        self.m.step(self.name, len(x))
        return np.array(self.m.look(self.y)[: len(x), : self.layout.dim])

    def expected(self, x: Floats, clusters: list[int]) -> Floats:
        """The same by the reference: Down's columns taken in the list's order."""
        layout, n = self.layout, self.layout.neurons
        gate, up = (product(f.name, raw, x) for f, raw in ((layout.gate, self.raw[0]), (layout.up, self.raw[1])))
        hidden = np.zeros((len(x), layout.clusters * n), np.float32)
        hidden[:, : layout.ffn_dim] = silu(gate) * up
        chosen = [c * n + i for c in clusters for i in range(n)]
        per_cluster = self.raw[2].reshape(layout.dim, layout.clusters, -1)
        down = np.ascontiguousarray(per_cluster[:, clusters]).reshape(layout.dim, -1)
        return product(layout.down.name, down, np.ascontiguousarray(hidden[:, chosen]))


silu = lanewise(mathematics.silu)


def network(m: Machine, kind: str, tile: int) -> Network:
    gate, up, down, dim, ffn_dim = FFNS[kind]
    layout = ClusterLayout(PACKED[gate], PACKED[up], PACKED[down], dim, ffn_dim)
    rng, clusters, n = np.random.default_rng(0), layout.clusters, layout.neurons
    size, per = BLOCK[down]
    raw = (
        random_raw(rng, gate, ffn_dim, dim),
        random_raw(rng, up, ffn_dim, dim),
        random_raw(rng, down, dim, clusters * n),
    )
    raw[2].reshape(dim, -1)[:, -(-ffn_dim // per) * size :] = 0  # columns of padding
    bundles = m.room((clusters, layout.bundle), region="weights")
    blocks = -(-dim // layout.gate.columns)
    for c in range(clusters):
        for f, rows, first in ((layout.gate, raw[0], 0), (layout.up, raw[1], layout.gate_bytes)):
            area = m.look(bundles)[c, first : first + n // ROWS * blocks * f.block]
            pack(f.name, rows[c * n : (c + 1) * n], area.reshape(n // ROWS, blocks, f.block))
        size_down = layout.down_groups * layout.down.block
        area = m.look(bundles)[c, layout.down_offset : layout.down_offset + size_down]
        column = raw[2].reshape(dim, clusters, -1)[:, c]
        pack(down, np.ascontiguousarray(column), area.reshape(layout.down_groups, 1, layout.down.block))
    table = m.room((clusters, CLUSTER_ROW // 8), np.int64, "weights")
    for word_, first in ((0, 0), (1, layout.down_offset)):
        m.look(table)[:, word_] = m.arena.address(bundles) + first + np.arange(clusters) * layout.bundle
    ids = m.room(1 + clusters, np.int32, "weights")

    x_subs, hidden_subs = blocks * layout.gate.subs, clusters * n // 32
    x, width = m.room((m.rows, -(-dim // 32) * 32), np.float32), -(-dim // ROWS) * ROWS
    tiles, hidden = m.tiles(layout.gate.is_float, x_subs), m.tiles(layout.down.is_float, hidden_subs)
    y, scratch = m.room((m.rows + 8, width), np.float32), m.rows * 2 * n * 4
    up_operands: dict[int, Operand] = {
        o.UP_TABLE: table,
        o.UP_LIST: ids,
        o.UP_NEURONS: n,
        o.UP_BLOCKS: blocks,
        o.UP_X: tiles,
        o.UP_X_SUBS: x_subs,
        o.UP_OUT: hidden,
        o.UP_OUT_SUBS: hidden_subs,
        o.UP_OUT_FLOAT: int(layout.down.is_float),
        o.UP_CHUNK: 1,
        o.UP_PANEL: 1,
        o.UP_SCRATCH: m.room(m.lanes * scratch),
        o.UP_SCRATCH_LANE: scratch,
        o.UP_UP_OFFSET: layout.gate_bytes,
    }
    down_operands: dict[int, Operand] = {
        o.DOWN_TABLE: table,
        o.DOWN_LIST: ids,
        o.DOWN_GROUPS: layout.down_groups,
        o.DOWN_X: hidden,
        o.DOWN_X_SUBS: hidden_subs,
        o.DOWN_Y: y,
        o.DOWN_Y_ROW: 4 * width,
        o.DOWN_CHUNK: 2,
        o.DOWN_PANEL: 2,
    }
    ints, floats = (None, tiles) if layout.gate.is_float else (tiles, None)
    b = m.builder()
    b.add("merge", Opcode.MERGE, m.emit(x, x_subs, tile, ints, floats))
    b.add(kernel_name("ffn_up", gate, up, "silu", tile), Opcode.FFN_UP, up_operands)
    b.add(kernel_name("ffn_down", down, tile), Opcode.FFN_DOWN, down_operands)
    return Network(m, layout, raw, ids, table, bundles, x, y, m.load(b))


@pytest.mark.parametrize("kind", FFNS)
@pytest.mark.parametrize("lanes", [1, 3])
def test_clusters_of_the_list_run_in_its_order(kind: str, lanes: int) -> None:
    for tile, rows in ((1, [1, 3]), (TILE_TOKENS, [1, 5, TILE_TOKENS + 1, 3 * TILE_TOKENS])):
        with machine(lanes, rows=3 * TILE_TOKENS) as m:
            net = network(m, kind, tile)
            every = list(range(net.layout.clusters))
            for n in rows:
                x = np.random.default_rng(n).standard_normal((n, net.layout.dim), np.float32)
                for chosen in (every, every[::2], every[-1:], every[::-1], [every[-1], every[0], every[1]], []):
                    net.choose(chosen)
                    assert same_bits(net.run(x), net.expected(x, chosen) + np.float32(0)), (tile, n, chosen)


def test_a_part_of_the_list_is_as_if_other_neurons_were_zero() -> None:
    with machine(2, rows=8) as m:
        net = network(m, "Q4_0", TILE_TOKENS)
        x = np.random.default_rng(1).standard_normal((3, net.layout.dim), np.float32)
        net.choose([0, 2, 3])
        partial_result = net.run(x)
        size, per = BLOCK["Q4_0"]
        for missing in (1, 4):  # Up's rows of these clusters become zero
            rows = net.raw[1][missing * 32 : missing * 32 + 32]
            rows.reshape(len(rows), -1, size)[..., :2] = 0
        assert per == 32
        assert same_bits(net.expected(x, [0, 1, 2, 3, 4]), partial_result)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_clusters_that_arrive_late(lanes: int) -> None:
    """Weights and flags come in any order, each only once a lane sleeps for want of one; the bits are right."""
    with machine(lanes, rows=8) as m:
        m.unit._header[r.SPIN] = 0  # sleep at once
        net = network(m, "Q4_0", TILE_TOKENS)
        n = net.layout.clusters
        x = np.random.default_rng(2).standard_normal((3, net.layout.dim), np.float32)
        net.choose(list(range(n)))
        expected = net.expected(x, list(range(n)))
        flags = m.room((n, 64), region="flags")
        counters = m.look(flags).view(np.int64)
        m.look(net.table)[:, CLUSTER_FLAG // 8] = m.arena.address(flags) + 64 * np.arange(n)
        weights = m.look(net.bundles)
        whole = weights.copy()
        for epoch in (1, 2, 3):
            m.look(net.table)[:, CLUSTER_WANTED // 8] = epoch
            weights[...] = 0xAA
            posted: list[int] = []

            def bring(epoch: int, posted: list[int]) -> None:
                while len(posted) < n:
                    asleep = until(
                        lambda: [c for c in range(n) if counters[c, 0] < epoch and counters[c, SLEEPERS // 8] > 0]
                    )
                    weights[asleep[-1]] = whole[asleep[-1]]
                    posted.append(asleep[-1])
                    post_flag.ctypes(m.arena.address(flags) + 64 * asleep[-1], epoch)

            thread = threading.Thread(target=partial(bring, epoch, posted))
            thread.start()
            got = net.run(x)
            thread.join(PATIENCE)
            assert sorted(posted) == list(range(n))
            assert same_bits(got, expected)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_step_that_waits_for_clusters_can_be_abandoned(lanes: int) -> None:
    with machine(lanes, rows=8) as m:
        m.unit._header[r.SPIN] = 0
        net = network(m, "Q4_0", TILE_TOKENS)
        n = net.layout.clusters
        x = np.random.default_rng(3).standard_normal((2, net.layout.dim), np.float32)
        net.choose(list(range(n)))
        flags = m.room((n, 64), region="flags")
        counters = m.look(flags).view(np.int64)
        m.look(net.table)[:, CLUSTER_FLAG // 8] = m.arena.address(flags) + 64 * np.arange(n)
        m.look(net.table)[:, CLUSTER_WANTED // 8] = 1
        counters[0, 0] = 1  # the first is there, the others never come

        def abort() -> None:
            until(lambda: counters[:, SLEEPERS // 8].sum() == min(lanes, n - 1))
            m.unit._abort_word[0] = 1

        thread = threading.Thread(target=abort)
        thread.start()
        with pytest.raises(UnitError, match="abandoned"):
            net.run(x)
        thread.join(PATIENCE)
        counters[:, 0] = 1
        assert same_bits(net.run(x), net.expected(x, list(range(n))))
