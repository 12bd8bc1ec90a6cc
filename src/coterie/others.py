"""The units beside the CPU unit: which programs they run, and what is theirs (design section 7)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from coterie.actors.cpu import CpuUnit
from coterie.actors.gpu import GpuUnit
from coterie.actors.gpus import open_device
from coterie.actors.unit import Rows
from coterie.errors import UnitError
from coterie.graphs import Graphs
from coterie.kernels.record import WHOLE, Opcode
from coterie.scheduler.balance import Balance, Given
from coterie.scheduler.layout import ModelLayout, Units
from coterie.scheduler.lower_npu import SHARES
from coterie.scheduler.placement import CPU_ONLY, Placement

if TYPE_CHECKING:
    from coterie.models.load import Model

Progress = Callable[..., None]
OPCODES = {"matmul": int(Opcode.MATMUL), "ffn": int(Opcode.FFN)}  # of graphs


def shares(parts: Mapping[str, int], cuts: Mapping[str, Given]) -> dict[int, int]:
    """What a step's header says of cuts."""
    return {word: WHOLE * count // cuts[kind].of for kind, count in parts.items() for word in SHARES[kind]}


class OtherUnits:
    """GPU and NPU units of a model, where `placement` has them; it changes when one is lost. They are a queue and a
    thread of this process, whatever the CPU unit's host is. Raises UnitError where one is missing."""

    def __init__(
        self, cpu: CpuUnit, units: Units, placement: Placement, model: "Model", progress: Progress, gpu_share: float
    ) -> None:
        self.placement, self._cpu, self._progress = placement, cpu, progress
        self._layout: ModelLayout | None = None
        self._alone = False
        self.adapts = True  # whether cuts follow what their parts take
        self.gpu: GpuUnit | None = None
        self.graphs: Graphs | None = None
        self.balance: Balance | None = None
        try:
            if units.gpu is not None:
                self.gpu = GpuUnit(cpu.arena, units.gpu, open_device(cpu.arena, gpu_share))
                if not self.gpu.device.integrated and (placement.prefill, placement.decode) != ("gpu", "gpu"):
                    raise UnitError("this GPU has memory of its own, and so a KV cache of its own: use --units gpu")
            if units.npu is not None:
                self.graphs = Graphs(cpu, units.npu, model, progress, placement)
                self.balance = Balance(dict(placement.cuts)) if placement.split == "tensor" else None
        except BaseException:
            self.close()
            raise

    def load(self, layout: ModelLayout) -> None:
        """Have everything built before the first step: no step builds anything."""
        self._layout = layout
        if self.gpu is not None:
            weights = layout.weights.pinned
            self.gpu.device.upload(weights.offset, weights.nbytes)
            for done, program in enumerate(layout.gpu.values()):
                self._progress("building for the GPU", done, len(layout.gpu))
                self.gpu.load(program)
        if self.graphs is not None:
            self.graphs.load(layout)

    def keep_weights_once(self) -> None:
        """Where a device has its own copy of the weights, give the host's back: nobody could do its work then."""
        if self.gpu is not None and not self.gpu.device.integrated:
            self._cpu.arena.release("weights")
            self._alone = True

    @property
    def names(self) -> tuple[str, ...]:
        """The units that there are, by name."""
        return tuple(name for name, unit in (("gpu", self.gpu), ("npu", self.graphs)) if unit is not None)

    def on_gpu(self, name: str) -> bool:
        """Whether steps of that program are the GPU unit's now."""
        return (self.placement.decode if name in ("decode", "batch") else self.placement.prefill) == "gpu"

    def run_on_gpu(self, name: str, rows: Rows) -> None:
        """See GpuUnit.run."""
        assert self.gpu is not None
        assert self._layout is not None
        self.gpu.run(name, rows, [self._layout.shared.logits])

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """While the CPU unit runs a step of that program, the NPU unit runs the graphs in it, if it has any. Raises
        UnitLost where one of them fails."""
        if self.gpu is not None and self.placement.gpu:
            self.gpu.settle()  # after an interrupt its queue may still be at KV blocks
        program = self._layout.npu.get(name) if self._layout else None
        if program is None or self.graphs is None:
            yield
        else:
            parts = self.parts
            self._cpu.give(shares(parts, self.placement.cuts))
            before = self._cpu.product_seconds()
            pieces = {OPCODES[kind]: self.placement.cuts[kind].pieces_of(count) for kind, count in parts.items()}
            with self.graphs.unit.beside(program.name, self._cpu.next_epoch, pieces):
                yield
            if self.balance is not None and self.adapts:
                after, busy = self._cpu.product_seconds(), self.graphs.unit.busy_seconds()
                self.balance.observe({kind: (busy[OPCODES[kind]], after[kind] - before[kind]) for kind in parts})

    @property
    def parts(self) -> dict[str, int]:
        """How many parts of each kind of product the NPU computes in the next step with graphs."""
        if self.balance is not None:
            return dict(self.balance.parts)
        return {kind: cut.parts for kind, cut in self.placement.cuts.items()}

    @contextmanager
    def none(self) -> Iterator[None]:
        """Meanwhile the CPU unit does everything."""
        placement, self.placement = self.placement, CPU_ONLY
        try:
            yield
        finally:
            self.placement = placement

    def give_up(self) -> None:
        """From now on the CPU unit does everything. Raises UnitError where it has no weights."""
        if self._alone:
            raise UnitError("the GPU that has the weights is gone; open the model again")
        self.placement = CPU_ONLY

    def describe(self) -> list[dict[str, Any]]:
        """What they are, with what they have built so far."""
        return [unit.describe() for unit in (self.gpu, self.graphs) if unit is not None]

    def close(self) -> None:
        for unit in (self.graphs, self.gpu):
            if unit is not None:
                unit.close()
