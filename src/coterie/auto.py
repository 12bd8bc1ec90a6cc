"""Which units this machine's model is best computed on, and where cuts between units begin, by what was measured of its
own products.

Candidates for `--preset auto` are every unit that can compute a model alone, pairs in which each operator is one
unit's, and pairs that share products, where units were measured beside each other. Units of class near are candidates
only where that is allowed. A GPU stand-in that shares products is none: it has one number of threads a process.
"""

from contextlib import suppress
from dataclasses import replace

from coterie.actors.identity import There, units_there
from coterie.errors import CoterieError, PlanError
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
from coterie.scheduler.estimate import Estimator
from coterie.scheduler.placement import UNITS, Placement
from coterie.scheduler.plan import Plan, Wishes
from coterie.scheduler.planner import lanes_and_kept
from coterie.scheduler.profile import Shapes, load_profile
from coterie.scheduler.resident import CHUNK
from coterie.scheduler.sharing import PROMPT, TOKENS, Candidate, Sharing

APART: tuple[tuple[str, ...], ...] = (("cpu",), ("gpu",), ("cpu", "gpu"), ("cpu", "npu"))
BESIDE: tuple[tuple[str, ...], ...] = (("cpu", "gpu"), ("cpu", "npu"), ("cpu", "gpu", "npu"))
MEASURE = "coterie profile --shapes MODEL --split tensor"


def auto_wishes(file: ModelHeader, spec: ModelSpec, wishes: Wishes, *, near: bool) -> Wishes:
    """`wishes` with the units that need least for the products of a prompt and an answer; of class exact, unless
    `near`. Raises PlanError where products have not been measured on a unit that could be the best."""
    if not near:
        return _chosen(wishes, ("cpu",), "of class exact; --allow-near lets GPU and NPU take part")
    if wishes.memory is not None or spec.sparse or spec.part is not None:
        why = "only the CPU unit streams" if wishes.memory is not None else "sparse models are the CPU unit's"
        return _chosen(wishes, ("cpu",), why)
    found = Here(file, spec, wishes).all()
    best = min(found, key=lambda candidate: candidate.seconds)
    rest = "; ".join(each.line() for each in sorted(found, key=lambda each: each.seconds) if each is not best)
    what = f"for {PROMPT} prompt tokens + {TOKENS} tokens {best.line()}"
    said = f"{what}{'; expected of others: ' * bool(rest)}{rest}"
    return replace(_chosen(wishes, best.units, said), split=best.split, begin=best.begin)


def _chosen(wishes: Wishes, units: tuple[str, ...], why: str) -> Wishes:
    return replace(wishes, units=units, split="layer", reasons=(f"preset auto: {','.join(units)}, {why}",))


class Here:
    """This machine's measured units for a model, for prompts of so many tokens."""

    def __init__(self, file: ModelHeader, spec: ModelSpec, wishes: Wishes, prompt: int = PROMPT) -> None:
        self.file, self.spec, self.wishes, self.prompt = file, spec, wishes, prompt
        self.known = load_profile()

    def all(self) -> list[Candidate]:
        """All that can be had, with times by what was measured. Raises PlanError for what was not, but for units that
        share products: these are left out."""
        lanes, _ = lanes_and_kept(replace(self.wishes, units=("cpu",), split="layer"))
        there = units_there(UNITS, lanes)
        sharing = self._sharing(lanes, self.known.shapes, there)
        found = [
            sharing.candidate(units, Placement.of(units, CHUNK)) for units in APART if set(units) <= set(there.keys)
        ]
        for units in BESIDE:
            if set(units) <= set(there.keys) and not {"gpu"} & set(units) & there.stand_ins:
                with suppress(PlanError):
                    found.append(self.beside(units))
        return found

    def beside(self, units: tuple[str, ...]) -> Candidate:
        """What units that share products are expected to take, and where cuts begin best. Raises PlanError where they
        have not been measured beside each other."""
        lanes, kept = lanes_and_kept(replace(self.wishes, units=units, split="tensor"))
        return self.placed(units, Placement.of(units, CHUNK, "tensor", kept), lanes, told=False)

    def placed(self, units: tuple[str, ...], placement: Placement, lanes: int, *, told: bool) -> Candidate:
        """What a placement is expected to take; its cuts as it has them (`told`), or where they are best."""
        tensor = placement.split == "tensor"
        there = units_there(("cpu", *(unit for unit in units if unit != "cpu")), lanes, placement.own_cores())
        sharing = self._sharing(lanes, self.known.beside if tensor else self.known.shapes, there, told=told)
        try:
            return sharing.candidate(units, placement)
        except PlanError as error:
            raise PlanError(f"{error}{' --split tensor' * tensor}") from None

    def _sharing(self, lanes: int, shapes: Shapes, there: There, *, told: bool = False) -> Sharing:
        estimator = Estimator(shapes, there.keys)
        return Sharing(self.spec, self.file.tensors, lanes, estimator, prompt=self.prompt, told=told)


def explained(file: ModelHeader, spec: ModelSpec, wishes: Wishes, plan: Plan) -> tuple[Candidate, list[Candidate]]:
    """What a plan is expected to take on its units, and other ways to share the work. Raises PlanError for what was not
    measured."""
    here, others = Here(file, spec, wishes), list[Candidate]()
    mine = here.placed(wishes.units, plan.placement, plan.lanes, told=True)
    with suppress(PlanError):
        others = here.all()
    return mine, [each for each in others if (each.units, each.split) != (mine.units, mine.split)]


def begun(file: ModelHeader, spec: ModelSpec, wishes: Wishes) -> Wishes:
    """`wishes`, of units that share products, with where cuts begin, and why there."""
    try:
        found = Here(file, spec, wishes).beside(wishes.units)
    except CoterieError as error:
        said = str(error) if not isinstance(error, PlanError) else f"not measured beside each other: {MEASURE}"
        return replace(wishes, reasons=(*wishes.reasons, f"cuts begin in the middle ({said})"))
    cuts = Placement.of(found.units, CHUNK, "tensor", begin=found.begin).cuts
    parts = ", ".join(f"{kind} {cut.parts}/{cut.of}" for kind, cut in cuts.items())
    why = f"cuts begin where measured products end soonest: {','.join(found.units)} {parts}"
    return replace(wishes, begin=found.begin, reasons=(*wishes.reasons, why))
