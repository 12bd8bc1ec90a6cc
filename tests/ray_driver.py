"""A program with a Ray session and two workers, one of them stopped: python tests/ray_driver.py [ADDRESS]

Says on stdout, a line of JSON each: "starting"; what processes there are; and, once stdin has a line, how it ended.
"""

import ctypes
import json
import os
import signal
import sys
from typing import Any

from coterie.actors import ray_folder
from coterie.actors.greeting import greeting
from coterie.actors.ray_session import open_session

PR_GET_PDEATHSIG = 2


class Worker:
    def pid(self) -> int:
        return os.getpid()

    def manners(self) -> tuple[int, int, int, bytes]:
        """Niceness, what the OOM killer adds, the signal it gets when its parent dies, greeting."""
        death = ctypes.c_int()
        ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(death))
        with open("/proc/self/oom_score_adj", encoding="ascii") as file:
            return os.nice(0), int(file.read()), death.value, greeting()


def workers(ray: Any, count: int) -> list[Any]:
    return [ray.remote(num_cpus=0)(Worker).remote() for _ in range(count)]


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


def main(address: str | None = None) -> None:
    with open_session(address, progress=say) as session:
        actors = workers(session.ray, 2)
        pids = session.ray.get([actor.pid.remote() for actor in actors])
        os.kill(pids[0], signal.SIGSTOP)
        known = (ray_folder.read_session(session._folder.name) if session._folder else None) or {
            "pids": {},
            "keeper": 0,
            "folder": "",
        }
        say(
            {
                "folder": known["folder"],
                "owned": session.owned,
                "memory": session.memory(),
                "pids": known["pids"] | {"keeper": known["keeper"], "stopped": pids[0], "worker": pids[1]},
            }
        )
        sys.stdin.readline()
        alive = session.alive()
    say({"alive": alive})


if __name__ == "__main__":
    main(*sys.argv[1:])
