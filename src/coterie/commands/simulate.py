"""coterie simulate: what a model would do on a device that is not here."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.commands import terminal
from coterie.commands.explained import explanation_lines
from coterie.commands.options import Context, Json, Memory, ModelArgument, ModelOption, Preset, Threads, pick_model
from coterie.errors import UsageError

if TYPE_CHECKING:
    from coterie.models.header import ModelHeader
    from coterie.models.spec import ModelSpec
    from coterie.scheduler.choice import Choice
    from coterie.scheduler.simulate import Answer, Phase, Question
    from coterie.scheduler.soc import Device

AUTO = "auto"  # of --units and --split


def simulate(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    soc: Annotated[
        str, typer.Option("--soc", metavar="NAME | FILE", help="A device of configs/soc, a TOML file, or: this.")
    ] = "this",
    memory: Memory = None,
    units: Annotated[
        str, typer.Option("--units", metavar="UNIT,...", help="Who works; auto: whoever is fastest together.")
    ] = "cpu",
    split: Annotated[
        str,
        typer.Option(
            "--split",
            metavar="UNIT=SHARE,... | auto",
            help="Cut decode's matrices by rows; auto: all, as is fastest.",
        ),
    ] = "",
    formats: Annotated[
        str, typer.Option("--formats", metavar="UNIT=FORMAT,...", help="What a unit takes weights for, as npu=int4.")
    ] = "",
    prompt: Annotated[int, typer.Option("-p", "--n-prompt", min=0, help="Tokens of the prompt; 0: none.")] = 256,
    tokens: Annotated[int, typer.Option("-n", "--n-gen", min=0, help="Tokens of the answer; 0: none.")] = 64,
    preset: Preset = None,
    allow_near: Annotated[
        bool, typer.Option("--allow-near", help="Let --units auto take GPU and NPU, of class near.")
    ] = False,
    context: Context = None,
    threads: Threads = None,
    what_if: Annotated[
        str, typer.Option("--what-if", metavar="CHANGES", help="And then, as flash=2x,memory=+1GiB,sync=fence.")
    ] = "",
    timeline: Annotated[
        Path | None, typer.Option("--timeline", metavar="FILE", help="Write what every unit did, for Perfetto.")
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Say where the time goes, and what more would give."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Tokens/s, and what bounds them, of a model on a device that is described, not present (emulated)."""
    name = pick_model(model, model_option)
    with terminal.Progress() as progress:
        from coterie import fetch
        from coterie.models.load import read_spec
        from coterie.opening import open_file
        from coterie.scheduler.explain import explain as reasons_of
        from coterie.scheduler.simulate import Question
        from coterie.scheduler.what_if import changed

        device = _device(soc, threads)
        if units == AUTO and split:
            raise UsageError("--units auto decides who does what; drop --split")
        if preset is not None and (split or units != "cpu"):
            raise UsageError(f"preset {preset} decides who does what; drop --units and --split")
        names, solve = tuple(units.split(",")), split == AUTO
        question = Question(
            memory, names, () if solve else _shares(split), names if solve else (), prompt=prompt, tokens=tokens,
            formats=_pairs("--formats", formats), context=context or None, threads=threads,
        )  # fmt: skip
        after = changed(what_if, device, question) if what_if else None
        with open_file(fetch.resolve(name, progress)) as file:
            spec = read_spec(file)
            progress("simulating")
            choose = partial(_choices, file, spec, preset=preset, near=allow_near)
            found = [choose(*asked) for asked in [(device, question), after] if asked]
            made, answers = found[0][0], [each[0].answer for each in found]
            reasons = reasons_of(made.simulation, file, made.answer) if explain else None
        if timeline is not None:
            _write(timeline, answers[0])
            progress.say([f"wrote {timeline}"])
    if as_json:
        data = answers[0].as_dict() | ({"what_if": {"changes": what_if} | answers[1].as_dict()} if after else {})
        data |= {"units": list(made.question.units), "cut": bool(made.question.cut)}
        data |= {"preset": made.preset or None, "decode_units": list(made.question.decode or made.question.units)}
        data |= {"choices": [_summary(choice) for choice in found[0]]}
        terminal.write_json(data | ({"explain": reasons.as_dict()} if reasons else {}))
    else:
        lines = _lines(answers[0], made.simulation.units) + _others(found[0])
        if after:
            lines += ["", f"if {what_if}:", *_compared(answers[0], answers[1])]
        lines += explanation_lines(reasons, answers[0]) if reasons else []
        terminal.write("\n".join(lines) + "\n")


def _choices(
    file: "ModelHeader", spec: "ModelSpec", device: "Device", question: "Question", *, preset: str | None, near: bool
) -> "list[Choice]":
    """What was asked for; with units that are to be chosen all that can be, first the fastest that is allowed."""
    from coterie.scheduler.choice import allowed, choices, one_choice, preset_choice
    from coterie.scheduler.presets import load_preset

    if preset is not None:
        return preset_choice(file, spec, device, replace(question, units=()), load_preset(preset))
    if question.units != (AUTO,):
        return one_choice(file, spec, device, question)
    found = choices(file, spec, device, question)
    chosen = allowed(found, near=near)[0]
    return [chosen, *(choice for choice in found if choice is not chosen)]


def _summary(choice: "Choice") -> dict[str, object]:
    return {"name": choice.name, "seconds": choice.seconds, "numerics": "exact" if choice.exact else "near"}


def _others(found: "list[Choice]") -> list[str]:
    """What was not chosen, next best first; what is faster is of a class that was not allowed."""
    first, times = found[0], [f"{choice.name} {choice.seconds / found[0].seconds:.2f}" for choice in found[1:]]
    kind = "exact" if first.exact else "near"
    lines = [f"chosen: {first.name} ({kind}); the others take, in times of this: {'; '.join(times)}"] if times else []
    faster = [choice.name for choice in found[1:] if choice.seconds < first.seconds]
    return lines + ([f"faster, but of class near: {'; '.join(faster)}; --allow-near allows them"] if faster else [])


def _device(soc: str, threads: int | None) -> "Device":
    from coterie.scheduler.soc_file import load_soc
    from coterie.scheduler.this_machine import this_machine

    return this_machine(lanes=threads) if soc == "this" else load_soc(soc)


def _pairs(option: str, text: str) -> dict[str, str]:
    """Keys and values of "a=b,c=d"."""
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    if any(not key or not value for key, _, value in pairs):
        raise UsageError(f"{option} {text}: write UNIT=VALUE, several with commas")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _shares(text: str) -> tuple[tuple[str, float], ...]:
    try:
        return tuple((unit, float(value)) for unit, value in _pairs("--split", text).items())
    except ValueError:
        raise UsageError(f"--split {text}: shares are numbers, as gpu=0.75,npu=0.25") from None


def _write(path: Path, answer: "Answer") -> None:
    from coterie.trace.timeline import write_timeline

    write_timeline(path, answer.events, f"emulated: {answer.device}" if answer.emulated else answer.device)


def _lines(answer: "Answer", units: list[str]) -> list[str]:
    """An answer for people."""
    plan = answer.plan
    what = "emulated, not this machine" if answer.emulated else "this machine, simulated"
    lines = [f"{answer.device} ({what}): {plan.model}, units {', '.join(units)}"]
    share = "all weights in memory" if not plan.streamed_per_token else (
        f"{100 * plan.resident:.0f} % of a token's weights in memory, {plan.streamed_per_token / 1e6:.0f} MB streamed"
    )  # fmt: skip
    lines.append(f"{share}; {plan.total >> 20} MiB in all, context {plan.context}, chunks of {plan.chunk}")
    for label, phase in (("prefill", answer.prefill), ("decode", answer.decode)):
        if phase is not None:
            lines += _phase_lines(label, phase)
    if answer.guesses:
        lines.append(f"{len(answer.guesses)} of {answer.constants} constants of this device are guesses")
    return lines


def _phase_lines(label: str, phase: "Phase") -> list[str]:
    energy = "" if phase.joules is None else f", {phase.joules:.3g} J a token"
    busy = ", ".join(f"{name} {100 * part:.0f} %" for name, part in phase.busy.items() if part > 0)
    waits = [
        f"{name} for {reason} {100 * part:.0f} %"
        for name, each in phase.waits.items()
        for reason, part in each.items()
        if reason in ("weights", "units", "memory") and part >= 0.005
    ]
    lines = [f"{label}: {phase.tokens_per_s:.4g} tokens/s, bound by {phase.bottleneck}{energy}", f"  busy: {busy}"]
    return lines + ([f"  waiting: {', '.join(waits)}"] if waits else [])


def _compared(before: "Answer", after: "Answer") -> list[str]:
    lines = []
    for label in ("prefill", "decode"):
        old, new = getattr(before, label), getattr(after, label)
        if old is not None and new is not None:
            ratio = new.tokens_per_s / old.tokens_per_s
            lines.append(
                f"{label}: {old.tokens_per_s:.4g} -> {new.tokens_per_s:.4g} tokens/s ({ratio:.2f} times), bound by "
                f"{new.bottleneck}"
            )
    return lines
