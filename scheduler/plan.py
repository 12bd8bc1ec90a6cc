"""The plan: what runs where, with how much memory, decided before anything is loaded (design sections 3 and 9).

In this version there is one unit, `cpu`, and all weights are pinned; the plan says so, and what it will take.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from coterie.errors import PlanError, UsageError
from coterie.kernels import target
from coterie.kernels.shapes import TILE_TOKENS
from coterie.models.gguf_file import GGUFFile
from coterie.models.spec import ModelSpec
from coterie.scheduler.layout import BATCH, block_table_bytes, lay_out_model
from coterie.storage.arena import Ledger, available_memory, round_up
from coterie.storage.kv import KVLayout
from coterie.storage.unit import lay_out_unit

VERSION = 1
DEFAULT_CONTEXT = 4096  # positions, where neither the user nor the model says less
CHUNK = 256  # prompt tokens computed together
MAX_LANES = 64
OVERHEAD = 200 << 20  # bytes: Python, the compiler and libraries, beside the arena


@dataclass(frozen=True)
class Plan:
    """A decision, and where each value came from: "flag", "environment", "config", "argument" (of the Python API) or
    "automatic". Sizes are bytes."""

    model: str
    architecture: str
    context: int
    lanes: int
    tile: int  # tokens in a matrix tile
    chunk: int
    batch: int
    path: str  # instruction set
    bytes_per_token: int  # of weights, read for every decoded token
    regions: dict[str, int]
    sources: dict[str, str]
    numerics: str = "exact"
    residency: str = "pinned"
    version: int = VERSION
    units: dict[str, str] = field(default_factory=lambda: {"cpu": "everything"})

    @property
    def total(self) -> int:
        """Bytes of the arena, if the whole context is used."""
        return sum(self.regions.values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}

    def lines(self) -> list[str]:
        """For people, before the first token."""
        mib = {name: size / (1 << 20) for name, size in self.regions.items()}
        rest = sum(size for name, size in mib.items() if name not in ("weights", "kv"))
        said = ", ".join(f"{name} from {source}" for name, source in self.sources.items() if source != "automatic")
        return [
            f"{self.model}: {self.architecture}, all weights {self.residency} ({mib['weights']:.0f} MiB), "
            f"numerics {self.numerics}",
            f"cpu does everything: {self.lanes} lane{'s' * (self.lanes > 1)} on {self.path}, prompts in chunks of "
            f"{self.chunk}; decoding is bound by memory, {self.bytes_per_token / 1e6:.0f} MB a token",
            f"context {self.context} positions (up to {mib['kv']:.0f} MiB of KV cache), {rest:.0f} MiB else"
            + (f" [{said}]" if said else ""),
        ]


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def make_plan(
    file: GGUFFile,
    spec: ModelSpec,
    *,
    threads: int | None = None,
    context: int | None = None,
    memory: int | None = None,
    tracing: bool = False,
    sources: Mapping[str, str] | None = None,
) -> Plan:
    """Lay the model out on paper. Raises UsageError for values that make no sense, PlanError where it does not fit.

    `memory` (bytes) bounds the arena plus OVERHEAD.
    """
    given = {"threads": threads, "context": context, "memory": memory}
    lanes = available_cores() if threads is None else threads
    if not 1 <= lanes <= MAX_LANES:
        raise UsageError(f"{lanes} threads: choose 1 to {MAX_LANES}")
    positions = min(spec.context, DEFAULT_CONTEXT) if context is None else context
    if not 1 <= positions <= spec.context:
        raise UsageError(f"a context of {positions} positions: this model takes 1 to {spec.context}")
    _check_shapes(file, spec)
    chunk, tile = min(CHUNK, round_up(positions, BATCH)), TILE_TOKENS
    ledger = Ledger()
    layout = lay_out_model(ledger, file, spec, lanes=lanes, context=positions, chunk=chunk, tile=tile)
    lay_out_unit(ledger, lanes, chunk, tracing=tracing)
    regions = ledger.usage()
    regions["kv"] = KVLayout.of(spec).region(positions)
    regions["state"] += (BATCH + 1) * block_table_bytes(positions)
    regions["programs"] = sum(p.nbytes for p in layout.programs.values())
    plan = Plan(
        model=file.path.name,
        architecture=spec.architecture,
        context=positions,
        lanes=lanes,
        tile=tile,
        chunk=chunk,
        batch=BATCH,
        path=target.path(),
        bytes_per_token=layout.weights.bytes_per_token,
        regions=regions,
        sources={name: _source(name, value, sources or {}) for name, value in given.items()},
    )
    if memory is not None and plan.total + OVERHEAD > memory:
        need = -(-(plan.total + OVERHEAD) >> 20)
        raise PlanError(
            f"{file.path.name} needs {need} MiB with a context of {positions}, more than the {memory >> 20} MiB "
            "allowed; lower -c, or raise --memory (models larger than memory are not in this version)"
        )
    needed = plan.total - regions["kv"] + OVERHEAD  # the cache is taken only as sequences grow
    if needed > available_memory():
        raise PlanError(
            f"{file.path.name} needs {needed >> 20} MiB, but only {available_memory() >> 20} MiB of memory are free; "
            "models larger than memory are not in this version"
        )
    return plan


def _source(name: str, value: int | None, sources: Mapping[str, str]) -> str:
    return "automatic" if value is None else sources.get(name, "argument")


def _check_shapes(file: GGUFFile, spec: ModelSpec) -> None:
    """What the kernels cannot do is said here."""
    if spec.head_dim % 16:
        raise PlanError(
            f"{file.path.name}: heads of {spec.head_dim} dimensions are not supported (multiples of 16 are)"
        )
    for layer in spec.layers:
        if layer.rope.dims % 16 or layer.rope.dims > spec.head_dim:
            raise PlanError(f"{file.path.name}: a rotary embedding of {layer.rope.dims} dimensions is not supported")
