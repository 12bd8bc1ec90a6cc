"""Cutting one matrix product across units: which rows of the weights, and which tokens, each unit takes.

HeteroInfer (arXiv 2501.14794, section 4): a cut of the weights' rows ("weight-centric"), standard lengths on a unit
with static graphs and the tokens that are left on another one ("activation-centric", with several lengths one after
the other), padding to a standard length, and padding with a cut of rows ("hybrid"). All of them are one family here:
units compute the first tokens together, each some of the rows, and one unit computes the tokens that are left over,
all rows. Every member of the family on a grid of rows is looked at; the one that takes least wins.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from math import inf, lcm
from typing import NamedTuple

from coterie.errors import PlanError
from coterie.scheduler.bandwidth import until_all_end
from coterie.scheduler.device_model import Cost

GRID = {2: 64, 3: 24}  # into how many parts rows are cut at most, by the number of units that share them
Costs = Callable[[str, int, int], Cost]  # of a unit, for so many rows and tokens


@dataclass(frozen=True)
class Worker:
    """A unit that may take a part. `step`: its rows begin at multiples of this; `lengths`: numbers of tokens for which
    it has graphs (none: it takes any number); `join`: seconds until others can use what it made, by flag and copy; 0
    for the unit at which operators begin and end."""

    name: str
    step: int = 1
    lengths: tuple[int, ...] = ()
    join: float = 0.0


@dataclass(frozen=True)
class Piece:
    """What one unit computes: `rows` from `row` on, for `tokens` from `token` on, in runs of these lengths (graphs may
    be longer than what is left: padding). `seconds`: alone."""

    unit: str
    row: int
    rows: int
    token: int
    tokens: int
    runs: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Cut:
    """A cut of a product. `seconds`: from its start until all of it can be used, memory shared."""

    strategy: str
    pieces: tuple[Piece, ...]
    seconds: float

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(piece.unit for piece in self.pieces))


class Candidate(NamedTuple):
    """A member of the family: the units of `group` compute the first `covered` tokens, with rows between `bounds`, and
    `taker` the tokens that are left."""

    group: tuple[Worker, ...]
    bounds: tuple[int, ...]
    covered: int
    taker: Worker | None


class Load(NamedTuple):
    """What a unit does: runs of so many tokens, seconds alone, bytes."""

    runs: tuple[int, ...]
    seconds: float
    nbytes: float


def solve(
    rows: int,
    tokens: int,
    workers: Sequence[Worker],
    costs: Costs,
    *,
    together: float = inf,
    shares: Sequence[float] | None = None,
) -> Cut:
    """The cut of a product of `rows` weight rows and `tokens` tokens that takes least; of equals one with fewer pieces,
    then the first in the order of `workers`. `together`: bytes/s that units read at most at the same time; `shares`:
    only these shares of the rows for the first of two units, instead of the grid. Raises PlanError where no unit can
    compute it."""
    if rows < 1 or tokens < 1:
        raise PlanError(f"a product of {rows} rows and {tokens} tokens cannot be cut")
    loads = _Loads(tokens, costs)
    best, least = None, (inf, 0)
    for candidate in candidates(rows, tokens, workers, shares):
        if loads.rest(candidate) > least[0]:
            continue
        found = loads.seconds(candidate, together), len(candidate.group) + (candidate.taker is not None)
        if found < least:
            best, least = candidate, found
    if best is None:
        raise PlanError(f"no unit can compute {rows} rows for {tokens} tokens")
    pieces = loads.pieces(best)
    return Cut(_strategy(pieces), pieces, least[0])


def candidates(
    rows: int, tokens: int, workers: Sequence[Worker], shares: Sequence[float] | None = None
) -> Iterator[Candidate]:
    """Everything that is looked at."""
    for covered in _covered(tokens, workers):
        takers: list[Worker | None] = [None]
        if covered < tokens:
            takers = [worker for worker in workers if not worker.lengths]
        for count in range(1, len(workers) + 1):
            for group in combinations(workers, count):
                for bounds in _bounds(rows, group, shares):
                    for taker in takers:
                        yield Candidate(group, bounds, covered, taker)


def _covered(tokens: int, workers: Sequence[Worker]) -> list[int]:
    """How many tokens units may compute together: all, or what whole graphs add up to without padding."""
    sums = {0}
    for length in sorted({length for worker in workers for length in worker.lengths}):
        for at in range(length, tokens):
            if at - length in sums:
                sums.add(at)
    return [tokens, *sorted(sums - {0}, reverse=True)]


def _bounds(rows: int, group: Sequence[Worker], shares: Sequence[float] | None) -> Iterator[tuple[int, ...]]:
    """Where the rows of a group's units begin and end."""
    if len(group) == 1:
        yield 0, rows
        return
    step = lcm(*(worker.step for worker in group))
    if shares is not None and len(group) == 2:
        inner = sorted({round(share * rows / step) * step for share in shares} - {0, rows})
    else:
        step *= -(-rows // (step * GRID[len(group)]))
        inner = list(range(step, rows, step))
    for cut in combinations(inner, len(group) - 1):
        yield 0, *cut, rows


class _Loads:
    """What units take for parts of a product; each part is looked up once."""

    def __init__(self, tokens: int, costs: Costs) -> None:
        self._tokens, self._cost = tokens, cache(costs)
        self.of = cache(self._of)

    def _of(self, worker: Worker, rows: int, tokens: int) -> Load:
        """The best runs of a unit over so many tokens: where it has lengths, the combination that takes least."""
        if tokens <= 0:
            return Load((), 0.0, 0.0)
        if not worker.lengths:
            only = self._cost(worker.name, rows, tokens)
            return Load((tokens,), only.seconds, only.nbytes)
        ways = []
        for length in sorted(worker.lengths, reverse=True):
            first, then = self._cost(worker.name, rows, length), self.of(worker, rows, tokens - length)
            ways.append(Load((length, *then.runs), first.seconds + then.seconds, first.nbytes + then.nbytes))
        return min(ways, key=lambda load: load.seconds)

    def rest(self, candidate: Candidate) -> float:
        """Seconds that the tokens which are left over take alone: it takes no less."""
        if candidate.taker is None:
            return 0.0
        return self.of(candidate.taker, candidate.bounds[-1], self._tokens - candidate.covered).seconds

    def seconds(self, candidate: Candidate, together: float) -> float:
        """Until all of it can be used."""
        group, bounds, covered, taker = candidate
        busy = {
            worker.name: self.of(worker, end - first, covered)
            for worker, (first, end) in zip(group, pairwise(bounds), strict=True)
        }
        join = max(worker.join for worker in group)
        if taker is not None:
            rest = self.of(taker, bounds[-1], self._tokens - covered)
            before = busy.get(taker.name, Load((), 0.0, 0.0))
            busy[taker.name] = Load((), before.seconds + rest.seconds, before.nbytes + rest.nbytes)
            join = max(join, taker.join)
        return until_all_end([(load.seconds, load.nbytes) for load in busy.values()], together) + join

    def pieces(self, candidate: Candidate) -> tuple[Piece, ...]:
        group, bounds, covered, taker = candidate
        found = []
        for worker, (first, end) in zip(group, pairwise(bounds), strict=True):
            load = self.of(worker, end - first, covered)
            found.append(Piece(worker.name, first, end - first, 0, covered, load.runs, load.seconds))
        if taker is not None:
            rest = self._tokens - covered
            load = self.of(taker, bounds[-1], rest)
            found.append(Piece(taker.name, 0, bounds[-1], covered, rest, load.runs, load.seconds))
        return tuple(found)


def _strategy(pieces: Sequence[Piece]) -> str:
    """What the paper calls it, or nearly."""
    first, padded = pieces[0], any(sum(piece.runs) > piece.tokens for piece in pieces)
    by_rows = first.rows < max(piece.row + piece.rows for piece in pieces)
    if by_rows:
        return "hybrid" if padded or len({piece.token for piece in pieces}) > 1 else "rows"
    if len(pieces) > 1:
        return "lengths" if len(first.runs) > 1 else "tokens"
    return "padding" if padded else "lengths" if len(first.runs) > 1 else "one unit"
