"""What the CPU unit's programs of one mode compute in: residual stream, tiles, scratch. Sizes do not depend on how many
layers there are."""

from typing import Literal

import numpy as np

from coterie.kernels import shapes
from coterie.kernels.formats import COLUMNS, Format
from coterie.kernels.shapes import FLOAT_TOKEN, INT8_TOKEN
from coterie.scheduler.buffers import Laid, Tiles
from coterie.scheduler.lower_sparse import SparseLowering
from coterie.storage.arena import BufferRef, round_up
from coterie.storage.kv import KVLayout
from coterie.storage.runs import ClusterLayout
from coterie.storage.weights import FFN

Mode = Literal["decode", "prefill"]


class Workspace:
    """The buffers of programs for up to `rows` rows in tiles of `tile` tokens."""

    def __init__(self, laid: Laid, *, mode: Mode, rows: int, tile: int) -> None:
        self.spec, self.weights, self.shared, self.ledger = laid
        self.mode, spec = mode, laid.spec
        self.rows, self.tile, self.lanes = round_up(rows, tile), tile, self.shared.lanes
        self.width = round_up(spec.dim, COLUMNS)
        self.heads_width = round_up(spec.n_heads * spec.head_dim, COLUMNS)
        self.qkv_width = round_up(spec.qkv_rows, COLUMNS)
        self.kv = KVLayout.of(spec)
        self._allocate()

    # --- buffers ----------------------------------------------------------------------------------

    def _floats(self, *shape: int) -> BufferRef:
        return self.ledger.allocate("activations", shape, np.float32)

    def _allocate(self) -> None:
        spec, rows = self.spec, self.rows
        self.x = [self._floats(rows, self.width) for _ in range(2)]
        self.y = self._floats(rows, self.width)
        # A preparation of one span's Up may still read y while another span's Down adds to its sums.
        self.z = self._floats(rows, self.width) if self.mode == "decode" else self.y
        self.qkv = self._floats(rows, self.qkv_width)
        layers = self.weights.layers
        readers = [m.format for layer in layers for m in layer.projections]
        dense = self._dense
        readers += [g for layout in dense for g in (layout.gate, layout.up)]
        readers += [layer.predictor.format for layer in layers if layer.predictor]
        self.normed = self._tiles(spec.dim, rows, readers)
        self.attended = self._tiles(spec.n_heads * spec.head_dim, rows, [layer.output.format for layer in layers])
        private = self._private
        self.attention = self._floats(private, rows, self.heads_width)
        if dense:
            self._allocate_ffn()
        self.sparse = self._sparse()
        if output := self.weights.output:
            self.planes = 1 if output.format.is_float else 2
            self.final_tile = max(self.tile, self.planes)
            self.final = self._tiles(spec.dim, self.shared.logits.shape[0], [output.format])
        share = spec.n_heads // spec.n_kv_heads
        self.attend_lane = round_up(shapes.attend_scratch(share, spec.head_dim, shapes.QUERY_TOKENS), 64)
        self.attend_scratch = self.ledger.allocate("activations", self.lanes * self.attend_lane)
        self.unpack_scratch = self.ledger.allocate("activations", self.lanes * shapes.UNPACKED)
        self.spans = -(-self.shared.context // shapes.SPAN) + 1
        self.state_row = spec.n_heads * self.spans * (shapes.HEAD + 4 * spec.head_dim)
        states = rows * self.state_row if self.mode == "decode" else 64
        self.states = self.ledger.allocate("activations", states)

    @property
    def _dense(self) -> list[ClusterLayout]:
        return [layer.ffn.layout for layer in self.weights.layers if isinstance(layer.ffn, FFN)]

    def _allocate_ffn(self) -> None:
        dense = self._dense
        hidden = max(layout.clusters * layout.neurons for layout in dense)
        self.hidden = self._tiles(hidden, self.rows, [layout.down for layout in dense], shared=True)
        self.ffn_lane = self.rows * 2 * max(layout.neurons for layout in dense) * 4
        self.ffn_scratch = self.ledger.allocate("activations", self.lanes * self.ffn_lane)

    def _sparse(self) -> SparseLowering | None:
        if not self.spec.sparse:
            return None
        return SparseLowering(
            self.spec, self.weights, self.ledger, lanes=self.lanes, rows=self.rows, tile=self.tile,
            decode=self.mode == "decode", cache=self.shared.cache, uses=self.shared.uses,
        )  # fmt: skip

    @property
    def _private(self) -> int:
        """How many copies a prepared buffer has: one a lane in decode."""
        return self.lanes if self.mode == "decode" else 1

    def _tiles(self, columns: int, rows: int, readers: list[Format], shared: bool = False) -> Tiles:
        """Tiles for whichever kinds the readers want. K-quants read whole blocks of 256 columns."""
        subs = max(round_up(columns, reader.columns) for reader in readers) // COLUMNS
        copies = 1 if shared else self._private
        refs: list[BufferRef | None] = []
        for is_float, token in ((False, INT8_TOKEN), (True, FLOAT_TOKEN)):
            wanted = any(reader.is_float == is_float for reader in readers)
            refs.append(self.ledger.allocate("activations", (copies, rows * subs * token)) if wanted else None)
        step = 0 if shared or self.mode == "prefill" else rows * subs
        return Tiles(refs[0], refs[1], subs, step * INT8_TOKEN, step * FLOAT_TOKEN)
