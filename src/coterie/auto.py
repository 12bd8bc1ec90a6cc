"""Which units this machine's model is best computed on, and where cuts between units begin, by what was measured of its
own products.

Candidates for `--preset auto` are every unit that can compute a model alone, pairs in which each operator is one
unit's, and pairs that share products, where units were measured beside each other. Units of class near are candidates
only where that is allowed. A GPU stand-in that shares products is none: it has one number of threads a process.
"""

from dataclasses import replace

from coterie.actors.identity import units_there
from coterie.errors import CoterieError, PlanError
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
from coterie.scheduler.estimate import Estimator
from coterie.scheduler.placement import UNITS, Placement
from coterie.scheduler.plan import Plan, Wishes
from coterie.scheduler.planner import lanes_and_kept
from coterie.scheduler.profile import load_profile
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
    found = candidates(file, spec, wishes)
    best = min(found, key=lambda candidate: candidate.seconds)
    rest = "; ".join(each.line() for each in sorted(found, key=lambda each: each.seconds) if each is not best)
    what = f"products of {PROMPT} prompt tokens + {TOKENS} tokens, {best.line()}"
    said = f"{what}{'; expected of others: ' * bool(rest)}{rest}"
    return replace(_chosen(wishes, best.units, said), split=best.split, begin=best.begin)


def _chosen(wishes: Wishes, units: tuple[str, ...], why: str) -> Wishes:
    return replace(wishes, units=units, split="layer", reasons=(f"preset auto: {','.join(units)}, {why}",))


def candidates(file: ModelHeader, spec: ModelSpec, wishes: Wishes) -> list[Candidate]:
    """All that can be had here, with times by what was measured."""
    lanes, _ = lanes_and_kept(replace(wishes, units=("cpu",), split="layer"))
    there = units_there(UNITS, lanes)
    sharing = Sharing(spec, file.tensors, lanes, Estimator(load_profile().shapes, there.keys))
    apart = [units for units in APART if set(units) <= set(there.keys)]
    found = [sharing.candidate(units, Placement.of(units, CHUNK)) for units in apart]
    for units in BESIDE:
        if set(units) <= set(there.keys) and not {"gpu"} & set(units) & there.stand_ins:
            try:
                found.append(beside(file, spec, replace(wishes, units=units, split="tensor")))
            except PlanError:
                continue  # not measured: not weighed
    return found


def beside(file: ModelHeader, spec: ModelSpec, wishes: Wishes) -> Candidate:
    """What units that share products are expected to take, and where cuts begin best. Raises PlanError where they have
    not been measured beside each other."""
    lanes, kept = lanes_and_kept(wishes)
    placement = Placement.of(wishes.units, CHUNK, "tensor", kept)
    there = units_there(wishes.units, lanes, placement.own_cores())
    sharing = Sharing(spec, file.tensors, lanes, Estimator(load_profile().beside, there.keys))
    return sharing.candidate(wishes.units, placement)


def explained(file: ModelHeader, spec: ModelSpec, wishes: Wishes, plan: Plan) -> tuple[Candidate, list[Candidate]]:
    """What a plan's products are expected to take on its units, and those of other ways to share them. Raises PlanError
    for what was not measured."""
    placement, known = plan.placement, load_profile()
    tensor = placement.split == "tensor"
    there = units_there(wishes.units, plan.lanes, placement.own_cores() if tensor else ())
    estimator = Estimator(known.beside if tensor else known.shapes, there.keys)
    try:
        mine = Sharing(spec, file.tensors, plan.lanes, estimator).candidate(wishes.units, placement, told=True)
    except PlanError as error:
        raise PlanError(f"{error}{' --split tensor' * tensor}") from None
    try:
        others = candidates(file, spec, wishes)
    except PlanError:
        others = []
    return mine, [each for each in others if (each.units, each.split) != (mine.units, mine.split)]


def begun(file: ModelHeader, spec: ModelSpec, wishes: Wishes) -> Wishes:
    """`wishes`, of units that share products, with where cuts begin, and why there."""
    try:
        found = beside(file, spec, wishes)
    except CoterieError as error:
        said = str(error) if not isinstance(error, PlanError) else f"not measured beside each other: {MEASURE}"
        return replace(wishes, reasons=(*wishes.reasons, f"cuts begin in the middle ({said})"))
    parts = ", ".join(f"{portion.kind} {portion.parts}/{portion.of}" for portion in found.portions if portion.of > 1)
    why = f"cuts begin where measured products end soonest: {','.join(found.units)} {parts}"
    return replace(wishes, begin=found.begin, reasons=(*wishes.reasons, why))
