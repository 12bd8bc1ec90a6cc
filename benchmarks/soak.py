"""Does anything grow? A model on the Ray host, its units killed and its ceiling changed at random, for a while.

    python benchmarks/soak.py MODEL [--minutes 30] [--memory 50%] [--seed 0] [--json OUT]

Every answer must be the first one's. Descriptors, threads and memory of this process, and memory of the arena, are
noted every ten seconds; at the end the last fifth is compared with the second.
"""

import argparse
import json
import os
import random
import signal
import statistics
import time
from pathlib import Path

from survival import Work, actor_of

from coterie.actors.ray_host import RayActor, RayHost
from coterie.actors.ray_session import open_session
from coterie.engine import Engine
from coterie.fetch import resolve
from coterie.opening import open_to_run
from coterie.scheduler.plan import Wishes
from coterie.sizes import Share, parse_memory

EVERY = 10.0  # seconds
KINDS = ("descriptors", "threads", "anonymous_kb", "arena_kb", "ray_kb", "processes")


def look(engine: Engine, session_memory: int) -> dict[str, float]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    arena = os.stat(f"/proc/self/fd/{engine.arena.describe()['fd']}").st_blocks / 2
    children = sum(name.isdecimal() for name in os.listdir("/proc"))
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "anonymous_kb": int(status["RssAnon"].split()[0]),
        "arena_kb": arena,
        "ray_kb": session_memory / 1024,
        "processes": children,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--memory", default="50%")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    wishes = Wishes(threads=2, context=2048, memory=parse_memory(args.memory), host="ray")
    session = open_session(None)
    engine = Engine(open_to_run(resolve(args.model, None), wishes, lambda *told: None), wishes, host=RayHost(session))
    work = Work(engine)
    expected, answers, ceilings = work.decode(), 0, 0
    begun, noted, notes = time.monotonic(), 0.0, list[dict[str, float]]()
    while time.monotonic() - begun < 60 * args.minutes:
        what = chance.random()
        if what < 0.3:
            actor = actor_of(engine, chance.choice(("cpu", "flash")))
            if isinstance(actor, RayActor) and actor.lost() is None:
                signal.pidfd_send_signal(actor._pidfd, chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)))
        elif what < 0.6:
            engine.set_memory(Share(chance.choice((0.3, 0.5, 0.7, 0.9))))
            ceilings += 1
        assert work.decode() == expected, "another answer"
        answers += 1
        if time.monotonic() - noted > EVERY:
            noted = time.monotonic()
            engine.set_memory(Share(0.5))
            notes.append(look(engine, session.memory()["sum"]))
    print(f"{answers} answers, all the same; {len(engine.supervisor.losses)} units replaced, {ceilings} new ceilings")
    fifth = len(notes) // 5
    for kind in KINDS:
        early = statistics.median(note[kind] for note in notes[fifth : 2 * fifth])
        late = statistics.median(note[kind] for note in notes[-fifth:])
        print(f"{kind:14} {early:10.0f} early, {late:10.0f} late")
    if args.json:
        args.json.write_text(json.dumps({"notes": notes, "losses": len(engine.supervisor.losses), "answers": answers}))
    engine.close()


if __name__ == "__main__":
    main()
