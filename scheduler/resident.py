"""A model that is all in memory, laid out without its file: to be measured, or looked at on paper."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import numpy as np

from coterie.kernels.shapes import TILE_TOKENS
from coterie.models.header import ModelHeader, TensorInfo
from coterie.models.spec import ModelSpec
from coterie.scheduler.layout import ModelLayout, Units, lay_out_model, lay_out_units
from coterie.scheduler.placement import CPU_ONLY, Placement
from coterie.storage.arena import Ledger
from coterie.storage.runs import Extents, lay_out_runs
from coterie.storage.weights import Residency

CONTEXT, CHUNK = 1280, 256
Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Resident:
    """Lays units and model out in a ledger, or in an arena."""

    spec: ModelSpec
    tensors: Tensors
    lanes: int
    placement: Placement = CPU_ONLY

    def units(self, ledger: Ledger) -> Units:
        """The units' own buffers."""
        return lay_out_units(ledger, self.placement, self.lanes, CHUNK, tracing=True)

    def model(self, ledger: Ledger, units: Units) -> ModelLayout:
        """The model's, with weights in the order of the file, as GPUs want them."""
        runs = lay_out_runs(self.tensors, self.spec)
        residency = Residency(np.arange(Extents.of(runs).nbytes.size))
        return lay_out_model(
            ledger, cast(ModelHeader, SimpleNamespace(tensors=self.tensors)), self.spec, runs, residency,
            lanes=self.lanes, context=CONTEXT, chunk=CHUNK, tile=TILE_TOKENS, placement=self.placement, gpu=units.gpu,
        )  # fmt: skip

    def on_paper(self) -> ModelLayout:
        """The model, where nothing is allocated."""
        paper = Ledger()
        return self.model(paper, self.units(paper))
