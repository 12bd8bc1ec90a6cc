"""Where the neuron cache, its metadata and its reader's buffers lie in the arena (docs/sparse.md)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coterie.kernels import cache as c
from coterie.kernels import record as r
from coterie.kernels import tape as t
from coterie.kernels.shapes import CLUSTER
from coterie.storage.arena import BufferRef, Ledger
from coterie.storage.flash_buffers import TRACE_EVENTS
from coterie.storage.runs import PAGE, SECTOR, Run

REGION = "cache"
DEPTH = 128  # reads in flight: enough for the disk to go on while lanes have all cores


@dataclass(frozen=True)
class NeuronBuffers:
    """`control`: int64[CACHE_WORDS]; `reader`: int64[128], a control block as in tape.py, with `requests`, `queue` and
    `trace`; `demands`: int64[a power of two]; `layers`: int64[layers][LAYER_WORDS]; `sums`: uint64[all neurons];
    `owners`, `stamps`, `counts`: int64[slots]; `free`: int64[DEPTH]; `slots`: uint8[slots][slot bytes]."""

    control: BufferRef
    reader: BufferRef
    requests: BufferRef
    queue: BufferRef
    trace: BufferRef | None
    demands: BufferRef
    layers: BufferRef
    sums: BufferRef
    owners: BufferRef
    stamps: BufferRef
    counts: BufferRef
    free: BufferRef
    slots: BufferRef


def bundle_runs(runs: Sequence[Run]) -> list[Run]:
    """The runs of bundles, by layer."""
    return [run for run in runs if run.kind == "neurons"]


def slot_bytes(run: Run, sector: int) -> int:
    """Bytes of a slot for the run's bundles, on a disk that is read in sectors of so many bytes: a bundle may begin
    anywhere within one."""
    bundle = run.item_bytes // CLUSTER
    return bundle if sector <= SECTOR else -(-(bundle + sector - SECTOR) // sector) * sector


def layer_neurons(run: Run) -> int:
    """Neurons of a layer: the least number of slots that a cache may have, since a step may use all at once."""
    return run.items * CLUSTER


def lay_out_neurons(ledger: Ledger, runs: Sequence[Run], slots: int, sector: int, *, tracing: bool) -> NeuronBuffers:
    """Cut the buffers for a cache of `slots` neurons."""
    bundles = bundle_runs(runs)
    neurons = layer_neurons(bundles[0])
    ring = r.RING_HEADER + TRACE_EVENTS * r.EVENT.itemsize
    size = max(slot_bytes(run, sector) for run in bundles)

    def words(*shape: int) -> BufferRef:
        return ledger.allocate(REGION, shape, np.int64)

    return NeuronBuffers(
        control=words(c.CACHE_WORDS),
        reader=words(t.CONTROL_WORDS),
        requests=words(DEPTH, t.SLOT_WORDS),
        queue=words(DEPTH),
        trace=ledger.allocate(REGION, (1, ring)) if tracing else None,
        demands=words(1 << (neurons * len(bundles) - 1).bit_length()),  # one a neuron: none is asked for twice
        layers=words(len(bundles), c.LAYER_WORDS),
        sums=ledger.allocate(REGION, neurons * len(bundles), np.uint64),
        owners=words(slots),
        stamps=words(slots),
        counts=words(slots),
        free=words(DEPTH),
        slots=ledger.allocate("neurons", (slots, size), align=PAGE),
    )
