"""A unit that is not there: its lane does the real arithmetic, and takes the time that the device model says.

It meets other units at flags in the arena like any other one, so that what runs beside it, waits for it, or is planned
around it can be tried on a machine that has no such unit. It says that it is emulated, and `auto` never chooses it.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coterie.actors.pacing import Flags, wait_until
from coterie.errors import UnitError, UsageError
from coterie.kernels.record import LINE
from coterie.scheduler import device_model
from coterie.scheduler.device_model import Instruction
from coterie.scheduler.soc import Device
from coterie.storage.arena import Arena, BufferRef

LAST_WAIT = 5.0  # seconds that `close` waits for the lane


@dataclass(frozen=True)
class Job:
    """An instruction of an emulated unit: `call` does its arithmetic; it starts when the flags `waits` carry the step's
    epoch, and ends with `sets` carrying it."""

    call: Callable[[], None]
    instruction: Instruction
    waits: tuple[BufferRef, ...] = ()
    sets: BufferRef | None = None


@dataclass(frozen=True)
class Done:
    """What a job took: by the model, and on this machine's clock (time.perf_counter, seconds)."""

    epoch: int
    number: int
    modelled: float
    start: float
    end: float
    late: bool  # the arithmetic alone took longer than it may


class EmulatedUnit:
    """The unit `name` of `device`, `dilation` times as slow as the model says. Its jobs run one after the other, in a
    thread of its own. Raises UsageError for a dilation that makes no sense."""

    def __init__(self, arena: Arena, device: Device, name: str, *, dilation: float = 1.0) -> None:
        if not 0 < dilation < 1e9:
            raise UsageError(f"a dilation of {dilation} makes no sense: give a factor above 0")
        self.arena, self.device, self.name, self.dilation = arena, device, name, dilation
        self.model = device.unit(name)
        self.flag: BufferRef = arena.allocate("flags", LINE)  # carries the epoch once a step is done
        self.events: list[Done] = []
        self._programs: dict[str, tuple[Job, ...]] = {}
        self._flags, self._mine = Flags(arena), Flags(arena)
        self._go = threading.Condition()
        self._wanted: tuple[str, int] | None = None
        self._closed, self._failure = False, ""
        self._thread = threading.Thread(target=self._serve, name=f"coterie-emulated-{name}", daemon=True)
        self._thread.start()

    def describe(self) -> dict[str, Any]:
        return {
            "unit": self.name,
            "runtime": f"emulated: {self.model.kind} of {self.device.name}, {self.dilation:g} times as slow",
            "lanes": 1,
            "real": False,
            "emulated": True,
            "dilation": self.dilation,
        }

    def load(self, name: str, jobs: Sequence[Job]) -> None:
        """Get ready to run these jobs under a name. Raises UsageError for one of another unit."""
        for job in jobs:
            if job.instruction.unit != self.name:
                raise UsageError(f"a job of unit {job.instruction.unit!r} was given to {self.name!r}")
            device_model.cost(job.instruction, self.device)  # what is not known of the device is said now
        self._programs[name] = tuple(jobs)

    def begin(self, name: str, epoch: int) -> None:
        """Start a step; returns at once. Raises UnitError while another one is running, or for a unit that failed."""
        if name not in self._programs:
            raise UnitError(f"the emulated {self.name} has no program {name!r}")
        with self._go:
            self._check()
            if self._wanted is not None:
                raise UnitError(f"the emulated {self.name} is still at step {self._wanted[1]}")
            self._wanted = name, epoch
            self._go.notify()

    def wait(self, epoch: int, patience: float = 30.0) -> None:
        """Come back when a step is done. Raises UnitError where it fails, or takes longer than `patience` seconds."""
        end = time.monotonic() + patience
        while not self._mine.reached(self.flag, epoch):
            self._check()
            if time.monotonic() > end:
                raise UnitError(f"the emulated {self.name} has not finished step {epoch} in {patience:g} seconds")

    def run(self, name: str, epoch: int) -> None:
        """A whole step."""
        self.begin(name, epoch)
        self.wait(epoch)

    def _check(self) -> None:
        if self._failure:
            raise UnitError(f"the emulated {self.name} failed: {self._failure}")
        if self._closed:
            raise UnitError(f"the emulated {self.name} has been closed")

    def _serve(self) -> None:
        while True:
            with self._go:
                while self._wanted is None and not self._closed:
                    self._go.wait()
                if self._closed:
                    return
                assert self._wanted is not None
                name, epoch = self._wanted
            try:
                done = self._step(self._programs[name], epoch)
            except Exception as error:  # arithmetic that somebody else wrote
                self._failure, done = f"{type(error).__name__}: {error}", False
            with self._go:
                self._wanted = None
            if done:
                self._flags.post(self.flag, epoch)

    def _step(self, jobs: Sequence[Job], epoch: int) -> bool:
        """False if the unit was closed meanwhile."""
        for number, job in enumerate(jobs):
            for flag in job.waits:
                while not self._flags.reached(flag, epoch):
                    if self._closed:
                        return False
            start = time.perf_counter()
            modelled = device_model.time(job.instruction, self.device)
            job.call()
            end = start + modelled * self.dilation
            late = time.perf_counter() > end
            wait_until(end)
            self.events.append(Done(epoch, number, modelled, start, time.perf_counter(), late))
            if job.sets is not None:
                self._flags.post(job.sets, epoch)
        return True

    def close(self) -> None:
        """Stop the lane; a second call does nothing."""
        with self._go:
            self._closed = True
            self._go.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(LAST_WAIT)
