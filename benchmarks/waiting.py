"""How lanes wait for another unit: asleep for what waits usually take, then looking (HeteroInfer, section 4.3).

    python benchmarks/waiting.py [--us 300] [--kernels 60] [--steps 40] [--lanes 1] [--json OUT]

An emulated NPU runs graphs that take so many microseconds and no core; the CPU unit's lanes meet it after each. Printed
are the parts of the waits spent asleep and looking, by the lanes' own counts, and how late a lane was.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from coterie.actors.cpu import CpuUnit
from coterie.actors.lanes import cycles_per_second
from coterie.actors.npu import NpuUnit
from coterie.actors.npu_product import Product
from coterie.kernels import library
from coterie.kernels import record as r
from coterie.kernels.record import Opcode
from coterie.scheduler.program import ProgramBuilder
from coterie.storage.arena import Arena
from coterie.storage.unit import lay_out_unit

REGIONS = dict.fromkeys(("state", "flags", "programs", "activations"), 4 << 20)


class Emulated:
    """A graph that takes some time and no core."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.ends = seconds, list[int]()
        self._cycles = library.function("lane_cycles", 0)

    def run(self) -> None:
        time.sleep(self.seconds)
        self.ends.append(self._cycles())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--us", type=float, default=300)
    parser.add_argument("--kernels", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    arena = Arena(REGIONS)
    units = [lay_out_unit(arena, lanes, 8, tracing=False) for lanes in (given.lanes, 1)]
    cpu = CpuUnit(arena, given.lanes, units[0], detached=True)
    npu = NpuUnit(arena, units[1], cpu.abort_address)
    error = arena.allocate("flags", r.LINE)
    ours, theirs = (ProgramBuilder(name, arena, lanes, error) for name, lanes in (("cpu", given.lanes), ("npu", 1)))
    ours.add("meet", Opcode.POST, {})
    for _ in range(given.kernels):
        theirs.meet(ours.drafts[-1].flag)
        theirs.add("graph", Opcode.FFN, {}, waits=[])
        ours.meet(theirs.drafts[-1].flag)
        ours.add("meet", Opcode.POST, {})
    program, graph = ours.build(), Emulated(given.us * 1e-6)
    cpu.load(program)
    nothing = np.zeros((1, 1), np.float32)
    npu.load(theirs.build(), [Product([graph], [nothing], nothing, None)] * given.kernels)
    counts = arena.numpy(units[0].counts)

    def step() -> float:
        begun = time.perf_counter()
        with npu.beside("npu", cpu.next_epoch, {int(Opcode.FFN): 1}):
            cpu.run("cpu", [0], [0], [0], ())
        return time.perf_counter() - begun

    step()
    counts[:] = 0
    seconds = [step() for _ in range(given.steps)]
    slept, polled = (float(counts[:, word].sum()) / cycles_per_second() for word in (r.LINE_SLEPT, r.LINE_POLLED))
    found = {
        "kernel_us": given.us,
        "waits": given.steps * given.kernels * given.lanes,
        "slept_s": slept,
        "polled_s": polled,
        "polling_share": polled / (slept + polled),
        "us_per_kernel": float(np.median(seconds)) / given.kernels * 1e6,
    }
    npu.close()
    cpu.close()
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
