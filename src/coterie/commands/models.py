"""coterie pull and coterie ls: models by name."""

import dataclasses
from typing import Annotated

import typer

from coterie.commands import terminal
from coterie.commands.options import Json


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A known model, for example smollm2.")],
    as_json: Json = False,
) -> None:
    """Fetch a model; its path goes to stdout."""
    from coterie import fetch

    with terminal.Progress() as progress:
        path = fetch.pull(name, progress)
    if as_json:
        terminal.write_json({"path": path})
    else:
        terminal.write(f"{path}\n")


def ls(as_json: Json = False) -> None:
    """List the models that have been pulled."""
    from coterie import fetch

    models = fetch.list_models()
    if as_json:
        terminal.write_json([dataclasses.asdict(model) for model in models])
    elif models:
        rows = [f"{model.name:16} {terminal.size_text(model.size):>10}  {model.path}" for model in models]
        terminal.write("\n".join(rows) + "\n")
    else:
        terminal.Progress().say([f"no models yet; fetch one with: coterie pull {next(iter(fetch.KNOWN))}"])
