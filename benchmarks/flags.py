"""Flags between two processes, beside a Ray actor call: how long until the other side knows.

    python benchmarks/flags.py [--rounds 2000] [--json OUT]

One-way times by the cycle counter, which all cores share: the poster writes its stamp and posts, the waiter looks at
the counter when it is awake. Spinning: both sides spin. Sleeping: the waiter sleeps in the futex at once, a millisecond
passes between posts, so that its core has halted. Busy: the same with a process on every core that computes, and 100 us
between posts. `ray.get(actor.m.remote())` is there and back.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, types

from coterie.actors.lanes import NAP, cycles_per_second
from coterie.actors.ray_session import open_session
from coterie.kernels.atomics import cycles, pause
from coterie.kernels.sync import post, wait_flag
from coterie.kernels.vector import i64_at, set_i64
from coterie.storage.arena import Arena

THERE, BACK, ABORT, STAMP, REST = 0, 64, 128, 192, 256  # bytes: two flags, a word that stays 0, a stamp, a timespec
FOREVER = 1 << 60  # cycles
I = types.int64  # noqa: E741


@cfunc(I(I, I, I, I, I))
def send(base, first, count, gap, spin):  # type: ignore[no-untyped-def]
    """Post `count` times, `gap` cycles after the other side has answered."""
    for number in range(first, first + count):
        until = cycles() + gap
        while cycles() < until:
            pause()
        set_i64(base + STAMP, cycles())
        post(base + THERE, number)
        wait_flag(base + BACK, number, spin, base + ABORT, base + REST)
    return count


@cfunc(I(I, I, I, I, I))
def receive(base, first, count, spin, times):  # type: ignore[no-untyped-def]
    """Note how long each post took."""
    for number in range(first, first + count):
        wait_flag(base + THERE, number, spin, base + ABORT, base + REST)
        set_i64(times + 8 * (number - first), cycles() - i64_at(base + STAMP))
        post(base + BACK, number)
    return count


def child(description: str) -> None:
    """The other side: lines of "first count spin" on stdin, a line of times in ns for each on stdout."""
    arena, rate = Arena.attach(json.loads(description)), cycles_per_second()
    print("ready", flush=True)
    for line in sys.stdin:
        first, count, spin = map(int, line.split())
        times = np.zeros(count, np.int64)
        receive.ctypes(arena.base, first, count, spin, times.ctypes.data)
        print(json.dumps((times / rate * 1e9).round().astype(int).tolist()), flush=True)


@contextmanager
def busy_cores() -> Iterator[None]:
    """A process that computes on every core."""
    command = [sys.executable, "-c", "while True: pass"]
    hogs = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    time.sleep(0.3)
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def summary(nanoseconds: list[int]) -> dict[str, float]:
    found = np.percentile(nanoseconds, [50, 90, 99, 100]) / 1e3
    return dict(zip(("p50", "p90", "p99", "max"), found.round(2).tolist(), strict=True))


class Echo:
    def m(self) -> int:
        return 1


def calls(ray: Any, actor: Any, count: int) -> dict[str, float]:
    times = []
    for _ in range(count):
        begun = time.perf_counter_ns()
        ray.get(actor.m.remote())
        times.append(time.perf_counter_ns() - begun)
    return summary(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    arena = Arena({"state": 4096}, shared=True)
    arena.numpy(arena.allocate("state", 512, np.int64))[REST // 8 : REST // 8 + 2] = 0, NAP
    other = subprocess.Popen(
        [sys.executable, __file__, "child", json.dumps(arena.describe())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdin is not None
    assert other.stdout is not None
    other.stdout.readline()
    microsecond, number, found = cycles_per_second() / 1e6, 1, {}

    def measure(gap_us: float, spin: int, rounds: int) -> dict[str, float]:
        nonlocal number
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(f"{number} {rounds} {spin}\n")
        other.stdin.flush()
        send.ctypes(arena.base, number, rounds, int(gap_us * microsecond), FOREVER)
        number += rounds
        return summary(json.loads(other.stdout.readline()))

    measure(1, FOREVER, 1000)
    found["flag, both spin"] = measure(1, FOREVER, args.rounds)
    found["flag, sleeper on a halted core"] = measure(1000, 0, args.rounds)
    with open_session(None) as session:
        actor = session.ray.remote(num_cpus=0)(Echo).remote()
        calls(session.ray, actor, 50)
        found["ray.get(actor.m.remote())"] = calls(session.ray, actor, args.rounds // 4)
        with busy_cores():
            found["cores busy: flag, sleeper"] = measure(100, 0, args.rounds)
            found["cores busy: flag, both spin"] = measure(100, FOREVER, args.rounds)
            found["cores busy: ray.get(actor.m.remote())"] = calls(session.ray, actor, args.rounds // 20)
    other.stdin.close()
    other.wait()
    for name, each in found.items():
        print(f"{name:40} " + "  ".join(f"{key} {value:9.2f} us" for key, value in each.items()))
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    child(sys.argv[2]) if sys.argv[1:2] == ["child"] else main()
