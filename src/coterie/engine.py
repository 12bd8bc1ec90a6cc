"""The engine: token ids in, logits out. Opens a model, plans, loads, compiles, and runs one step at a time."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.actors.cpu import CpuUnit
from coterie.actors.host import Host, ThreadHost
from coterie.actors.neurons import neuron_kernels
from coterie.actors.unit import Rows
from coterie.ceiling import Ceiling
from coterie.divergence import Divergence, measure_divergence
from coterie.errors import UsageError
from coterie.kernels import library
from coterie.kernels.operands import PROBE_BYTES
from coterie.meter import Meter
from coterie.models.load import Model
from coterie.models.rope import fill_rope_table
from coterie.models.source import WeightSource
from coterie.models.spec import Rope
from coterie.others import OtherUnits
from coterie.prompts import Prompting
from coterie.room import SCRATCH_ROOM, check_free, room_for
from coterie.scheduler.dispatch import Dispatcher
from coterie.scheduler.layout import BATCH, lay_out_model, lay_out_units, tape_room
from coterie.scheduler.plan import Flash, Plan, Wishes
from coterie.scheduler.planner import make_plan, plan_flash
from coterie.scheduler.residency import ring_room
from coterie.sizes import Memory
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.available import available_memory
from coterie.storage.flash_buffers import lay_out_flash
from coterie.storage.flash_file import FlashFile
from coterie.storage.kv import KVCache, KVLayout
from coterie.storage.kv import Sequence as KVSequence
from coterie.storage.packer import RunPacker, pack_into
from coterie.storage.runs import PAGE, Extents, lay_out_runs
from coterie.storage.tables import fill_tables
from coterie.storage.weights import Residency
from coterie.stream import Stream
from coterie.supervision import Supervisor
from coterie.trace.chrome import write_chrome_trace

Floats = npt.NDArray[np.float32]
Progress = Callable[..., None]  # progress(label, done=0, total=0)


class Engine(Prompting):
    """A model in memory, ready to run.

    Kernels are compiled before weights are loaded; their machine code is cached on disk. Raises ModelError,
    PlanError, UsageError.
    """

    def __init__(
        self,
        model: Model,
        wishes: Wishes = Wishes(),  # noqa: B008 - it is frozen
        *,
        trace: Path | None = None,
        progress: Progress | None = None,
        host: Host | None = None,
    ) -> None:
        self.model, self.spec, self._trace = model, model.spec, trace
        self._progress: Progress = progress or (lambda label, done=0, total=0: None)
        self._wishes = replace(wishes, tracing=trace is not None)
        if trace is not None:
            write_chrome_trace(trace, [], 1.0)  # a path that cannot be written is known now
        self._packed = model.file if isinstance(model.file, FlashFile) else None
        self.flash: Flash | None = None
        if self._packed is not None:
            self.flash = plan_flash(self._packed.path, self._packed.identity, wishes)
        self.plan, self._residency = make_plan(model.file, model.spec, self._wishes, self.flash)
        check_free(self.plan, 0)
        plan, self.runs = self.plan, lay_out_runs(model.file.tensors, model.spec)
        self.host: Host = host or ThreadHost()
        regions = plan.regions if self._packed is None else plan.regions | room_for(self.runs, plan)
        self.arena = Arena(regions, shared=self.host.shared)
        if self._packed is not None:
            for region in SCRATCH_ROOM:
                self.arena.use_small_pages(region)
        self._units = lay_out_units(self.arena, plan.placement, plan.lanes, plan.chunk, tracing=self._wishes.tracing)
        buffers = self._units.cpu
        self.cache = KVCache(self.arena, KVLayout.of(self.spec), plan.context, BATCH + 1)
        self.supervisor = Supervisor(self.host, self.arena, buffers, self._progress)
        detached = self._packed is not None or self.host.shared or not plan.placement.exact
        actor = self.supervisor.start("cpu")
        self.unit = CpuUnit(self.arena, plan.lanes, buffers, detached=detached, actor=actor)
        self.stream: Stream | None = None
        self.meter: Meter | None = None
        self._lock = RLock()  # held while a step runs, or the ceiling changes
        self._ceiling = Ceiling(self)
        self._ropes: dict[Rope, BufferRef] | None = None
        self._loaded: set[str] = set()
        self._closed = False
        self.others: OtherUnits | None = None
        self.dispatcher: Dispatcher | None = None
        self.divergence: Divergence | None = None
        try:
            if not plan.placement.exact:
                self.others = OtherUnits(
                    self.unit, self._units, plan.placement, model, self._progress, wishes.gpu_share
                )
            if self._packed is not None:
                self.stream = self._open_stream(self._packed)
                self.meter = Meter(self.stream.unit, self.unit)
            self._lay_out()
            if isinstance(model.file, WeightSource):
                self._pack(model.file)
            self._fill_rope_tables()
            if self.others is not None:
                self.others.load(self.layout)
                self.divergence = measure_divergence(self)
                self.others.keep_weights_once()
                if self.divergence.identical and not plan.placement.lengths:
                    self.plan = replace(self.plan, numerics="exact")
            self.count_anew()
            if wishes.memory == "auto":
                self._ceiling.follow()
        except BaseException:
            self.close()
            raise

    def _open_stream(self, file: FlashFile) -> Stream:
        plan = self.plan
        assert plan.flash is not None
        buffers = lay_out_flash(
            self.arena,
            entries=tape_room(self.runs),
            ring_bytes=ring_room(self.runs),
            depth=plan.flash.depth,
            tracing=self._wishes.tracing,
        )
        stream = Stream(self.arena, file, plan, buffers, self.unit.abort_address, self.supervisor.start("flash"))
        self.unit.connect(stream.unit.arrived, stream.unit.freed)
        assert self.flash is not None
        self.flash = replace(self.flash, engine=stream.unit.engine)
        self.plan = replace(plan, flash=replace(plan.flash, engine=stream.unit.engine))
        return stream

    def _lay_out(self) -> None:
        """Cut the buffers that depend on what is resident, and fill the tables."""
        plan = self.plan
        sector = plan.flash.sector if plan.flash else PAGE
        self.layout = lay_out_model(
            self.arena, self.model.file, self.spec, self.runs, self._residency,
            lanes=plan.lanes, context=plan.context, chunk=plan.chunk, tile=plan.tile, ropes=self._ropes,
            sector=sector, tracing=self._wishes.tracing, counting=self._wishes.counting,
            placement=plan.placement, gpu=self._units.gpu,
        )  # fmt: skip
        self._compile()
        self._ropes = self.layout.shared.ropes
        self._logits: Floats = self.arena.numpy(self.layout.shared.logits)[:, : self.spec.vocab]
        stream = self.stream
        if stream is not None:
            assert plan.flash is not None
            stream.adopt(self.layout, self._residency.pinned, plan.flash.block, self._progress)
        self._fill_tables()

    def _fill_tables(self) -> None:
        """Tell kernels where weights are, with nothing in the neuron cache."""
        stream, plan = self.stream, self.plan
        for weights in (self.layout.whole, self.layout.weights):
            fill_tables(self.arena, weights, 0 if stream is None else stream.unit.arrived)
        if stream is not None and self.layout.neurons is not None:
            stream.open_neurons(self.layout.neurons, plan.flash.sector if plan.flash else PAGE)

    def _pack(self, file: WeightSource) -> None:
        total = self.plan.weight_bytes
        packers = [RunPacker(file, self.spec, run) for run in self.runs]
        progress = lambda done: self._progress("packing", done, total)  # noqa: E731
        pack_into(self.arena, self.layout.weights, packers, self.plan.lanes, progress)

    def _fill_rope_tables(self) -> None:
        for rope, ref in self.layout.shared.ropes.items():
            fill_rope_table(rope, self.arena.numpy(ref)[: self.plan.context])

    def _compile(self) -> None:
        """Have the machine code of whatever may run, before weights take the memory that the compiler needs."""
        wanted = [kernel for program in self.layout.programs.values() for kernel in program.kernels]
        if self.stream is not None and self._residency.slots:
            wanted += neuron_kernels(self.stream.unit.engine)
        library.compile_missing(wanted, self._progress, available_memory())

    def sequence(self) -> KVSequence:
        """A new, empty sequence; close it to give its memory back."""
        self._check_open()
        return self.cache.sequence()

    def decode(self, sequences: Sequence[KVSequence], tokens: Sequence[int]) -> Floats:
        """Append one token to each of up to BATCH different sequences; logits float32[n, vocab], maybe a view that the
        next step overwrites."""
        n = len(tokens)
        if not 1 <= n <= BATCH or n != len(sequences):
            raise UsageError(f"a decode step takes 1 to {BATCH} sequences and a token each")
        self.check(tokens)
        for s in sequences:
            s.reserve(s.length + 1)
        positions, tables = [s.length for s in sequences], [s.table_address for s in sequences]
        with self._lock:
            self._check_open()
            self._run("decode" if n == 1 else "batch", Rows(tokens, positions, tables, range(n)))
            for s in sequences:
                s.length += 1
            # A new ceiling, from another thread, may move the buffer.
            return self._logits[:n] if self.stream is None else self._logits[:n].copy()

    def read_bandwidth(self) -> float:
        """Bytes/s at which the lanes read the layers' weights, once through; the better of two times."""
        with self._lock:
            self._check_open()
            self._surely(self._ceiling.apply)
            seconds = []
            for _ in range(2):
                self._surely(lambda: self.ready("probe"))
                start = time.perf_counter()
                self._surely(lambda: self.unit.run("probe", [0], [0], [0], ()))
                seconds.append(time.perf_counter() - start)
            return float(self.layout.programs["probe"].words[0, PROBE_BYTES] / min(seconds))

    # --- the ceiling ----------------------------------------------------------------------------------

    def set_memory(self, memory: Memory) -> None:
        """Change the ceiling for good: at once between two steps, else the step under way is cut short and run again.
        From "auto" on it follows what the machine can spare.

        Raises PlanError for a ceiling that cannot hold what is not weights, and the smallest ring; UsageError where
        there is nothing to stream from.
        """
        self._check_open()
        self._ceiling.set(memory)

    def set_ceiling(self, memory: Memory, *, urgent: bool = True) -> None:
        """Change the ceiling for now; what is not `urgent` waits for the next step."""
        self._ceiling.ask(memory, urgent)
        if urgent:
            with self._lock:
                self._surely(self._ceiling.apply)

    @property
    def wishes(self) -> Wishes:
        """What a new plan for this engine must keep."""
        plan = self.plan
        return replace(
            self._wishes, threads=plan.lanes, context=plan.context, chunk=plan.chunk, memory=plan.memory, pinned=None
        )

    def adopt(self, plan: Plan, residency: Residency) -> None:
        """Drop what is no longer resident, and lay out anew. No step may be running."""
        assert self.stream is not None
        self.plan, self._residency = plan, residency
        self.unit.unload()
        self._loaded.clear()
        self.stream.forget(residency.pinned.size)
        keep = int(Extents.of(self.runs).nbytes[residency.pinned].sum())
        self.arena.release("weights", keep)
        self.arena.rewind("weights")
        for region in ("staging", "tables", "flags", "programs", "activations", "neurons", "cache"):
            if region in self.arena.regions:
                self.arena.release(region)
        self._lay_out()

    def itself(self) -> "Engine":
        """Of a weak proxy, what it stands for."""
        return self

    def flash_report(self) -> dict[str, Any] | None:
        """What streaming costs, since the model was opened or `count_anew` was called; None without a packed file."""
        return None if self.meter is None else self.meter.report(self.plan)

    def count_anew(self) -> None:
        if self.meter is not None:
            self.meter.reset()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this model has been closed; open it again to use it")

    def forecast(self) -> dict[str, Any]:
        """What decoding can be, with the bandwidth that memory gives now (Plan.forecast)."""
        return self.plan.forecast(self.read_bandwidth())

    def close(self) -> None:
        """Stop the units, write the trace, forget the memory. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as last:  # in reverse, each whatever becomes of the others
            last.callback(self.host.close)
            last.callback(self.arena.close)
            last.callback(self.model.close)
            if self._trace is not None:
                last.callback(self._write_trace, self._trace)
            if self.stream is not None:
                last.callback(self.stream.close)
            last.callback(self.unit.close)
            if self.others is not None:
                last.callback(self.others.close)
            last.callback(self._ceiling.unfollow)

    def _write_trace(self, path: Path) -> None:
        others = (("gpu", self._units.gpu), ("npu", self._units.npu))
        rings = [("cpu", self.unit.buffers.rings)] + [(name, unit.rings) for name, unit in others if unit is not None]
        if self.stream is not None:
            rings.append(("flash", self.stream.unit.buffers.trace))
            if self.stream.neurons is not None:
                rings.append(("neurons", self.stream.neurons.buffers.trace))
        arrays = [(name, self.arena.numpy(ref)) for name, ref in rings if ref is not None]
        write_chrome_trace(path, arrays, self.unit.cycles_per_second())
