"""Models on paper, for simulators: shapes without weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from coterie.commands.measure_units import Shape, made_up
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
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
