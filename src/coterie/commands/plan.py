"""coterie plan: what would run where, from the model's header alone."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.commands import terminal
from coterie.commands.explained import explanation_lines, portion_lines
from coterie.commands.options import (
    AllowNear,
    Context,
    Json,
    Memory,
    ModelArgument,
    ModelOption,
    Preset,
    Split,
    Threads,
    Units,
    pick_model,
    value_sources,
)
from coterie.errors import CoterieError

if TYPE_CHECKING:
    from coterie.models.header import ModelHeader
    from coterie.models.spec import ModelSpec
    from coterie.scheduler.explain import Explanation
    from coterie.scheduler.plan import Plan, Wishes
    from coterie.scheduler.simulate import Answer


def plan(
    command: typer.Context,
    model: ModelArgument = None,
    model_option: ModelOption = None,
    context: Context = None,
    threads: Threads = None,
    memory: Memory = None,
    units: Units = None,
    split: Split = None,
    preset: Preset = None,
    allow_near: AllowNear = False,
    activations: Annotated[
        Path | None,
        typer.Option("--activations", metavar="COUNTS", help="Say what is expected of neurons (see profile)."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="Write the plan, for run --plan; packs if it must."),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say where a step's time goes, predicted, by profile --flash and --units, or --shapes.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """What would be in memory and what streamed, and how fast that can be; reads only headers."""
    name = pick_model(model, model_option)
    with terminal.Progress() as progress:
        from coterie import fetch
        from coterie.models.load import read_spec
        from coterie.opening import begun_wishes, flash_of, open_file, open_to_run, plan_identity, preset_wishes
        from coterie.scheduler.placement import parse_units
        from coterie.scheduler.plan import Wishes
        from coterie.scheduler.plan_file import format_plan, write_plan
        from coterie.scheduler.plan_schema import Decisions
        from coterie.scheduler.planner import make_plan
        from coterie.scheduler.profile import load_profile, machine
        from coterie.storage.activations import activations_of

        wishes = Wishes(
            threads,
            context or None,
            memory=memory,
            units=parse_units(units),
            split=split or "layer",
            sources=value_sources(command),
        )
        path = fetch.resolve(name, progress)
        if preset is not None:
            wishes = preset_wishes(path, preset, wishes, near=allow_near)
        wishes = begun_wishes(path, wishes)
        with open_file(path) if save is None else open_to_run(path, wishes, progress).file as file:
            spec = read_spec(file)
            if activations is not None:
                wishes = replace(wishes, activations=activations_of(activations, spec, file))
            made, _ = make_plan(file, spec, wishes, flash_of(file, spec, wishes))
            reasons = _reasons(file, spec, wishes, made, needed=explain) if explain or save else None
            forecast = made.forecast(load_profile().memory_bandwidth)
            if save is not None:
                notes = [made.forecast_line(forecast), *(reasons[0] if reasons else [])]
                write_plan(save, format_plan(Decisions.of(made, plan_identity(file), machine()), made, notes))
                progress.say([f"wrote {save}"])
    reasons = reasons if explain else None  # what is saved has them wherever they are known
    if as_json:
        more = {"explain": reasons[1]} if reasons else {}
        terminal.write_json(made.as_dict() | {"forecast": forecast} | more)
    else:
        lines = [*made.lines(), made.forecast_line(forecast), *(reasons[0] if reasons else [])]
        terminal.write("\n".join(lines) + "\n")


def _reasons(
    file: "ModelHeader", spec: "ModelSpec", wishes: "Wishes", plan: "Plan", *, needed: bool
) -> tuple[list[str], dict[str, Any]] | None:
    """Why the plan is as fast as it is, on this machine as it was measured, for people and as data: in virtual time, or
    of several units what products take; None where that cannot be and is not `needed`."""
    try:
        if plan.placement.exact:
            found, answer = _simulated(file, spec, wishes, plan)
            return explanation_lines(found, answer), found.as_dict()
        from coterie.auto import explained

        mine, others = explained(file, spec, wishes, plan)
        return portion_lines(mine, others), mine.as_dict() | {"others": [other.as_dict() for other in others]}
    except CoterieError:
        if needed:
            raise
        return None


def _simulated(file: "ModelHeader", spec: "ModelSpec", wishes: "Wishes", plan: "Plan") -> "tuple[Explanation, Answer]":
    from coterie.scheduler.explain import explain
    from coterie.scheduler.sharing import PROMPT, TOKENS
    from coterie.scheduler.simulate import Question, Simulation
    from coterie.scheduler.this_machine import this_machine
    from coterie.sizes import Share

    prompt = min(PROMPT, plan.context // 2)
    tokens = min(TOKENS, plan.context - prompt)
    device, memory = this_machine(lanes=plan.lanes), wishes.memory
    if not isinstance(memory, Share):
        memory = plan.total if plan.streamed_per_token else device.memory
    question = Question(
        memory, prompt=prompt, tokens=tokens, context=plan.context, threads=plan.lanes, chunk=plan.chunk
    )
    simulation = Simulation(file, spec, device, question)
    answer = simulation.answer()
    return explain(simulation, file, answer), answer
