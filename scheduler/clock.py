"""The virtual clock: discrete events over steps whose units run side by side.

A unit runs its tasks in order; a task starts when those it waits for are done (and their unit has said so), when its
weights have arrived, and when its step has begun. Flash reads in the tape's order, across steps, as far as the ring has
room (docs/flash.md). What runs at the same time shares the memory's bandwidth: everyone gets what it wants, or an equal
part where that is too much, and its work takes longer accordingly (processor sharing, at every event anew).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np

from coterie.errors import PlanError
from coterie.scheduler.bandwidth import shared
from coterie.scheduler.flash_model import FlashModel, between
from coterie.scheduler.soc import Device
from coterie.scheduler.steps import Request, Requests, Step, Task
from coterie.trace.timeline import Span

NEVER = 1e-15  # seconds: less is nothing
WEIGHTS, UNITS, BEGIN, MEMORY, DONE = "weights", "units", "begin", "memory", "done"


@dataclass
class Outcome:
    """Spans of steps, and of each unit ("flash" too) the seconds it was busy, what bound it, and what it waited for."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    busy: dict[str, float] = field(default_factory=dict)
    bound: dict[str, dict[str, float]] = field(default_factory=dict)
    waits: dict[str, dict[str, float]] = field(default_factory=dict)
    events: list[Span] = field(default_factory=list)
    read: int = 0  # bytes


@dataclass(slots=True)
class Running:
    """A task or a read under way; times are seconds alone."""

    start: float
    launch: float
    work: float
    wants: float  # bytes/s
    task: Task | None
    item: int  # number of the task in its step, or of the first read
    waited: float


class Clock:
    """Runs `steps` one after the other; `requests` knows the ring. `pace` is called with the time of each event, for
    a driver that lives in real time."""

    def __init__(
        self,
        device: Device,
        units: Sequence[str],
        steps: Sequence[Step],
        requests: Requests,
        *,
        fence: bool = False,
        record: bool = True,
        pace: Callable[[float], None] | None = None,
    ) -> None:
        self.device, self.units, self.steps, self.record, self.pace = device, list(units), steps, record, pace
        self._index = {name: i for i, name in enumerate(self.units)}
        models = [device.units[name] for name in self.units]
        # From a unit to another one: a flag and shared buffers, or a call of the runtime and a copy.
        self._says = [[a.fence + b.copy if fence else a.sync for b in models] for a in models]
        # A GPU's queue has all of a step ahead, and waits for flags itself: it never runs empty in it.
        self._ahead = [model.kind == "gpu" and not fence for model in models]
        self._cores = [device.core_of(name) for name in self.units]
        self._beside = [device.units[name].beside_flash for name in self.units]
        self._place(requests)
        self._rates: dict[int, float] = {}
        self._by_depth = self._depths()

    def _place(self, requests: Requests) -> None:
        """Number the reads of all steps, and find out which have to be over before each has room."""
        owners = np.zeros(requests.pages, np.int64)
        self._reads: list[tuple[Request, int, int]] = []  # with its last number, and what must be free before it
        self._bases, consumed = list[int](), 0
        for step in self.steps:
            base = consumed - step.first
            self._bases.append(base)
            for request in step.requests:
                first, end = requests.room(request)
                self._reads.append((request, base + request.end, int(owners[first:end].max())))
                owners[first:end] = base + request.end
            consumed += step.end - step.first

    def _depths(self) -> list[float]:
        """Share of its rate that flash comes to with 1, 2, ... requests in flight, as far as that is known."""
        device, sizes = self.device, [request.nbytes for request, _, _ in self._reads]
        if not device.flashes or not sizes:
            return [1.0]
        size = sum(sizes) // len(sizes)
        known = [(depth, sequential_rate(flash, size)) for depth, flash in sorted(device.flashes.items())]
        best = [(depth, max(rate for other, rate in known if other <= depth)) for depth, _ in known]
        full = between(device.flash_depth, best)
        return [between(n, best) / full for n in range(1, device.flash_depth + 1)]

    def _together(self, first: int, freed: int) -> tuple[int, int, float]:
        """What flash reads at a time from read number `first` on: the number behind the last, bytes, bytes/s. Reads in
        flight share the disk and end together, and only then the unit sees what room there is for others."""
        end = first + 1
        while end < min(first + len(self._by_depth), len(self._reads)) and self._reads[end][2] <= freed:
            end += 1
        nbytes = sum(request.nbytes for request, _, _ in self._reads[first:end])
        return end, nbytes, self._rate(nbytes // (end - first)) * self._by_depth[end - first - 1]

    def run(self) -> Outcome:
        """Raises PlanError where steps can never end."""
        self.now, self._arrived, self._freed, self._read = 0.0, 0, 0, 0
        self._current, self._done = 0, list[float]()
        self._running: list[Running | None] = [None] * (len(self.units) + 1)
        self._idle_since = [0.0] * (len(self.units) + 1)
        self._why = [BEGIN] * (len(self.units) + 1)
        self._wake = [inf] * (len(self.units) + 1)
        names = [*self.units, "flash"]
        self.outcome = Outcome(
            busy=dict.fromkeys(names, 0.0), bound={n: {} for n in names}, waits={n: {} for n in names}
        )
        self._waits = [self.outcome.waits[name] for name in names]
        self._begin_step(0.0)
        while self._current < len(self.steps):
            self._start_all()
            self._advance()
        return self.outcome

    # --- starting -----------------------------------------------------------------------------------

    def _begin_step(self, at: float) -> None:
        if self._current >= len(self.steps):
            return
        step = self.steps[self._current]
        self._lists: list[list[int]] = [[] for _ in self.units]
        for number, task in enumerate(step.tasks):
            self._lists[self._index[task.unit]].append(number)
        self._next = [0] * len(self.units)
        self._done = [inf] * len(step.tasks)
        self._left = len(step.tasks)
        pause = self.device.between if self._current else 0.0
        self._begin = at + pause + step.lookup
        self._freed = max(self._freed, self._bases[self._current] + step.first)

    def _start_all(self) -> None:
        for unit in range(len(self.units)):
            if self._running[unit] is None:
                self._start_task(unit)
        if self._running[-1] is None:
            self._start_read()

    def _start_task(self, unit: int) -> None:
        """Start the unit's next task, or note why not, and when to look again at the latest."""
        self._wake[unit] = inf
        mine = self._lists[unit]
        if self._next[unit] >= len(mine):
            self._why[unit] = DONE
            return
        number = mine[self._next[unit]]
        task, ready, reason = self.steps[self._current].tasks[number], self._begin, BEGIN
        for wait in task.waits:
            end = self._done[wait]
            if end == inf:
                self._why[unit] = UNITS
                return
            other = self._index[self.steps[self._current].tasks[wait].unit]
            end += self._says[other][unit] if other != unit else 0.0
            if end > ready:
                ready, reason = end, UNITS
        if ready > self.now + NEVER:
            self._why[unit], self._wake[unit] = reason, ready
            return
        if task.needs and self._arrived < self._bases[self._current] + task.needs:
            self._why[unit] = WEIGHTS
            return
        waited = self.now - self._idle_since[unit]
        launch = self._launch(unit, task, waited > NEVER, self._next[unit] == 0)
        self._running[unit] = Running(self.now, launch, task.work, task.bytes_per_s, task, number, waited)
        self._next[unit] += 1

    def _launch(self, unit: int, task: Task, waited: bool, first: bool) -> float:
        """Seconds that it takes to launch a task, which the unit has waited for, or which is its first in a step."""
        alone, queued, drained = task.launch
        return queued if not waited or (self._ahead[unit] and not first) else min(alone, drained)

    def _start_read(self) -> None:
        if self._read >= len(self._reads):
            self._why[-1] = DONE
            return
        freed = min(self._freed, self._arrived)
        if freed < self._reads[self._read][2]:
            self._why[-1] = MEMORY
            return
        end, nbytes, rate = self._together(self._read, freed)
        waited = self.now - self._idle_since[-1]
        latency = self.device.latency if waited > NEVER or self._read == 0 else 0.0
        self._running[-1] = Running(self.now, latency, nbytes / rate, rate, None, self._read, waited)
        self._read = end

    def _rate(self, nbytes: int) -> float:
        """Bytes/s of a request: tapes run through the file in one direction."""
        if nbytes not in self._rates:
            flash = self.device.flash
            if flash is None:
                raise PlanError(f"nothing is known of the flash of {self.device.name}, and weights must be streamed")
            self._rates[nbytes] = sequential_rate(flash, nbytes)
        return self._rates[nbytes]

    # --- time ---------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """To the next event: something ends, or may start."""
        working, dt = list[tuple[int, Running]](), min(self._wake) - self.now
        for unit, running in enumerate(self._running):
            if running is None:
                continue
            if running.launch > 0:
                dt = min(dt, running.launch)
            else:
                working.append((unit, running))
        speeds = self._speeds(working) if len(working) > 1 else [1.0]
        for (_, running), speed in zip(working, speeds, strict=False):
            dt = min(dt, running.work / speed)
        if dt == inf:
            raise PlanError(
                f"step {self._current} cannot go on: nothing runs, and nothing that is waited for will come"
            )
        dt = max(0.0, dt)
        self.now += dt
        if self.pace is not None:
            self.pace(self.now)
        for (_, running), speed in zip(working, speeds, strict=False):
            running.work -= dt * speed
        for unit, running in enumerate(self._running):
            if running is None:
                waits, why = self._waits[unit], self._why[unit]
                waits[why] = waits.get(why, 0.0) + dt
                continue
            if running.launch > 0:
                running.launch = running.launch - dt if running.launch - dt > NEVER else 0.0
            if running.launch <= 0 and running.work <= NEVER:
                self._end(unit, running)

    def _speeds(self, working: list[tuple[int, Running]]) -> list[float]:
        """How fast each of those at work goes, against being alone."""
        shares = shared([r.wants for _, r in working], self.device.together)
        reading = working[-1][0] == len(self.units)
        speeds = []
        for (i, _), share in zip(working, shares, strict=True):
            if i == len(self.units):
                speeds.append(share * self.device.flash_beside)
                continue
            others = sum(self._cores[j] == self._cores[i] for j, _ in working if j < len(self.units))
            speeds.append(share / others * (self._beside[i] if reading else 1.0))
        return speeds

    def _end(self, i: int, running: Running) -> None:
        self._running[i], self._idle_since[i] = None, self.now
        name = self.units[i] if i < len(self.units) else "flash"
        self.outcome.busy[name] += self.now - running.start
        task = running.task
        bound = self.outcome.bound[name]
        kind = "flash" if task is None else task.bound
        bound[kind] = bound.get(kind, 0.0) + self.now - running.start
        if task is None:
            for request, number, _ in self._reads[running.item : self._read]:
                self._arrived = number
                self.outcome.read += request.nbytes
                self._note(name, "read", request.layer, running, request.nbytes)
            return
        self._done[running.item] = self.now
        self._left -= 1
        if task.frees:
            self._freed = max(self._freed, self._bases[self._current] + task.frees)
        self._note(name, task.name, task.layer, running)
        if not self._left:
            self.outcome.steps.append((self._begin, self.now))
            self._current += 1
            self._begin_step(self.now)

    def _note(self, unit: str, name: str, layer: int, running: Running, nbytes: int = 0) -> None:
        if self.record:
            event = Span(unit, name, layer, self._current, running.start, self.now, running.waited, nbytes)
            self.outcome.events.append(event)


def sequential_rate(flash: FlashModel, nbytes: int) -> float:
    """Bytes/s of large reads in the file's order; as random ones, where nothing else is known."""
    known = {point.pattern for point in flash.points if point.core == "big"}
    return flash.bandwidth("sequential" if "sequential" in known else "random", nbytes)
