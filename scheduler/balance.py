"""Moving a cut between two units by what their parts took: a pure state machine, measured times in, cuts out.

A cut stays right only while both units stay as fast as they were (heat, other programs). Parts are what static graphs
were built for, or rows of tokens, so that no cut needs compiling; a cut moves at the end of a step, and holds for all
of the next one.
"""

from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass

from coterie.kernels.record import WHOLE

NEW = 0.5  # weight of the newest step in a unit's rate
IDLE = 0.05  # share of a unit's time that waiting may take and still be none
EAGER = 0.95  # what a unit is thought to take, of what it can have taken at most, when nobody waits for it
FORGIVE = 0.99  # what a unit without parts is thought to take, of what it was thought to take a step before
WORTH = 0.03  # share of a product's time that a move must save


@dataclass(frozen=True)
class Given:
    """A cut of a kind of product: another unit computes the first `parts` of `of` equal parts, the CPU unit the rest.
    `points`: to how many parts the cut may move, ascending; 0 is always one of them, and is not named."""

    parts: int
    of: int
    points: tuple[int, ...]

    @classmethod
    def around(cls, parts: int, of: int) -> "Given":
        """A cut that may move by one or two parts up, and by half down: a graph's fixed costs make many small ones
        expensive, and down to nothing is always possible."""
        points = {parts // 2, parts, parts + 1, parts + 2} if parts > 3 else {parts, parts + 1, parts + 2}
        return cls(parts, of, tuple(sorted(point for point in points if point <= of)))

    @classmethod
    def whole(cls) -> "Given":
        """Everything, and no other cut."""
        return cls(1, 1, (1,))

    def pieces(self) -> list[tuple[int, int]]:
        """Parts that are computed in one go, as (first, last + 1): up to the first point, and between points."""
        return list(zip((0, *self.points[:-1]), self.points, strict=True))

    def pieces_of(self, parts: int) -> int:
        """How many pieces so many parts are."""
        return sum(point <= parts for point in self.points)

    def share(self, parts: int) -> int:
        """So many parts as a step's header says them, of WHOLE."""
        return WHOLE * parts // self.of

    def bounds(self, count: int) -> list[int]:
        """Where pieces of `count` groups or clusters begin and end: pieces() in these units, as kernels of the CPU unit
        find them by a step's header."""
        return [count * self.share(point) // WHOLE for point in (0, *self.points)]


@dataclass(frozen=True)
class Move:
    """The cut of a kind of product went from `before` to `after` parts behind step `step`, as a part took the other
    unit and the CPU unit so many seconds."""

    step: int
    kind: str
    before: int
    after: int
    other: float
    cpu: float

    def line(self) -> str:
        """For people."""
        return (
            f"step {self.step}: {self.kind} {self.before} -> {self.after} parts; one takes {1e3 * self.other:.3g} ms "
            f"there, {1e3 * self.cpu:.3g} ms on the CPU unit"
        )


class Balance:
    """The cuts of several kinds of products between the CPU unit and another one."""

    def __init__(self, given: dict[str, Given]) -> None:
        self.given, self.moves = given, list[Move]()
        self.parts = {kind: cut.parts for kind, cut in given.items()}
        self._rates: dict[tuple[str, str], float] = {}  # seconds a part, by kind and unit
        self._forgiven = set[tuple[str, str]]()  # whose rates were not measured in the last step
        self._steps = 0

    def observe(self, seconds: dict[str, tuple[float, float]]) -> None:
        """What each kind's parts took in a step, the other unit's and the CPU unit's; moves cuts where that pays."""
        self._steps += 1
        for kind, (other, cpu) in seconds.items():
            parts, of = self.parts[kind], self.given[kind].of
            self._learn(kind, "other", other, parts)
            self._learn(kind, "cpu", cpu, of - parts)
            for unit, idle in (("other", parts == 0), ("cpu", parts == of)):
                if idle and (kind, unit) in self._rates:  # in time it gets another chance
                    self._rates[kind, unit] *= FORGIVE
                    self._forgiven.add((kind, unit))
            best = self._best(kind)
            if best != parts:
                rates = self._rates[kind, "other"], self._rates[kind, "cpu"]
                self.moves.append(Move(self._steps, kind, parts, best, *rates))
                self.parts[kind] = best

    def observe_waits(self, seconds: dict[str, tuple[float, float]]) -> None:
        """The same for a unit whose own times nobody sees: what the CPU unit took to compute its parts, and then waited
        for the other unit's. Where it hardly has, the other one took no longer, and is thought a little faster than it
        was, so that a unit which has become faster is found out."""
        found = dict[str, tuple[float, float]]()
        for kind, (computed, waited) in seconds.items():
            known, parts = self._rates.get((kind, "other")), self.parts[kind]
            other = computed + waited
            if waited < IDLE * computed and parts:
                other = EAGER * min(computed, computed if known is None else known * parts)
            found[kind] = other, computed
        self.observe(found)

    def rest(self, kinds: Iterable[str]) -> None:
        """A step in which one unit alone computed these."""
        if idle := {kind: (0.0, 0.0) for kind in kinds if kind in self.parts}:
            self.observe(idle)

    def _learn(self, kind: str, unit: str, seconds: float, parts: int) -> None:
        if parts and seconds > 0:
            now, known = seconds / parts, self._rates.get((kind, unit))
            if known is not None and (kind, unit) not in self._forgiven:
                now = NEW * now + (1 - NEW) * known
            self._forgiven.discard((kind, unit))
            self._rates[kind, unit] = now

    def _best(self, kind: str) -> int:
        """The cut at which both end soonest; the present one where no other saves enough, or a rate is not known."""
        other, cpu = self._rates.get((kind, "other")), self._rates.get((kind, "cpu"))
        parts, cut = self.parts[kind], self.given[kind]
        if other is None or cpu is None:
            return parts

        def seconds(given: int) -> float:
            return max(given * other, (cut.of - given) * cpu)

        number = bisect(cut.points, cut.of * cpu / (other + cpu))  # where both would end at once
        best = min((0, *cut.points)[number : number + 2], key=seconds)
        return best if seconds(best) < (1 - WORTH) * seconds(parts) else parts

    def story(self) -> str:
        """Every move, for people."""
        return "\n".join(move.line() for move in self.moves)
