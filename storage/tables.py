"""The tables by which kernels find weights: a row a cluster, an address a neuron (docs/packed-format.md)."""

import numpy as np
import numpy.typing as npt

from coterie.kernels.shapes import (
    CLUSTER,
    CLUSTER_DOWN,
    CLUSTER_FLAG,
    CLUSTER_GATE_UP,
    CLUSTER_WANTED,
    NEURON_BUNDLES,
    NEURON_FLAG,
    NEURON_GATE,
    NEURON_GATE_WANTED,
    NEURON_SCORES,
    NEURON_WANTED,
)
from coterie.storage.arena import Arena
from coterie.storage.weights import FFN, SparseFFN, Weights

Int64s = npt.NDArray[np.int64]


def fill_tables(arena: Arena, weights: Weights, arrived: int) -> None:
    """Write every layer's cluster table and lists; `arrived` is the address of the flag that counts reads."""
    wanted = np.zeros(weights.where.size, np.int64)  # 1 + tape position, of what is streamed
    wanted[weights.tape] = weights.begin + np.arange(1, 1 + weights.tape.size)
    for layer in weights.layers:
        if isinstance(layer.ffn, FFN):
            _fill_clusters(arena, weights, layer.ffn, wanted, arrived)
        else:
            _fill_neurons(arena, weights, layer.ffn, wanted, arrived)


def _places(arena: Arena, weights: Weights, index: int) -> tuple[Int64s, Int64s]:
    """Of each item of a run: the number of its extent, and its address."""
    run = weights.runs[index]
    items = np.arange(run.items)
    numbers = weights.extents.first[index] + items // run.per
    return numbers, arena.base + weights.where[numbers] + items % run.per * run.item_bytes


def _fill_clusters(arena: Arena, weights: Weights, ffn: FFN, wanted: Int64s, arrived: int) -> None:
    table = arena.numpy(ffn.table)
    numbers, bundle = _places(arena, weights, ffn.index)
    table[:, CLUSTER_GATE_UP // 8] = bundle
    table[:, CLUSTER_DOWN // 8] = bundle + ffn.layout.down_offset
    table[:, CLUSTER_FLAG // 8] = np.where(wanted[numbers] > 0, arrived, 0)
    table[:, CLUSTER_WANTED // 8] = wanted[numbers]
    for span in ffn.spans:
        arena.numpy(span.list)[:] = [span.count, *range(span.first, span.first + span.count)]


def _fill_neurons(arena: Arena, weights: Weights, ffn: SparseFFN, wanted: Int64s, arrived: int) -> None:
    """The addresses are those of pinned bundles: others come and go."""
    table, layout = arena.numpy(ffn.table), ffn.layout
    gates, table[:, NEURON_SCORES // 8] = _places(arena, weights, ffn.deciding)
    bundles, table[:, NEURON_BUNDLES // 8] = _places(arena, weights, ffn.bundles)
    table[:, NEURON_GATE // 8] = table[:, (NEURON_BUNDLES if layout.scores else NEURON_SCORES) // 8]
    table[:, NEURON_FLAG // 8] = arrived
    table[:, NEURON_GATE_WANTED // 8], table[:, NEURON_WANTED // 8] = wanted[gates], wanted[bundles]
    pinned = weights.is_pinned(bundles)[:, None]
    first = table[:, NEURON_BUNDLES // 8, None] + np.arange(CLUSTER) * layout.bundle
    arena.numpy(ffn.addresses).reshape(-1, CLUSTER)[:] = np.where(pinned, first, 0)
