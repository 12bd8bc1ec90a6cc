"""Hosts: what keeps a unit's lanes alive, threads of this process or a process of their own (design section 2)."""

from typing import Any, ClassVar, Protocol

from coterie.actors.lanes import Lanes
from coterie.actors.reading import ReadingLane
from coterie.errors import UnitError
from coterie.storage.arena import Arena, BufferRef


class UnitLost(UnitError):
    """A unit is gone, or will not answer any more: what it was doing is to be done by another. `hangs`: it is still
    there, and may go on at any time."""

    def __init__(self, unit: str, reason: str, *, hangs: bool = False) -> None:
        super().__init__(f"unit {unit} was lost: {reason}")
        self.unit, self.reason, self.hangs = unit, reason, hangs


class Crew:
    """A unit's lanes in one process: what an actor does for the unit that runs it by programs and flags."""

    KINDS: ClassVar = {"cpu": Lanes, "flash": ReadingLane, "neurons": ReadingLane}

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.lanes: dict[str, Lanes | ReadingLane] = {}

    def open(self, kind: str, **arguments: Any) -> dict[str, Any]:
        """Start the lanes of that kind; what they say of themselves."""
        lanes = self.lanes[kind] = self.KINDS[kind](self.arena, **arguments)
        return {} if isinstance(lanes, Lanes) else {"engine": lanes.engine, "readers": lanes.readers}

    def load(self, table: BufferRef, kernels: list[str]) -> None:
        """See Lanes.load."""
        lanes = self.lanes["cpu"]
        assert isinstance(lanes, Lanes)
        lanes.load(table, kernels)

    def close(self, kind: str) -> None:
        """Wait for lanes that have been told to leave."""
        lanes = self.lanes.pop(kind, None)
        if lanes is not None:
            lanes.close()


class Actor(Protocol):
    """A crew, here or elsewhere. Its methods are the crew's, and raise UnitLost where it does not answer."""

    def open(self, kind: str, **arguments: Any) -> dict[str, Any]: ...

    def load(self, table: BufferRef, kernels: list[str]) -> None: ...

    def close(self, kind: str) -> None: ...

    def meet(self) -> None:
        """Wait until it can be told something. Raises UnitError, UnitLost."""

    def lost(self) -> str | None:
        """Why nothing more is to be expected of it; None while there is hope."""

    def fence(self) -> None:
        """Make sure that it writes nothing any more. Raises UnitError where that cannot be."""


class Host(Protocol):
    """Starts actors."""

    shared: bool  # whether actors are other processes, which attach to the arena

    def start(self, unit: str, arena: Arena, pulse: BufferRef) -> Actor:
        """An actor for a unit; `pulse`: int64[2][8], a line that another process counts up while it lives, and one that
        tells it to stop. Raises UnitError where none can be had."""

    def describe(self) -> dict[str, Any]:
        """What it is."""

    def close(self) -> None:
        """End whatever it has started."""


class ThreadActor(Crew):
    """A crew in this process. A thread cannot be ended from outside: what hangs stays, and must not be replaced."""

    def meet(self) -> None:
        """It is here."""

    def lost(self) -> str | None:
        return None

    def fence(self) -> None:
        """Lanes that have ended write nothing."""


class ThreadHost:
    """Units are threads of this process."""

    shared = False

    def start(self, unit: str, arena: Arena, pulse: BufferRef) -> Actor:
        return ThreadActor(arena)

    def describe(self) -> dict[str, Any]:
        return {"host": "threads"}

    def close(self) -> None:
        """Nothing is left."""
