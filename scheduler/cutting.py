"""Cutting the products of a step across a device's units, by what the device model says of their parts."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, product

from coterie.scheduler.device_model import Cost, Instruction, cost, in_format, launches
from coterie.scheduler.joint import Kind, Option, share_out
from coterie.scheduler.operators import Operator
from coterie.scheduler.partition import Cut, Worker, solve
from coterie.scheduler.soc import Device
from coterie.scheduler.steps import LINEAR, Product, product_of
from coterie.storage.weights import PINNED

LENGTHS = (64, 128, 256, 512, 1024)  # tokens for which an NPU has graphs, beside one of a single token
OWN_BYTES = {"int4": 0.5, "int8": 1.0, "f16": 2.0, "f16_sdk": 2.0}  # of a weight, in formats that only units have

Shape = tuple[str, int, int]  # kind, rows, columns: of a product's weights
Place = tuple[int, Shape]  # with the layer


def shape_of(i: Instruction) -> Shape:
    return i.kind, i.rows, i.columns


def place_of(i: Instruction) -> Place:
    return i.layer, shape_of(i)


def cuttable(operator: Operator) -> bool:
    """Whether it is a product whose weights are in memory."""
    return operator.instruction.kind in LINEAR and operator.first == PINNED


@dataclass(frozen=True)
class Steps:
    """A step's operators, and how often there is such a step."""

    operators: Sequence[Operator]
    times: float

    def products(self) -> list[Instruction]:
        return [operator.instruction for operator in self.operators if cuttable(operator)]


@dataclass(frozen=True)
class Cutter:
    """Cuts products on `units` of a device; `home` is the unit that does all between them. `fence`: units wait for
    each other by calls of their runtimes and copies, not by flags; `formats`: what a unit takes weights for; `lengths`:
    of an NPU's graphs."""

    device: Device
    units: Sequence[str]
    home: str
    fence: bool = False
    formats: Mapping[str, str] | None = None
    lengths: tuple[int, ...] = LENGTHS
    _known: dict[tuple[Instruction, bool], Cut] = field(default_factory=dict, init=False, repr=False, compare=False)

    def cut(self, operators: Iterable[Operator], outside: Collection[Place] = ()) -> dict[Product, Cut]:
        """The best cut of each product whose weights are in memory; streamed ones are not cut. `outside`: products of
        which units with a window take no part."""
        products = [operator.instruction for operator in operators if cuttable(operator)]
        return {product_of(i): self.best(i, inside=place_of(i) not in outside) for i in products}

    def best(self, i: Instruction, *, inside: bool = True) -> Cut:
        """The best cut of one product; not `inside`: without units that have a window. Those have the last rows, so
        that what they take for few tokens is a part of what they take for many, or the other way round."""
        i = replace(i, layer=-1)
        if (i, inside) not in self._known:
            names = sorted(self.units, key=self._has_window)
            workers = [self.worker(name, i.tokens) for name in names if inside or not self._has_window(name)]
            part = partial(self.part, i)
            self._known[i, inside] = solve(i.rows, i.tokens, workers, part, together=self.device.together)
        return self._known[i, inside]

    def _has_window(self, name: str) -> bool:
        return self.device.unit(name).window is not None

    def outside(self, phases: Sequence[Steps]) -> list[set[Place]]:
        """Of each phase the products that the unit with a window leaves to others, so that all weights it computes with
        fit, in the least time of all. Raises PlanError where that cannot be, UsageError as share_out."""
        banned: list[set[Place]] = [set() for _ in phases]
        name = next(filter(self._has_window, self.units), "")
        if not name:
            return banned
        layers: dict[Shape, set[int]] = {}
        for phase in phases:
            for i in phase.products():
                layers.setdefault(shape_of(i), set()).add(i.layer)
        choices = (True,) if all(map(self._has_window, self.units)) else (True, False)
        ways = list(product(choices, repeat=len(phases)))  # in which phases the unit takes part
        kinds = [
            Kind(len(found), tuple(self._option(name, shape, way, phases) for way in ways))
            for shape, found in layers.items()
        ]
        counts = share_out(kinds, self.device.unit(name).window or 0.0)
        for (shape, found), each in zip(layers.items(), counts, strict=True):
            left = iter(sorted(found))
            for way, count in zip(ways, each, strict=True):
                for layer in islice(left, count):
                    for places, inside in zip(banned, way, strict=True):
                        if not inside:
                            places.add((layer, shape))
        return banned

    def _option(self, name: str, shape: Shape, way: Sequence[bool], phases: Sequence[Steps]) -> Option:
        """A product with the unit inside in some phases: seconds of all steps, bytes of the weights it has for it."""
        seconds, nbytes = 0.0, 0.0
        for phase, inside in zip(phases, way, strict=True):
            i = next((i for i in phase.products() if shape_of(i) == shape), None)
            if i is not None:
                cut = self.best(i, inside=inside)
                rows = max((piece.rows for piece in cut.pieces if piece.unit == name), default=0)
                row = i.columns * OWN_BYTES[own] if (own := self._format(name)) in OWN_BYTES else i.nbytes / i.rows
                seconds, nbytes = seconds + phase.times * cut.seconds, max(nbytes, rows * row)
        return Option(seconds, nbytes)

    def _format(self, name: str) -> str:
        """What a unit takes weights for, "": what they are."""
        return (self.formats or {}).get(name, "")

    def worker(self, name: str, tokens: int) -> Worker:
        """A unit as the solver knows it."""
        unit, home = self.device.unit(name), self.device.unit(self.home)
        lengths = () if unit.kind != "npu" else (1,) if tokens == 1 else self.lengths
        if name == self.home:
            return Worker(name, unit.step, lengths)
        meeting = home.fence + unit.copy + unit.fence + home.copy if self.fence else home.sync + unit.sync
        ahead = home.kind == "gpu" and not self.fence  # its queue holds what comes next, and waits for flags itself
        idle = 0.0 if ahead else (home.drained or 0.0) - (home.queued or 0.0)
        return Worker(name, unit.step, lengths, meeting + max(0.0, idle))

    def part(self, i: Instruction, unit: str, rows: int, tokens: int) -> Cost:
        """What so many rows of a product, for so many tokens, take: behind other work at home, elsewhere on a unit
        whose queue has run empty."""
        model = self.device.unit(unit)
        own = replace(i, unit=unit, rows=rows, tokens=tokens, nbytes=i.nbytes * rows / i.rows)
        found = cost(in_format(own, self._format(unit)), self.device)
        _, queued, drained = launches(found, model)
        return replace(found, launch=queued if unit == self.home else drained)
