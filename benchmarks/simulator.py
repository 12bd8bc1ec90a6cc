"""What the simulator predicts of this machine, against what is measured, in alternation.

    python benchmarks/simulator.py MODEL.gguf ... [--shares 100,75,50,25] [--rounds 3] [--json]

A round: the machine is measured (kernels of the models' formats, flash at the depths that matter), which takes half a
minute; then, for every model and share, prefill of 256 tokens and decode of 64 are timed and simulated with what was
just measured. Memory and disk of a virtual machine wander, so a prediction is compared only within its round. Quoted:
the median over rounds of predicted / measured - 1, and the median of their sizes over all cells. The bar: every cell
within 15 %, the median within 8 %. Nothing else should run on the machine.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from coterie import LLM
from coterie.actors.sweep import Sweep, memory_bandwidth
from coterie.commands.measure_units import measure_units
from coterie.commands.terminal import Progress
from coterie.models.load import read_spec
from coterie.opening import open_file
from coterie.scheduler.profile import DeviceProfile, FlashProfile, file_system, load_profile
from coterie.scheduler.simulate import Question, Simulation
from coterie.scheduler.soc import Device
from coterie.scheduler.this_machine import this_machine
from coterie.sizes import Share
from coterie.storage.flash_writer import packed_path

PROMPT, TOKENS = 256, 64
BLOCKS = (256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20)
DEPTHS = (2, 4, 8, 16, 32)
POINT = 0.15  # seconds


def measured_device(models: list[Path], lanes: int, progress: Progress) -> Device:
    """This machine, as it is now."""
    formats, packed = set[str](), models[0]
    for model in models:
        with open_file(model) as file:
            formats |= {tensor.format for tensor in file.tensors.values() if tensor.rows > 1}
            packed = packed_path(file)  # type: ignore[arg-type]
    known = load_profile().flash.get(file_system(packed))
    flash = None
    with Sweep(packed) as sweep:
        engine = known.engine if known else sweep.engines[0]
        rows = [
            sweep.measure((engine, "sequential", block, depth, sweep.size), POINT)
            for block in BLOCKS
            for depth in DEPTHS
        ]
        best = max(rows, key=lambda row: row.bytes_per_s)
        block, depth = (known.block, known.depth) if known else (best.block, best.depth)
        flash = FlashProfile(engine, block, depth, best.bytes_per_s, False, tuple(rows))
    unit = measure_units(sorted(formats), lanes, progress, (packed, flash))
    profile = DeviceProfile(memory_bandwidth(), {file_system(packed): flash}, {str(lanes): unit})
    return this_machine(profile, lanes=lanes, path=packed)


def cell(model: Path, share: int, device: Device, lanes: int) -> dict[str, float]:
    """Tokens/s, measured and simulated, of prefill and decode."""
    memory = None if share >= 100 else Share(share / 100)
    context = PROMPT + TOKENS + 1
    found: dict[str, float] = {}
    with LLM(model, threads=lanes, context=context, memory=memory) as llm:
        found["prefill"] = statistics.median(llm.bench(PROMPT, 0, 3)[0]["samples_ts"])
        found["decode"] = statistics.median(llm.bench(0, TOKENS, 3)[0]["samples_ts"])
    with open_file(model) as file:
        spec = read_spec(file)
        question = Question(memory or 1 << 40, prompt=PROMPT, tokens=0, context=context, threads=lanes)
        roomy = Device(**{**vars(device), "memory": 1 << 41})
        prefill = Simulation(file, spec, roomy, question).answer().prefill
        again = Question(memory or 1 << 40, prompt=0, tokens=TOKENS, context=context, threads=lanes)
        decode = Simulation(file, spec, roomy, again).answer().decode
    assert prefill is not None
    assert decode is not None
    return found | {"prefill simulated": prefill.tokens_per_s, "decode simulated": decode.tokens_per_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--shares", default="100,75,50,25")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    arguments = parser.parse_args()
    shares = [int(word) for word in arguments.shares.split(",")]
    for model in arguments.models:  # packs it, and measures the disk, once
        with LLM(model, threads=arguments.threads, context=64, memory=Share(0.5)):
            pass
    rounds: list[dict[str, dict[str, float]]] = []
    with Progress() as progress:
        for _ in range(arguments.rounds):
            figures: dict[str, dict[str, float]] = {}
            for model in arguments.models:
                for share in shares:
                    if share in (shares[0], shares[len(shares) // 2]):  # within a minute
                        device = measured_device(arguments.models, arguments.threads, progress)
                    figures[f"{model.name} {share} %"] = cell(model, share, device, arguments.threads)
            rounds.append(figures)
    rows, sizes = list[dict[str, Any]](), list[float]()
    for name in rounds[0]:
        for phase in ("prefill", "decode"):
            measured = [figures[name][phase] for figures in rounds]
            simulated = [figures[name][f"{phase} simulated"] for figures in rounds]
            errors = [s / m - 1 for s, m in zip(simulated, measured, strict=True)]
            error = statistics.median(errors)
            sizes.append(abs(error))
            rows.append(
                {
                    "cell": f"{name} {phase}",
                    "measured": measured,
                    "simulated": simulated,
                    "errors": errors,
                    "error": error,
                }
            )
    if arguments.json:
        print(json.dumps({"cells": rows, "median": statistics.median(sizes), "worst": max(sizes)}, indent=1))
        return
    print("| cell | measured, tokens/s | simulated | error |\n|---|---|---|---|")
    for row in rows:
        measured, simulated = statistics.median(row["measured"]), statistics.median(row["simulated"])
        print(f"| {row['cell']} | {measured:.1f} | {simulated:.1f} | {100 * row['error']:+.1f} % |")
    print(f"\nmedian {100 * statistics.median(sizes):.1f} %, worst {100 * max(sizes):.1f} %")


if __name__ == "__main__":
    main()
