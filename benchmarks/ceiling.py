"""Rows 2, 7 and 8: the ceiling holds, changes while answers grow, and nothing is written.

    python benchmarks/ceiling.py changes PACKED      50 random set_memory calls in a run: ids, and how fast RSS falls
    python benchmarks/ceiling.py hog PACKED MB       `--memory auto` in a cgroup that a memory hog shares (needs root)
    python benchmarks/ceiling.py limits PACKED SIZE...   in a cgroup of --memory + 200 MB: peak, writes, page cache;
                                                 with kernels in the cache, and with an empty one

In `hog` the cgroup has MB megabytes; a quarter into the answer another process of the group takes a third of them
within about a second, keeps them for some seconds, and ends. `hog` and `limits` need root.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cgroup
import numpy as np

from coterie.llm import LLM
from coterie.sizes import parse_size

PROMPT = "The history of the railway begins with"
TOKENS = 200
CONSTANT = 200_000_000  # bytes beside --memory
PAGE = os.sysconf("SC_PAGESIZE")


def rss() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def expected(packed: Path) -> list[int]:
    """Ids with everything in memory."""
    with LLM(packed, threads=2, context=512) as llm:
        generation = llm.generate(PROMPT, TOKENS, temperature=0)
        list(generation)
        return generation.tokens


def changes(packed: Path) -> None:
    wanted, rng = expected(packed), np.random.default_rng(0)
    falls, calls = list[float](), 0
    with LLM(packed, threads=2, context=512, memory="100%") as llm:
        generation, seen = llm.generate(PROMPT, TOKENS, temperature=0), 0
        for _ in generation:
            if len(generation.tokens) // 4 > seen and calls < 50:
                seen = len(generation.tokens) // 4
                before, start = rss(), time.perf_counter()
                old = llm.plan.total
                llm.set_memory(f"{rng.uniform(15, 100):.2f}%")
                calls += 1
                drop = old - llm.plan.total
                if drop > 32 << 20:
                    while rss() > before - 0.9 * drop and time.perf_counter() - start < 5:
                        time.sleep(0.001)
                    falls.append(time.perf_counter() - start)
        verdict = "the same" if generation.tokens == wanted else "DIFFERENT"
    print(f"{calls} calls of set_memory in {TOKENS} tokens: ids {verdict}")
    print(f"RSS after {len(falls)} cuts had fallen in {np.median(falls):.3f} s (median), {max(falls):.3f} s (longest)")


def hog(packed: Path, megabytes: int) -> None:
    wanted = expected(packed)
    with cgroup.memory_cgroup(megabytes * 10**6) as group:
        command = [sys.executable, __file__, "follow", str(packed), str(group), str(megabytes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        ids = [int(word) for word in re.findall(r"^ids (.*)$", done.stdout, re.M)[0].split()] if done.stdout else []
        print(re.sub(r"^ids .*\n", "", done.stdout, flags=re.M), end="")
        print(done.stderr[-500:], end="")
        events = (group / "memory.oom_control") if (group / "memory.oom_control").exists() else group / "memory.events"
        print("out of memory:", " ".join(line for line in events.read_text().splitlines() if "oom_kill " in line))
    print(f"exit code {done.returncode}, ids {'the same' if ids == wanted else 'DIFFERENT'}")


def follow(packed: Path, group: Path, megabytes: int) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    with LLM(packed, threads=2, context=512, memory="auto") as llm:
        generation, totals, other = llm.generate(PROMPT, TOKENS, temperature=0), list[int](), None
        for _ in generation:
            totals.append(llm.plan.total >> 20)
            if len(generation.tokens) == TOKENS // 4:
                other = subprocess.Popen([sys.executable, __file__, "take", str(megabytes // 3)])
        lowest = totals.index(min(totals))
        print(f"ceiling: {totals[0]} MiB, {totals[lowest]} at token {lowest}, {totals[-1]} at the end")
        print("ids", *generation.tokens)
        if other is not None:
            print("the hog ended with", other.wait())


def take(megabytes: int) -> None:
    """Be the hog."""
    held = []
    for _ in range(megabytes):
        held.append(np.ones(10**6, np.uint8))
        time.sleep(1 / megabytes)
    time.sleep(5)


def limits(packed: Path, sizes: list[str]) -> None:
    for size in sizes:
        limit = parse_size(size) + CONSTANT
        for warm in (True, False):
            with tempfile.TemporaryDirectory() as empty, cgroup.memory_cgroup(limit) as group:
                cgroup.drop_page_cache()
                environment = {} if warm else {"COTERIE_HOME": empty}
                done = cgroup.run([sys.executable, __file__, "serve", packed, size], group, environment=environment)
                highest = cgroup.peak(group)
            _say(f"--memory {size}, cgroup {limit / 1e6:.0f} MB, {'warm' if warm else 'cold'}", done, highest)


def _say(case: str, done: cgroup.Run, highest: int) -> None:
    print(f"{case}: ", end="")
    print(done.error or f"{done.output.strip()}, anonymous peak {done.anonymous / 1e6:.0f} MB, ", end="")
    print(f"resident peak {done.resident / 1e6:.0f} MB, cgroup's peak {highest / 1e6:.0f} MB")


def serve(packed: Path, size: str) -> None:
    """Answer under a ceiling; say what was written, and what the page cache gained meanwhile."""
    with LLM(packed, threads=2, memory=size) as llm:
        first = llm.generate(PROMPT, 1, temperature=0)
        list(first)
        written, cached = _written(), _cached()
        generation = llm.generate(PROMPT, TOKENS, temperature=0)
        list(generation)
        report = llm.flash()
        assert report is not None
        read = report["read_bytes_per_token"] * len(generation.tokens)
        print(
            f"plan {llm.plan.total / 1e6:.0f} MB, read {read / 1e6:.0f} MB, written {_written() - written} bytes, "
            f"page cache {(_cached() - cached) / 1e6:+.1f} MB, {generation.timings['tokens_per_s']:.1f} tokens/s"
        )


def _written() -> int:
    return int(re.findall(r"^write_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[0])


def _cached() -> int:
    return int(re.findall(r"^Cached: +(\d+)", Path("/proc/meminfo").read_text(), re.M)[0]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["changes", "hog", "limits", "follow", "take", "serve"])
    parser.add_argument("arguments", nargs="+")
    given = parser.parse_args()
    first, rest = given.arguments[0], given.arguments[1:]
    match given.what:
        case "changes":
            changes(Path(first))
        case "hog":
            hog(Path(first), int(rest[0]))
        case "follow":
            follow(Path(first), Path(rest[0]), int(rest[1]))
        case "take":
            take(int(first))
        case "limits":
            limits(Path(first), rest)
        case "serve":
            serve(Path(first), rest[0])


if __name__ == "__main__":
    main()
