"""Running a model's steps: on the units they are placed on, and again where one is lost or the ceiling changes."""

from collections.abc import Callable, Mapping
from threading import RLock

import numpy as np
import numpy.typing as npt

from coterie.actors.cpu import NOTHING, CpuUnit
from coterie.actors.host import UnitLost
from coterie.actors.unit import Rows
from coterie.ceiling import Ceiling
from coterie.meter import Meter
from coterie.others import OtherUnits
from coterie.scheduler.layout import ROW_DECODE, WITH_GPU, ModelLayout
from coterie.storage.arena import Arena
from coterie.stream import Stream
from coterie.supervision import Supervisor


class Yield(Exception):
    """The step under way makes room for a new ceiling."""


class Again(Exception):
    """The chunk under way must be computed again."""


def parts_of(rows: Rows, first: int) -> tuple[Rows, Rows]:
    """The rows behind the first ones, and those."""
    wanted = np.asarray(rows.outputs, np.int64)
    positions, tables = np.asarray(rows.positions), np.asarray(rows.tables)
    theirs = Rows(rows.ids[:first], positions[:first], tables[:first], wanted[wanted < first])
    return Rows(rows.ids[first:], positions[first:], tables[first:], wanted[wanted >= first] - first), theirs


def _nothing() -> None:
    """There is nobody to watch."""


class Stepping:
    """What an engine is made of, as far as steps need it."""

    unit: CpuUnit
    others: OtherUnits | None
    stream: Stream | None
    meter: Meter | None
    arena: Arena
    layout: ModelLayout
    supervisor: Supervisor
    _ceiling: Ceiling
    _loaded: set[str]  # programs of the CPU unit
    _lock: RLock  # held while a step runs, or the ceiling changes

    def _fill_tables(self) -> None:
        raise NotImplementedError

    def _run(self, name: str, rows: Rows, *, more: bool = False) -> None:
        """Run a program for one step; `more`: logits of this chunk's rows are wanted after it. A step that a new
        ceiling cuts short, or that loses a unit, is run again; but not `head`, which cannot be: then the chunk is."""
        while True:
            try:
                if not name.startswith("head"):
                    self._ceiling.apply()
                self._step(name, rows, more)
            except Yield:
                continue
            except UnitLost as loss:
                self._recover(loss)
                if name not in ("decode", "batch", "prefill"):
                    raise Again from None
                continue
            self.supervisor.done()
            return

    def _step(self, name: str, rows: Rows, more: bool) -> None:
        """A step, on whichever units it is placed."""
        if self.others is None:
            self._on_cpu(name, rows, more)
        elif name == "decode" and (shared := self.others.decode_program()):
            program, words = shared
            with self.others.gpu_beside(program, rows, words):
                self._on_cpu(program, rows, more, words)
        elif name.endswith(WITH_GPU):
            self._on_both(self.others, name.removesuffix(WITH_GPU), rows, more)
        elif self.others.on_gpu(name):
            self.others.run_on_gpu(name, rows)
        else:
            program = ROW_DECODE if name == "decode" and self.others.decode_beside_npu else name
            with self.others.beside(program) as given:
                self._on_cpu(program, rows, more, given)

    def _on_both(self, others: OtherUnits, name: str, rows: Rows, more: bool) -> None:
        """A step of a chunk of which the GPU unit computes the first tokens, and the CPU unit, maybe with an NPU unit
        beside it, the others; logits are all of rows that one of them has."""
        first = others.first_tokens(name, len(rows.ids))
        ours, theirs = parts_of(rows, first)
        shared = f"{name}{WITH_GPU}"
        if name.startswith("prefill"):
            with others.gpu_beside(f"prefill{WITH_GPU}", theirs), others.beside(shared) as given:
                self._on_cpu(shared, ours, more, given)
        elif np.size(theirs.outputs):
            others.run_on_gpu(f"head{WITH_GPU}", theirs)
        else:
            self._on_cpu(shared, ours, more)

    def _on_cpu(self, name: str, rows: Rows, more: bool, given: Mapping[int, int] = NOTHING) -> None:
        self.ready(name)
        program, stream, meter = self.layout.programs[name], self.stream, self.meter
        ids = np.asarray(rows.ids, np.int64)
        watch_others = _nothing if self.others is None else self.others.watch
        if stream is None or meter is None:
            self.unit.run(name, *rows, self._places(name, ids), watch=watch_others, given=given)
            return

        def watch() -> None:
            watch_others()
            stream.watch()
            if self._ceiling.pressing and not name.startswith("head"):
                raise Yield

        self.unit.settle()  # no lane is left of a step before, that could use what is read now
        if self.layout.neurons is not None and stream.neurons is None:  # a unit was lost
            self._fill_tables()
        meter.start()
        try:
            tape = stream.begin(program, again=more)
            self.unit.run(name, *rows, self._places(name, ids), tape, watch, given)
        except Yield:
            stream.lose()
            raise
        except BaseException:
            stream.lose()
            stream.watch()  # if the flash unit complains, that is the reason
            raise
        meter.stop(ids.size if name in ("decode", "batch") else 0)

    def _recover(self, loss: UnitLost) -> None:
        """Replace what was lost, and what is lost meanwhile; other units by the CPU unit."""
        if self.others is not None and loss.unit in self.others.names:
            self.supervisor.give_up(loss)
            return self.others.give_up(loss.unit)
        while True:
            try:
                return self.supervisor.recover(loss, self.unit, self.stream)
            except UnitLost as another:
                loss = another

    def _surely(self, action: Callable[[], None]) -> None:
        """Do something that can be done again, until no unit is lost in it."""
        while True:
            try:
                return action()
            except UnitLost as loss:
                self._recover(loss)

    def _places(self, name: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where a step finds its ids' embeddings; a head needs none, and would read them from flash once more."""
        return np.empty(0, np.int64) if name.startswith("head") else self._embeddings(ids)

    def _embeddings(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Addresses of the groups of rows in which the ids' embeddings lie."""
        layout = self.layout
        if layout.lookups is not None and layout.bounce is not None:
            assert self.stream is not None
            return self.stream.look_up(ids, layout.lookups, layout.bounce)
        return self.arena.base + layout.weights.embedding_places(ids)[2]

    def ready(self, *names: str) -> None:
        """Link programs now, rather than when they are first run."""
        for name in names:
            if name not in self._loaded:
                self.unit.load(self.layout.programs[name])
                self._loaded.add(name)
