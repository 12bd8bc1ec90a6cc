"""What every compute unit can do; one file a unit implements it (design section 7)."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from coterie.scheduler.program import Program


class Rows(NamedTuple):
    """The rows of a step: token ids, positions, addresses of block tables, and which of them want logits."""

    ids: Sequence[int]
    positions: npt.ArrayLike
    tables: npt.ArrayLike
    outputs: npt.ArrayLike


class Unit(Protocol):
    """A compute unit: an actor with lanes that run programs."""

    def describe(self) -> dict[str, Any]:
        """What it is, truthfully: name, runtime, whether it is real hardware."""

    def load(self, program: Program) -> None:
        """Get ready to run a program."""

    def run(
        self,
        name: str,
        ids: npt.ArrayLike,
        positions: npt.ArrayLike,
        tables: npt.ArrayLike,
        outputs: npt.ArrayLike,
    ) -> None:
        """Run a loaded program for one step, and come back when it is done."""

    def close(self) -> None:
        """Stop the lanes."""
