"""Why a simulated step takes as long as it does: what each kind of operator costs and where it runs, and what more of
something would give."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from coterie.errors import CoterieError
from coterie.models.header import ModelHeader
from coterie.scheduler.device_model import Instruction, cost, in_format, part
from coterie.scheduler.operators import Rows
from coterie.scheduler.simulate import Answer, Question, Simulation
from coterie.scheduler.soc import Device
from coterie.scheduler.steps import LINEAR, Placement, product_of
from coterie.scheduler.what_if import changed

GIB = 1 << 30


@dataclass(frozen=True)
class Line:
    """Operators that are alike: how many in a step, where each runs, how long all of them take alone, one after the
    other (seconds), with their weights in memory."""

    name: str
    count: int
    where: str
    seconds: float


@dataclass(frozen=True)
class Change:
    """What a change would give: speeds of prefill and decode over those without it (None: not asked for)."""

    name: str
    prefill: float | None
    decode: float | None


@dataclass(frozen=True)
class Explanation:
    """Tables of a chunk of the prompt and of a token (those that were asked for), and changes."""

    tables: dict[str, tuple[Rows, list[Line]]]
    changes: list[Change]

    def as_dict(self) -> dict[str, object]:
        tables = {name: [vars(line) for line in lines] for name, (_, lines) in self.tables.items()}
        return tables | {"changes": [vars(change) for change in self.changes]}


def explain(simulation: Simulation, file: ModelHeader, answer: Answer) -> Explanation:
    """Where the time of a simulated answer goes."""
    question, tables = simulation.question, dict[str, tuple[Rows, list[Line]]]()
    if answer.prefill is not None:
        rows = Rows(min(question.prompt, answer.plan.chunk), 0)
        tables["prefill"] = rows, table(simulation, "prefill", rows)
    if answer.decode is not None:
        rows = Rows(1, question.prompt + question.tokens // 2)
        tables["decode"] = rows, table(simulation, "decode", rows)
    return Explanation(tables, list(changes(simulation, file, answer)))


def table(simulation: Simulation, name: str, rows: Rows) -> list[Line]:
    """The operators of a step of a program, those that take most first."""
    placement = simulation.placement(name, rows)
    groups: dict[tuple[str, str], tuple[int, float]] = {}
    for operator in simulation.operators(name, rows):
        i = operator.instruction
        where, seconds = _placed(i, placement, simulation.device)
        count, total = groups.get((_label(i), where), (0, 0.0))
        groups[_label(i), where] = count + 1, total + seconds
    lines = [Line(label, count, where, seconds) for (label, where), (count, seconds) in groups.items()]
    return sorted(lines, key=lambda line: -line.seconds)


def _label(i: Instruction) -> str:
    """What people call it."""
    family = (i.kernel.partition(":")[0] or i.kind).replace("_", " ")
    return f"{family} {i.rows} x {i.columns}" if i.kind in LINEAR else family


def _placed(i: Instruction, placement: Placement, device: Device) -> tuple[str, float]:
    """Where an operator runs, and seconds."""
    cut = placement.cuts.get(product_of(i))
    if cut is not None:
        parts = [f"{p.unit} {p.rows} rows x {'+'.join(map(str, p.runs))}" for p in cut.pieces]
        return cut.units[0] if cut.strategy == "one unit" else f"{cut.strategy}: {', '.join(parts)}", cut.seconds
    portions = placement.of(i)
    times = [_seconds(i, portion.unit, portion.share, placement, device) for portion in portions]
    names = [p.unit if p.share == 1 else f"{p.unit} {100 * p.share:.0f} %" for p in portions]
    return ", ".join(names), max(times)


def _seconds(i: Instruction, unit: str, share: float, placement: Placement, device: Device) -> float:
    own = replace(i, unit=unit) if share == 1 else part(i, share, unit, device.unit(unit).step)
    return cost(in_format(own, placement.format_of(unit)), device).seconds


def changes(simulation: Simulation, file: ModelHeader, now: Answer) -> Iterator[Change]:
    """What one more GiB, a disk twice as fast, or another set of units would give; what cannot be is left out."""
    device, question = simulation.device, simulation.question
    asked = list[tuple[str, Device, Question]]()
    if now.plan.streamed_per_token:
        whole = sum(tensor.nbytes for tensor in file.tensors.values())
        roomy = replace(question, memory=now.plan.total + min(GIB, whole))
        asked.append(("1 GiB more memory", replace(device, memory=max(device.memory, now.plan.total + GIB)), roomy))
        asked.append(("flash twice as fast", *changed("flash=2x", device, question)))
    for unit in device.units:
        if unit not in question.units:
            units = (*question.units, unit)
            asked.append((f"{unit} too", device, replace(question, units=units, cut=units, split=())))
        elif len(question.units) > 1:
            units = tuple(name for name in question.units if name != unit)
            cut = units if question.cut else ()
            asked.append((f"without {unit}", device, replace(question, units=units, cut=cut, split=())))
    for name, other, question_then in asked:
        try:
            then = Simulation(file, simulation.spec, other, question_then).answer()
        except CoterieError:
            continue
        yield Change(name, _over(then, now, "prefill"), _over(then, now, "decode"))


def _over(then: Answer, now: Answer, phase: str) -> float | None:
    after, before = getattr(then, phase), getattr(now, phase)
    return after.tokens_per_s / before.tokens_per_s if after is not None and before is not None else None
