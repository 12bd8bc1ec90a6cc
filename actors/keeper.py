"""The keeper: a small process that starts Ray's head, and ends all of it when it should.

It is the subreaper of everything that Ray starts, so nothing of it can get away: when the driver is gone, however it
ended (its end of a pipe closes), when a part of Ray dies, or when it is told to (SIGTERM), it kills all its
descendants, stopped ones too, reaps them, and removes the session's folder. If it is killed itself, Ray's processes
die with it (PR_SET_PDEATHSIG), and whoever starts next sweeps the folder (ray_folder.py).

    python -m coterie.actors.keeper driver|cluster PORT

`driver`: lives as long as its stdin is open. `cluster`: until SIGTERM. One line of JSON on stdout: the session, or
{"error": why not}. It imports neither numpy nor ray.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from coterie.actors import ray_folder
from coterie.errors import CoterieError, UnitError

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
START_SECONDS = 60.0
PARTS = ("gcs", "raylet", "head")  # the session ends with the first of them


class Ended(Exception):
    """The session is to end: the driver is gone, or SIGTERM came."""


def main(kind: str, port: str) -> int:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    try:
        folder, lock = ray_folder.claim(kind == "cluster")
    except (CoterieError, OSError) as error:
        _report({"error": str(error)})
        return 1
    try:
        with _Watch(driver=kind == "driver") as watch:
            _keep(folder, port, watch)
    except Ended:
        return 0
    except (CoterieError, OSError) as error:
        _report({"error": str(error)})
        return 1
    finally:
        end_descendants()
        ray_folder.discard(folder)
        os.close(lock)
    return 0


def _keep(folder: Path, port: str, watch: "_Watch") -> None:
    """Start Ray, say where it is, and watch it until a part of it is gone. Raises Ended, UnitError."""
    session = {"folder": str(folder), "keeper": os.getpid(), "started": time.time(), **_start(folder, port, watch)}
    ray_folder.write_session(folder, session)
    _report(session)
    parts = [os.pidfd_open(session["pids"][name]) for name in PARTS]
    watch.until(parts)


def _start(folder: Path, port: str, watch: "_Watch") -> dict[str, Any]:
    """Address and processes of a new head, as actors/ray_head.py says them."""
    command = [sys.executable, "-P", "-m", "coterie.actors.ray_head", str(folder), port]
    environment = os.environ | {ray_folder.MARK: str(folder)}
    with open(folder / "log", "wb") as log:
        head = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,
            preexec_fn=die_with_parent,  # safe here: one thread
        )
    assert head.stdout is not None
    if not watch.until([head.stdout.fileno()], START_SECONDS):
        raise UnitError(f"Ray did not start within {START_SECONDS:.0f} s{_last_line(folder)}")
    with head.stdout as answer:
        line = answer.readline()
    try:
        session = json.loads(line)
    except ValueError:
        raise UnitError(f"Ray did not start{_last_line(folder)}") from None
    if "error" in session:
        raise UnitError(f"Ray did not start: {session['error']}")
    return dict(session)


def _last_line(folder: Path) -> str:
    lines = (folder / "log").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((f": {line.strip()[:300]}" for line in reversed(lines) if line.strip()), "")


class _Watch:
    """Waits for descriptors, for the driver's end and for SIGTERM at once."""

    def __init__(self, driver: bool) -> None:
        self._poll = select.poll()
        if driver:
            self._poll.register(sys.stdin.fileno(), select.POLLIN)
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll.register(self._woken, select.POLLIN)

    def __enter__(self) -> "_Watch":
        signal.set_wakeup_fd(self._wake)
        signal.signal(signal.SIGTERM, lambda *_: None)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows is not to be cut short

    def until(self, fds: list[int], seconds: float | None = None) -> bool:
        """Wait until one of `fds` can be read; False after `seconds`. Raises Ended."""
        for fd in fds:
            self._poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in self._poll.poll(None if seconds is None else 1000 * seconds)}
        for fd in fds:
            self._poll.unregister(fd)
        if ready - set(fds):
            raise Ended
        return bool(ready)


def end_descendants() -> None:
    """Kill and reap all that this process, as a subreaper, has below it."""
    while True:
        for pid in _descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                children.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(name))
    found = [os.getpid()]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found[1:]


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends; it stays so over exec."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def prctl(option: int, value: int) -> None:
    """Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


def _report(session: dict[str, Any]) -> None:
    """Tell who started this, once; the pipe is closed so that nobody waits for more."""
    with contextlib.suppress(OSError, ValueError):
        print(json.dumps(session), flush=True)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
