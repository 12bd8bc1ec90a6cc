"""coterie run: answer a prompt."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.commands import terminal
from coterie.commands.options import (
    AllowNear,
    Context,
    GpuShare,
    Host,
    Json,
    Memory,
    ModelArgument,
    ModelOption,
    Preset,
    RayAddress,
    Split,
    Threads,
    Units,
    pick_model,
    read_stdin,
    read_text,
    value_sources,
)
from coterie.errors import UsageError
from coterie.sampling import SamplingOptions

if TYPE_CHECKING:
    from coterie.answer import Generation
    from coterie.llm import LLM
    from coterie.storage.journal import Request

# What --resume leaves to choose; all else the session says.
BESIDE_RESUME = {
    *("model", "model_option", "threads", "memory", "plan", "trace", "as_json", "resume"),
    *("host", "ray_address", "units", "gpu_share", "split", "preset", "allow_near"),
}


def run(
    command: typer.Context,
    model: ModelArgument = None,
    model_option: ModelOption = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt; else -f or a pipe.")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message of the chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt; no chat template.")] = False,
    n: Annotated[int, typer.Option("-n", "--n-predict", min=-1, help="Tokens at most; -1: to the end.")] = -1,
    context: Context = None,
    threads: Threads = None,
    memory: Memory = None,
    units: Units = None,
    gpu_share: GpuShare = None,
    split: Split = None,
    temperature: Annotated[
        float, typer.Option("--temp", help="0: the most probable token.")
    ] = SamplingOptions.temperature,
    top_k: Annotated[int, typer.Option("--top-k", help="Only the k best tokens; 0: off.")] = SamplingOptions.top_k,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Only the best that make up p; 1: off.")
    ] = SamplingOptions.top_p,
    min_p: Annotated[
        float, typer.Option("--min-p", help="Only those at least p times the best; 0: off.")
    ] = SamplingOptions.min_p,
    repeat_penalty: Annotated[
        float, typer.Option("--repeat-penalty", help="Of recent tokens; 1: off.")
    ] = SamplingOptions.repeat_penalty,
    repeat_last_n: Annotated[
        int, typer.Option("--repeat-last-n", help="Tokens that are recent; -1: all.")
    ] = SamplingOptions.repeat_last_n,
    seed: Annotated[int | None, typer.Option("--seed", help="Equal seeds, equal answers.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; repeatable.")] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Follow a plan that coterie plan --save wrote.")
    ] = None,
    preset: Preset = None,
    allow_near: AllowNear = False,
    cut: Annotated[
        int | None,
        typer.Option("--cut", metavar="K", min=1, help="Run the first K layers in a Ray actor, in memory of its own."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write a Chrome/Perfetto trace.")
    ] = None,
    host: Host = None,
    ray_address: RayAddress = None,
    session: Annotated[
        str | None, typer.Option("--session", metavar="S", help="Keep a journal by this name, to resume it.")
    ] = None,
    session_kv: Annotated[
        bool, typer.Option("--session-kv", help="Keep the KV cache beside it: resuming computes less.")
    ] = False,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="S", help="Continue a session; the request is its own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt: the answer goes to stdout, plan and timings to stderr."""
    sources = value_sources(command)
    begin: Callable[..., Generation]
    if resume is not None:
        request = _request(command, resume)
        name = _model_of(request, pick_model(model, model_option) if model or model_option else None)
        context, sources["context"] = request.context, "session"
        options = SamplingOptions.of(request.sampling)
        begin = methodcaller("resume", resume)
    else:
        name = pick_model(model, model_option)
        options = SamplingOptions(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            seed=seed,
        )
        if stop and not all(stop):
            raise UsageError("--stop is empty: leave it out")
        if raw and system is not None:
            raise UsageError("--system is part of a chat, --raw means none; drop one of them")
        kept = _kept(session, session_kv)
        sampling = {**dataclasses.asdict(options), "stop": stop or [], **kept}
        begin = partial(_start, text=_prompt(prompt, file), system=system, raw=raw, n=n, sampling=sampling)
    if trace is not None and not trace.absolute().parent.is_dir():
        raise UsageError(f"--trace {trace}: there is no folder {trace.absolute().parent}")

    if cut is not None and session is not None:
        raise UsageError("--session is for whole models: drop --cut")

    from coterie.llm import LLM

    with (
        terminal.Progress() as progress,
        LLM(
            name,
            threads=threads,
            context=context or None,
            memory=memory,
            units=units,
            gpu_share=gpu_share,
            split=split,
            plan=plan,
            preset=preset,
            allow_near=allow_near,
            cut=cut,
            trace=trace,
            progress=progress,
            sources=sources,
            host=host or ("ray" if ray_address else "threads"),
            ray_address=ray_address,
        ) as llm,
    ):
        forecast = llm.forecast()
        # What the other process can do is not known, and the forecast is of the layers here.
        more = llm.front.lines() if llm.front else [llm.plan.forecast_line(forecast)]
        progress.say([*llm.lines(), *more])
        generation = begin(llm)
        _show(generation, progress, as_json)
        progress.say([_summary(generation, llm, options)])
        if as_json:
            terminal.write_json(
                {
                    "text": generation.text,
                    "tokens": generation.tokens,
                    "finish_reason": generation.finish_reason,
                    "seed": options.seed,
                    "timings": generation.timings,
                    "memory": llm.memory(),
                    "flash": llm.flash(),
                    "host": llm.host(),
                    "units": llm.units(),
                    "losses": llm.losses(),
                    "link": llm.front and llm.front.report(),
                    "plan": llm.plan.as_dict() | {"forecast": forecast},
                }
            )


def _request(command: typer.Context, session: str) -> "Request":
    """What a session was asked. Raises UsageError for options that would ask for something else."""
    for parameter in command.command.params:
        source = command.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE" and parameter.name not in BESIDE_RESUME:
            raise UsageError(f"{parameter.opts[0]} is in the session that --resume continues; drop one of them")

    from coterie.session import session_path
    from coterie.storage.journal import read_journal

    return read_journal(session_path(session)).request


def _model_of(request: "Request", named: str | None) -> str:
    """The model to open: as it was named now, else where it was."""
    if named is None and not Path(request.path).exists():
        raise UsageError(f"the session's model was {request.path}, which is not there; name it beside --resume")
    return named or request.path


def _kept(session: str | None, session_kv: bool) -> dict[str, Any]:
    """The arguments that make a journal. Raises UsageError before anything is loaded where there is one already."""
    if session is None:
        if session_kv:
            raise UsageError("--session-kv is kept beside a journal: give --session too")
        return {}

    from coterie.session import session_path
    from coterie.storage.journal import exists_already

    if (path := session_path(session)).exists():
        raise exists_already(path)
    return {"session": session, "session_kv": session_kv}


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt of -p, -f or the pipe. A file's last newline is its editor's, not the user's."""
    if prompt is not None and file is not None:
        raise UsageError("two prompts: -p and -f; give one")
    if prompt is not None:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UsageError("-p is not UTF-8 text; put it into a file and give -f") from None
        return prompt
    text = read_text(file) if file is not None else read_stdin()
    if not text:
        raise UsageError("no prompt: give -p TEXT or -f FILE, or pipe it in")
    return text.removesuffix("\n")


def _start(llm: "LLM", text: str, system: str | None, raw: bool, n: int, sampling: dict[str, Any]) -> "Generation":
    if raw or llm.template is None:
        if system is not None:
            raise UsageError("this model has no chat template, so --system has no place; drop it")
        return llm.generate(text, max_tokens=n, **sampling)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return llm.chat(messages, max_tokens=n, **sampling)


def _show(generation: "Generation", progress: terminal.Progress, as_json: bool) -> None:
    """Stream the answer to stdout; where no terminal shows it, show that it grows."""
    watched = sys.stdout.isatty() and not as_json
    progress("reading the prompt")
    last = ""
    for count, piece in enumerate(generation, start=1):
        if watched:
            progress.stop()
        else:
            progress(f"answering, about {count} tokens")
        if piece and not as_json:
            terminal.write(piece)
            last = piece
    if last and not last.endswith("\n"):
        terminal.write("\n")


def _summary(generation: "Generation", llm: "LLM", options: SamplingOptions) -> str:
    timings, memory, flash = generation.timings, llm.memory(), llm.flash()
    parts = [
        f"prompt {timings['prompt_tokens']} tokens, {timings['prompt_tokens_per_s']:.1f}/s",
        f"answer {timings['generated_tokens']} tokens, {timings['tokens_per_s']:.1f}/s",
        f"ended by {generation.finish_reason}",
    ]
    if timings["resumed_tokens"]:
        parts.insert(2, f"{timings['resumed_tokens']} of them from the session")
    if options.temperature > 0:
        parts.append(f"seed {options.seed}")
    if flash is not None and flash["hit_rate"] < 1:
        parts.append(
            f"flash {flash['read_bytes_per_token'] / 1e6:.0f} MB/token at {flash['bandwidth'] / 1e9:.2f} GB/s, "
            f"hit rate {100 * flash['hit_rate']:.0f} %, stalled {100 * flash['stall_share']:.0f} %"
        )
    for (unit, by), count in Counter((loss["unit"], loss["by"]) for loss in llm.losses()).items():
        often = f" {count} times" if count > 1 else ""
        parts.append(
            f"unit {unit} lost and replaced{often}" + (", by threads of this process" if by == "threads" else "")
        )
    if "memory" in (found := llm.host()):
        sizes = [f"Ray {terminal.size_text(found['memory'].get('sum', 0))}"]
        sizes += [f"actor {unit} {terminal.size_text(size)}" for unit, size in found["actors"].items()]
        parts.append(f"beside the model {', '.join(sizes)}")
    if llm.front:
        cost = llm.front.report()["decode"]
        parts.append(f"link {cost['added_ms']:.2f} ms and {cost['bytes'] / 1e3:.1f} kB a token")
    parts.append(f"peak memory {terminal.size_text(memory['peak_rss'])}")
    return " · ".join(parts)
