"""A Ray session for tests, and ways to hurt its actors."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from exact_models import CONTEXT

from coterie.actors.host import Actor
from coterie.actors.ray_host import RayActor, RayHost
from coterie.actors.ray_session import RaySession, open_session
from coterie.engine import Engine
from coterie.errors import UnitError
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes
from coterie.sizes import Share


class Guest(RayHost):
    """A host that leaves its session open for others."""

    def close(self) -> None:
        for actor in self._actors:
            actor.end()


@contextmanager
def a_session() -> Iterator[RaySession]:
    """Ray; where it cannot be started here, the test is skipped, with the reason."""
    try:
        session = open_session(None)
    except UnitError as error:
        pytest.skip(f"no Ray here: {error}")
    with session:
        yield session


@contextmanager
def on_ray(session: RaySession, path: Path, share: float | None = None, **wishes: Any) -> Iterator[Engine]:
    """An engine whose units are actors."""
    wanted = Wishes(threads=2, context=CONTEXT, memory=None if share is None else Share(share), host="ray", **wishes)
    engine = Engine(open_model(path), wanted, host=Guest(session))
    try:
        yield engine
    finally:
        engine.close()


def pid_of(actor: Actor) -> int:
    assert isinstance(actor, RayActor)
    lines = Path(f"/proc/self/fdinfo/{actor._pidfd}").read_text().splitlines()
    pid = next(int(line.split()[1]) for line in lines if line.startswith("Pid:"))
    assert pid > 0, "it has ended"  # -1 would mean all processes there are
    return pid


def actor_of(engine: Engine, unit: str) -> Actor:
    if unit == "cpu":
        return engine.unit.actor
    assert engine.stream is not None
    return engine.stream.unit.actor


def hurt(engine: Engine, unit: str, number: signal.Signals) -> int:
    """Send a signal to a unit's process; its id."""
    actor = actor_of(engine, unit)
    pid = pid_of(actor)
    assert isinstance(actor, RayActor)
    signal.pidfd_send_signal(actor._pidfd, number)
    return pid


def at_step(engine: Engine, number: int, action: Callable[[], Any], patch: pytest.MonkeyPatch) -> None:
    """Do something as soon as lanes have been told of a step, `number` steps from now (0: the next)."""
    begin, left = engine.unit._begin, [number]

    def begun(*arguments: int) -> int:
        epoch = begin(*arguments)
        left[0] -= 1
        if left[0] == -1:
            patch.setattr(engine.unit, "_begin", begin)
            action()
        return epoch

    patch.setattr(engine.unit, "_begin", begun)
