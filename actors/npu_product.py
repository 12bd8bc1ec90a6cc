"""A product of a layer on the NPU unit: static graphs of some of its rows, or neurons, each."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class BoundGraph(Protocol):
    """A graph whose input and output are buffers of the arena."""

    def run(self) -> None: ...


class Product:
    """Graphs of successive rows of a matrix, or neurons of a network, all with one input. A step runs the first of
    them, so that a cut moves without anything being built (HeteroInfer, section 4.2, builds what its solver said).

    graphs   each bound to its output, float32[n][width]; None: a piece without rows
    outputs  those
    y        float32[n][row] of the whole product
    columns  where each output belongs in `y`; None: outputs are sums over neurons, which are added up in `y`; it may be
             the first one's output
    """

    def __init__(
        self,
        graphs: Sequence[BoundGraph | None],
        outputs: Sequence[Floats],
        y: Floats,
        columns: Sequence[int] | None,
    ) -> None:
        self.graphs, self._outputs, self._y, self._columns = list(graphs), list(outputs), y, columns
        self._begins = self.graphs[0] is not None and self._outputs[0] is y  # the first piece writes all of a sum

    def run(self, pieces: int) -> None:
        """Compute the first `pieces` graphs' part of `y`; of a sum with none it is 0."""
        if self._columns is None and not (pieces and self._begins):
            self._y.fill(0)
        for number, graph in enumerate(self.graphs[:pieces]):
            if graph is not None:
                graph.run()
                self._deliver(number)

    def _deliver(self, number: int) -> None:
        out, y = self._outputs[number], self._y
        if out is y:
            return
        if self._columns is None:
            np.add(y, out, out=y)
        else:
            first = self._columns[number]
            y[:, first : first + out.shape[1]] = out
