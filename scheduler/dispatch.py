"""Which piece of a prompt runs next: a pure state machine, events in, orders out.

Pieces are subgraphs of chunks. They run in order for now; but what may run beside what follows only from units and
needs, so that another policy can run them out of order (llm.npu, section 3.4). Times come in with events, in seconds
since the prompt began. An event that makes no sense raises ValueError, and changes nothing.
"""

from bisect import insort
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Task(NamedTuple):
    """A subgraph of a chunk, by their numbers: both in the prompt's order, and so are tasks."""

    chunk: int
    subgraph: int


@dataclass(frozen=True)
class Subgraph:
    """What is computed in one go.

    name     for people
    program  what runs
    rows     which of the prompt it computes, as whoever runs it counts them
    units    all that it occupies
    needs    tasks that must be done before, each earlier in the prompt's order
    seconds  that it is expected to take, for policies; 0: not known
    """

    name: str
    program: str
    rows: range
    units: tuple[str, ...]
    needs: tuple[Task, ...] = ()
    seconds: float = 0.0


Chunk = tuple[Subgraph, ...]
Heir = Callable[[Subgraph, str], Subgraph]  # what a subgraph becomes when that unit is lost: program and units
Policy = Callable[[Sequence[Task], "Dispatcher"], Task | None]  # picks from tasks that can start, in the prompt's order


class Event(NamedTuple):
    """What a dispatcher was told, `kind` being its method; or an "order" that it gave."""

    seconds: float
    kind: str
    about: tuple[Any, ...]


def in_order(can_start: Sequence[Task], dispatcher: "Dispatcher") -> Task | None:
    """One after the other: the first that is not done, when nothing is under way."""
    return next((task for task in can_start if not dispatcher.under_way and task == dispatcher.ready[0]), None)


class Dispatcher:
    """A prompt's tasks. Whoever runs them asks for orders, and tells what becomes of each.

    A task is ready when all that it needs is done; under way from its order to its end; then done, unless its chunk
    fails. `record`: all events and orders, of which `replay` makes the same again.
    """

    def __init__(self, chunks: Iterable[Chunk], heir: Heir, policy: Policy = in_order) -> None:
        self.chunks: tuple[Chunk, ...] = ()
        self.record, self._lines = list[Event](), list[str]()
        self.ready: list[Task] = []  # in the prompt's order
        self.under_way: dict[Task, float | None] = {}  # since when; None: ordered, not started
        self.done, self.lost_units = set[Task](), set[str]()
        self._void = set[Task]()  # under way for nothing: what they need was undone
        self._heir, self._policy = heir, policy
        self.refit(0, tuple(chunks), 0.0)

    @classmethod
    def replay(cls, record: Sequence[Event], heir: Heir, policy: Policy = in_order) -> "Dispatcher":
        """What comes of a record's events."""
        again = cls(record[0].about[1], heir, policy)
        for event in record[1:]:
            if event.kind != "order":
                getattr(again, event.kind)(*event.about, event.seconds)
        return again

    def story(self) -> str:
        """Every event and order for people, a line each; what was free is seen from the orders."""
        return "\n".join(self._lines)

    # --- what is known --------------------------------------------------------------------------------

    def subgraph(self, task: Task) -> Subgraph:
        return self.chunks[task.chunk][task.subgraph]

    def chunk_done(self, chunk: int) -> bool:
        return all(Task(chunk, i) in self.done for i in range(len(self.chunks[chunk])))

    def released(self, task: Task) -> list[Task]:
        """What the end of a task makes ready."""
        behind = [then for then in self._behind.get(task, ()) if then not in self.under_way]
        return [then for then in behind if self.done.issuperset({*self.subgraph(then).needs} - {task})]

    @property
    def idle(self) -> set[str]:
        """Units that are not lost, and have no task under way."""
        busy = {unit for task in self.under_way for unit in self.subgraph(task).units}
        return self._units - busy - self.lost_units

    # --- events ---------------------------------------------------------------------------------------

    def orders(self, free: Collection[str], seconds: float) -> list[Task]:
        """The tasks to start now, when these units are free."""
        if not self.idle.issuperset(free):
            raise ValueError(f"{', '.join(sorted(set(free) - self.idle))}: not free, or not there")
        self._note(seconds, "orders", tuple(sorted(free)))
        left, given = set(free), list[Task]()
        while task := self._policy([t for t in self.ready if left.issuperset(self.subgraph(t).units)], self):
            self.ready.remove(task)
            self.under_way[task] = None
            given.append(task)
            chosen = self.subgraph(task)
            left -= set(chosen.units)
            said = f"{self._name(task)} is next: {chosen.program}, {len(chosen.rows)} rows, {'+'.join(chosen.units)}"
            self._note(seconds, "order", task, line=said)
        return given

    def started(self, task: Task, seconds: float) -> None:
        """An ordered task begins."""
        if self.under_way.get(task, seconds) is not None:
            raise ValueError(f"{self._name(task)} starts, but was not ordered, or has started before")
        self._note(seconds, "started", task, line=f"{self._name(task)} starts")
        self.under_way[task] = seconds

    def ended(self, task: Task, seconds: float) -> None:
        """A task that was started is computed."""
        if self._stop(task, seconds, "ended"):
            self.done.add(task)
            for then in self.released(task):
                insort(self.ready, then)

    def failed(self, task: Task, seconds: float) -> None:
        """A task that was started is not computed. All of its chunk, and what needed that, is undone."""
        if self._stop(task, seconds, "failed"):
            undone = {Task(task.chunk, i) for i in range(len(self.chunks[task.chunk]))}
            for then, subgraph in self._all():  # in order: what needs one of them is behind it
                if not undone.isdisjoint(subgraph.needs):
                    undone.add(then)
            self.done -= undone
            self._void |= undone & self.under_way.keys()
            self._settle()

    def lost(self, unit: str, seconds: float) -> None:
        """A unit takes no more tasks: those of its own that are not done are others'. What is under way stays so until
        it is said to have ended or failed."""
        if unit in self.lost_units:
            raise ValueError(f"{unit} is lost, but was lost before")
        lost = self.lost_units | {unit}
        self._check(((task, self._without(subgraph, lost)) for task, subgraph in self._all()), lost)
        theirs = sum(unit in subgraph.units and task not in self.done for task, subgraph in self._all())
        self._note(seconds, "lost", unit, line=f"{unit} is lost; tasks that others have now: {theirs}")
        self.lost_units = lost
        self._settle()

    def refit(self, first: int, chunks: tuple[Chunk, ...], seconds: float) -> None:
        """Chunks from number `first` on, of which nothing is done or under way, are cut anew, into these."""
        if not 0 <= first <= len(self.chunks) or any(t.chunk >= first for t in (*self.done, *self.under_way)):
            raise ValueError(f"chunk {first} is cut anew, but has begun, or is not there")
        new = [(Task(i, j), subgraph) for i, c in enumerate(chunks, first) for j, subgraph in enumerate(c)]
        self._check(new, self.lost_units)
        there = {task for task, _ in self._all() if task.chunk < first} | {task for task, _ in new}
        for task, subgraph in new:
            if not all(need < task and need in there for need in subgraph.needs):
                raise ValueError(f"{subgraph.name} of chunk {task.chunk} needs what is not there before it")
        rows = ", ".join(str(len(chunk[0].rows)) for chunk in chunks if chunk)
        self._note(seconds, "refit", first, chunks, line=f"chunks from number {first} on have {rows} rows")
        self.chunks = (*self.chunks[:first], *chunks)
        self._settle()

    # --- in here --------------------------------------------------------------------------------------

    def _all(self) -> Iterator[tuple[Task, Subgraph]]:
        return ((Task(i, j), s) for i, chunk in enumerate(self.chunks) for j, s in enumerate(chunk))

    def _name(self, task: Task) -> str:
        there = task.chunk < len(self.chunks) and task.subgraph < len(self.chunks[task.chunk])
        return f"chunk {task.chunk} {self.subgraph(task).name if there else task.subgraph}"

    def _check(self, subgraphs: Iterable[tuple[Task, Subgraph]], lost: Collection[str]) -> None:
        for task, subgraph in subgraphs:
            if not subgraph.units or not set(lost).isdisjoint(subgraph.units):
                raise ValueError(f"{subgraph.name} of chunk {task.chunk} has no unit, or one that is lost")

    def _note(self, seconds: float, kind: str, *about: Any, line: str = "") -> None:
        if self.record and seconds < self.record[-1].seconds:
            raise ValueError(f"{kind} at {seconds} s, but it was {self.record[-1].seconds} s before")
        self.record.append(Event(seconds, kind, about))
        self._lines += [f"{seconds:8.3f} s: {line}"] if line else []

    def _stop(self, task: Task, seconds: float, how: str) -> bool:
        """A task is no longer under way; whether that counts."""
        since, name, void = self.under_way.get(task), self._name(task), task in self._void
        if since is None:
            raise ValueError(f"{name} has {how}, but was not started")
        what = ", for nothing" if void else f": chunk {task.chunk} is to be computed again" * (how == "failed")
        self._note(seconds, how, task, line=f"{name} has {how} after {1e3 * (seconds - since):.1f} ms{what}")
        del self.under_way[task]
        if void:
            self._void.remove(task)
            self._settle()
        return not void

    def _without(self, subgraph: Subgraph, lost: Collection[str]) -> Subgraph:
        for unit in sorted(lost):
            subgraph = self._heir(subgraph, unit) if unit in subgraph.units else subgraph
        return subgraph

    def _settle(self) -> None:
        """Find anew who does what is not done, what is behind each task, and what is ready."""
        if self.lost_units:  # what was done by a unit that is lost now may have been undone
            new = {t: s if t in self.done else self._without(s, self.lost_units) for t, s in self._all()}
            self.chunks = tuple(tuple(new[Task(i, j)] for j in range(len(c))) for i, c in enumerate(self.chunks))
        self.ready, self._behind, self._units = [], dict[Task, list[Task]](), set[str]()
        for task, subgraph in self._all():
            self._units.update(subgraph.units)
            for need in subgraph.needs:
                self._behind.setdefault(need, []).append(task)
            if task not in self.done and task not in self.under_way and self.done.issuperset(subgraph.needs):
                self.ready.append(task)
