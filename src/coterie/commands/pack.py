"""coterie pack and coterie verify: models as files that are read extent by extent."""

import time
from pathlib import Path
from typing import Annotated

import typer

from coterie.commands import terminal
from coterie.commands.options import Json, ModelArgument, ModelOption, pick_model
from coterie.errors import ModelError

LISTED = 1000  # damaged extents that --json lists


def pack(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to; by default Coterie's cache.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a model for running from flash; the packed file's path goes to stdout."""
    name = pick_model(model, model_option)

    from coterie import fetch

    with terminal.Progress() as progress:
        source = fetch.resolve(name, progress)
        progress(f"reading {source}")
        from coterie.opening import open_model
        from coterie.storage.flash_writer import pack_model, packed_copy

        start = time.monotonic()
        opened = open_model(source)
        try:
            path = output or packed_copy(opened, progress)
            if output:
                pack_model(opened, output, progress)
        finally:
            opened.close()
        seconds, size = time.monotonic() - start, path.stat().st_size
        progress.say([f"{terminal.size_text(size)} in {seconds:.1f} s"])
    if as_json:
        terminal.write_json({"path": path, "source": source, "bytes": size, "seconds": seconds})
    else:
        terminal.write(f"{path}\n")


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
                raise ModelError(f"{path} is a GGUF file, which has no checksums; verify is for packed models")
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
