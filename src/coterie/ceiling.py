"""The ceiling of an open model: asked for from any thread, applied between two tries of a step."""

import weakref
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

from coterie.errors import UsageError
from coterie.pressure import Follower
from coterie.room import check_free
from coterie.scheduler.plan import Plan
from coterie.scheduler.planner import make_plan
from coterie.sizes import Memory, Share
from coterie.storage.weights import Residency

if TYPE_CHECKING:
    from coterie.engine import Engine


class Ceiling:
    """What an engine's ceiling is to be, and who changes it: the user, or `auto`."""

    def __init__(self, engine: "Engine") -> None:
        self._engine: Engine = weakref.proxy(engine)
        self._asking = Lock()
        self._asked: tuple[Plan, Residency] | None = None  # for, and not yet applied
        self._urgent = True
        self._follower: Follower | None = None

    @property
    def pressing(self) -> bool:
        """Whether the step under way should make room for a new one."""
        return self._asked is not None and self._urgent

    def set(self, memory: Memory) -> None:
        """Set it for good; see Engine.set_memory."""
        self.unfollow()  # `auto` would soon have its way again
        if self._engine.stream is None or not self._engine.plan.placement.exact:
            self._check_holds(memory)
        elif memory == "auto":
            self.follow()
        else:
            self._engine.set_ceiling(memory)

    def _check_holds(self, memory: Memory) -> None:
        """A model that is in memory as a whole can be given only a ceiling that it keeps to."""
        if isinstance(memory, Share):
            enough = memory.part >= 1
        else:
            enough = memory == "auto" or memory >= self._engine.plan.total
        if not enough:
            raise UsageError(
                "this model is in memory as a whole, with no packed copy to stream from; open it from a packed file "
                "(coterie pack), or with a lower memory="
            )

    def follow(self) -> None:
        """Have it follow what the machine can spare."""
        self._follower = Follower(self._engine.itself())
        self._follower.start()

    def unfollow(self) -> None:
        follower, self._follower = self._follower, None
        if follower is not None:
            follower.stop()

    def ask(self, memory: Memory, urgent: bool) -> None:
        """Ask for another one. Raises PlanError where it cannot be."""
        engine = self._engine
        with self._asking:
            plan = engine.plan
            wishes = replace(engine.wishes, memory=memory)
            new, residency = make_plan(engine.model.file, engine.spec, wishes, engine.flash)
            check_free(new, plan.total)
            self._asked = replace(new, sources=plan.sources | {"memory": "argument"}), residency
            self._urgent = urgent

    def apply(self) -> None:
        """Have the engine lay out anew for what was asked for last. Where that fails half-way, it is asked for again
        before anything is computed."""
        with self._asking:
            asked, self._asked = self._asked, None
        if asked is None:
            return
        try:
            self._engine.adopt(*asked)
        except BaseException:
            with self._asking:
                self._asked = self._asked or asked
            raise
