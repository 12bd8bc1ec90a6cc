"""coterie bench: tokens per second, as llama-bench reports them."""

import csv
import io
from enum import StrEnum
from typing import Annotated, Any

import typer

from coterie.commands import terminal
from coterie.commands.options import (
    AllowNear,
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
    value_sources,
)
from coterie.errors import UsageError


class Output(StrEnum):
    md = "md"
    csv = "csv"
    json = "json"


def bench(
    command: typer.Context,
    model: ModelArgument = None,
    model_option: ModelOption = None,
    prompts: Annotated[
        str, typer.Option("-p", "--n-prompt", metavar="N,...", help="Prompt lengths to time; 0: none.")
    ] = "512",
    gens: Annotated[
        str, typer.Option("-n", "--n-gen", metavar="N,...", help="Answer lengths to time; 0: none.")
    ] = "128",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Times each.")] = 5,
    threads: Threads = None,
    memory: Memory = None,
    units: Units = None,
    gpu_share: GpuShare = None,
    split: Split = None,
    preset: Preset = None,
    allow_near: AllowNear = False,
    host: Host = None,
    ray_address: RayAddress = None,
    output: Annotated[Output, typer.Option("-o", "--output", help="Form of the result.")] = Output.md,
    as_json: Json = False,
) -> None:
    """Time prefill (pp) and decode (tg); the result goes to stdout."""
    name = pick_model(model, model_option)
    tests = [(length, 0) for length in _lengths("-p", prompts)] + [(0, length) for length in _lengths("-n", gens)]
    if not tests:
        raise UsageError("nothing to time: -p and -n are both 0")

    from coterie.llm import LLM

    context = max(max(test) for test in tests) + 1
    with (
        terminal.Progress() as progress,
        LLM(
            name,
            threads=threads,
            context=context,
            memory=memory,
            units=units,
            gpu_share=gpu_share,
            split=split,
            preset=preset,
            allow_near=allow_near,
            progress=progress,
            sources=value_sources(command),
            host=host or ("ray" if ray_address else "threads"),
            ray_address=ray_address,
        ) as llm,
    ):
        progress.say(llm.lines())
        rows: list[dict[str, Any]] = []
        for n_prompt, n_gen in tests:
            progress(f"timing {_label(n_prompt, n_gen)}, {repetitions} times")
            rows += llm.bench(n_prompt, n_gen, repetitions)
    if as_json or output is Output.json:
        terminal.write_json(rows)
    else:
        terminal.write(_csv(rows) if output is Output.csv else _markdown(rows))


def _lengths(option: str, text: str) -> list[int]:
    """The lengths of "256" or "64,256"; zeros ask for nothing."""
    words = text.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() and len(word) < 10 for word in words):
        raise UsageError(f"{option} {text}: give a number of tokens, or several as 64,256")
    return [int(word) for word in words if int(word) > 0]


def _label(n_prompt: int, n_gen: int) -> str:
    names = [f"{kind}{length}" for kind, length in (("pp", n_prompt), ("tg", n_gen)) if length]
    return "+".join(names)


def _csv(rows: list[dict[str, Any]]) -> str:
    fields = [name for name, value in rows[0].items() if not isinstance(value, list)]
    text = io.StringIO()
    table = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n", quoting=csv.QUOTE_ALL)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _markdown(rows: list[dict[str, Any]]) -> str:
    """llama-bench's table."""
    table = [("model", "size", "params", "backend", "threads", "test", "t/s")]
    for row in rows:
        params = row["model_n_params"]
        table.append(
            (
                str(row["model_type"]).replace("|", "/"),
                terminal.size_text(row["model_size"]),
                f"{params / 1e6:.2f} M" if params < 1e9 else f"{params / 1e9:.2f} B",
                "CPU",
                str(row["n_threads"]),
                _label(row["n_prompt"], row["n_gen"]),
                f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
            )
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    lines.insert(1, "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |")
    return "\n".join(lines) + "\n"
