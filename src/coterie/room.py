"""Room for an engine whose ceiling may change: address space for its regions, and whether memory can be had."""

from coterie.errors import PlanError
from coterie.scheduler.layout import lookup_room
from coterie.scheduler.plan import Plan
from coterie.scheduler.residency import SLOT_METADATA, region_bytes, ring_room, slot_cost
from coterie.storage.available import available_memory
from coterie.storage.mapping import HUGE
from coterie.storage.neuron_buffers import bundle_runs, layer_neurons
from coterie.storage.runs import PAGE, Extents, Run

# Bytes of address space for regions that are laid out anew when the ceiling changes.
SCRATCH_ROOM = {"flags": 256 << 20, "programs": 256 << 20, "tables": 64 << 20}
CACHE_ROOM = 128 << 20  # of a neuron cache's queue and checksums, when there was none before


def check_free(plan: Plan, held: int) -> None:
    """Refuse a plan for more memory than there is, beside the `held` bytes that are the model's already. The KV cache
    is taken only as sequences grow."""
    needed, free = plan.total - region_bytes(plan.regions["kv"]), held + available_memory()
    if needed > free:
        raise PlanError(
            f"{plan.model} would take {needed >> 20} MiB, but only {free >> 20} MiB of memory can be had; "
            "lower --memory"
        )


def room_for(runs: tuple[Run, ...], plan: Plan) -> dict[str, int]:
    """Room, not memory, for regions that may grow when the ceiling is raised."""
    every = int(Extents.of(runs).nbytes.sum())
    lookups = lookup_room(runs, plan.chunk)
    return _cache_room(runs, plan) | {
        "weights": every + HUGE,
        "staging": ring_room(runs),
        "activations": plan.regions["activations"] + lookups,
        **{name: size + plan.regions[name] for name, size in SCRATCH_ROOM.items()},
    }


def _cache_room(runs: tuple[Run, ...], plan: Plan) -> dict[str, int]:
    """Of a sparse model's neuron cache."""
    neurons = sum(map(layer_neurons, bundle_runs(runs)))
    if not neurons:
        return {}
    sector = plan.flash.sector if plan.flash else PAGE
    return {
        "neurons": neurons * slot_cost(runs, sector) + HUGE,
        "cache": plan.regions.get("cache", 0) + neurons * SLOT_METADATA + CACHE_ROOM,
    }
