"""The graphs of a model's prompts on an NPU runtime: made of its weights, built or read from the disk, bound to the
arena."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coterie.actors.cpu import CpuUnit
from coterie.actors.npu import NpuUnit
from coterie.scheduler.layout import ModelLayout
from coterie.storage.unit import UnitBuffers

if TYPE_CHECKING:
    from coterie.models.load import Model


class Graphs:
    """The NPU unit of a model, and where its graphs come from."""

    def __init__(self, cpu: CpuUnit, buffers: UnitBuffers, model: "Model", progress: Callable[..., None]) -> None:
        self.unit = NpuUnit(cpu.arena, buffers, cpu.abort_address, {})

    def load(self, layout: ModelLayout) -> None:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return self.unit.describe()

    def close(self) -> None:
        self.unit.close()
