"""SwiGLU models: what leaving out neurons costs in quality, and whether it would pay on this disk.

    coterie profile --flash
    python benchmarks/swiglu.py MODEL.gguf ... [--chunks 4] > FILE.md

Thresholds are calibrated on the first 2,048 tokens of benchmarks/text/english.txt, and what follows is scored, as
`coterie calibrate` does it. Tokens/s with half of the weights in memory are measured by the engine for the dense model;
for the methods, which it does not have, they are what scheduler/skipping.py expects.
"""

import argparse
import sys
from pathlib import Path

from coterie import LLM
from coterie.commands.calibrate import SHARE, SPARSITIES, Method, check, cut, measure, oracle, score
from coterie.commands.terminal import Progress
from coterie.opening import open_model
from coterie.scheduler.profile import load_profile
from coterie.scheduler.skipping import known_machine
from coterie.sizes import Share

TEXT = Path(__file__).parent / "text" / "english.txt"
CONTEXT = 512  # tokens of a chunk
CALIBRATION = 4  # chunks
GENERATED, REPETITIONS = 64, 5  # of the dense measurement


def quality(path: Path, chunks: int) -> str:
    """The table of a model, and the verdicts."""
    machine = known_machine(load_profile(), path)
    if machine is None:
        sys.exit("this machine has not been measured: coterie profile --flash")
    model = open_model(path)
    try:
        check(model, CONTEXT)
        pieces, forward = cut(model, TEXT.read_text(encoding="utf-8"), CONTEXT), oracle(model)
        with Progress() as progress:
            sparsities = [int(word) for word in SPARSITIES.split(",")]
            thresholds = measure(model, forward, pieces[:CALIBRATION], sparsities, progress)
            scored = pieces[CALIBRATION : CALIBRATION + chunks]
            methods = [method.value for method in Method if method is not Method.all]
            report = score(model, forward, thresholds, scored, methods, machine, progress)
    finally:
        model.close()
    rates = f"{machine.sequential / 1e9:.2f} GB/s, {machine.reads:,.0f} small reads/s"
    lines = [f"**{path.name}**, {report.tokens_scored} tokens scored; the profile has {rates}", "", report.table(), ""]
    return "\n".join([*lines, *(f"* {verdict}" for verdict in report.verdicts())])


def dense_speed(path: Path) -> str:
    """Tokens/s that the engine reaches with SHARE of the weights in memory."""
    with LLM(path, memory=Share(SHARE), context=GENERATED + 1) as llm:
        (row,) = llm.bench(0, GENERATED, REPETITIONS)
    samples = sorted(row["samples_ts"])
    return f"* dense at {SHARE:.0%}, measured: {row['avg_ts']:.3g} tokens/s ({samples[0]:.3g}-{samples[-1]:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--chunks", type=int, default=4, help="of 512 tokens, to be scored")
    arguments = parser.parse_args()
    for path in arguments.models:
        print(f"{quality(path, arguments.chunks)}\n{dense_speed(path)}\n", flush=True)


if __name__ == "__main__":
    main()
