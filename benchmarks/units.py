"""Other units under a hard ceiling: a model with a GPU and an NPU unit in a cgroup of its plan's total + 200 MB.

    python benchmarks/units.py MODEL [--units cpu,gpu,npu] [--context 1024] [--runs 3]     needs root (cgroups)

The first run builds graphs and programs; all must survive. Printed: the plan's total, of it what runtimes are expected
to keep, what the process grew by when graphs were loaded, and the group's peak (anonymous memory and page cache
together).
"""

import argparse
import json
import sys
from pathlib import Path

import cgroup

from coterie import LLM
from coterie.commands.options import read_text
from coterie.fetch import resolve
from coterie.models.load import open_source, read_spec
from coterie.scheduler.placement import parse_units
from coterie.scheduler.plan import OVERHEAD, Wishes
from coterie.scheduler.planner import make_plan

TEXT = Path(__file__).parent / "text" / "english.txt"


def serve(model: str, units: str, context: int, memory: int) -> None:
    """Answer once under the ceiling, and say what was kept."""
    prompt = read_text(TEXT)[:2500]
    with LLM(model, units=units, context=context, memory=memory) as llm:
        tokens = list(llm.generate(prompt, max_tokens=32, temperature=0.0))
        about = {"tokens": len(tokens), "memory": llm.memory(), "units": llm.units(), "copies": llm.plan.copies}
    print(json.dumps(about))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--units", default="cpu,gpu,npu")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.model, given.units, given.context, given.serve)
    path = resolve(given.model, None)
    with open_source(path) as file:
        wishes = Wishes(context=given.context, units=parse_units(given.units))
        total = make_plan(file, read_spec(file), wishes)[0].total
    command = [sys.executable, __file__, str(path), "--units", given.units, "--context", str(given.context)]
    for _ in range(given.runs):
        with cgroup.memory_cgroup(total + OVERHEAD) as group:
            done = cgroup.run([*command, "--serve", str(total)], group)
            peak = cgroup.peak(group)
        found = json.loads(done.output) if done.status == 0 else {}
        grown = [unit["weight_copies"] for unit in found.get("units", []) if "weight_copies" in unit]
        said = {
            "status": done.status,
            "error": done.error,
            "total": total,
            "limit": total + OVERHEAD,
            "copies": found.get("copies"),
            "grown": grown,
            "group_peak": peak,
            "peak_rss": found.get("memory", {}).get("peak_rss"),
        }
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
