"""Options that several commands share, and reading what the user named."""

import sys
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import typer

from coterie.errors import UsageError
from coterie.sizes import parse_memory

TEXT_LIMIT = 64 * 2**20  # bytes of a prompt or a text to score


ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A GGUF file, a safetensors folder, or a model's name (see: coterie ls)."),
]
ModelOption = Annotated[str | None, typer.Option("-m", "--model", metavar="MODEL", help="The same as MODEL.")]
Threads = Annotated[
    int | None,
    typer.Option("-t", "--threads", min=1, max=1024, envvar="COTERIE_THREADS", help="Lanes; by default one per core."),
]
Context = Annotated[
    int | None,
    typer.Option(
        "-c",
        "--ctx-size",
        min=0,
        envvar="COTERIE_CONTEXT",
        help="Positions at most; 0: what the model allows, 4096 at most.",
    ),
]
Memory = Annotated[
    Any,
    typer.Option(
        "--memory",
        parser=parse_memory,
        metavar="SIZE",
        envvar="COTERIE_MEMORY",
        help="Ceiling, as 64MiB or 2G; 50%: room for half of the weights; auto: what the machine can spare.",
    ),
]
Host = Annotated[
    Literal["threads", "ray"] | None,
    typer.Option("--host", envvar="COTERIE_HOST", help="What units are: threads of this process, or Ray actors."),
]
Units = Annotated[
    str | None,
    typer.Option(
        "--units",
        metavar="cpu,gpu,npu",
        envvar="COTERIE_UNITS",
        help="Units that may compute; GPU and NPU are near, not exact. Default: cpu.",
    ),
]
GpuShare = Annotated[
    float | None,
    typer.Option(
        "--gpu-share",
        min=0.01,
        max=1.0,
        envvar="COTERIE_GPU_SHARE",
        help="Keep the GPU busy for this part of the time at most, a few ms at a time: others draw meanwhile.",
    ),
]
Split = Annotated[
    Literal["layer", "tensor"] | None,
    typer.Option(
        "--split",
        envvar="COTERIE_SPLIT",
        help="layer: an operator is one unit's; tensor: several compute parts of a product at the same time.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME|FILE",
        help="Who does what: llmnpu, heteroinfer, powerinfer2 or a TOML file like these; auto: what is fastest here.",
    ),
]
AllowNear = Annotated[bool, typer.Option("--allow-near", help="Let --preset auto take GPU and NPU, of class near.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Join this Ray; auto: coterie cluster start's.",
    ),
]
Activation = Annotated[
    Literal["relu", "relu2", "drelu"] | None,
    typer.Option("--activation", help="What a ReLU model was trained with, if its file does not say."),
]
Counts = Annotated[
    Path | None,
    typer.Option("--activations", metavar="COUNTS", help="Put neurons that are live often first (see profile)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


SOURCES = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "config"}


def value_sources(command: typer.Context) -> dict[str, str]:
    """Where the values that shape a plan came from, for the plan to show."""
    names = "threads", "context", "memory", "host", "units", "split"
    found = {name: command.get_parameter_source(name) for name in names}
    given = {name: SOURCES[source.name] for name, source in found.items() if source and source.name in SOURCES}
    return {"context": "automatic"} | given  # a command may work out how much it needs


def pick_model(argument: str | None, option: str | None) -> str:
    """The one model that was named, as MODEL or as -m; raises UsageError."""
    if argument and option:
        raise UsageError(f"two models: {argument!r} and -m {option!r}; name one")
    if not (argument or option):
        raise UsageError("which model? give a GGUF file or a name, for example smollm2 (see: coterie ls)")
    return argument or option or ""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; raises UsageError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return _decoded(file, str(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def read_stdin() -> str | None:
    """What was piped in, or None where stdin is a terminal or closed; raises UsageError."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    return _decoded(sys.stdin.buffer, "stdin")


def _decoded(file: BinaryIO, name: str) -> str:
    data = file.read(TEXT_LIMIT + 1)
    if len(data) > TEXT_LIMIT:
        raise UsageError(f"{name} holds more than {TEXT_LIMIT >> 20} MiB of text; give less")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text: byte {error.start} is wrong; convert it first") from error
