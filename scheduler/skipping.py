"""Whether leaving out neurons of a SwiGLU model pays on this disk: what a token would take with part of the weights in
memory, by what was measured of the machine.

A model on paper, as nothing of it runs. Of what does not fit, as much as can be is what the method skips: Up and Down
for CATS, Down for TEAL. Dense weights are streamed at the disk's best rate. Single neurons are read at its rate of
small random reads, whatever their size up to some KiB; live ones are taken to miss as often as any, since SwiGLU has no
hot neurons to speak of, and to be asked for in time. A sentence's core stays in memory and what is dense gives way to
it; choosing again streams everything once. Disk and memory work side by side.
"""

from dataclasses import dataclass
from pathlib import Path

from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
from coterie.models.thresholds import RESELECT
from coterie.scheduler.profile import DeviceProfile, file_system, single_reads


@dataclass(frozen=True)
class Machine:
    """bytes/s streamed from flash, small random reads/s, bytes/s from memory."""

    sequential: float
    reads: float
    memory: float


def known_machine(profile: DeviceProfile, path: Path) -> Machine | None:
    """What was measured of this machine and the file system at `path`; None where something is missing."""
    flash = profile.flash.get(file_system(path))
    if flash is None or not flash.bytes_per_s or not profile.memory_bandwidth:
        return None
    reads = single_reads(profile, path)
    return Machine(flash.bytes_per_s, reads, profile.memory_bandwidth) if reads else None


@dataclass(frozen=True)
class Costs:
    """Bytes of weights: `total` that a token uses; `gate`, `up`, `down` of all layers. And all layers' `neurons`."""

    total: int
    gate: int
    up: int
    down: int
    neurons: int

    @classmethod
    def of(cls, file: ModelHeader, spec: ModelSpec) -> "Costs":
        """As the file's formats have them. Of an embedding that is not also the head a token uses one row: nothing."""
        size = {name: tensor.nbytes for name, tensor in file.tensors.items()}
        if not spec.tied:
            del size["token_embd.weight"]
        layers = range(len(spec.layers))
        gate, up, down = (sum(size[f"blk.{i}.ffn_{name}.weight"] for i in layers) for name in ("gate", "up", "down"))
        return cls(sum(size.values()), gate, up, down, len(layers) * spec.ffn_dim)

    def skipped(self, method: str, sparsity: float) -> float:
        """Bytes that need not be read for a token. What TEAL drops of Gate's and Up's input saves nothing: weights lie
        by rows, and a column is a piece of every row."""
        matrices = {"cats": self.up + self.down, "teal": self.down, "core": self.gate + self.up + self.down}
        return sparsity * matrices[method]

    def seconds(self, method: str, sparsity: float, share: float, machine: Machine) -> float:
        """What a token takes with so much of the weights' bytes in memory; the method "dense" skips nothing."""
        missing = (1 - share) * self.total
        if method == "dense":
            return max(missing / machine.sequential, self.total / machine.memory)
        skipped = self.skipped(method, sparsity)
        if method == "core":
            flash = (max(0.0, missing - skipped) + missing / RESELECT) / machine.sequential
        else:
            neuron = self._neuron(method)
            absent = min(self.neurons, missing / neuron)
            streamed = (missing - absent * neuron) / machine.sequential
            flash = streamed + (1 - sparsity) * absent / machine.reads
        return max(flash, (self.total - skipped) / machine.memory)

    def break_even(self, method: str, share: float, machine: Machine) -> float:
        """The sparsity from which on flash has less to do than in streaming everything that is missing. For single
        neurons it does not depend on the share: so many reads take as long as all those bytes."""
        if method == "core":
            return (1 - share) * self.total / RESELECT / self.skipped(method, 1)
        return max(0.0, 1 - machine.reads * self._neuron(method) / machine.sequential)

    def _neuron(self, method: str) -> float:
        """Bytes that one read brings: of a neuron what the method skips."""
        return self.skipped(method, 1) / self.neurons
