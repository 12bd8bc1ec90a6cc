"""The units beside the CPU unit: which programs they run, and what is theirs (design section 7)."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from coterie.actors.cpu import NOTHING, CpuUnit
from coterie.actors.gpu import GpuUnit
from coterie.actors.gpus import open_device
from coterie.actors.host import UnitLost
from coterie.actors.unit import Rows
from coterie.errors import UnitError
from coterie.graphs import Graphs
from coterie.kernels.record import LINE_PART, LINE_POLLED, LINE_REST, LINE_SLEPT, PRODUCTS, WHOLE
from coterie.scheduler.balance import Balance, Given
from coterie.scheduler.layout import ROW_DECODE, WITH_GPU, ModelLayout, Units, decode_name
from coterie.scheduler.lower_npu import ROW_SHARES, SHARES
from coterie.scheduler.placement import CPU_ONLY, DECODE, ROW_KINDS, Placement

if TYPE_CHECKING:
    from coterie.models.load import Model

Progress = Callable[..., None]
WORDS = SHARES | ROW_SHARES | {kind: (word,) for kind, word in DECODE.items()}  # header words of kinds of products


def shares(parts: Mapping[str, int], cuts: Mapping[str, Given]) -> dict[int, int]:
    """What a step's header says of cuts."""
    return {word: cuts[kind].share(count) for kind, count in parts.items() for word in WORDS[kind]}


class OtherUnits:
    """GPU and NPU units of a model, where `placement` has them; it changes when one is lost. They are a queue and a
    thread of this process, whatever the CPU unit's host is. Raises UnitError where one is missing."""

    def __init__(
        self, cpu: CpuUnit, units: Units, placement: Placement, model: "Model", progress: Progress, gpu_share: float
    ) -> None:
        self.placement, self._cpu, self._progress = placement, cpu, progress
        self._layout: ModelLayout | None = None
        self._alone = False
        self._first = 0  # tokens of the chunk under way that are the GPU unit's
        self.adapts = True  # whether cuts follow what their parts take
        self.gpu: GpuUnit | None = None
        self.graphs: Graphs | None = None
        self.balance: Balance | None = None
        try:
            if units.gpu is not None:
                cores = placement.own_cores()
                device = open_device(cpu.arena, gpu_share, cores)
                self.gpu = GpuUnit(cpu.arena, units.gpu, device, cores, placement.fast)
                if not self.gpu.device.integrated and (placement.prefill, placement.decode) != ("gpu", "gpu"):
                    raise UnitError("this GPU has memory of its own, and so a KV cache of its own: use --units gpu")
            if placement.split == "tensor":
                self.balance = Balance(dict(placement.cuts))
            if units.npu is not None:
                self.graphs = Graphs(cpu, units.npu, model, progress, placement)
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
        placement = self.placement
        if name == "decode" and placement.shares_decode:  # else both decode, or the CPU unit alone
            return False
        if name in ("decode", "batch"):
            return placement.decode == "gpu"
        if "tokens" in placement.cuts and placement.prefill == "gpu":  # all of a chunk, or none of it
            return self.parts["tokens"] == placement.cuts["tokens"].of
        return placement.prefill == "gpu"

    def program_for(self, tokens: int) -> str:
        """What follows the name of a program for a chunk of so many tokens: "@" and the graphs' length, "+gpu" where
        the GPU unit computes the first tokens, nothing where one unit does everything."""
        first = self.placement.first_tokens(tokens, self.parts.get("tokens", 0))
        length = self.placement.length_for(tokens - first)
        return f"@{length}" * (length is not None) + WITH_GPU * (0 < first < tokens)

    def first_tokens(self, name: str, tokens: int) -> int:
        """How many of a chunk's tokens the GPU unit computes in a step that others do too; in a head's, as when it
        began."""
        if name.startswith("prefill"):
            self._first = self.placement.first_tokens(tokens, self.parts["tokens"])
        return self._first

    def decode_program(self) -> tuple[str, dict[int, int]] | None:
        """The program of a decode step that CPU and GPU unit compute together, the one with the fewest meetings, and
        how much of products is the GPU unit's, by header word; None: one of them does."""
        if not self.placement.shares_decode:
            return None
        rest = WHOLE if self.placement.decode == "gpu" else 0  # of products that are not cut
        parts = {kind: count for kind, count in self.parts.items() if kind in DECODE}
        words = dict.fromkeys(PRODUCTS, rest) | shares(parts, self.placement.cuts)
        wanted = {kind for kind, word in DECODE.items() if words[word]}
        found = next(kinds for kinds in self.placement.decode_kinds if wanted <= set(kinds))
        return (decode_name(found), words) if wanted else None

    @property
    def decode_beside_npu(self) -> bool:
        """Whether CPU and NPU unit compute decode steps of one token together."""
        parts = self.parts
        return any(parts[kind] for kind in self.placement.row_kinds)

    def run_on_gpu(self, name: str, rows: Rows) -> None:
        """See GpuUnit.run."""
        assert self.gpu is not None
        assert self._layout is not None
        self._alone_in(name)
        self.gpu.run(name, rows, [self._layout.shared.logits])

    def _alone_in(self, name: str) -> None:
        """A step of that program without the GPU unit, which might take part: its chance comes in time."""
        if self.balance is not None and self.adapts:
            tokens = name.startswith("prefill") and not name.endswith(WITH_GPU)
            self.balance.rest((*DECODE, *ROW_KINDS) if name == "decode" else ("tokens",) * tokens)

    @contextmanager
    def gpu_beside(self, name: str, rows: Rows, words: Mapping[int, int] = NOTHING) -> Iterator[None]:
        """While the CPU unit runs its part of a step, the GPU unit runs its own, of these rows; `words`: how much of
        products is the GPU unit's, by header word. Raises UnitLost."""
        assert self.gpu is not None
        cpu = self._cpu
        epoch = max(cpu.next_epoch, self.gpu.next_epoch)
        cpu.skip_to(epoch)
        before, started = cpu.seconds(), time.perf_counter()
        with self.gpu.beside(name, rows, epoch, words, cpu.abort_address):
            yield
            ours = time.perf_counter() - started
        late = time.perf_counter() - started - ours  # that the GPU unit ended behind us
        if self.balance is None or not self.adapts:
            return
        took = (cpu.seconds() - before).tolist()
        if name.startswith("decode"):
            both = zip(took[LINE_PART:LINE_REST], took[LINE_REST:], strict=True)
            seconds = dict(zip(DECODE, both, strict=True))
            self.balance.observe_waits({kind: seconds[kind] for kind in DECODE if kind in self.balance.parts})
        else:
            waited = took[LINE_SLEPT] + took[LINE_POLLED] - sum(took[LINE_REST:])  # that for keys, and not for an NPU
            self.balance.observe_waits({"tokens": (ours - waited, waited + late)})

    @contextmanager
    def beside(self, name: str) -> Iterator[dict[int, int]]:
        """While the CPU unit runs a step of that program, the NPU unit runs the graphs in it, if it has any; how much
        of products is given to it, by header word. Raises UnitLost where one of them fails."""
        if self.gpu is not None and self.placement.gpu and not name.endswith(WITH_GPU):
            self.gpu.settle()  # after an interrupt its queue may still be at KV blocks
        self._alone_in(name)
        program = self._layout.npu.get(name) if self._layout else None
        if program is None or self.graphs is None:
            yield {}
        else:
            words, cuts = ROW_SHARES if name == ROW_DECODE else SHARES, self.placement.cuts
            parts = {kind: count for kind, count in self.parts.items() if kind in words}
            before = self._cpu.seconds()
            pieces = {kind: cuts[kind].pieces_of(count) for kind, count in parts.items()}
            with self.graphs.unit.beside(program.name, self._cpu.next_epoch, pieces):
                yield shares(parts, cuts)
            if self.balance is not None and self.adapts:
                took, busy = self._cpu.seconds() - before, self.graphs.unit.busy_seconds()
                ours = {kind: [LINE_PART + PRODUCTS.index(word) for word in words[kind]] for kind in parts}
                self.balance.observe({kind: (busy[kind], float(took[ours[kind]].sum())) for kind in parts})

    def watch(self) -> None:
        """While the CPU unit runs. Raises UnitLost where a unit that it may be waiting for does not answer."""
        if self.gpu is not None and self.placement.gpu:
            self.gpu.watch()

    @property
    def parts(self) -> dict[str, int]:
        """How many parts of each kind of product are another unit's in the next step."""
        balance = self.balance
        return {kind: balance.parts[kind] if balance else cut.parts for kind, cut in self.placement.cuts.items()}

    @contextmanager
    def none(self) -> Iterator[None]:
        """Meanwhile the CPU unit does everything."""
        placement, self.placement = self.placement, CPU_ONLY
        try:
            yield
        finally:
            self.placement = placement

    def give_up(self, lost: str) -> None:
        """A unit is lost, and from now on the CPU unit does everything. Raises UnitError where it has no weights."""
        if self.gpu is not None and lost != "gpu":
            with suppress(UnitLost):  # no step of its own comes to wait for what it may still write
                self.gpu.settle()
        if self._alone:
            raise UnitError("the GPU that has the weights is gone; open the model again")
        self.placement = CPU_ONLY

    def describe(self) -> list[dict[str, Any]]:
        """What they are, with what they have built so far, and their parts of products as cuts are now."""
        cuts, parts = self.placement.cuts, self.parts
        found = []
        for unit, kinds in ((self.gpu, ("tokens", *DECODE)), (self.graphs, (*SHARES, *ROW_KINDS))):
            if unit is not None:
                given = {kind: [parts[kind], cuts[kind].of] for kind in kinds if kind in parts}
                found.append(unit.describe() | ({"parts": given} if given else {}))
        return found

    def close(self) -> None:
        for unit in (self.graphs, self.gpu):
            if unit is not None:
                unit.close()
