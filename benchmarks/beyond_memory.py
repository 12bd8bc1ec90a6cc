"""Models larger than memory, against llama.cpp and against what disk and memory allow, in alternation.

    LLAMA_BENCH=.../llama-bench python benchmarks/beyond_memory.py MODEL.gguf ... [--shares 75,50,25] [--pairs 5]
    python benchmarks/beyond_memory.py --report            tables and the curve out of what was measured

A cell is a model, a share of its weight bytes that may be resident, and one of:

    decode     the peer, ours, ours with everything resident, fio
    prefill    512 tokens: the peer (decoding), ours, ours with everything resident, fio
    ablations  the peer, the peer with the file's first part locked in memory, ours, ours through buffered reads

A round takes each part of a cell once, in this order, within a minute or two: disk and memory of a virtual machine
wander two- to threefold, so figures are compared within a round only. A run's tokens/s is the median of its
repetitions; quoted are medians over rounds. Every run is in the JSON file (--out), which is written after each round;
the same command later goes on from there.

Peer: llama-bench, mmap, no repacked copy, -b 16 -ub 16, no warm-up, in a memory cgroup (page cache counts), the page
cache dropped before, at the best of read-ahead 8192, 512 and 128 KiB, found once a share by a run of each; the old
value is put back. Its bytes: what its process read from the disk from the first repetition on.

Memory: below 2 GB of file, equal budgets for weights: the peer's cgroup is share x file + its own anonymous bytes
(their peak in a free run), ours has --memory SHARE% in a cgroup of its planned total + 200 MB. Above, equal cgroups of
share x file, ours with --memory (that - 200 MB).

B: the larger of the peer's own bytes/s and fio's best of that round (random and sequential, 256 KiB, 1 and 4 MiB,
depth 4, 16, 32, io_uring, direct, on our packed file). Bound of a step: max(streamed bytes / B, step with everything
resident).

Locked: another process of the peer's cgroup holds the file's first bytes in memory, the share less an eighth of it (at
most 64 MiB). The limit stays: the peer pages the rest through what is left, which is as much as our ring may take, at
the read-ahead that is best for that.

Buffered: in a cgroup of what the same round's direct run took, so that no page cache lives in the constant.

Nothing else should run on the machine. Without root there is neither peer nor cgroup: those parts are skipped, and it
is said.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cgroup
from beyond_report import report, values
from curve import Line, curve

PARTS = {
    "decode": ("peer", "ours", "resident", "fio"),
    "prefill": ("peer", "ours prefill", "resident prefill", "fio"),
    "ablations": ("peer", "peer locked", "ours", "ours buffered"),
}
READ_AHEADS = (8192, 512, 128)  # KiB
CONSTANT = 200_000_000  # bytes: what our interpreter takes beyond its plan
LARGE = 2_000_000_000  # bytes of file from which on both sides get equal cgroups
WINDOW = 64 << 20  # bytes: the most that is left to the peer's page cache where the rest is locked
PROMPT = 512
Figures = dict[str, Any]


def tokens_for(nbytes: int) -> int:
    """Tokens a repetition, so that a run of the peer takes some seconds."""
    return 16 if nbytes < 200_000_000 else 8 if nbytes < LARGE else 4


@dataclass
class Bench:
    """One model at one share; `setup` is what is found out once and kept."""

    model: Path
    packed: Path
    share: int
    arguments: argparse.Namespace
    limited: bool  # cgroups can be had
    setup: Figures
    parts: dict[str, Callable[[], Figures]] = field(init=False)
    peak: int = 0  # what the last run of ours took of its cgroup

    def __post_init__(self) -> None:
        self.size = self.model.stat().st_size
        self.budget = self.size * self.share // 100
        self.tokens = tokens_for(self.size)
        self.parts = {
            "peer": self.peer,
            "peer locked": lambda: self.peer(locked=self.budget - min(self.budget // 8, WINDOW)),
            "ours": self.ours,
            "ours buffered": lambda: self.ours(buffered=True),
            "ours prefill": lambda: self.ours(prompt=PROMPT),
            "resident": lambda: self.ours(resident=True),
            "resident prefill": lambda: self.ours(prompt=PROMPT, resident=True),
            "fio": self.fio,
        }

    # The peer

    def peer_command(self, repetitions: int, tokens: int) -> list[str]:
        threads = str(self.arguments.threads)
        return [
            *(self.arguments.llama_bench, "-m", str(self.model), "-p", "0", "-n", str(tokens), "-r", str(repetitions)),
            *("-t", threads, "-lm", "mmap", "--repack", "0", "-b", "16", "-ub", "16", "--no-warmup", "--progress"),
            *("-o", "json"),
        ]

    def peer_run(self, limit: int, ahead: int, repetitions: int, timeout: float, locked: int = 0) -> Figures:
        """Figures of one run in a cgroup of `limit` bytes."""
        with cgroup.memory_cgroup(limit) as group, cgroup.read_ahead(self.model, ahead):
            cgroup.drop_page_cache()
            command = self.peer_command(repetitions, self.tokens)
            if locked:
                with cgroup.held(self.model, locked, group):
                    run = cgroup.run(command, group, "generation run 1/", timeout)
            else:
                run = cgroup.run(command, group, "generation run 1/", timeout)
            peak = cgroup.peak(group)
        figures: Figures = {"read_ahead": ahead, "limit": limit, "locked": locked, "cgroup_peak": peak}
        figures |= {"anonymous": run.anonymous, "seconds": run.seconds}
        if run.error:
            return figures | {"error": run.error}
        row = json.loads(run.output)[0]
        nbytes = (run.read - run.marked) / (repetitions * self.tokens)
        seconds = sum(row["samples_ns"]) / 1e9
        return figures | {
            "rate": statistics.median(row["samples_ts"]),
            "samples": row["samples_ts"],
            "bytes_per_token": nbytes,
            "bandwidth": (run.read - run.marked) / seconds,
        }

    def peer(self, locked: int = 0) -> Figures:
        """Figures of decoding, at the best read-ahead."""
        if "peer_anonymous" not in self.setup:
            run = cgroup.run(self.peer_command(1, self.tokens), timeout=self.arguments.timeout)
            if run.error:
                sys.exit(f"llama-bench without a limit: {run.error}")
            self.setup["peer_anonymous"] = run.anonymous
        limit = self.budget + (self.setup["peer_anonymous"] if self.size < LARGE else 0)
        best = "read_ahead_locked" if locked else "read_ahead"
        if best not in self.setup:
            trials = [self.peer_run(limit, ahead, 1, self.arguments.timeout / 5, locked) for ahead in READ_AHEADS]
            self.setup[best] = max(trials, key=lambda trial: float(trial.get("rate", 0)))["read_ahead"]
            self.setup[f"{best}_trials"] = trials
        return self.peer_run(limit, self.setup[best], self.arguments.reps, self.arguments.timeout, locked)

    # Ours

    def ours(self, prompt: int = 0, resident: bool = False, buffered: bool = False) -> Figures:
        """Figures of decoding, or of prefilling `prompt` tokens."""
        command = [
            *(sys.executable, "-m", "coterie", "bench", str(self.packed), "-o", "json"),
            *("-p", str(prompt), "-n", "0" if prompt else str(self.tokens)),
            *("-r", str(self.arguments.reps), "-t", str(self.arguments.threads)),
        ]
        environment = {"COTERIE_FLASH_BUFFERED": "1"} if buffered else {}
        limit = None
        if not resident:
            limit = self.budget
            memory = str(limit - CONSTANT) if self.size >= LARGE else f"{min(self.share, 100)}%"
            command += ["--memory", memory]
            if self.size < LARGE:
                key = "prefill_limit" if prompt else "limit"
                if key not in self.setup:
                    first = self.finish(cgroup.run(command, timeout=self.arguments.timeout, environment=environment))
                    if "error" in first:
                        return first
                    self.setup[key] = first["memory"]["total"] + CONSTANT
                limit = self.setup[key]
            if buffered:  # what the constant leaves free would be page cache
                limit = min(limit, self.peak or limit)
        if limit is None or not self.limited:
            return self.finish(cgroup.run(command, timeout=self.arguments.timeout, environment=environment))
        with cgroup.memory_cgroup(limit) as group:
            cgroup.drop_page_cache()
            run = cgroup.run(command, group, timeout=self.arguments.timeout, environment=environment)
            peak = cgroup.peak(group)
        self.peak = 0 if buffered or run.error else peak
        return self.finish(run) | {"limit": limit, "cgroup_peak": peak}

    def finish(self, run: cgroup.Run) -> Figures:
        figures: Figures = {"seconds": run.seconds, "resident": run.resident, "written": run.written}
        if run.error:
            return figures | {"error": run.error}
        row = json.loads(run.output)[0]
        figures |= {"rate": statistics.median(row["samples_ts"]), "samples": row["samples_ts"]}
        return figures | {key: row[key] for key in ("model_size", "flash", "memory") if key in row}

    # The disk

    def fio(self) -> Figures:
        """Bytes/s of the sweep, by what was read how."""
        sweep = [
            (f"{order} {block} x{depth}", order, block, depth)
            for order in ("randread", "read")
            for block in ("256k", "1m", "4m")
            for depth in (4, 16, 32)
        ]
        lines = [
            *("[global]", f"filename={self.packed}", "ioengine=io_uring", "direct=1", "thread", "time_based"),
            *(f"runtime={self.arguments.fio_seconds}", "randrepeat=0", "norandommap", "stonewall"),
        ]
        for name, order, block, depth in sweep:
            lines += [f"[{name}]", f"rw={order}", f"bs={block}", f"iodepth={depth}"]
        said = subprocess.run(
            ["fio", "--readonly", "--output-format=json", "-"],
            input="\n".join(lines),
            capture_output=True,
            text=True,
        )
        if said.returncode:
            return {"error": (said.stderr.strip().splitlines() or [f"status {said.returncode}"])[-1]}
        rates = {job["jobname"]: job["read"]["bw_bytes"] for job in json.loads(said.stdout)["jobs"]}
        return {"best": max(rates.values()), "sweep": rates}


def say(part: str, figures: Figures) -> None:
    if "error" in figures:
        text = figures["error"]
    elif "best" in figures:
        text = f"{figures['best'] / 1e9:.2f} GB/s"
    else:
        text = f"{figures['rate']:.2f} tokens/s"
        for key in ("bytes_per_token", "bandwidth"):
            if key in figures:
                text += f", {figures[key] / 1e6:.0f} MB{'/s' if key == 'bandwidth' else ' a token'}"
        if "flash" in figures:
            text += f", {figures['flash']['read_bytes_per_token'] / 1e6:.0f} MB a token"
    print(f"  {part:17} {text}", flush=True)


def measure(bench: Bench, kind: str, cell: Figures, pairs: int, save: Callable[[], None]) -> None:
    """Rounds until the cell has `pairs` of them."""
    parts = [part for part in PARTS[kind] if bench.limited or "peer" not in part]
    while len(cell["rounds"]) < pairs:
        print(f"{bench.model.name} {bench.share} % {kind}: round {len(cell['rounds']) + 1} of {pairs}", flush=True)
        turn: Figures = {"when": datetime.datetime.now().isoformat(timespec="seconds")}
        for part in parts:
            turn[part] = bench.parts[part]()
            say(part, turn[part])
        cell["rounds"].append(turn)
        save()


def draw(cells: list[Figures], path: Path) -> None:
    """The curve of the model named like a 1B one, if it has two shares or more."""
    chosen = [cell for cell in cells if cell["kind"] == "decode" and cell["model"].endswith("1b")]
    lines = []
    for name, part in (("Coterie", "ours"), ("llama.cpp", "peer")):
        rates = {cell["share"]: found for cell in chosen if (found := values(cell, part, "rate"))}
        points = [(share, min(found), statistics.median(found), max(found)) for share, found in rates.items()]
        lines.append(Line(name, points))
    if min(len(line.points) for line in lines) < 2:
        print("no curve: it takes two shares of a 1b model, with the peer", file=sys.stderr)
        return
    title = f"{chosen[0]['model']} ({chosen[0]['file_bytes'] / 1e6:.0f} MB) in less memory than it takes"
    path.write_text(curve(title, "weights that may be resident, % of their bytes", "tokens/s", lines))
    print(f"drew {path}", file=sys.stderr)


def pack(model: Path, folder: Path | None) -> Path:
    """The model in the packed format, made where it is missing."""
    packed = (folder or model.parent) / f"{model.stem}.coterie"
    if not packed.exists():
        made = subprocess.run([sys.executable, "-m", "coterie", "pack", str(model), "-o", str(packed)])
        if made.returncode:
            sys.exit(f"could not pack {model.name}: see above")
    return packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="GGUF files")
    parser.add_argument("--shares", default="75,50,25", help="per cent; the curve: 110,100,95,90,75,50,25,10")
    parser.add_argument("--kinds", default="decode", help="decode,prefill,ablations")
    parser.add_argument("--pairs", type=int, default=5, help="rounds that a cell is to have")
    parser.add_argument("--reps", type=int, default=3, help="repetitions a run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fio-seconds", type=float, default=1, help="for each of the 18 combinations")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run")
    parser.add_argument("--packed", type=Path, help="folder of the packed models (default: beside each model)")
    parser.add_argument("--out", type=Path, default=Path("beyond_memory.json"))
    parser.add_argument(
        "--report", action="store_true", help="print the tables of --out, draw --curve; measure nothing"
    )
    parser.add_argument("--curve", type=Path, default=Path(__file__).parent.parent / "docs" / "beyond_memory.svg")
    arguments = parser.parse_args()
    found: Figures = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"setups": {}, "cells": []}
    if arguments.report:
        print(report(found["cells"]))
        draw(found["cells"], arguments.curve)
        return
    arguments.llama_bench = os.environ.get("LLAMA_BENCH")
    if not arguments.llama_bench:
        sys.exit("set LLAMA_BENCH to a llama-bench binary (benchmarks/README.md says how to build one)")
    if not shutil.which("fio"):
        sys.exit("fio is missing: apt-get install fio")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that cgroup and read-ahead are put back

    def save() -> None:
        written = arguments.out.with_suffix(".tmp")
        written.write_text(json.dumps(found, indent=1) + "\n")
        written.replace(arguments.out)

    for model in arguments.models:
        packed = pack(model, arguments.packed)
        reason = cgroup.why_not(model)
        if reason:
            print(f"no peer: {reason}", file=sys.stderr)
        for share in map(int, arguments.shares.split(",")):
            setup = found["setups"].setdefault(f"{model.stem} {share}", {})
            bench = Bench(model, packed, share, arguments, not reason, setup)
            for kind in arguments.kinds.split(","):
                key = {"model": model.stem, "share": share, "kind": kind}
                cell = next((cell for cell in found["cells"] if key.items() <= cell.items()), None)
                if cell is None:
                    cell = key | {"file_bytes": bench.size, "rounds": []}
                    found["cells"].append(cell)
                measure(bench, kind, cell, arguments.pairs, save)
    print(f"python {sys.argv[0]} --report --out {arguments.out} prints the tables")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last whole round")
