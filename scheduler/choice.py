"""Which units should work: every set of a device's units is simulated, by the fixed rule and with cuts, and every
preset; the fastest that is allowed is taken. So the choice is never predicted slower than one unit, a preset, or any
other set."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations

from coterie.errors import CoterieError, PlanError
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
from coterie.scheduler.placement import DECODE, ROW_KINDS
from coterie.scheduler.presets import Preset, chosen_way, load_preset, preset_names
from coterie.scheduler.simulate import Answer, Question, Simulation
from coterie.scheduler.soc import Device


@dataclass(frozen=True)
class Choice:
    """A set of units, of a `preset` or none, with what is predicted of it; `seconds` of the prompt and all tokens."""

    question: Question
    simulation: Simulation
    answer: Answer
    seconds: float
    preset: str = ""

    @property
    def name(self) -> str:
        return self.preset or ", ".join(self.question.units) + (" with cuts" if self.question.cut else "")

    @property
    def exact(self) -> bool:
        """Whether it is of class `exact`: of described devices only CPUs are known to be."""
        units = self.simulation.device.units
        return all(units[name].kind == "cpu" for name in self.simulation.units)


def choices(file: ModelHeader, spec: ModelSpec, device: Device, question: Question) -> list[Choice]:
    """All that can be, the fastest first; of equals the one with fewer units. Raises PlanError, or UsageError, where
    nothing can be."""
    found, problem = list[Choice](), CoterieError("")
    for asked in _questions(device, question):
        try:
            found += one_choice(file, spec, device, asked)
        except CoterieError as error:
            problem = error
    for name in preset_names():
        with suppress(CoterieError):  # it is for other models, or for a device with other units
            found += preset_choice(file, spec, device, question, load_preset(name))
    if not found:
        raise problem if str(problem) else PlanError(f"{device.name} has no units")
    return sorted(found, key=lambda choice: choice.seconds)


def allowed(found: Sequence[Choice], *, near: bool) -> list[Choice]:
    """Of choices those of class `exact`, or also those of class `near`. Raises PlanError where there is none."""
    kept = [choice for choice in found if near or choice.exact]
    if not kept:
        raise PlanError(f"only {found[0].name} could run it, which is of class near: allow that with --allow-near")
    return kept


def preset_choice(
    file: ModelHeader, spec: ModelSpec, device: Device, question: Question, preset: Preset
) -> list[Choice]:
    """A preset's way for such a model, on the device's units. Raises PlanError, UnitError, UsageError."""
    names = {device.units[name].kind: name for name in reversed(list(device.units))}

    def lacking(kind: str) -> str:
        return "" if kind in names else f"{device.name} has none"

    way = chosen_way(preset, spec, lacking, file.path.name)
    placement, tensor = way.placement, way.placement.split == "tensor"

    def units_of(unit: str, kinds: Sequence[str]) -> tuple[str, ...]:
        shared = tensor and unit != "cpu" and any(kind in placement.cuts for kind in kinds)
        return tuple(names[kind] for kind in ((unit, "cpu") if shared else (unit,)))

    decoder = "gpu" if placement.shares_decode else "npu" if placement.row_kinds else placement.decode
    cut = units_of(placement.prefill, ("matmul", "ffn", "tokens"))
    home = (names["cpu"],) if placement.prefill == "npu" and names["cpu"] not in cut else ()
    asked = replace(
        question,
        units=(*cut, *home),
        cut=cut,
        decode=units_of(decoder, (*DECODE, *ROW_KINDS)),
        split=(),
        lengths=placement.lengths or question.lengths,
        chunk=question.chunk or way.chunk,
    )
    return [replace(choice, preset=preset.name) for choice in one_choice(file, spec, device, asked)]


def one_choice(file: ModelHeader, spec: ModelSpec, device: Device, question: Question) -> list[Choice]:
    """Just what was asked for. Raises PlanError, UsageError."""
    simulation = Simulation(file, spec, device, question)
    answer = simulation.answer()
    return [Choice(question, simulation, answer, _seconds(answer, question))]


def _questions(device: Device, question: Question) -> Iterator[Question]:
    names = list(device.units)
    for count in range(1, len(names) + 1):
        for units in combinations(names, count):
            static = any(device.units[name].kind == "npu" for name in units)
            if not static:
                yield replace(question, units=units, cut=(), split=())
            if static or count > 1:  # an NPU's graphs have lengths, which the fixed rule knows nothing of
                yield replace(question, units=units, cut=units, split=())


def _seconds(answer: Answer, question: Question) -> float:
    prompt = answer.prefill.seconds if answer.prefill else 0.0
    return prompt + question.tokens * (answer.decode.seconds if answer.decode else 0.0)
