"""The processes of a session, and what they take, as the kernel counts it."""

import contextlib
from pathlib import Path
from typing import Any

from coterie.actors import ray_folder

AGENT = b"cat"  # what stands in for Ray's agents (ray_head.py)


def session_processes(folder: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Names by process id: Ray's own processes in a session, and its workers."""
    session = ray_folder.read_session(folder.name)
    if session is None:
        return {}, {}
    own = {session["keeper"]: "keeper"} | {pid: name for name, pid in session["pids"].items()}
    workers = {}
    for pid in ray_folder.members(folder):
        words = _command(pid)
        if pid not in own and words == [AGENT]:
            own[pid] = "agents"
        elif pid not in own and words:
            workers[pid] = words[0].decode(errors="replace")[:80]
    return own, workers


def measure(names: dict[int, str]) -> list[dict[str, Any]]:
    """Each of these processes with its memory (PSS, bytes)."""
    return [{"pid": pid, "name": name, "memory": pss(pid)} for pid, name in names.items()]


def by_name(processes: list[dict[str, Any]]) -> dict[str, int]:
    """What was measured, by name, and its "sum"."""
    sizes = dict.fromkeys((process["name"] for process in processes), 0)
    for process in processes:
        sizes[process["name"]] += process["memory"]
    return sizes | {"sum": sum(sizes.values())}


def pss(pid: int) -> int:
    """Bytes of a process, pages it shares divided by those that share them; 0 where it is gone or hidden."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:")), 0)
    return 0


def own(pid: int) -> int:
    """Bytes of a process but for memory that is shared on purpose, as an arena is."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.startswith("Pss")}
        return sizes["Pss"] - sizes.get("Pss_Shmem", 0)
    return 0


def _command(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().rstrip(b"\0").split(b"\0")
    return []
