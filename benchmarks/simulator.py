"""What the simulator predicts of this machine, against what is measured, in alternation.

    python benchmarks/simulator.py MODEL.gguf ... [--shares 100,75,50,25] [--prompts 256] [--rounds 3] [--json]
    python benchmarks/simulator.py MODEL.gguf --dilated [--seconds 10]      virtual and dilated time, no measuring

The machine is measured (kernels of the model's formats, flash at the depths that matter), prefill of 256 tokens (or of
--prompts) and decode of 32 are timed for a model and a share, the machine is measured again, and so on: memory and disk
of a virtual machine wander by half within minutes, so a cell is predicted by the mean of what the measurements before
and after it say. Quoted: the median over rounds of predicted / measured - 1, and the median of their sizes over all
cells. The bar: every cell within 15 %, the median within 8 %. Nothing else should run on the machine.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from coterie import LLM
from coterie.actors.dilated import DilatedClock
from coterie.actors.sweep import Sweep, memory_bandwidth
from coterie.commands.measure_pauses import measure_pauses
from coterie.commands.measure_units import measure_units
from coterie.commands.terminal import Progress
from coterie.models.load import open_source, read_spec
from coterie.opening import open_file
from coterie.scheduler.operators import Rows
from coterie.scheduler.profile import DeviceProfile, FlashProfile, file_system, load_profile
from coterie.scheduler.simulate import Question, Simulation
from coterie.scheduler.soc import Device
from coterie.scheduler.soc_file import load_soc
from coterie.scheduler.this_machine import this_machine
from coterie.sizes import Share
from coterie.storage.flash_writer import packed_path

PROMPT, TOKENS, REPEAT = 256, 32, 3
CONTEXT = PROMPT + TOKENS + 1
BLOCKS = (64 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20)
DEPTHS = (1, 2, 4, 8, 16, 32)
POINT = 0.15  # seconds


def measured_device(model: Path, lanes: int, progress: Progress) -> Device:
    """This machine, as it is now."""
    with open_source(model) as file:
        formats = {tensor.format for tensor in file.tensors.values() if tensor.rows > 1}
        packed = packed_path(file)
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
    unit = measure_units(sorted(formats), lanes, progress, measure_pauses(lanes, progress), (packed, flash))
    profile = DeviceProfile(memory_bandwidth(), {file_system(packed): flash}, {str(lanes): unit})
    return this_machine(profile, lanes=lanes, path=packed)


def ceiling(share: int) -> Share | None:
    return None if share >= 100 else Share(share / 100)


def timed(model: Path, share: int, lanes: int, prompts: list[int]) -> dict[str, float]:
    """Tokens/s of prefill, of prompts of these lengths, and decode."""
    with LLM(model, threads=lanes, context=CONTEXT, memory=ceiling(share)) as llm:
        found = {f"prefill {n}": statistics.median(llm.bench(n, 0, REPEAT)[0]["samples_ts"]) for n in prompts}
        return found | {"decode": statistics.median(llm.bench(0, TOKENS, REPEAT)[0]["samples_ts"])}


def simulated(model: Path, share: int, device: Device, lanes: int, prompts: list[int]) -> dict[str, float]:
    """The same in virtual time."""
    memory = ceiling(share)
    with open_file(model) as file:
        spec = read_spec(file)
        roomy, found = Device(**{**vars(device), "memory": 1 << 41}), dict[str, float]()
        for length in prompts:
            question = Question(memory or 1 << 40, prompt=length, tokens=0, context=CONTEXT, threads=lanes)
            prefill = Simulation(file, spec, roomy, question).answer().prefill
            assert prefill is not None
            found[f"prefill {length}"] = prefill.tokens_per_s
        again = Question(memory or 1 << 40, prompt=0, tokens=TOKENS, context=CONTEXT, threads=lanes)
        decode = Simulation(file, spec, roomy, again).answer().decode
    assert decode is not None
    return found | {"decode": decode.tokens_per_s}


Cell = tuple[str, float, float]  # its name, tokens/s measured and simulated


def a_round(models: list[Path], shares: list[int], lanes: int, prompts: list[int], progress: Progress) -> list[Cell]:
    """Every model and share once, between two measurements of the machine."""
    cells = list[Cell]()
    for model in models:
        device = measured_device(model, lanes, progress)
        for share in shares:
            before, found = device, timed(model, share, lanes, prompts)
            device = measured_device(model, lanes, progress)
            said = [simulated(model, share, each, lanes, prompts) for each in (before, device)]
            for phase, rate in found.items():
                mean = statistics.harmonic_mean([each[phase] for each in said])
                cells.append((f"{model.name}, {lanes} lanes, {share} %, {phase}", rate, mean))
    return cells


def dilated(model: Path, seconds: float) -> None:
    """Decode steps of a phone in dilated real time, against the virtual clock. The bar: within 5 %."""
    device = load_soc("snapdragon-8gen3")
    print("| units | memory | virtual, ms | dilated, ms | factor | off by |\n|---|---|---|---|---|---|")
    for units, split, part in (
        (("cpu",), (), 0.5),
        (("gpu", "npu"), (("gpu", 0.5), ("npu", 0.5)), 1.0),
        (("gpu", "npu"), (("gpu", 0.5), ("npu", 0.5)), 0.5),
    ):
        with open_file(model) as file:
            made = Simulation(file, read_spec(file), device, Question(Share(part), units, split, prompt=0))
        steps = [made.step("decode", Rows(1, at)) for at in (100, 101)]
        virtual = made.run(steps).steps[-1][1]
        factor = seconds / virtual
        real = DilatedClock(made.device, made.units, steps, made.requests, factor=factor).run().steps[-1][1]
        row = "+".join(units), f"{100 * part:.0f} %", f"{1e3 * virtual:.3f}", f"{1e3 * real:.3f}", f"{factor:.0f}"
        print("| " + " | ".join([*row, f"{100 * (real / virtual - 1):+.2f} %"]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--shares", default="100,75,50,25")
    parser.add_argument("--prompts", default=str(PROMPT), help="lengths of prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    parser.add_argument("--dilated", action="store_true", help="compare the two drivers instead")
    parser.add_argument("--seconds", type=float, default=10.0, help="that a dilated run takes")
    arguments = parser.parse_args()
    if arguments.dilated:
        dilated(arguments.models[0], arguments.seconds)
        return
    shares, prompts = ([int(word) for word in text.split(",")] for text in (arguments.shares, arguments.prompts))
    for model in arguments.models:  # packs it, and measures the disk, once
        with LLM(model, threads=arguments.threads, context=64, memory=Share(0.5)):
            pass
    rounds = list[list[Cell]]()
    with Progress() as progress:
        for _ in range(arguments.rounds):
            rounds.append(a_round(arguments.models, shares, arguments.threads, prompts, progress))
    rows, sizes = list[dict[str, Any]](), list[float]()
    for cells in zip(*rounds, strict=True):
        errors = [said / rate - 1 for _, rate, said in cells]
        sizes.append(abs(statistics.median(errors)))
        rows.append(
            {
                "cell": cells[0][0],
                "measured": [rate for _, rate, _ in cells],
                "simulated": [said for _, _, said in cells],
                "errors": errors,
                "error": statistics.median(errors),
            }
        )
    if arguments.json:
        print(json.dumps({"cells": rows, "median": statistics.median(sizes), "worst": max(sizes)}, indent=1))
        return
    print("| cell | measured, tokens/s | simulated | error |\n|---|---|---|---|")
    for row in rows:
        measured, simulated = statistics.median(row["measured"]), statistics.median(row["simulated"])
        print(f"| {row['cell']} | {measured:.1f} | {simulated:.1f} | {100 * row['error']:+.1f} % |")
    p90 = sorted(sizes)[math.ceil(0.9 * len(sizes)) - 1]
    said = f"median {100 * statistics.median(sizes):.1f} %, p90 {100 * p90:.1f} %, worst {100 * max(sizes):.1f} %"
    print(f"\n{len(sizes)} cells: {said}")


if __name__ == "__main__":
    main()
