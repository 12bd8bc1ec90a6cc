"""Units that are lost and replaced, so that a generation outlives them (docs/supervision.md)."""

import time
from collections.abc import Callable
from typing import NamedTuple

from coterie.actors.cpu import CpuUnit
from coterie.actors.host import Actor, Host, ThreadActor, UnitLost
from coterie.errors import UnitError
from coterie.storage.arena import Arena
from coterie.storage.unit import UnitBuffers
from coterie.stream import Stream

UNITS = ("cpu", "flash")
MOST_LOSSES = 5  # without a step in between


class Loss(NamedTuple):
    """A unit that was lost and replaced: which, why, by what ("actor", "threads"), and the seconds that took once it
    was known."""

    unit: str
    reason: str
    by: str
    seconds: float


class Supervisor:
    """Has units' actors started, and others in place of those that are lost."""

    def __init__(self, host: Host, arena: Arena, buffers: UnitBuffers, progress: Callable[..., None]) -> None:
        self.host, self.losses = host, list[Loss]()
        self._arena, self._buffers, self._progress = arena, buffers, progress
        self._in_a_row = 0

    def start(self, unit: str) -> Actor:
        """An actor for a unit. Raises UnitError."""
        return self.host.start(unit, self._arena, self._buffers.pulse(UNITS.index(unit)))

    def done(self) -> None:
        """A step was done, so there is no end of losses to fear."""
        self._in_a_row = 0

    def give_up(self, loss: UnitLost) -> None:
        """A GPU or an NPU was lost: the CPU unit does its work from now on. Raises UnitError for one that may still go
        on and write."""
        if loss.hangs:
            raise UnitError(f"{loss}; end this process: it may still write") from None
        self._progress(f"{loss}; the CPU unit does its work from now on")
        self.losses.append(Loss(loss.unit, loss.reason, "cpu", 0.0))

    def recover(self, loss: UnitLost, cpu: CpuUnit, stream: Stream | None) -> None:
        """Have the lost unit's work done by another actor, between two tries of a step: fence first, so that what wakes
        up late writes nowhere. A neuron cache ends with either unit: killed lanes may have left half a demand in its
        queue. What is interrupted, or loses another unit, is done again by the next try. Raises UnitError where nothing
        can take over.
        """
        begun = time.perf_counter()
        self._in_a_row += 1
        if self._in_a_row > MOST_LOSSES:
            raise UnitError(f"{loss}; that was {MOST_LOSSES} times in one step") from None
        if loss.hangs and isinstance(cpu.actor, ThreadActor):
            raise UnitError(f"{loss}; a thread cannot be replaced, so end this process") from None
        self._progress(f"unit {loss.unit} was lost ({loss.reason}); having another one")
        cause = loss.reason if loss.unit == "cpu" else cpu.actor.lost()
        if cause is not None:
            cpu.actor.fence()
            cpu.revive(self._replace("cpu"))
            self._note("cpu", cause, cpu.actor, begun)
        if stream is not None:
            flash = stream.unit.actor
            cause = loss.reason if loss.unit != "cpu" else flash.lost()
            if cause is not None:
                flash.fence()
            stream.end_neurons()
            cause = cause or flash.lost()
            if cause is not None:
                flash.fence()
                stream.revive(self._replace("flash"))
                self._note(loss.unit if loss.unit != "cpu" else "flash", cause, stream.unit.actor, begun)
            stream.lose()

    def _note(self, unit: str, reason: str, actor: Actor, begun: float) -> None:
        by = "threads" if isinstance(actor, ThreadActor) else "actor"
        self.losses.append(Loss(unit, reason, by, time.perf_counter() - begun))

    def _replace(self, unit: str) -> Actor:
        """Another actor; threads of this process where the host has none to give any more. Raises UnitLost where it is
        lost again."""
        try:
            actor = self.start(unit)
            actor.meet()
        except UnitLost:
            raise
        except UnitError as error:
            self._progress(f"{error}; it goes on as threads of this process")
            return ThreadActor(self._arena)
        return actor
