"""coterie sessions: which there are, and deleting one."""

import dataclasses
import time
from typing import Annotated

import typer

from coterie.commands import terminal
from coterie.commands.options import Json


def sessions(
    delete: Annotated[str | None, typer.Option("--delete", metavar="S", help="Delete this one.")] = None,
    as_json: Json = False,
) -> None:
    """List the sessions that run --session has begun."""
    from coterie.session import list_sessions, session_path
    from coterie.storage.journal import delete_journal

    if delete is not None:
        delete_journal(session_path(delete))
        return
    found = list_sessions()
    if as_json:
        terminal.write_json([dataclasses.asdict(session) for session in found])
    elif found:
        rows = [
            f"{session.name:20} {session.tokens:>7} tokens  {session.state:10}  "
            f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(session.changed))}  {' '.join(session.model.split())}"
            for session in found
        ]
        terminal.write("\n".join(rows) + "\n")
    else:
        terminal.Progress().say(["no sessions yet; begin one with: coterie run MODEL --session NAME -p TEXT"])
