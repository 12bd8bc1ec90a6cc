"""`--memory auto`: follow what the machine can spare, give memory back when others need it, and grow again.

Two signals of the kernel: how much memory is available (MemAvailable, and what this process's cgroup still allows), and
how much time tasks lose waiting for memory (PSI, /proc/pressure/memory).
"""

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.errors import CoterieError, PlanError
from coterie.scheduler.planner import least_ceiling, spare
from coterie.storage.available import available_memory

if TYPE_CHECKING:
    from coterie.engine import Engine

PERIOD = 0.2  # seconds between looks
STEP = 64 << 20  # bytes: smaller changes are not worth a new layout
PRESSED = 5.0  # percent of the last ten seconds in which some task waited for memory
YIELD = 0.1  # of its size: what a model gives back at a time while there is pressure
PAUSE = 2.0  # seconds between two times that it gives back for pressure alone
CALM = 5.0  # seconds of plenty before it grows again
PSI = Path("/proc/pressure/memory")


def pressure(path: Path = PSI) -> float:
    """Percent of the last ten seconds in which some task waited for memory; 0 where the kernel does not say."""
    try:
        some = path.read_text().splitlines()[0]
        return float(dict(word.split("=") for word in some.split()[1:])["avg10"])
    except (OSError, ValueError, KeyError, IndexError):
        return 0.0


def target(now: int, available: int, waiting: float) -> int:
    """Bytes that a model of `now` bytes should have, when `available` more could be had and tasks wait for memory
    `waiting` percent of the time."""
    wanted = now + available - spare(now + available)
    return min(wanted, int(now * (1 - YIELD))) if waiting >= PRESSED else wanted


class Follower:
    """A thread that sets an engine's ceiling by what the machine can spare, until the engine is gone or closed."""

    def __init__(
        self,
        engine: "Engine",
        *,
        available: Callable[[], int] = available_memory,
        waiting: Callable[[], float] = pressure,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = weakref.ref(engine)
        self._available, self._waiting, self._clock = available, waiting, clock
        self._plenty_since: float | None = None
        self._yielded = -PAUSE
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="coterie-auto", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _follow(self) -> None:
        while not self._end.wait(PERIOD):
            engine = self._engine()
            if engine is None:
                return
            with suppress(CoterieError, OSError):  # closed meanwhile, or no memory for the change: look again
                self.look(engine)
            del engine

    def look(self, engine: "Engine") -> None:
        """Compare what the model has with what it should have, and change it: down at once, up after a while."""
        now, waiting = engine.plan.total, self._waiting()
        if self._clock() - self._yielded < PAUSE:
            waiting = 0.0  # the last ten seconds' figure does not show yet what has been given back
        elif waiting >= PRESSED:
            self._yielded = self._clock()
        wanted = target(now, self._available(), waiting)
        if wanted < now - STEP:
            self._plenty_since = None
            self._set(engine, wanted)
        elif wanted > now + STEP and engine.plan.streamed_per_token:
            if self._plenty_since is None:
                self._plenty_since = self._clock()
            elif self._clock() - self._plenty_since >= CALM:
                self._plenty_since = None
                engine.set_ceiling(wanted, urgent=False)
        else:
            self._plenty_since = None

    def _set(self, engine: "Engine", ceiling: int) -> None:
        try:
            engine.set_ceiling(ceiling)
        except PlanError:  # less than it needs at least
            least = least_ceiling(engine.model.file, engine.spec, engine.wishes, engine.flash)
            if least < engine.plan.total - STEP:
                engine.set_ceiling(least)
