"""A Ray of Coterie's that stays after the process that started it: one a user, under a keeper of its own."""

import contextlib
import os
import select
import signal
import socket
from typing import Any

from coterie.actors import ray_folder, ray_session
from coterie.errors import UnitError, UsageError


def start(port: int) -> dict[str, Any]:
    """Start it on 127.0.0.1:`port` (0: any), and say what its keeper says. Raises UnitError where it runs already, or
    Ray does not start, UsageError for a port that is taken."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(f"--port {port}: {error.strerror}; name another, or none") from None
    keeper = ray_session.start_keeper("cluster", port)
    try:
        found = ray_session.keeper_answer(keeper)
    except BaseException:
        ray_session.end_keeper(keeper)
        raise
    keeper.returncode = 0  # it stays: nobody here is to wait for it
    return found


def stop() -> bool:
    """End it with all its processes, or what is left of it; False where nothing was running. Raises UnitError."""
    path = ray_folder.base() / ray_folder.CLUSTER
    held = ray_folder.held(path)
    if held:
        session = ray_folder.read_session()
        if session is None:
            if ray_folder.held(path):
                raise UnitError("the cluster is only just starting: try again in some seconds")
        else:
            _end(session["keeper"])
    there = path.exists()
    ray_folder.sweep()
    return held or there


def _end(keeper: int) -> None:
    """SIGTERM, and SIGKILL where that does not help: Ray dies with its keeper either way."""
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(keeper)
        try:
            # Held still, so the keeper was there when the descriptor was opened: it is no later process of that id.
            if not ray_folder.held(ray_folder.base() / ray_folder.CLUSTER):
                return
            signal.pidfd_send_signal(process, signal.SIGTERM)
            if not select.select([process], [], [], ray_session.END_SECONDS)[0]:
                signal.pidfd_send_signal(process, signal.SIGKILL)
                select.select([process], [], [], ray_session.END_SECONDS)
        finally:
            os.close(process)
