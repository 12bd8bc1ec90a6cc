"""Cutting the products of a step across a device's units, by what the device model says of their parts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.scheduler.device_model import Cost, Instruction, cost
from coterie.scheduler.operators import Operator
from coterie.scheduler.partition import Cut, Worker, solve
from coterie.scheduler.soc import Device
from coterie.scheduler.steps import LINEAR, Product, product_of
from coterie.storage.weights import PINNED

LENGTHS = (64, 128, 256, 512, 1024)  # tokens for which an NPU has graphs, beside one of a single token


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

    def cut(self, operators: Iterable[Operator]) -> dict[Product, Cut]:
        """The best cut of each product whose weights are in memory; streamed ones are not cut."""
        found: dict[Product, Cut] = {}
        for operator in operators:
            i = operator.instruction
            if i.kind in LINEAR and operator.first == PINNED and product_of(i) not in found:
                found[product_of(i)] = self.best(i)
        return found

    def best(self, i: Instruction) -> Cut:
        """The best cut of one product."""
        workers = [self.worker(name, i.tokens) for name in self.units]

        def part(unit: str, rows: int, tokens: int) -> Cost:
            return self.part(i, unit, rows, tokens)

        return solve(i.rows, i.tokens, workers, part, together=self.device.together)

    def worker(self, name: str, tokens: int) -> Worker:
        """A unit as the solver knows it."""
        unit, home = self.device.unit(name), self.device.unit(self.home)
        lengths = () if unit.kind != "npu" else (1,) if tokens == 1 else self.lengths
        if name == self.home:
            return Worker(name, unit.step, lengths)
        meeting = home.fence + unit.copy + unit.fence + home.copy if self.fence else home.sync + unit.sync
        idle = (home.drained or 0.0) - (home.queued or 0.0)  # what comes next starts on a queue that has run empty
        return Worker(name, unit.step, lengths, meeting + max(0.0, idle))

    def part(self, i: Instruction, unit: str, rows: int, tokens: int) -> Cost:
        """What so many rows of a product, for so many tokens, take: behind other work at home, elsewhere on a unit
        whose queue has run empty."""
        model = self.device.unit(unit)
        own = replace(i, unit=unit, rows=rows, tokens=tokens, nbytes=i.nbytes * rows / i.rows)
        if self.formats and unit in self.formats:
            own = replace(own, format=self.formats[unit], kernel="")
        found = cost(own, self.device)
        known = model.queued if unit == self.home else model.drained
        return replace(found, launch=found.launch if known is None else min(found.launch, known))
