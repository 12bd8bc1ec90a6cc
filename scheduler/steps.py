"""Steps for a simulator: the operators of a program, placed on units, cut where weights arrive, with their costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from coterie.errors import UsageError
from coterie.scheduler.device_model import Cost, Instruction, cost, in_format, launches, part
from coterie.scheduler.operators import Operator
from coterie.scheduler.partition import Cut
from coterie.scheduler.soc import Device
from coterie.storage.runs import PAGE
from coterie.storage.weights import PINNED, Weights

Shares = tuple[tuple[str, float], ...]  # units, and what part of an operator's rows each takes
LINEAR = ("matmul", "ffn")
LEAST_SHARE = 0.01
NO_LAUNCH = 0.0, 0.0, 0.0


class Portion(NamedTuple):
    """A unit's part of an operator: a share of the rows, in runs of so many tokens (none: all of the step's)."""

    unit: str
    share: float
    runs: tuple[int, ...] = ()


Product = tuple[int, str, int, int, int, str]  # layer, kind, rows, columns, tokens, format


def product_of(i: Instruction) -> Product:
    return i.layer, i.kind, i.rows, i.columns, i.tokens, i.format


@dataclass(frozen=True)
class Placement:
    """Who does what in one phase: `cuts` of products, else by the kind of an instruction, else `others`. A unit that
    follows another one's work waits for it at a flag, or, with `fence`, by the runtime's own call and for a copy of its
    result. `formats`: what a unit takes weights for, where it is not to choose by their format."""

    by_kind: Mapping[str, Shares]
    others: str
    fence: bool = False
    formats: Mapping[str, str] | None = None
    cuts: Mapping[Product, Cut] = field(default_factory=dict)

    def format_of(self, unit: str) -> str:
        """What a unit takes weights for, "": what they are."""
        return (self.formats or {}).get(unit, "")

    def of(self, i: Instruction) -> tuple[Portion, ...]:
        cut = self.cuts.get(product_of(i))
        if cut is not None:
            return tuple(Portion(piece.unit, piece.rows / i.rows, piece.runs) for piece in cut.pieces)
        return tuple(Portion(*share) for share in self.by_kind.get(i.kind, ((self.others, 1.0),)))


def placements(
    device: Device, units: Sequence[str], split: Shares = (), *, fence: bool = False, formats: Mapping[str, str] | None
) -> tuple[Placement, Placement]:
    """Who decodes and who prefills, by a fixed rule: matrices of a prompt on the NPU if one is named, the rest and
    decode on the first GPU or CPU that is named; `split` cuts decode's matrices by rows. Raises UsageError."""
    for name in [*units, *(name for name, _ in split), *(formats or {})]:
        device.unit(name)
    for name, format in (formats or {}).items():
        if format not in device.unit(name).rates:
            known = ", ".join(device.unit(name).rates)
            raise UsageError(f"{name} of {device.name} knows nothing of {format!r}; it knows {known}")
    if not units or len(set(units)) != len(units):
        raise UsageError(f"--units {','.join(units)}: name each unit once")
    kinds = {name: device.unit(name).kind for name in units}
    first = next((name for name in units if kinds[name] != "npu"), units[0])
    matrices = next((name for name in units if kinds[name] == "npu"), first)
    if split and (abs(sum(s for _, s in split) - 1) > 1e-6 or min(s for _, s in split) < LEAST_SHARE):
        raise UsageError(f"--split {split}: shares must be at least {LEAST_SHARE} and add up to 1")
    decode = dict.fromkeys(LINEAR, split or ((first, 1.0),))
    prefill: dict[str, Shares] = dict.fromkeys(LINEAR, ((matrices, 1.0),))
    return Placement(decode, first, fence, formats), Placement(prefill, first, fence, formats)


class Task(NamedTuple):
    """A piece of work of one unit. `waits`: tasks of the same step; `needs`: tape positions below this must have
    arrived (0: none); `frees`: those below are no longer needed when it ends; `chained`: follows its own first part,
    without a launch. `launch`: alone, queued and drained, seconds; then `work` seconds that want `bytes_per_s`."""

    unit: str
    name: str
    layer: int
    launch: tuple[float, float, float]
    work: float
    bytes_per_s: float
    waits: tuple[int, ...]
    needs: int
    frees: int
    chained: bool
    bound: str


@dataclass(frozen=True)
class Request:
    """A read: tape positions `first` to `end`, which lie side by side in the file and in memory."""

    first: int
    end: int
    nbytes: int
    layer: int


@dataclass(frozen=True)
class Step:
    """One pass: tasks, and the tape's requests it uses, from position `first` to `end`."""

    name: str
    tasks: tuple[Task, ...]
    requests: tuple[Request, ...]
    first: int
    end: int
    tokens: int
    lookup: float = 0.0  # seconds that looking embeddings up takes before it


class Requests:
    """The tape's reads, as the flash unit merges them, and which pages of the ring they take."""

    def __init__(self, weights: Weights, block: int) -> None:
        numbers, extents = weights.tape, weights.extents
        self.nbytes, self.where = extents.nbytes[numbers], weights.where[numbers] - weights.staging.offset
        offset = extents.offset[numbers]
        self.layers = np.array([run.layer for run in weights.runs])[extents.run[numbers]].tolist()
        ends = offset + self.nbytes
        joined = (offset[1:] == ends[:-1]) & (self.where[1:] == self.where[:-1] + self.nbytes[:-1])
        self._joined, self._block = [False, *joined.tolist()], block
        self._sizes, self._begin = self.nbytes.tolist(), weights.begin
        self.pages = max(1, weights.staging.nbytes // PAGE)

    def between(self, first: int, end: int) -> tuple[Request, ...]:
        """Requests for tape positions `first` to `end` (excluded)."""
        found, at, size, base = list[Request](), first, 0, self._begin
        for position in range(first, end):
            nbytes = self._sizes[position - base]
            if position > at and (not self._joined[position - base] or size + nbytes > self._block):
                found.append(Request(at, position, size, self.layers[at - base]))
                at, size = position, 0
            size += nbytes
        if end > first:
            found.append(Request(at, end, size, self.layers[at - base]))
        return tuple(found)

    def room(self, request: Request) -> tuple[int, int]:
        """The pages of the ring that a request takes: the first, and the one behind the last."""
        at = int(self.where[request.first - self._begin])
        return at // PAGE, -(-(at + request.nbytes) // PAGE)


def make_step(
    name: str,
    operators: Sequence[Operator],
    device: Device,
    placement: Placement,
    requests: tuple[Request, ...],
    span: tuple[int, int],
    tokens: int,
    lookup: float = 0.0,
) -> Step:
    """Place operators on units and cut those on streamed weights into a piece a request."""
    maker = _Maker(device, placement, requests)
    for operator in operators:
        maker.add(operator)
    return Step(name, tuple(maker.tasks), requests, *span, tokens, lookup)


class _Maker:
    def __init__(self, device: Device, placement: Placement, requests: tuple[Request, ...]) -> None:
        self.device, self.placement = device, placement
        self.tasks: list[Task] = []
        self._last: list[tuple[int, ...]] = []  # of each operator, the tasks after which it is done
        self._starts = {request.first: number for number, request in enumerate(requests)}
        self._requests = requests
        self._costs: dict[Instruction, tuple[Cost, tuple[float, float, float]]] = {}

    def add(self, operator: Operator) -> None:
        waits = tuple(task for number in operator.waits for task in self._last[number])
        portions, last = self.placement.of(operator.instruction), list[int]()
        whole = len(portions) == 1 and len(portions[0].runs) < 2
        prepared = set[str]()
        for unit, share, runs in portions:
            before = waits
            if self.device.units[unit].kind != "cpu" and unit not in prepared:  # lanes of a CPU do these for themselves
                prepared.add(unit)
                for each in operator.prepares:
                    before = (self._task(replace(each, unit=unit), before, 0, 0),)
            for tokens in runs or (operator.instruction.tokens,):
                i = replace(operator.instruction, unit=unit, tokens=tokens)
                i = i if share == 1 else part(i, share, unit, self.device.units[unit].step)
                last.append(self._placed(operator, i, before, operator.frees if whole else 0))
        if not whole and operator.frees:  # what is freed is freed when all parts are done
            joined = Task(portions[0].unit, "join", -1, NO_LAUNCH, 0.0, 0.0, tuple(last), 0, operator.frees, True, "")
            self.tasks.append(joined)
            last = [len(self.tasks) - 1]
        self._last.append(tuple(last))

    def _placed(self, operator: Operator, i: Instruction, waits: tuple[int, ...], frees: int) -> int:
        if operator.first == PINNED:
            return self._task(i, waits, 0, frees)
        nbytes = [r.nbytes for r in self._of(operator)]
        ends = [min(r.end, operator.end) for r in self._of(operator)]
        for number, (size, end) in enumerate(zip(nbytes, ends, strict=True)):
            final = number == len(ends) - 1
            if number:  # as the first one, but without a launch, and with its own share of the work
                last = self.tasks[-1]
                work = last.work / nbytes[number - 1] * size
                self.tasks.append(
                    last._replace(
                        launch=NO_LAUNCH, work=work, waits=(), needs=end, frees=frees if final else 0, chained=True
                    )
                )
            else:
                self._task(i, waits, end, frees if final else 0, size / sum(nbytes))
        return len(self.tasks) - 1

    def _of(self, operator: Operator) -> list[Request]:
        number = self._starts.get(operator.first)
        if number is None:  # a request that began with an earlier operator's extents
            number = max(n for first, n in self._starts.items() if first < operator.first)
        found = [self._requests[number]]
        while found[-1].end < operator.end:
            number += 1
            found.append(self._requests[number])
        return found

    def _task(self, i: Instruction, waits: tuple[int, ...], needs: int, frees: int, share: float = 1.0) -> int:
        unit = self.device.units[i.unit]
        i = in_format(i, self.placement.format_of(i.unit))
        if i not in self._costs:
            found = cost(i, self.device)
            self._costs[i] = found, launches(found, unit)
        found, launch = self._costs[i]
        name = i.kernel.partition(":")[0] or i.kind
        task = Task(
            i.unit, name, i.layer, launch, found.work * share, found.bytes_per_s,
            waits, needs, frees, False, found.bound,
        )  # fmt: skip
        self.tasks.append(task)
        return len(self.tasks) - 1
