"""What Ray itself takes, as the kernel counts it."""

import contextlib
import os
from pathlib import Path

from coterie.actors import ray_folder


def session_processes(folder: Path) -> dict[int, str]:
    """Names of a session's own processes by id: not its workers."""
    session = ray_folder.read_session(folder.name)
    if session is None:
        return {}
    named = {session["keeper"]: "keeper"} | {pid: name for name, pid in session["pids"].items()}
    agents = {pid: "agents" for pid in ray_folder.members(folder) if pid not in named and _is_agent(pid)}
    return named | agents


def processes_memory(processes: dict[int, str]) -> dict[str, int]:
    """PSS, bytes, by name, and their sum."""
    sizes = dict.fromkeys(processes.values(), 0)
    for pid, name in processes.items():
        sizes[name] += pss(pid)
    return sizes | {"sum": sum(sizes.values())}


def pss(pid: int) -> int:
    """Bytes of a process, pages it shares divided by those that share them; 0 where it is gone or hidden."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    return 0


def _is_agent(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")) in ("cat", "coreutils", "busybox")
    return False
