"""Dilated real time: the steps of a simulation lived through by threads that meet at flags, `factor` times as slow.

A thread a unit, and one for flash, take their tasks in order, wait for each other at counters in an arena, as real
units do, and sleep for what the model says. While several use memory, each goes as fast as its part of the bandwidth
allows; whoever starts or ends tells the others. So what the virtual clock works out by itself is found by another way.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coterie.actors.pacing import Flags
from coterie.errors import UnitError, UsageError
from coterie.kernels.record import LINE
from coterie.scheduler.bandwidth import shared
from coterie.scheduler.clock import Clock, Outcome, Running
from coterie.scheduler.soc import Device
from coterie.scheduler.steps import Requests, Step
from coterie.storage.arena import Arena, BufferRef
from coterie.trace.timeline import Span

NEVER = 1e-12  # modelled seconds
CATCH_UP = 0.02  # seconds by which a thread may wake too late and still begin when it should have


@dataclass
class Work:
    """What a thread is at: modelled seconds left, in which it wants so much of the memory's bandwidth; since when."""

    launch: float
    left: float
    wants: float
    since: float  # time.perf_counter()


class DilatedClock(Clock):
    """Runs steps as Clock does, in real time. `factor`: real seconds for a modelled one."""

    def __init__(
        self,
        device: Device,
        units: Sequence[str],
        steps: Sequence[Step],
        requests: Requests,
        *,
        factor: float,
        **rest: Any,
    ) -> None:
        if not 0 < factor < 1e9:
            raise UsageError(f"a dilation of {factor} makes no sense: give a factor above 0")
        super().__init__(device, units, steps, requests, **rest)
        self.factor = factor

    def run(self) -> Outcome:
        """Spans of steps and events in modelled seconds. Raises UnitError where a thread fails."""
        self.outcome = Outcome(busy=dict.fromkeys([*self.units, "flash"], 0.0))
        arena = Arena({"flags": (len(self.units) + 4) * LINE})
        self._lines: dict[str, BufferRef] = {}
        for name in [*self.units, "arrived", "freed", "step"]:
            self._lines[name] = arena.allocate("flags", LINE)
        self._arena, self._state = arena, threading.Condition()
        self._working: dict[int, Work] = {}
        self._stamps: dict[tuple[str, int], float] = {}
        self._failure: BaseException | None = None
        self._freed_so_far, self._ended = 0, 0
        mine = [Flags(arena) for _ in range(len(self.units) + 1)]  # linking is not for several threads at a time
        self._begun = time.perf_counter()
        threads = [threading.Thread(target=self._guard, args=(i, each), daemon=True) for i, each in enumerate(mine)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        arena.close()
        if self._failure is not None:
            raise UnitError(f"a dilated run failed: {self._failure}")
        self.outcome.events.sort(key=lambda event: (event.start, event.end))
        return self.outcome

    def _guard(self, i: int, flags: Flags) -> None:
        try:
            if i == len(self.units):
                self._serve_flash(flags)
            else:
                self._serve_unit(i, flags)
        except BaseException as error:  # the others must not wait for ever
            with self._state:
                self._failure = self._failure or error
                self._state.notify_all()

    # --- threads ------------------------------------------------------------------------------------

    def _serve_unit(self, unit: int, flags: Flags) -> None:
        name, finished, idle = self.units[unit], 0, self._begun
        totals = [0] * len(self.units)  # tasks of all steps before, by unit
        for number, step in enumerate(self.steps):
            places = self._places(step, totals)
            begin, done = self._step_begins(number, flags), 0
            for at, task in enumerate(step.tasks):
                if task.unit != name:
                    continue
                ready = max(idle, begin)
                for wait in task.waits:
                    other, place = places[wait]
                    self._await(flags, self.units[other], place)
                    says = self._says[other][unit] * self.factor if other != unit else 0.0
                    ready = max(ready, self._stamps[self.units[other], place] + says)
                if task.needs:
                    ready = max(ready, self._await(flags, "arrived", self._bases[number] + task.needs))
                waited = (ready - idle) / self.factor
                launch = self._launch(unit, task, waited > NEVER * 1e3, done == 0)
                start = self._not_long_ago(ready)
                end = self._take(unit, Running(start, launch, task.work, task.bytes_per_s, task, at, waited))
                finished, done, idle = finished + 1, done + 1, end
                self._worked(name, start, end)
                self._note_real(name, task.name, task.layer, number, start, end, 0)
                with self._state:
                    self._stamps[name, finished] = end
                flags.post(self._lines[name], finished)
                if task.frees:
                    self._free(flags, self._bases[number] + task.frees, end)
                self._count_task(flags, number, step, end)
            for task in step.tasks:
                totals[self._index[task.unit]] += 1

    def _places(self, step: Step, totals: list[int]) -> list[tuple[int, int]]:
        """Of each task its unit, and the count at which that unit has finished it."""
        counts, places = list(totals), []
        for task in step.tasks:
            unit = self._index[task.unit]
            counts[unit] += 1
            places.append((unit, counts[unit]))
        return places

    def _step_begins(self, number: int, flags: Flags) -> float:
        step = self.steps[number]
        if number == 0:
            begin = self._begun + step.lookup * self.factor
        else:
            self._await(flags, "step", number)
            begin = self._stamps["step", number] + (self.device.between + step.lookup) * self.factor
        self._free(flags, self._bases[number] + step.first, begin)
        return begin

    def _count_task(self, flags: Flags, number: int, step: Step, end: float) -> None:
        """The last task of a step ends it."""
        with self._state:
            self._ended += 1
            last = self._ended == len(step.tasks)
            if last:
                self._ended = 0
                before = self._stamps.get(("step", number), self._begun)
                pause = (self.device.between if number else 0.0) + step.lookup
                self.outcome.steps.append(((before - self._begun) / self.factor + pause, self._modelled(end)))
                self._stamps["step", number + 1] = end
        if last:
            flags.post(self._lines["step"], number + 1)

    def _serve_flash(self, flags: Flags) -> None:
        idle, count = self._begun, 0
        while count < len(self._reads):
            ready, after = idle, self._reads[count][2]
            if after:
                ready = max(ready, self._await(flags, "freed", after))
            arrived = self._reads[count - 1][1] if count else 0
            behind, nbytes, rate = self._together(count, min(self._freed_so_far, arrived))
            latency = self.device.latency if ready > idle or count == 0 else 0.0
            start = self._not_long_ago(ready)
            end = self._take(len(self.units), Running(start, latency, nbytes / rate, rate, None, count, 0.0))
            for request, number, _ in self._reads[count:behind]:
                self._note_real("flash", "read", request.layer, 0, start, end, request.nbytes)
                with self._state:
                    self._stamps["arrived", number] = end
            self._worked("flash", start, end)
            flags.post(self._lines["arrived"], number)
            idle, count = end, behind

    # --- waiting ------------------------------------------------------------------------------------

    def _await(self, flags: Flags, name: str, value: int) -> float:
        """Wait for a counter; returns when it came to `value`, or further at once."""
        while not flags.reached(self._lines[name], value):
            if self._failure is not None:
                raise UnitError("another unit failed")
        with self._state:
            at = self._stamps.get((name, value))
            if at is None:  # it went past: the next one that was posted
                at = min(stamp for (kind, count), stamp in self._stamps.items() if kind == name and count >= value)
        return at

    def _free(self, flags: Flags, value: int, at: float) -> None:
        with self._state:
            if value <= self._freed_so_far:
                return
            self._freed_so_far = value
            self._stamps["freed", value] = at
        flags.post(self._lines["freed"], value)

    def _not_long_ago(self, ready: float) -> float:
        """When to begin what could begin at `ready`: then, if the thread is only a little late."""
        now = time.perf_counter()
        return ready if now - ready < CATCH_UP else now

    def _take(self, i: int, running: Running) -> float:
        """Be at work until it is done; returns when, on the real clock."""
        with self._state:
            work = Work(running.launch, running.work, running.wants, running.start)
            self._settle_all(running.start)
            self._working[i] = work
            self._state.notify_all()
            while True:
                speed = self._speed(i)
                end = work.since + (work.launch if work.launch > NEVER else work.left / speed) * self.factor
                now = time.perf_counter()
                if now >= end:
                    self._settle_all(end)
                    if work.launch <= NEVER and work.left <= NEVER * 1e3:
                        break
                    continue
                self._state.wait(end - now)
                if self._failure is not None:
                    raise UnitError("another unit failed")
            del self._working[i]
            self._state.notify_all()
        return end

    def _settle_all(self, now: float) -> None:
        """Count what everyone has done since it was last looked at, up to a moment."""
        speeds = {i: self._speed(i) for i in self._working}
        for i, work in self._working.items():
            passed = max(0.0, now - work.since) / self.factor
            if work.launch > NEVER:
                work.launch = max(0.0, work.launch - passed)
            else:
                work.left = max(0.0, work.left - passed * speeds[i])
            work.since = max(work.since, now)

    def _speed(self, i: int) -> float:
        if self._working[i].launch > NEVER:
            return 1.0
        working = [(j, self._working[j]) for j in sorted(self._working) if self._working[j].launch <= NEVER]
        shares = shared([work.wants for _, work in working], self.device.together)
        flash = len(self.units)
        reading = any(j == flash for j, _ in working)
        share = next(share for (j, _), share in zip(working, shares, strict=True) if j == i)
        if i == flash:
            return share * (self.device.flash_beside if len(working) > 1 else 1.0)
        others = sum(self._cores[j] == self._cores[i] for j, _ in working if j != flash)
        return share / others * (self._beside[i] if reading else 1.0)

    def _modelled(self, at: float) -> float:
        return (at - self._begun) / self.factor

    def _worked(self, unit: str, start: float, end: float) -> None:
        with self._state:
            self.outcome.busy[unit] += (end - start) / self.factor

    def _note_real(self, unit: str, name: str, layer: int, step: int, start: float, end: float, nbytes: int) -> None:
        with self._state:
            self.outcome.read += nbytes
            event = Span(unit, name, layer, step, self._modelled(start), self._modelled(end), 0.0, nbytes)
            self.outcome.events.append(event)
