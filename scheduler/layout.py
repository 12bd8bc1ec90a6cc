"""Lay a model out: the same walk counts bytes in a ledger for the plan, and cuts buffers from the arena."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from coterie.kernels import operands as o
from coterie.kernels.formats import COLUMNS
from coterie.kernels.library import kernel_name
from coterie.kernels.record import LINE, Opcode
from coterie.kernels.shapes import SPAN
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec, Rope
from coterie.scheduler.buffers import Laid, Shared
from coterie.scheduler.lower import Lowering
from coterie.scheduler.lower_gpu import GpuLowering
from coterie.scheduler.lower_gpu_cut import CpuRows, FirstTokens, GpuRows, Meetings, flags
from coterie.scheduler.lower_npu import NpuLowering, NpuTokens
from coterie.scheduler.placement import CPU_ONLY, Placement
from coterie.scheduler.program import Operand, Program, ProgramBuilder
from coterie.scheduler.workspace import Mode
from coterie.storage.arena import BufferRef, Ledger, round_up
from coterie.storage.neuron_buffers import NeuronBuffers, bundle_runs, lay_out_neurons, layer_neurons
from coterie.storage.runs import PAGE, Run, embedding_run
from coterie.storage.unit import UnitBuffers, lay_out_unit
from coterie.storage.weights import Residency, Weights, lay_out

BATCH = 8  # rows of a decode batch
PROBE_PIECE = 256 << 10  # bytes
LOOKUPS = 4  # threads that look embeddings up on flash
WITH_GPU = "+gpu"  # behind the name of a program that CPU and GPU unit compute together
ROW_DECODE = "decode@1"  # a decode step of CPU and NPU unit
OUTPUT_ROWS = 8  # rows whose logits are computed together, each in two planes


@dataclass(frozen=True)
class ModelLayout:
    """A model's buffers and programs. Programs by name: `decode` (one row), `batch` (2 to 8 rows of different
    sequences), `prefill` (a chunk of one sequence, no logits), `head` (logits of chosen rows of a prefill), `probe`
    (reads the pinned weights: the machine's bandwidth, with the same lanes on the same memory). `whole`: the weights as
    prompts use them, which differ from `weights` where decode has a neuron cache. `lookups`:
    uint8[rows][group bytes], room for embeddings that are not pinned; `bounce`: uint8[LOOKUPS][extent bytes];
    `neurons`: buffers of the neuron cache, where there is one. `hidden`: by program, where hidden states enter and
    leave a part of a model, float32[rows][dim, padded with zeros]. `gpu`: the GPU unit's programs, by the names of
    those they stand for; `npu`: the NPU unit's, by the name of the CPU unit's that runs beside it (`prefill@64`, whose
    head is `head@64`; ROW_DECODE, with logits); `prefill+gpu`, `head+gpu` and `decode+gpu:...` (decode_name) are
    computed by both, and `prefill@64+gpu` by three."""

    weights: Weights
    whole: Weights
    shared: Shared
    programs: dict[str, Program]
    lookups: BufferRef | None
    bounce: BufferRef | None
    neurons: NeuronBuffers | None
    hidden: dict[str, tuple[BufferRef, BufferRef]]
    gpu: dict[str, Program] = field(default_factory=dict)
    npu: dict[str, Program] = field(default_factory=dict)

    @property
    def on_cpu(self) -> list[Program]:
        """Programs whose tables lie in the arena."""
        return [*self.programs.values(), *self.npu.values()]


def lay_out_model(
    ledger: Ledger,
    file: ModelHeader,
    spec: ModelSpec,
    runs: tuple[Run, ...],
    residency: Residency,
    *,
    lanes: int,
    context: int,
    chunk: int,
    tile: int,
    placement: Placement = CPU_ONLY,
    gpu: UnitBuffers | None = None,
    ropes: dict[Rope, BufferRef] | None = None,
    sector: int = PAGE,
    tracing: bool = False,
    counting: bool = False,
) -> ModelLayout:
    """Cut everything but KV blocks and trace rings, in a fixed order. `gpu`: the GPU unit's own buffers, where
    `placement` has one; `ropes`: those that are there already; `sector`: of the disk, bytes; `tracing`, `counting`: as
    of Wishes."""
    weights = lay_out(file.tensors, spec, runs, residency, ledger, whole=not residency.slots)
    whole = weights
    if residency.slots:  # a prompt's chunk uses all neurons, and has a tape of its own
        whole = lay_out(file.tensors, spec, runs, residency, ledger, beside=weights)
    ropes = ropes or {
        rope: ledger.allocate("state", (context, 2, rope.dims // 2), np.float32)
        for rope in dict.fromkeys(layer.rope for layer in spec.layers)
    }
    width = round_up(spec.vocab, COLUMNS) if spec.has_head else 0
    logits = ledger.allocate("activations", (2 * OUTPUT_ROWS, width), np.float32)
    uses = neurons = None
    if spec.sparse and counting:
        uses = ledger.allocate("cache", (len(spec.layers), layer_neurons(bundle_runs(runs)[0])), np.int32)
    if residency.slots:
        neurons = lay_out_neurons(ledger, runs, residency.slots, sector, tracing=tracing)
    cache = neurons.control if neurons else None
    shared = Shared(lanes, context, ledger.allocate("flags", LINE), ropes, logits, cache, uses)

    laid = Laid(spec, weights, shared, ledger)

    def lowering(mode: Mode, rows: int, tile: int) -> Lowering:
        used = whole if mode == "prefill" else weights
        return Lowering(laid._replace(weights=used), mode=mode, rows=rows, tile=tile)

    prefill = lowering("prefill", chunk, tile)
    decode = lowering("decode", 1, 1)
    programs = [decode.whole("decode")]
    batch = lowering("decode", BATCH, tile)
    programs += [batch.whole("batch"), prefill.body("prefill")]
    made = {"decode": decode, "batch": batch, "prefill": prefill}
    hidden = {name: (lowered.entering, lowered.leaving) for name, lowered in made.items()}
    if spec.has_head:
        programs.append(prefill.head("head"))
    programs.append(_probe(ledger, weights, shared))
    on_gpu = _on_gpu(laid, placement, gpu, chunk)
    written = flags(ledger, len(spec.layers)) if "tokens" in placement.cuts else []
    if gpu is not None:
        own, its = _with_gpu(laid, placement, gpu, written, chunk=chunk, tile=tile)
        programs, on_gpu = programs + own, on_gpu | {program.name: program for program in its}
    beside, on_npu = _with_npu(laid, placement, written, tile)
    programs += beside
    lookups = bounce = None
    embedding = weights.embedding
    if embedding and sum(part.count for part in embedding.slices) < embedding.run.extents:
        run = embedding.run
        lookups = ledger.allocate("activations", (max(chunk, BATCH), run.item_bytes))
        bounce = ledger.allocate("activations", (LOOKUPS, run.stride), align=PAGE)
    named = {p.name: p for p in programs}
    return ModelLayout(weights, whole, shared, named, lookups, bounce, neurons, hidden, on_gpu, on_npu)


class Units(NamedTuple):
    """The compute units' own buffers; of the GPU, which has one queue, and the NPU, which runs one graph at a time,
    only where they are placed."""

    cpu: UnitBuffers
    gpu: UnitBuffers | None
    npu: UnitBuffers | None


def lay_out_units(ledger: Ledger, placement: Placement, lanes: int, chunk: int, *, tracing: bool) -> Units:
    """Cut the units' own buffers, for steps of up to `chunk` rows."""
    cpu = lay_out_unit(ledger, lanes, chunk, tracing=tracing)
    gpu = lay_out_unit(ledger, 1, chunk, tracing=tracing) if placement.gpu else None
    npu = lay_out_unit(ledger, 1, chunk, tracing=tracing) if placement.prefill == "npu" else None
    return Units(cpu, gpu, npu)


def _on_gpu(laid: Laid, placement: Placement, unit: UnitBuffers | None, chunk: int) -> dict[str, Program]:
    """The GPU unit's programs."""
    if unit is None:
        return {}
    made: list[Program] = []
    if placement.prefill == "gpu":
        prefill = GpuLowering(laid, unit, rows=chunk)
        made += [prefill.body("prefill"), prefill.head("head")]
    if placement.decode == "gpu":
        made += [GpuLowering(laid, unit, rows=1).whole("decode")]
        made += [GpuLowering(laid, unit, rows=BATCH).whole("batch")]
    return {program.name: program for program in made}


def _with_gpu(
    laid: Laid, placement: Placement, unit: UnitBuffers, written: list[BufferRef], *, chunk: int, tile: int
) -> tuple[list[Program], list[Program]]:
    """Programs of steps that CPU and GPU unit compute together: the CPU unit's, and the GPU unit's; `written`: the
    flags of a prompt's first tokens, whose CPU programs are others where there are graphs too."""
    on_cpu, on_gpu = list[Program](), list[Program]()
    if written:
        first = FirstTokens(laid, unit, rows=chunk - max(placement.lengths, default=0), written=written)
        on_gpu += [first.body(f"prefill{WITH_GPU}"), first.head(f"head{WITH_GPU}")]
    if written and not placement.lengths:
        other = Lowering(laid, mode="prefill", rows=chunk, tile=tile)
        other.written = written
        on_cpu += [other.body(f"prefill{WITH_GPU}"), other.head(f"head{WITH_GPU}")]
    if placement.shares_decode:
        meetings = Meetings.of(laid.ledger, len(laid.spec.layers))
        gpu = GpuRows(laid, unit, meetings=meetings)
        cpu = CpuRows(laid, meetings=meetings, taken=gpu.hidden)
        for kinds in placement.decode_kinds:
            name = decode_name(kinds)
            on_cpu.append(cpu.whole_of(kinds, name))
            on_gpu.append(gpu.beside(name, cpu))
    return on_cpu, on_gpu


def _with_npu(
    laid: Laid, placement: Placement, written: list[BufferRef], tile: int
) -> tuple[list[Program], dict[str, Program]]:
    """Programs of prompts' steps with graphs: the CPU unit's, and the NPU unit's. Those behind a GPU unit's tokens
    (`written`: its flags) have the same buffers, and so the same graphs."""
    on_cpu, on_npu = list[Program](), dict[str, Program]()
    for length in placement.lengths:
        lowered = NpuLowering(laid, rows=length, tile=tile)
        behind = written and length == placement.lengths[-1]
        for more in ("", WITH_GPU) if behind else ("",):
            lowered.written = written if more else ()
            name = f"prefill@{length}{more}"
            body, on_npu[name] = lowered.both(name, f"graphs@{length}{more}")
            on_cpu += [body, lowered.head(f"head@{length}{more}")]
    if placement.row_kinds:
        token, on_npu[ROW_DECODE] = NpuTokens(laid, kinds=placement.row_kinds).both(ROW_DECODE, "graphs@1")
        on_cpu.append(token)
    return on_cpu, on_npu


def decode_name(kinds: Collection[str]) -> str:
    """The programs of a decode step of CPU and GPU unit in which products of these kinds are cut."""
    return f"decode{WITH_GPU}:{','.join(kinds)}"


def tape_room(runs: tuple[Run, ...]) -> int:
    """Reads at most on the tape of a model: a sparse one has a second one behind the first."""
    count = sum(run.extents for run in runs)
    return 2 * count if bundle_runs(runs) else count


def lookup_room(runs: tuple[Run, ...], chunk: int) -> int:
    """Bytes at most of what looking embeddings up takes."""
    embedding = embedding_run(runs)
    if embedding is None:
        return 0
    return max(chunk, BATCH) * embedding.item_bytes + LOOKUPS * embedding.stride + 2 * PAGE


def _probe(ledger: Ledger, weights: Weights, shared: Shared) -> Program:
    """Read all pinned weights, or the ring where that is more."""
    pinned, staging = weights.pinned, weights.staging
    buffer = pinned if pinned.nbytes >= staging.nbytes else staging
    builder = ProgramBuilder("probe", ledger, shared.lanes, shared.error)
    operands: dict[int, Operand] = {
        o.PROBE_BASE: buffer,
        o.PROBE_BYTES: buffer.nbytes,
        o.PROBE_PIECE: PROBE_PIECE,
        o.PROBE_OUT: ledger.allocate("activations", shared.lanes * LINE),
    }
    builder.add(kernel_name("probe"), Opcode.PROBE, operands)
    return builder.build()


def block_table_bytes(context: int) -> int:
    """Bytes of a sequence's KV block table."""
    return round_up(-(-context // SPAN) * 8, LINE)
