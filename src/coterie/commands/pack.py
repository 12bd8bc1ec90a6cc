"""coterie pack and coterie verify: models as files that are read extent by extent."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from coterie.commands import terminal
from coterie.commands.options import Json, ModelArgument, ModelOption, pick_model
from coterie.errors import ModelError, UsageError

if TYPE_CHECKING:
    from coterie.models.source import WeightSource

Activation = Literal["relu", "relu2", "drelu"]
Format = Literal["Q4_0", "Q8_0", "F16"]
LISTED = 1000  # damaged extents that --json lists


def pack(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to; by default Coterie's cache.")
    ] = None,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="By neurons, so that idle ones of a ReLU model are skipped.")
    ] = False,
    activation: Annotated[
        Activation | None,
        typer.Option("--activation", help="With --sparse: what the model was trained with, if its file does not say."),
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            "--format", help="Of a safetensors folder's matrices, by default Q4_0; with --sparse, of a GGUF's Down."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a model for running from flash; the packed file's path goes to stdout."""
    name = pick_model(model, model_option)
    if activation and not sparse:
        raise UsageError("--activation goes with --sparse; without it a model runs as its file says")

    from coterie import fetch

    with terminal.Progress() as progress:
        source = fetch.resolve(name, progress)
        if format and not sparse and not source.is_dir():
            raise UsageError("a GGUF keeps its formats; --format is for safetensors folders, or goes with --sparse")
        progress(f"reading {source}")
        from coterie.opening import open_by_neurons, open_model
        from coterie.storage.flash_writer import pack_model, packed_copy

        start = time.monotonic()
        opened = open_by_neurons(source, activation, format) if sparse else open_model(source, format)
        try:
            path = output or packed_copy(opened, progress)
            if output:
                pack_model(opened, output, progress)
            numerics = _numerics(opened.source)
        finally:
            opened.close()
        seconds, size = time.monotonic() - start, path.stat().st_size
        progress.say([*numerics, f"{terminal.size_text(size)} in {seconds:.1f} s"])
    if as_json:
        facts = {"path": path, "source": source, "bytes": size, "seconds": seconds, "numerics": numerics}
        terminal.write_json(facts)
    else:
        terminal.write(f"{path}\n")


def _numerics(source: "WeightSource") -> list[str]:
    """What packing changed in the weights, a line each."""
    from coterie.models.safetensors_folder import SafetensorsFolder
    from coterie.models.transposed import ByNeurons

    base = source.base if isinstance(source, ByNeurons) else source
    lines = base.changes(source.tensors) if isinstance(base, SafetensorsFolder) else []
    if isinstance(source, ByNeurons):
        lines += source.changes
        if source.errors:  # none where the packed copy was there
            error = sum(source.errors.values()) / len(source.errors)
            lines.append(f"Down lost by it: mean relative error {100 * error:.2f} %")
    return lines


def verify(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A packed model.")],
    as_json: Json = False,
) -> None:
    """Read a packed model and compare all its checksums."""
    with terminal.Progress() as progress:
        progress(f"reading {path}")
        from coterie.opening import open_model
        from coterie.storage.flash_file import FlashFile, damaged_extents

        start = time.monotonic()
        opened = open_model(path)
        try:
            file = opened.file
            if not isinstance(file, FlashFile):
                raise ModelError(f"{path} has no checksums; verify is for packed models")
            rows = file.manifest()
            bad = damaged_extents(file, progress)
        finally:
            opened.close()
        seconds = time.monotonic() - start
    facts = {"path": path, "bytes": file.size, "extents": file.checksums.size, "damaged": len(bad), "seconds": seconds}
    if as_json:
        terminal.write_json(facts | {"identity": file.identity, "damaged_extents": bad[:LISTED]})
    if bad:
        first = rows.slice(bad[0], 1).to_pylist()[0]
        layer = f" of layer {first['layer']}" if first["layer"] >= 0 else ""
        raise ModelError(
            f"{path}: {len(bad)} of {file.checksums.size} extents are damaged, the first at byte {first['offset']} "
            f"({first['kind']}{layer}); pack the model again"
        )
    if not as_json:
        terminal.write(f"{path}: sound, {file.checksums.size} extents, {terminal.size_text(file.size)}\n")
