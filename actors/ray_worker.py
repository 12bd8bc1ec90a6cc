"""What the raylet starts workers with, in place of Ray's own setup_worker.py.

A worker dies with its raylet even while it is stopped: the kernel sees to it. Ray's own notices by a connection, which
a stopped process cannot. There are no runtime environments in a session of ours, so nothing is left to set up; Ray's
would import all of Ray for that, before each worker imports it again.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
OURS = ("--serialized-runtime-env-context", "--language")  # options that are for the setup, not for the worker

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with open(f"/proc/{os.getppid()}/comm", encoding="ascii", errors="replace") as parent:
        if parent.read().strip() != "raylet":  # it died before the kernel knew
            sys.exit(1)
    words = [word for word in sys.argv[1:] if not word.startswith(OURS)]
    os.execv(sys.executable, [sys.executable, *words])
