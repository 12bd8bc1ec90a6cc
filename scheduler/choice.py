"""Which units should work: every set of a device's units is simulated, by the fixed rule and with cuts, and the fastest
taken. So the choice is never predicted slower than one unit, or any other set."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from coterie.errors import CoterieError, PlanError
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
from coterie.scheduler.simulate import Answer, Question, Simulation
from coterie.scheduler.soc import Device


@dataclass(frozen=True)
class Choice:
    """A set of units with what is predicted of it; `seconds` of the prompt and all tokens."""

    question: Question
    simulation: Simulation
    answer: Answer
    seconds: float

    @property
    def name(self) -> str:
        return ", ".join(self.question.units) + (" with cuts" if self.question.cut else "")


def choices(file: ModelHeader, spec: ModelSpec, device: Device, question: Question) -> list[Choice]:
    """All that can be, the fastest first; of equals the one with fewer units. Raises PlanError, or UsageError, where
    nothing can be."""
    found, problem = list[Choice](), CoterieError("")
    for asked in _questions(device, question):
        try:
            found += one_choice(file, spec, device, asked)
        except CoterieError as error:
            problem = error
    if not found:
        raise problem if str(problem) else PlanError(f"{device.name} has no units")
    return sorted(found, key=lambda choice: choice.seconds)


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
