"""The engine: token ids in, logits out. Opens a model, plans, packs, compiles, and runs one step at a time."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coterie.actors.cpu import CpuUnit
from coterie.errors import UsageError
from coterie.kernels.library import is_cached
from coterie.kernels.operands import PROBE_BYTES
from coterie.models.load import Model
from coterie.models.rope import rope_table
from coterie.scheduler.layout import BATCH, OUTPUT_ROWS, lay_out_model
from coterie.scheduler.plan import Plan, make_plan
from coterie.scheduler.program import Program
from coterie.storage.arena import Arena
from coterie.storage.kv import KVCache, KVLayout
from coterie.storage.kv import Sequence as KVSequence
from coterie.storage.unit import lay_out_unit
from coterie.storage.weights import Packer
from coterie.trace.chrome import write_chrome_trace

ROPE_ROWS = 256  # positions of a rope table computed at a time
Floats = npt.NDArray[np.float32]
Progress = Callable[..., None]  # progress(label, done=0, total=0)


class Engine:
    """A model in memory, ready to run.

    Programs are compiled when they are first needed; their machine code is cached on disk. Raises ModelError,
    PlanError, UsageError.
    """

    def __init__(
        self,
        model: Model,
        *,
        threads: int | None = None,
        context: int | None = None,
        memory: int | None = None,
        trace: Path | None = None,
        progress: Progress | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.spec, self._trace = model, model.spec, trace
        self._progress: Progress = progress or (lambda label, done=0, total=0: None)
        tracing = trace is not None
        if trace is not None:
            write_chrome_trace(trace, np.zeros((0, 0), np.uint8), 1.0)  # a path that cannot be written is known now
        self.plan: Plan = make_plan(
            model.file, model.spec, threads=threads, context=context, memory=memory, tracing=tracing,
            sources=sources or {},
        )  # fmt: skip
        plan = self.plan
        self.arena = Arena(plan.regions)
        self.layout = lay_out_model(
            self.arena, model.file, self.spec,
            lanes=plan.lanes, context=plan.context, chunk=plan.chunk, tile=plan.tile,
        )  # fmt: skip
        buffers = lay_out_unit(self.arena, plan.lanes, plan.chunk, tracing=tracing)
        self.cache = KVCache(self.arena, KVLayout.of(self.spec), plan.context, BATCH + 1)
        self._logits: Floats = self.arena.numpy(self.layout.shared.logits)[:, : self.spec.vocab]
        self._pack()
        self._fill_rope_tables()
        self.unit = CpuUnit(self.arena, plan.lanes, buffers)
        self._loaded: set[str] = set()
        self._closed = False

    def _pack(self) -> None:
        total = sum(tensor.nbytes for tensor in self.model.file.tensors.values())
        packer = Packer(self.model.file, self.spec, self.arena, lambda done: self._progress("packing", done, total))
        packer.fill(self.layout.weights, self.plan.lanes)

    def _fill_rope_tables(self) -> None:
        for rope, ref in self.layout.shared.ropes.items():
            table = self.arena.numpy(ref)
            for first in range(0, self.plan.context, ROPE_ROWS):
                last = min(self.plan.context, first + ROPE_ROWS)
                table[first:last] = rope_table(rope, first, last)

    def _run(
        self,
        name: str,
        ids: Sequence[int],
        positions: npt.ArrayLike,
        tables: npt.ArrayLike,
        outputs: npt.ArrayLike,
    ) -> None:
        self._check_open()
        self.ready(name)
        self.unit.run(name, ids, positions, tables, outputs)

    def ready(self, *names: str) -> None:
        """Compile and link programs now, rather than when they are first run."""
        for name in names:
            if name not in self._loaded:
                self._load(self.layout.programs[name])
                self._loaded.add(name)

    def _load(self, program: Program) -> None:
        kernels = list(dict.fromkeys(program.kernels))
        cold = not all(map(is_cached, kernels))
        self.unit.load(program, lambda n: self._progress("compiling", n, len(kernels)) if cold else None)

    @property
    def weight_kind(self) -> str:
        """The format that most weights are in."""
        sizes: dict[str, int] = {}
        for tensor in self.model.file.tensors.values():
            sizes[tensor.format] = sizes.get(tensor.format, 0) + tensor.nbytes
        return max(sizes, key=lambda name: sizes[name])

    def sequence(self) -> KVSequence:
        """A new, empty sequence; close it to give its memory back."""
        self._check_open()
        return self.cache.sequence()

    def check(self, tokens: Sequence[int]) -> None:
        """Raise UsageError for ids that are no tokens of this model."""
        wrong = [t for t in tokens if not isinstance(t, int | np.integer) or not 0 <= t < self.spec.vocab]
        if wrong:
            raise UsageError(f"token {wrong[0]} does not exist: this model's ids are 0 to {self.spec.vocab - 1}")

    def prefill(self, sequence: KVSequence, tokens: Sequence[int], rows: Sequence[int] | None = None) -> Floats:
        """Append tokens to a sequence, in chunks; logits float32[n, vocab] of `rows` (indices into `tokens`,
        ascending; default: the last)."""
        self.check(tokens)
        if not len(tokens):
            raise UsageError("there are no tokens to compute")
        wanted = np.array([len(tokens) - 1] if rows is None else rows, np.int64)
        sequence.reserve(sequence.length + len(tokens))
        logits = np.empty((wanted.size, self.spec.vocab), np.float32)
        done = 0
        for first in range(0, len(tokens), self.plan.chunk):
            ids = tokens[first : first + self.plan.chunk]
            positions = sequence.length + np.arange(len(ids))
            tables = np.full(len(ids), sequence.table_address)
            self._run("prefill", ids, positions, tables, ())
            sequence.length += len(ids)
            here = wanted[(wanted >= first) & (wanted < first + len(ids))] - first
            for part in range(0, here.size, OUTPUT_ROWS):
                outputs = here[part : part + OUTPUT_ROWS]
                self._run("head", ids, positions, tables, outputs)
                logits[done : done + outputs.size] = self._logits[: outputs.size]
                done += outputs.size
            self._progress("prompt", first + len(ids), len(tokens))
        return logits

    def decode(self, sequences: Sequence[KVSequence], tokens: Sequence[int]) -> Floats:
        """Append one token to each of up to BATCH different sequences; logits float32[n, vocab], a view that the
        next step overwrites."""
        n = len(tokens)
        if not 1 <= n <= BATCH or n != len(sequences):
            raise UsageError(f"a decode step takes 1 to {BATCH} sequences and a token each")
        self.check(tokens)
        for s in sequences:
            s.reserve(s.length + 1)
        positions, tables = [s.length for s in sequences], [s.table_address for s in sequences]
        self._run("decode" if n == 1 else "batch", tokens, positions, tables, range(n))
        for s in sequences:
            s.length += 1
        return self._logits[:n]

    def read_bandwidth(self) -> float:
        """Bytes/s at which the lanes read the layers' weights, once through."""
        program = self.layout.programs["probe"]
        self._run("probe", [0], [0], [0], ())
        start = time.perf_counter()
        self._run("probe", [0], [0], [0], ())
        return float(program.words[0, PROBE_BYTES] / (time.perf_counter() - start))

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this model has been closed; open it again to use it")

    def forecast(self) -> dict[str, float]:
        """What decoding can be: bytes/s that memory gives now, and tokens/s if nothing else took time."""
        bandwidth = self.read_bandwidth()
        return {"read_bandwidth": bandwidth, "tokens_per_s": bandwidth / self.plan.bytes_per_token}

    def close(self) -> None:
        """Stop the unit, write the trace, forget the memory. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.unit.close()
        rings = self.unit.buffers.rings
        if self._trace is not None and rings is not None:
            write_chrome_trace(self._trace, self.arena.numpy(rings), self.unit.cycles_per_second())
        self.model.close()
        self.arena.close()
