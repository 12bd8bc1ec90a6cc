"""Models on paper, for simulators: shapes without weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from coterie.commands.measure_units import Shape, made_up
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
from coterie.scheduler.profile import FlashRow, KernelCost, UnitProfile
from coterie.scheduler.simulate import Question, Simulation
from coterie.scheduler.soc import Device
from coterie.scheduler.soc_file import load_soc
from coterie.sizes import Share

PHONE = load_soc("snapdragon-8gen3")
SMALL = Shape(512, 8, 2, 2048, 4, 2048)
LLAMA_1B = Shape(2048, 32, 8, 8192, 16, 128256)
LLAMA_8B = Shape(4096, 32, 8, 14336, 32, 128256)
DENSE_47B = Shape(6144, 48, 8, 32768, 64, 32000)


def on_paper(shape: Shape, format: str = "Q4_0") -> tuple[ModelHeader, ModelSpec]:
    """A header without a file, and the model it tells of."""
    spec, tensors = made_up(shape, format)
    return cast(ModelHeader, SimpleNamespace(tensors=tensors, path=Path("paper.gguf"))), spec


def simulation(device: Device = PHONE, shape: Shape = SMALL, **asked: Any) -> Simulation:
    return Simulation(*on_paper(shape), device, Question(**{"memory": Share(1.0), "prompt": 16, "tokens": 8, **asked}))


# A machine that was measured: by depth, so many GB/s; two lanes that read 10 GB/s and compute 1 T/s.
ROWS = tuple(FlashRow("sequential", "io_uring", 1 << 20, depth, 1 << 30, depth * 1e9, 1.0) for depth in (1, 2, 4))
KERNELS = tuple(
    KernelCost(name, 1e-5, rate, bandwidth, 0.0)
    for name, rate, bandwidth in [
        *((f"{family}:Q4_0:1", 0.0, 1e10) for family in ("matmul", "ffn_up", "ffn_down")),
        *((f"{family}:Q4_0:4", 1e12, 0.0) for family in ("matmul", "ffn_up", "ffn_down")),
        ("matmul:Q4_0:2", 0.0, 1e10),
        *((family, 1e12, 0.0) for family in ("attend", "attend_one", "norm", "rope", "merge", "embed:Q4_0")),
    ]
)
UNIT = UnitProfile(2, KERNELS, 1e-4, 2e-4, 0.8)
