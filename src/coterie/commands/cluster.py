"""coterie cluster: a Ray that stays, for those who do not know Ray."""

import time
from typing import Annotated, Any

import typer

from coterie.commands import terminal
from coterie.commands.options import Json
from coterie.errors import UsageError

cluster = typer.Typer(help="Keep a Ray running on this machine, for runs to join.", no_args_is_help=True)

JOIN = "coterie run --host ray --ray-address auto"


@cluster.command()
def start(
    port: Annotated[int, typer.Option(help="Port of Ray on 127.0.0.1; 0: any that is free.", min=0, max=65535)] = 0,
    as_json: Json = False,
) -> None:
    """Start Ray on this machine, for this user alone; it stays until `coterie cluster stop`."""
    from coterie.actors import ray_cluster

    with terminal.Progress() as progress:
        progress("starting Ray")
        session = ray_cluster.start(port)
    if as_json:
        terminal.write_json(_facts(session))
    else:
        terminal.write(f"Ray runs at {session['address']}; join it: {JOIN}; end it: coterie cluster stop\n")


@cluster.command()
def status(as_json: Json = False) -> None:
    """Say whether it runs, with which processes, and what they take."""
    from coterie.actors import ray_folder

    session = ray_folder.read_session()
    if as_json:
        terminal.write_json({"running": False} if session is None else _facts(session))
    elif session is None:
        terminal.write("no cluster of yours runs here; start one: coterie cluster start\n")
    else:
        terminal.write("\n".join(_lines(_facts(session))) + "\n")


@cluster.command()
def stop() -> None:
    """End it, with all that runs on it; also what is left of one of which parts were killed."""
    from coterie.actors import ray_cluster

    with terminal.Progress() as progress:
        progress("stopping Ray")
        if not ray_cluster.stop():
            raise UsageError("no cluster of yours runs here")


def _facts(session: dict[str, Any]) -> dict[str, Any]:
    """Address, processes, uptime in seconds, memory (PSS) in bytes."""
    from pathlib import Path

    from coterie.actors.ray_memory import by_name, measure, session_processes

    own, workers = map(measure, session_processes(Path(session["folder"])))
    return {
        "running": True,
        "address": session["address"],
        "folder": session["folder"],
        "token": session["token"],
        "uptime_s": time.time() - session["started"],
        "memory": by_name(own),
        "processes": own,
        "workers": workers,
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    memory = dict(facts["memory"])
    total = terminal.size_text(memory.pop("sum"))
    parts = ", ".join(f"{name} {terminal.size_text(size)}" for name, size in memory.items())
    lines = [
        f"Ray runs at {facts['address']} since {facts['uptime_s']:.0f} s; join it: {JOIN}",
        f"memory of Ray itself: {total} ({parts})",
    ]
    return lines + [
        f"worker {worker['pid']}: {worker['name']}, {terminal.size_text(worker['memory'])}"
        for worker in facts["workers"]
    ]
