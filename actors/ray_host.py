"""The Ray host: each unit is a Ray actor, a process that shares the arena. Ray places, starts and ends them; what they
do for a token goes by programs and flags in the arena, without it.

Supervision (docs/supervision.md): an actor that has ended shows by its pidfd, one that was stopped by its pulse. Before
its work is given away it is killed and reaped: a process that wakes up late must not write into memory that is used
again.
"""

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.actors.greeting import check_greeting, greeting, same_kernel
from coterie.actors.host import Actor, UnitLost
from coterie.actors.messages import pack, raise_complaint, unpack
from coterie.actors.ray_memory import own
from coterie.actors.ray_session import RaySession
from coterie.actors.unit_process import UnitProcess
from coterie.configs import placement
from coterie.errors import CoterieError, UnitError
from coterie.paths import cache_dir
from coterie.storage.arena import Arena, BufferRef

PULSE_LIMIT = 2.0  # seconds without a pulse, of which there are 20 a second, after which an actor counts as stopped
START_LIMIT = 60.0  # seconds in which Ray must have started an actor
REAP_LIMIT = 20.0  # seconds a killed process may take to end; a dead disk can keep it
LOOK = 0.05  # seconds between two looks for an answer


class RayHost:
    """Starts units as actors of a Ray session, on the machine of this process."""

    shared = True

    def __init__(self, session: RaySession) -> None:
        self.session = session
        self._placement = placement()
        self._kind = session.ray.remote(UnitProcess)  # once: Ray keeps every class it is given
        self._actors: list[RayActor] = []

    def start(self, unit: str, arena: Arena, pulse: BufferRef) -> Actor:
        ray, wanted = self.session.ray, self._placement[unit]
        if not self.session.alive():
            raise UnitError(f"Ray has ended, and cannot start unit {unit}")
        here = ray.get_runtime_context().get_node_id()
        near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        options = {"num_cpus": 0, "resources": wanted, "max_restarts": 0, "max_task_retries": 0}
        try:
            handle = self._kind.options(scheduling_strategy=near, **options).remote()
        except Exception as error:  # ray's own are of many kinds
            raise UnitError(f"Ray cannot start unit {unit}: {' '.join(str(error).split())[:200]}") from None
        for earlier in self._actors:
            if earlier.unit == unit and earlier.serves(arena):  # one whose start was interrupted would share the pulse
                earlier.fence()
        actor = RayActor(unit, self.session, handle, arena, pulse)
        self._actors = [*(each for each in self._actors if each.lost() is None), actor]
        return actor

    def describe(self) -> dict[str, Any]:
        actors = {actor.unit: own(actor.pid) for actor in self._actors if actor.pid}
        return {"host": "ray", "address": self.session.address, "memory": self.session.memory(), "actors": actors}

    def close(self) -> None:
        for actor in self._actors:
            actor.end()
        self.session.close()


class RayActor:
    """A crew in a Ray actor."""

    def __init__(self, unit: str, session: RaySession, handle: Any, arena: Arena, pulse: BufferRef) -> None:
        self.unit, self._session, self._ray, self._handle = unit, session, session.ray, handle
        self._arena, self._pulse = arena, pulse
        self._beats: npt.NDArray[np.int64] = arena.numpy(pulse)
        self._beats[:] = 0
        message = pack(["attach", {"home": str(cache_dir()), "arena": arena.describe(), "pulse": pulse}])
        self._hello: Any = handle.handle.remote(message)
        self._pidfd, self.pid = -1, 0
        self._gone: str | None = None
        self._seen, self._since, self._looked = 0, 0.0, 0.0

    # --- what a crew does -----------------------------------------------------------------------------

    def open(self, kind: str, **arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._call("open", kind=kind, **arguments)
        return found

    def load(self, table: BufferRef, kernels: list[str]) -> None:
        self._call("load", table=table, kernels=kernels)

    def close(self, kind: str) -> None:
        if self._pidfd >= 0 and self.lost() is None:
            try:
                self._call("close", kind=kind)
            except CoterieError:
                self.fence()

    def serves(self, arena: Arena) -> bool:
        """Whether it may still do something there."""
        return self._handle is not None and self._arena is arena

    def meet(self) -> None:
        if self._gone:
            raise UnitLost(self.unit, self._gone)
        if self._hello is None:
            return
        try:
            self._greet()
        except BaseException as error:
            self._gone = f"it did not start ({str(error) or type(error).__name__})"
            raise
        self._hello = None

    def _call(self, order: str, **arguments: Any) -> Any:
        self.meet()
        if reason := self.lost():
            raise UnitLost(self.unit, reason)
        return self._answer(self._handle.handle.remote(pack([order, arguments])))["answer"]

    def _greet(self) -> None:
        """Wait until the process runs, and get hold of it."""
        mine = greeting()
        theirs = check_greeting(mine, self._answer(self._hello)["greeting"])
        if not same_kernel(check_greeting(mine, mine), theirs):
            raise UnitError(f"Ray started unit {self.unit} where this process's memory cannot be shared")
        try:
            self._pidfd, self.pid = os.pidfd_open(theirs["pid"]), theirs["pid"]
            maps = Path(f"/proc/{self.pid}/maps").read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UnitLost(self.unit, f"its process has ended ({error.strerror})") from None
        if f" {self._arena.describe()['inode']} " not in maps or _readable(self._pidfd):  # another one has its id
            os.close(self._pidfd)
            self._pidfd, self.pid = -1, 0
            raise UnitLost(self.unit, "its process has ended")
        self._seen, self._since = int(self._beats[0, 0]), time.monotonic()

    def _answer(self, asked: Any) -> dict[str, Any]:
        ray, end = self._ray, time.monotonic() + START_LIMIT
        try:
            while not ray.wait([asked], timeout=LOOK)[0]:
                if reason := self.lost():
                    raise UnitLost(self.unit, reason)
                if not self._session.alive():
                    raise UnitLost(self.unit, "Ray has ended")
                if time.monotonic() > end and self._hello is None:
                    raise UnitLost(self.unit, f"its process has not answered for {START_LIMIT:.0f} s")
                if time.monotonic() > end:
                    raise self._unplaced()
            answer: dict[str, Any] = unpack(ray.get(asked))
        except CoterieError:
            raise
        except Exception as error:
            if isinstance(error, ray.exceptions.ActorUnschedulableError):
                raise self._unplaced() from None
            if isinstance(error, ray.exceptions.RayActorError):
                raise UnitLost(self.unit, "its process has ended") from None
            raise UnitError(f"Ray: {' '.join(str(error).split())[:200]}") from None
        raise_complaint(answer)
        return answer

    def _unplaced(self) -> UnitError:
        wanted = ", ".join(f"{count:g} of {name}" for name, count in placement()[self.unit].items())
        return UnitError(
            f"Ray has no place for unit {self.unit}, which asks for {wanted or 'nothing'}: change placement.toml, or "
            "start Ray with --resources"
        )

    # --- supervision ----------------------------------------------------------------------------------

    def lost(self) -> str | None:
        if self._gone or self._pidfd < 0:
            return self._gone
        if _readable(self._pidfd):
            return "its process has ended"
        # Only time counts in which this process looked: it may have been stopped itself.
        now, beats = time.monotonic(), int(self._beats[0, 0])
        if beats != self._seen or now - self._looked > PULSE_LIMIT / 2:
            self._seen, self._since = beats, now
        self._looked = now
        return "its process does not move" if now - self._since > PULSE_LIMIT else None

    def fence(self) -> None:
        """Kill and reap. Raises UnitError where the kernel cannot end it."""
        if self._pidfd >= 0:
            _kill(self._pidfd)
            end = time.monotonic() + REAP_LIMIT
            while not _readable(self._pidfd):
                if time.monotonic() > end:
                    raise UnitError(f"the process of unit {self.unit} was killed and does not end: a disk keeps it")
                time.sleep(0.001)
        self._forget()

    def end(self) -> None:
        """Have the process gone, as soon as it likes."""
        if self._pidfd >= 0:
            _kill(self._pidfd)
        self._forget()

    def _forget(self) -> None:
        self._gone, self.pid = "its process was ended", 0
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        vars(self).pop("_beats", None)  # a host outlives its models
        vars(self).pop("_arena", None)
        handle, self._handle = self._handle, None
        if handle is not None and self._session.alive():
            self._ray.kill(handle)


def _readable(pidfd: int) -> bool:
    """Whether the process has ended, with all its threads."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _kill(pidfd: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
