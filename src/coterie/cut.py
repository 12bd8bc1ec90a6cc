"""A model in two processes that share no memory: its first layers in a Ray actor, the others here (docs/link.md)."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from coterie.actors.frames import Contract, Error, encode
from coterie.actors.host import Host
from coterie.actors.link import Call, Chain, Link
from coterie.actors.part_server import Server, one_line
from coterie.actors.ray_host import RayHost
from coterie.actors.ray_session import open_session
from coterie.errors import CoterieError, UnitError
from coterie.opening import Progress, open_to_run
from coterie.part_engine import PartEngine
from coterie.scheduler.plan import NUMERICS_VERSION, Wishes
from coterie.sizes import Memory, parse_memory

PATIENCE = 300.0  # seconds for a frame: the first one waits until kernels are compiled and weights loaded


def contract_of(engine: PartEngine, first: int, last: int) -> Contract:
    """What the peer with layers `first` to `last` of this engine's model must agree to."""
    spec, part = engine.spec, engine.spec.part
    assert part is not None
    numerics = f"{engine.plan.numerics}, version {NUMERICS_VERSION}"
    return Contract(part.model, first, last, part.layers, spec.dim, spec.vocab, engine.plan.context, numerics)


def serve(engine: PartEngine) -> Server:
    """The engine of a part without a head, behind frames."""
    part, plan = engine.spec.part, engine.plan
    assert part is not None
    contract = contract_of(engine, part.first, part.last)
    return Server(engine, contract, rows=plan.chunk, weights=plan.regions["weights"])


class PartActor:
    """A part of the model at `path` in a process of its own. Its one method takes and returns the bytes of a frame;
    what went wrong while it was opened is an answer too. Settings as of LLM."""

    def __init__(self, path: str, first: int, last: int, threads: int, context: int, memory: str | None) -> None:
        self._server: Server | None = None
        self._problem = ""
        wishes = Wishes(threads=threads, context=context, memory=None if memory is None else parse_memory(memory))
        try:
            model = open_to_run(Path(path), wishes, _silent, layers=(first, last))
            try:
                self._server = serve(PartEngine(model, wishes))
            except BaseException:
                model.close()
                raise
        except CoterieError as error:
            self._problem = one_line(str(error))

    def handle(self, frame: bytes) -> bytes:
        return encode(Error(0, self._problem)) if self._server is None else self._server.handle(frame)


def _silent(label: str, done: int, total: int) -> None:
    pass


def add_front(
    engine: PartEngine, path: Path, memory: Memory | None, ray_address: str | None, progress: Progress
) -> None:
    """Start the layers before the engine's in a Ray actor, with its settings, and have it ask there. Raises UnitError,
    and closes the engine, where that fails."""
    part, plan = engine.spec.part, engine.plan
    assert part is not None
    progress(f"starting layers 0 to {part.first - 1} in a Ray actor", 0, 0)
    settings = plan.lanes, plan.context, None if memory is None else str(memory)
    try:
        arguments = os.path.abspath(path), 0, part.first, *settings
        call, close = _start_actor(engine.host, ray_address, arguments)
        link = Link(call, contract_of(engine, 0, part.first))
        engine.front = Chain([link], close)
        link.check()
    except BaseException:
        engine.close()
        raise


def _start_actor(host: Host, ray_address: str | None, arguments: tuple[Any, ...]) -> tuple[Call, Callable[[], None]]:
    """A PartActor in a process that Ray starts, in the units' own session or one for this: how to ask it, how to end
    it."""
    shared = isinstance(host, RayHost)
    session = host.session if isinstance(host, RayHost) else open_session(ray_address)
    ray = session.ray
    actor = ray.remote(num_cpus=0)(PartActor).remote(*arguments)

    def call(frame: bytes) -> bytes:
        asked = actor.handle.remote(frame)
        try:
            if not ray.wait([asked], timeout=PATIENCE)[0]:
                raise UnitError(f"the Ray actor with the first layers has not answered for {PATIENCE:.0f} s")
            reply: bytes = ray.get(asked)
        except ray.exceptions.RayError:
            raise UnitError("the process with the first layers has ended, and its cache with it; ask again") from None
        return reply

    def close() -> None:
        if session.alive():
            with suppress(ray.exceptions.RayError):  # it has gone by itself
                ray.kill(actor)
        if not shared:
            session.close()  # a second call does nothing

    return call, close
