"""What each mechanism for single neurons gives: PowerInfer-2's ablation (section 7.5), on a model with predictors.

    python benchmarks/ablation.py PREDICTED.coterie --memory 2640 [--rounds 3] [--out FILE.svg]

From one stage to the next one thing is added. Each stage is Coterie with parts of its source replaced, in a copy: the
product has no switches for what nobody should switch off.

demand reads      lanes read a live neuron's Gate, Up and Down apart, when they come to it; nothing is kept
bundles           the three lie together: one read
cache             neurons stay in memory
matrix pipeline   lanes ask for all of a layer's missing neurons at once, when the whole layer is decided
cluster pipeline  they ask cluster by cluster, the next layer's ahead: Coterie as it is
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bars import bars

import coterie

Patch = tuple[str, str, str]  # file, what stands there once, what is put in its place

NOT_AHEAD: Patch = ("scheduler/lower_sparse.py", "            if ahead:\n", "            if False:\n")
NOT_YET: Patch = (
    "kernels/sparse.py",
    """            if demand(cache, entry, layer_of(record), neuron):
                asked += 1
            if acquire""",
    "            if acquire",
)
APART: tuple[Patch, ...] = (
    (
        "kernels/neuron_lane.py",
        "        start(control, number)\n",
        """        request = request_at(control, number)
        whole = word(request, t.LENGTH)
        put(request, t.LENGTH, min(whole, word(request, t.DONE) + (whole // 3 + 511) // 512 * 512))
        start(control, number)
        put(request, t.LENGTH, whole)
""",
    ),
    (
        "kernels/neuron_lane.py",
        "        again = settle(control, request)\n",
        """        if 0 < word(request, t.RESULT) < word(request, t.LENGTH) - word(request, t.DONE):
            put(request, t.DONE, word(request, t.DONE) + word(request, t.RESULT))
            again = True
        else:
            again = settle(control, request)
""",
    ),
)
FORGETFUL: Patch = (
    "scheduler/residency.py",
    "    return slots, room - region_bytes(slots * cost)\n",
    "    return least, min(room - region_bytes(least * cost), region_bytes(others))\n",
)
STAGED: tuple[Patch, ...] = (
    (
        "kernels/sparse_late.py",
        "total, pieces = word(record, o.N_COUNT), 0",
        "total, pieces = 2 * word(record, o.N_COUNT), 0",
    ),
    (
        "kernels/sparse_late.py",
        "            if not late(record, step, lane, x, scratch, cluster_of(record, piece)):\n",
        """            cluster = cluster_of(record, piece % word(record, o.N_COUNT))
            if piece < word(record, o.N_COUNT):
                ask(record, step, lane, cluster)
            elif not late(record, step, lane, x, scratch, cluster):
""",
    ),
    (
        "kernels/sparse_late.py",
        "    def run(record, step, lane):\n",
        """    @register_jitable
    def ask(record, step, lane, cluster):
        cache, row, asked = word(record, o.N_CACHE), word(record, o.N_LIVE) + cluster * LIVE_ROW, 0
        for k in range(i32_at(row + LIVE_COUNT)):
            i = i32_at(row + LIVE_IDS + 4 * k)
            if i >= LIVE_LATE:
                neuron = cluster * CLUSTER + i - LIVE_LATE
                if demand(cache, word(record, o.N_ADDRESSES) + 8 * neuron, layer_of(record), neuron):
                    asked += 1
        if asked > 0:
            call_reader(cache, asked)
        tally(step, lane, LINE_ASKED, asked)

    def run(record, step, lane):
""",
    ),
)
SERIAL = (NOT_AHEAD, NOT_YET)  # neurons are asked for all the same when a lane comes to them
STAGES: dict[str, tuple[Patch, ...]] = {
    "demand reads": (*SERIAL, *APART, FORGETFUL),
    "bundles": (*SERIAL, FORGETFUL),
    "cache": SERIAL,
    "matrix pipeline": (NOT_AHEAD, NOT_YET, *STAGED),
    "cluster pipeline": (),
}
PAPERS = {"demand reads": 0.40, "bundles": 1.09, "cache": 4.18, "cluster pipeline": 9.60}  # tokens/s, its section 7.5


def patched(patches: tuple[Patch, ...], folder: Path) -> None:
    """A copy of the package with parts replaced."""
    shutil.copytree(Path(coterie.__file__).parent, folder / "coterie")
    for name, old, new in patches:
        path = folder / "coterie" / name
        text = path.read_text()
        if text.count(old) != 1:
            sys.exit(f"ablation: {name} has changed; what is replaced there stands in it {text.count(old)} times")
        path.write_text(text.replace(old, new))


def run(stage: str, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Figures of a stage, from a process of its own. Those that read everything are slow, and short."""
    tokens, skip = arguments.tokens, arguments.skip
    if FORGETFUL in STAGES[stage]:
        tokens, skip = arguments.slow, 2
    with tempfile.TemporaryDirectory() as folder:
        patched(STAGES[stage], Path(folder))
        script = str(Path(__file__).parent / "sparse.py")
        memory, count = str(arguments.memory), ["--tokens", str(tokens), "--skip", str(skip), "--seed", str(seed)]
        command = [sys.executable, script, "run", str(arguments.model), "--memory", memory, *count]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"PYTHONPATH": folder})
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", type=int, required=True, help="MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--skip", type=int, default=30)
    parser.add_argument("--slow", type=int, default=6, help="tokens of the stages without a cache")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="a picture, SVG")
    arguments = parser.parse_args()
    rounds: list[dict[str, dict[str, Any]]] = []
    for seed in range(arguments.rounds):
        rounds.append({stage: run(stage, arguments, seed) for stage in STAGES})
        print({stage: round(figures["tokens_per_s"], 3) for stage, figures in rounds[-1].items()}, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rounds, indent=1))
    speeds = {stage: statistics.median(each[stage]["tokens_per_s"] for each in rounds) for stage in STAGES}
    for stage, speed in speeds.items():
        figures = rounds[-1][stage]
        read, stalled = figures["missed_per_token"], 100 * figures["stalled_share"]
        print(f"{stage:17} {speed:7.3f} tokens/s, {read:7.0f} neurons read a token, lanes wait {stalled:.0f} %")
    if arguments.out:
        title = "What each mechanism gives: 7B, 90 % of the neurons idle, half of them on flash"
        rows = [(stage, speed, PAPERS.get(stage)) for stage, speed in speeds.items()]
        arguments.out.write_text(bars(title, ("Coterie, 2 cores", "PowerInfer-2's paper, phone"), rows))
    ratios = [each["cluster pipeline"]["tokens_per_s"] / each["matrix pipeline"]["tokens_per_s"] for each in rounds]
    print(f"cluster over matrix: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
