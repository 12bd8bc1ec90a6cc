"""The plan: what runs where, with how much memory, decided before anything is loaded (design sections 3 and 9)."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from coterie.errors import PlanError, UsageError
from coterie.kernels import target
from coterie.kernels.shapes import TILE_TOKENS
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
from coterie.scheduler.layout import BATCH, ModelLayout, block_table_bytes, lay_out_model
from coterie.scheduler.profile import flash_choice, load_profile
from coterie.scheduler.residency import choose, least_budget, region_bytes, resume, ring_room
from coterie.sizes import Memory, Share
from coterie.storage.arena import Ledger, round_up
from coterie.storage.available import available_memory
from coterie.storage.flash_buffers import lay_out_flash
from coterie.storage.kv import KVLayout
from coterie.storage.runs import Extents, lay_out_runs
from coterie.storage.unit import lay_out_unit
from coterie.storage.weights import Residency

VERSION = 2
DEFAULT_CONTEXT = 4096  # positions, where neither the user nor the model says less
CHUNK = 256  # prompt tokens computed together at most
LEAST_CHUNK = 16
MAX_LANES = 64
OVERHEAD = 200_000_000  # bytes: Python, its libraries and the compiler, beside the ceiling
LEAST_BLOCK = 256 << 10  # bytes read at a time at least ...
RING_READS = 8  # ... and else as many as let so many reads fit the ring
KV_SHARE = 4  # of a ceiling that is too small for the usual context, the cache gets one part in so many
CHUNK_SHARE = 8  # what depends on the chunk gets one part in so many
SPARE = 20  # `auto` leaves one part in so many of the machine's memory ...
SPARE_LEAST = 256 << 20  # ... and at least this to others


@dataclass(frozen=True)
class Flash:
    """How weights are streamed. `file`: the packed model; `identity`: the hash it is known by; rates in bytes/s;
    `source`: where block, depth and rate came from."""

    file: str
    identity: str
    block: int
    depth: int
    bytes_per_s: float | None
    source: str
    engine: str | None = None  # once it is opened


@dataclass(frozen=True)
class Plan:
    """A decision, and where each value came from: "flag", "environment", "config", "argument" (of the Python API),
    "plan" or "automatic". Sizes are bytes.

    `memory` is the ceiling over all regions together (None: whatever they need); Python and its libraries take up to
    OVERHEAD beside it. `pinned` counts extents in the order of residency.pin_order.
    """

    model: str
    architecture: str
    context: int
    lanes: int
    tile: int  # tokens in a matrix tile
    chunk: int
    batch: int
    path: str  # instruction set
    weight_bytes: int  # all of them, packed
    bytes_per_token: int  # of weights, used for every decoded token
    streamed_per_token: int  # of these, read from flash
    streamed_per_chunk: int  # the same for a chunk of a prompt
    pinned: int
    ring: int
    regions: dict[str, int]
    sources: dict[str, str]
    memory: int | None = None
    flash: Flash | None = None
    numerics: str = "exact"
    version: int = VERSION
    units: dict[str, str] = field(default_factory=lambda: {"cpu": "everything"})

    @property
    def total(self) -> int:
        """Bytes of the arena, if the whole context is used."""
        return sum(region_bytes(size) for size in self.regions.values())

    @property
    def resident(self) -> float:
        """Share of what a token uses that needs no reading."""
        return 1 - self.streamed_per_token / self.bytes_per_token

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total, "overhead": OVERHEAD, "resident": self.resident}

    def forecast(self, memory_bandwidth: float | None) -> dict[str, Any]:
        """What decoding can be at best: the seconds a token takes each unit, the one that takes longest (units work
        side by side), and tokens/s if nothing else took time. What is not known is None."""
        seconds: dict[str, float] = {}
        if memory_bandwidth:
            seconds["memory"] = self.bytes_per_token / memory_bandwidth
        if self.streamed_per_token and self.flash is not None and self.flash.bytes_per_s:
            seconds["flash"] = self.streamed_per_token / self.flash.bytes_per_s
        bottleneck = max(seconds, key=lambda unit: seconds[unit], default=None)
        if self.streamed_per_token and "flash" not in seconds:
            bottleneck = None  # the slower one is not known
        return {
            "read_bandwidth": memory_bandwidth,
            "seconds": seconds,
            "bottleneck": bottleneck,
            "tokens_per_s": None if bottleneck is None else 1 / seconds[bottleneck],
        }

    def forecast_line(self, forecast: dict[str, Any]) -> str:
        """A forecast for people."""
        if forecast["bottleneck"] is None:
            return "how fast it can be is not known yet: coterie profile --flash measures this machine"
        rates = {"memory": forecast["read_bandwidth"], "flash": self.flash.bytes_per_s if self.flash else None}
        unit = forecast["bottleneck"]
        speed = f"{forecast['tokens_per_s']:.3g} tokens/s"
        return f"expect up to {speed}: bound by {unit}, which gives {rates[unit] / 1e9:.3g} GB/s"

    def lines(self) -> list[str]:
        """For people, before the first token."""
        mib = {name: size / (1 << 20) for name, size in self.regions.items()}
        rest = sum(size for name, size in mib.items() if name not in ("weights", "staging", "kv"))
        said = ", ".join(f"{name} from {source}" for name, source in self.sources.items() if source != "automatic")
        cpu = (
            f"cpu computes: {self.lanes} lane{'s' * (self.lanes > 1)} on {self.path}, prompts in chunks of {self.chunk}"
        )
        ceiling = "" if self.memory is None else f" of a ceiling of {self.memory >> 20} MiB"
        lines = [f"{self.model}: {self.architecture}, {self._residency()}, numerics {self.numerics}", cpu]
        if self.flash is not None and self.streamed_per_token:
            rate = f"{self.flash.bytes_per_s / 1e9:.2f} GB/s" if self.flash.bytes_per_s else "speed not known yet"
            engine = f" by {self.flash.engine}" if self.flash.engine else ""
            lines.append(
                f"flash reads{engine}, {self.flash.block >> 10} KiB at a time, {self.flash.depth} in flight "
                f"({rate}, {self.flash.source}), through a ring of {self.ring / (1 << 20):.0f} MiB"
            )
        lines.append(
            f"memory {self.total >> 20} MiB{ceiling}: context {self.context} positions (KV cache up to {mib['kv']:.0f} "
            f"MiB), {rest:.0f} MiB else; Python beside it, up to {OVERHEAD // 10**6} MB"
            + (f" [{said}]" if said else "")
        )
        return lines

    def _residency(self) -> str:
        weights = self.regions["weights"] / (1 << 20)
        if not self.streamed_per_token:
            return f"all weights in memory ({weights:.0f} MiB), {self.bytes_per_token / 1e6:.0f} MB used a token"
        return (
            f"{100 * self.resident:.0f} % of a token's weights in memory ({weights:.0f} MiB), "
            f"{self.streamed_per_token / 1e6:.0f} MB streamed a token"
        )


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def spare(memory: int) -> int:
    """Bytes of so much memory that `auto` leaves to others."""
    return max(SPARE_LEAST, memory // SPARE)


def spare_memory() -> int:
    """Bytes that `auto` may take for all regions, before anything is loaded."""
    available = available_memory()
    return max(1, available - spare(available) - OVERHEAD)


@dataclass(frozen=True)
class Wishes:
    """What the user wants of a plan; None is for us to choose. `memory` is a ceiling in bytes, a share of the weights,
    or "auto". What follows `sources` comes from a plan file: extents pinned and bytes of the ring, how flash is read,
    and of which packed model."""

    threads: int | None = None
    context: int | None = None
    chunk: int | None = None
    memory: Memory | None = None
    tracing: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)
    pinned: int | None = None
    ring: int | None = None
    block: int | None = None
    depth: int | None = None
    identity: str | None = None


def plan_flash(path: Path, identity: str, wishes: Wishes) -> Flash:
    """How a packed model at `path` is read: as the plan file says, else as the device's profile, else as assumed."""
    choice = flash_choice(load_profile(), path)
    if wishes.block is not None and wishes.depth is not None:
        return Flash(str(path), identity, wishes.block, wishes.depth, choice.bytes_per_s, "plan")
    return Flash(str(path), identity, choice.block, choice.depth, choice.bytes_per_s, choice.source)


def wants_flash(file: ModelHeader, spec: ModelSpec, wishes: Wishes) -> bool:
    """Whether weights may have to be streamed."""
    if wishes.memory == "auto" or wishes.pinned is not None:
        return True
    if isinstance(wishes.memory, Share):
        return wishes.memory.part < 1
    draft = _Draft(file, spec, wishes, None)
    plan, _ = draft.in_memory(draft.context or draft.usual)
    if wishes.memory is not None:
        return plan.total > wishes.memory
    return plan.total - plan.regions["kv"] + OVERHEAD > available_memory()


def make_plan(file: ModelHeader, spec: ModelSpec, wishes: Wishes, flash: Flash | None = None) -> tuple[Plan, Residency]:
    """Lay the model out on paper; `flash` says how weights could be streamed (None: they must fit). Raises UsageError
    for values that make no sense, PlanError where it does not fit."""
    _check_shapes(file, spec)
    draft = _Draft(file, spec, wishes, flash)
    ceiling = spare_memory() if wishes.memory == "auto" else wishes.memory
    if wishes.pinned is not None:
        return draft.as_told(None if isinstance(ceiling, Share) else ceiling)
    if isinstance(ceiling, Share):
        return draft.for_share(ceiling)
    if ceiling is None:
        plan, residency = draft.in_memory(draft.context or draft.usual)
        needed = plan.total - plan.regions["kv"] + OVERHEAD  # the cache is taken only as sequences grow
        if needed <= available_memory():
            return plan, residency
        if flash is None:
            raise PlanError(
                f"{file.path.name} needs {needed >> 20} MiB, but only {available_memory() >> 20} MiB of memory are "
                "free; give --memory to stream what does not fit"
            )
        ceiling = spare_memory()
    return draft.under(ceiling)


def least_ceiling(file: ModelHeader, spec: ModelSpec, wishes: Wishes, flash: Flash | None) -> int:
    """The lowest ceiling, in bytes, under which `wishes` can be had."""
    draft = _Draft(file, spec, wishes, flash)
    context = draft.context or draft.usual
    return draft.fixed(context, draft.chunks(context)[-1]) + least_budget(draft.runs)


class _Draft:
    """Tries contexts, chunks and residencies until one fits."""

    def __init__(self, file: ModelHeader, spec: ModelSpec, wishes: Wishes, flash: Flash | None) -> None:
        self.file, self.spec, self.wishes, self.flash = file, spec, wishes, flash
        self.runs = lay_out_runs(file.tensors, spec)
        self.lanes = available_cores() if wishes.threads is None else wishes.threads
        if not 1 <= self.lanes <= MAX_LANES:
            raise UsageError(f"{self.lanes} threads: choose 1 to {MAX_LANES}")
        self.context = wishes.context
        if self.context is not None and not 1 <= self.context <= spec.context:
            raise UsageError(f"a context of {self.context} positions: this model takes 1 to {spec.context}")
        self.usual = min(spec.context, DEFAULT_CONTEXT)
        extents = Extents.of(self.runs)
        self.count, self.weight_bytes = int(extents.first[-1]), int(extents.nbytes.sum())

    def as_told(self, ceiling: int | None) -> tuple[Plan, Residency]:
        """What a plan file decided."""
        wishes, context = self.wishes, self.context or self.usual
        assert wishes.pinned is not None
        residency = resume(self.runs, wishes.pinned, wishes.ring or 0)
        plan = self._plan(context, self.chunks(context)[0], residency, ceiling)
        if ceiling is not None and plan.total > ceiling:
            raise PlanError(
                f"the plan needs {-(-plan.total >> 20)} MiB, more than its own ceiling of {ceiling >> 20} MiB; make it "
                "anew with coterie plan --save"
            )
        needed = plan.total + OVERHEAD
        if needed > available_memory():
            raise PlanError(
                f"the plan needs {needed >> 20} MiB, but only {available_memory() >> 20} MiB of memory are free; make "
                "it anew with a smaller --memory or -c"
            )
        return plan, residency

    def in_memory(self, context: int, ceiling: int | None = None) -> tuple[Plan, Residency]:
        """Everything pinned."""
        residency = choose(self.runs, 1 << 62)
        return self._plan(context, self.chunks(context)[0], residency, ceiling), residency

    def for_share(self, share: Share) -> tuple[Plan, Residency]:
        """A share of the weights' bytes in the file is the budget for pinned weights and the ring; the rest is as
        large as it wants to be."""
        size = sum(tensor.nbytes for tensor in self.file.tensors.values())
        budget = 1 << 62 if share.part >= 1 else int(share.part * size)
        residency = self._choose(budget)
        context = self.context or self.usual
        plan = self._plan(context, self.chunks(context)[0], residency, None)
        return plan, residency

    def under(self, ceiling: int) -> tuple[Plan, Residency]:
        """As much in memory as the ceiling allows."""
        context = self._context(ceiling) if self.context is None else self.context
        plan, residency = self.in_memory(context, ceiling)
        if plan.total <= ceiling:
            return plan, residency
        chunks = self.chunks(context)
        for chunk in chunks:
            fixed = self.fixed(context, chunk)
            without_cache = fixed - region_bytes(KVLayout.of(self.spec).region(context))
            if without_cache <= ceiling // CHUNK_SHARE or chunk == chunks[-1]:
                break
        residency = self._choose(ceiling - fixed)
        plan = self._plan(context, chunk, residency, ceiling)
        if plan.total > ceiling:  # `fixed` is an upper bound, so this is never reached
            raise PlanError(f"a plan of {plan.total} bytes for a ceiling of {ceiling}: please report this")
        return plan, residency

    def _context(self, ceiling: int) -> int:
        """The usual context if all fits with it; else what a part of the ceiling holds."""
        plan, _ = self.in_memory(self.usual)
        if plan.total <= ceiling:
            return self.usual
        kv = KVLayout.of(self.spec)
        blocks = max(1, (ceiling // KV_SHARE - kv.region(0)) // kv.stride)
        return min(self.usual, blocks * kv.positions)

    def _choose(self, budget: int) -> Residency:
        if budget < self.weight_bytes and self.flash is None:
            raise PlanError(f"{self.file.path.name} does not fit, and there is no packed copy to stream from")
        try:
            return choose(self.runs, budget)
        except PlanError as error:
            need = least_budget(self.runs) - budget >> 20
            raise PlanError(f"{self.file.path.name}: {error}; raise --memory by {need + 1} MiB, or lower -c") from None

    def chunks(self, context: int) -> list[int]:
        """Sizes of a prompt's chunk that may be tried, the largest first."""
        if self.wishes.chunk is not None:
            return [self.wishes.chunk]
        chunk = min(CHUNK, round_up(context, BATCH))
        sizes = [chunk]
        while chunk // 2 >= LEAST_CHUNK:
            chunk = round_up(chunk // 2, BATCH)
            sizes.append(chunk)
        return sizes

    def fixed(self, context: int, chunk: int) -> int:
        """Bytes of all that are not weights, at most: with as little pinned as can be, programs are longest."""
        least = choose(self.runs, least_budget(self.runs)) if self.flash else choose(self.runs, 1 << 62)
        regions = self._regions(context, chunk, least)[0]
        return sum(region_bytes(size) for name, size in regions.items() if name not in ("weights", "staging"))

    def _regions(self, context: int, chunk: int, residency: Residency) -> tuple[dict[str, int], ModelLayout]:
        ledger, tracing = Ledger(), self.wishes.tracing
        layout = lay_out_model(
            ledger, self.file, self.spec, self.runs, residency,
            lanes=self.lanes, context=context, chunk=chunk, tile=TILE_TOKENS,
        )  # fmt: skip
        lay_out_unit(ledger, self.lanes, chunk, tracing=tracing)
        if self.flash is not None:
            lay_out_flash(
                ledger, entries=self.count, ring_bytes=ring_room(self.runs), depth=self.flash.depth, tracing=tracing
            )
        regions = ledger.usage()
        regions["kv"] = KVLayout.of(self.spec).region(context)
        regions["state"] += (BATCH + 1) * block_table_bytes(context)
        regions["programs"] = sum(p.nbytes for p in layout.programs.values())
        return regions, layout

    def _plan(self, context: int, chunk: int, residency: Residency, ceiling: int | None) -> Plan:
        wishes, (regions, layout) = self.wishes, self._regions(context, chunk, residency)
        weights = layout.weights
        given = {name: getattr(wishes, name) for name in ("threads", "context", "memory", "chunk")}
        flash = self.flash
        if flash is not None and residency.ring and wishes.block is None:
            flash = replace(flash, block=_block(flash.block, residency.ring))
        body = int(weights.extents.nbytes[weights.tape[: weights.head]].sum())
        return Plan(
            model=self.file.path.name,
            architecture=self.spec.architecture,
            context=context,
            lanes=self.lanes,
            tile=TILE_TOKENS,
            chunk=chunk,
            batch=BATCH,
            path=target.path(),
            weight_bytes=self.weight_bytes,
            bytes_per_token=weights.bytes_per_token,
            streamed_per_token=weights.streamed,
            streamed_per_chunk=body,
            pinned=residency.pinned.size,
            ring=residency.ring,
            regions=regions,
            sources={name: _source(name, value, wishes.sources) for name, value in given.items()},
            memory=ceiling,
            flash=flash,
            units={"cpu": "everything"} | ({"flash": "reads"} if weights.streamed and flash else {}),
        )


def _block(block: int, ring: int) -> int:
    """Bytes read at a time, so that several reads fit the ring side by side."""
    while block > LEAST_BLOCK and block * RING_READS > ring:
        block //= 2
    return block


def _source(name: str, value: object, sources: Mapping[str, str]) -> str:
    return "automatic" if value is None else sources.get(name, "argument")


def _check_shapes(file: ModelHeader, spec: ModelSpec) -> None:
    """What the kernels cannot do is said here."""
    if spec.head_dim % 16:
        raise PlanError(
            f"{file.path.name}: heads of {spec.head_dim} dimensions are not supported (multiples of 16 are)"
        )
    for layer in spec.layers:
        if layer.rope.dims % 16 or layer.rope.dims > spec.head_dim:
            raise PlanError(f"{file.path.name}: a rotary embedding of {layer.rope.dims} dimensions is not supported")
