"""Making a plan: contexts, chunks and residencies are tried on paper until one fits the ceiling."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coterie.errors import PlanError, UsageError
from coterie.kernels import target
from coterie.kernels.shapes import CLUSTER, TILE_TOKENS
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
from coterie.scheduler.copies import unit_copies
from coterie.scheduler.hotness import Activity, allowed_fetches, expected_misses, hot_set
from coterie.scheduler.layout import (
    BATCH,
    ModelLayout,
    block_table_bytes,
    lay_out_model,
    lay_out_units,
    tape_room,
)
from coterie.scheduler.placement import Placement
from coterie.scheduler.plan import MAX_LANES, OVERHEAD, Flash, Plan, Wishes
from coterie.scheduler.profile import flash_choice, load_profile, single_reads
from coterie.scheduler.residency import choose, least_budget, region_bytes, resume, ring_room
from coterie.sizes import Share
from coterie.storage.arena import Ledger, round_up
from coterie.storage.available import available_memory
from coterie.storage.direct import sector_bytes
from coterie.storage.flash_buffers import lay_out_flash
from coterie.storage.kv import KVLayout
from coterie.storage.neuron_buffers import bundle_runs, layer_neurons
from coterie.storage.runs import PAGE, Extents, lay_out_runs
from coterie.storage.weights import Residency

DEFAULT_CONTEXT = 4096  # positions, where neither the user nor the model says less
CHUNK = 256  # prompt tokens computed together at most
LEAST_CHUNK = 16
LEAST_BLOCK = 256 << 10  # bytes read at a time at least ...
RING_READS = 8  # ... and else as many as let so many reads fit the ring
KV_SHARE = 4  # of a ceiling that is too small for the usual context, the cache gets one part in so many
CHUNK_SHARE = 8  # what depends on the chunk gets one part in so many
SPARE = 20  # `auto` leaves one part in so many of the machine's memory ...
SPARE_LEAST = 256 << 20  # ... and at least this to others


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


def plan_flash(path: Path, identity: str, wishes: Wishes) -> Flash:
    """How a packed model at `path` is read: as the plan file says, else as the device's profile, else as assumed."""
    choice = flash_choice(load_profile(), path)
    if wishes.block is not None and wishes.depth is not None:
        choice = replace(choice, block=wishes.block, depth=wishes.depth, source="plan")
    return Flash(file=str(path), identity=identity, sector=sector_bytes(path), **vars(choice))


def wants_flash(file: ModelHeader, spec: ModelSpec, wishes: Wishes) -> bool:
    """Whether weights may have to be streamed."""
    if wishes.units != ("cpu",):  # which are told to have everything in memory
        return False
    if wishes.pinned is not None:  # a plan file says so
        return wishes.block is not None
    if wishes.memory == "auto":
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
    plan, residency = _decided(draft, wishes)
    activity = draft.activity(residency)
    hot = draft.told_hot() if wishes.hot else {each.batch: each.hot for each in activity}
    return replace(plan, activity=activity, hot=hot), residency


def _decided(draft: "_Draft", wishes: Wishes) -> tuple[Plan, Residency]:
    if wishes.units != ("cpu",):
        return draft.with_units()
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
        if draft.flash is None:
            raise PlanError(
                f"{draft.file.path.name} needs {needed >> 20} MiB, but only {available_memory() >> 20} MiB of memory "
                "are free; give --memory to stream what does not fit"
            )
        ceiling = spare_memory()
    return draft.under(ceiling)


def least_ceiling(file: ModelHeader, spec: ModelSpec, wishes: Wishes, flash: Flash | None) -> int:
    """The lowest ceiling, in bytes, under which `wishes` can be had."""
    draft = _Draft(file, spec, wishes, flash)
    context = draft.context or draft.usual
    return draft.fixed(context, draft.chunks(context)[-1]) + least_budget(draft.runs, draft.sector)


def lanes_and_kept(wishes: Wishes) -> tuple[int, int]:
    """Lanes of the CPU unit, and cores that it leaves to units beside it, where no plan file says."""
    others = int(wishes.split == "tensor" and available_cores() > 1)  # who computes on cores has one of its own
    lanes = available_cores() - others if wishes.threads is None else wishes.threads
    return lanes, max(0, available_cores() - lanes) if len(wishes.units) > 1 else 0


class _Draft:
    """Tries contexts, chunks and residencies until one fits."""

    def __init__(self, file: ModelHeader, spec: ModelSpec, wishes: Wishes, flash: Flash | None) -> None:
        self.file, self.spec, self.wishes, self.flash = file, spec, wishes, flash
        self.runs = lay_out_runs(file.tensors, spec)
        self.sector = flash.sector if flash else PAGE
        self.lanes, self.kept = lanes_and_kept(wishes)
        if not 1 <= self.lanes <= MAX_LANES:
            raise UsageError(f"{self.lanes} threads: choose 1 to {MAX_LANES}")
        self.context = wishes.context
        if self.context is not None and not 1 <= self.context <= spec.context:
            raise UsageError(f"a context of {self.context} positions: this model takes 1 to {spec.context}")
        self.usual = min(spec.context, DEFAULT_CONTEXT)
        extents = Extents.of(self.runs)
        self.count, self.weight_bytes = int(extents.first[-1]), int(extents.nbytes.sum())

    def with_units(self) -> tuple[Plan, Residency]:
        """GPU and NPU units have all weights in memory, in the order of the file. Raises PlanError where they do not
        fit, UsageError for wishes that only the CPU unit can have."""
        wishes, names = self.wishes, ",".join(self.wishes.units)
        if self.spec.sparse or self.spec.part is not None:
            raise PlanError(f"{self.file.path.name}: sparse models and parts are for the CPU unit; drop --units")
        if isinstance(wishes.memory, Share | str):
            raise UsageError(f"--units {names} has all weights in memory: --memory must be a size")
        if wishes.pinned not in (None, self.count) or wishes.slots:
            raise PlanError(f"units {names} have all weights in memory: the plan must have {self.count} extents pinned")
        context = self.context or self.usual
        residency = Residency(np.arange(self.count))
        plan = self._plan(context, self.chunks(context)[0], residency, wishes.memory)
        if wishes.memory is not None and plan.total > wishes.memory:
            raise PlanError(
                f"{self.file.path.name} with --units {names} needs {-(-plan.total >> 20)} MiB, more than the ceiling "
                f"of {wishes.memory >> 20} MiB; raise --memory, lower -c, or drop --units: only the CPU unit streams"
            )
        return plan, residency

    def as_told(self, ceiling: int | None) -> tuple[Plan, Residency]:
        """What a plan file decided."""
        wishes, context = self.wishes, self.context or self.usual
        assert wishes.pinned is not None
        residency = resume(self.runs, wishes.pinned, wishes.ring or 0, wishes.slots or 0)
        plan = self._plan(context, self.chunks(context)[0], residency, ceiling)
        if ceiling is not None and plan.total > ceiling:
            raise PlanError(
                f"the plan needs {-(-plan.total >> 20)} MiB, more than its own ceiling of {ceiling >> 20} MiB; make it "
                "anew with coterie plan --save"
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
            return choose(self.runs, budget, self.sector)
        except PlanError as error:
            need = least_budget(self.runs, self.sector) - budget >> 20
            raise PlanError(f"{self.file.path.name}: {error}; raise --memory by {need + 1} MiB, or lower -c") from None

    def placement(self, chunk: int) -> Placement:
        if self.wishes.placement is not None:
            return self.wishes.placement
        return Placement.of(self.wishes.units, chunk, self.wishes.split, self.kept, self.wishes.begin)

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
        least = least_budget(self.runs, self.sector) if self.flash else 1 << 62
        regions = self._regions(context, chunk, choose(self.runs, least, self.sector))[0]
        weights = "weights", "staging", "neurons"
        return sum(region_bytes(size) for name, size in regions.items() if name not in weights)

    def _regions(self, context: int, chunk: int, residency: Residency) -> tuple[dict[str, int], ModelLayout]:
        ledger, tracing, placement = Ledger(), self.wishes.tracing, self.placement(chunk)
        units = lay_out_units(ledger, placement, self.lanes, chunk, tracing=tracing)
        layout = lay_out_model(
            ledger, self.file, self.spec, self.runs, residency,
            lanes=self.lanes, context=context, chunk=chunk, tile=TILE_TOKENS, sector=self.sector,
            tracing=tracing, counting=self.wishes.counting, placement=placement, gpu=units.gpu,
        )  # fmt: skip
        if self.flash is not None:
            entries, ring = tape_room(self.runs), ring_room(self.runs)
            lay_out_flash(ledger, entries=entries, ring_bytes=ring, depth=self.flash.depth, tracing=tracing)
        regions = ledger.usage()
        regions["kv"] = KVLayout.of(self.spec).region(context)
        regions["state"] += (BATCH + 1) * block_table_bytes(context)
        regions["programs"] = sum(p.nbytes for p in layout.on_cpu)
        return regions, layout

    def _pinned_neurons(self, residency: Residency) -> npt.NDArray[np.bool_]:
        """Which neurons' bundles stay in memory: bool[layers][neurons]."""
        extents, bundles = Extents.of(self.runs), bundle_runs(self.runs)
        stays = np.zeros((len(bundles), layer_neurons(bundles[0]) if bundles else 0), np.bool_)
        for number in residency.pinned.tolist():
            run, extent = self.runs[extents.run[number]], int(extents.number[number])
            if run.kind == "neurons":
                first = extent * run.per * CLUSTER
                stays[run.layer, first : first + run.items_of(extent) * CLUSTER] = True
        return stays

    def told_hot(self) -> dict[int, int]:
        """A plan file's hot neurons, by batch size. Raises PlanError where they are not of this model."""
        every = sum(map(layer_neurons, bundle_runs(self.runs)))
        for size, (hot, cold) in self.wishes.hot.items():
            if hot + cold != every:
                raise PlanError(
                    f"a plan with {hot} hot and {cold} cold neurons (batch {size}) is not one for this model: it has "
                    f"{every}"
                )
        return {size: hot for size, (hot, _) in self.wishes.hot.items()}

    def activity(self, residency: Residency) -> tuple[Activity, ...]:
        """What steps are expected to use, where activations were counted."""
        counts, spec, bundles = self.wishes.activations, self.spec, bundle_runs(self.runs)
        if counts is None or not bundles:
            return ()
        profile, stays = load_profile(), self._pinned_neurons(residency)[:, : spec.ffn_dim]
        reads = single_reads(profile, Path(self.flash.file)) if self.flash else None
        bundle = bundles[0].item_bytes // CLUSTER
        attention = sum(run.nbytes for run in self.runs if run.kind in ("qkv", "attention")) / len(bundles)
        seconds = attention / profile.memory_bandwidth if profile.memory_bandwidth else None
        allowed = allowed_fetches(self.flash.bytes_per_s if self.flash else None, seconds, bundle)

        def of(batch: int) -> Activity:
            frequencies = counts.frequencies(batch)
            hot = sum(hot_set(f, here, allowed).size for f, here in zip(frequencies, stays, strict=True))
            missing = expected_misses(frequencies[~stays], residency.slots) if residency.slots else 0.0
            taken = missing / reads if reads else None
            return Activity(batch, float(frequencies.sum()), hot, hot * bundle, missing, missing * bundle, taken)

        return tuple(of(batch) for batch in counts.batches)

    def _plan(self, context: int, chunk: int, residency: Residency, ceiling: int | None) -> Plan:
        wishes, (regions, layout) = self.wishes, self._regions(context, chunk, residency)
        weights = layout.weights
        given = {name: getattr(wishes, name) for name in ("threads", "context", "memory", "chunk")}
        given["units"] = None if wishes.units == ("cpu",) else wishes.units
        given["split"] = None if wishes.split == "layer" else wishes.split
        flash, bundles, placement = self.flash, bundle_runs(self.runs), self.placement(chunk)
        numerics = "exact" if placement.exact else "near"
        if flash is not None and residency.ring and wishes.block is None:
            flash = replace(flash, block=_block(flash.block, residency.ring))
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
            pinned=residency.pinned.size,
            ring=residency.ring,
            slots=residency.slots,
            neurons=sum(map(layer_neurons, bundles)),
            pinned_neurons=int(self._pinned_neurons(residency).sum()),
            regions=regions,
            sources={name: _source(name, value, wishes.sources) for name, value in given.items()},
            memory=ceiling,
            host=wishes.host,
            flash=flash,
            numerics="lossy: predictors decide which neurons are computed" if self.spec.predictor else numerics,
            placement=placement,
            copies=unit_copies(placement, self.spec),
            reasons=wishes.reasons,
            units=placement.describe()
            | ({"flash": "reads"} if (weights.streamed or residency.slots) and flash else {}),
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
