"""The plan: what runs where, with how much memory, decided before anything is loaded (design sections 3 and 9)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from coterie.scheduler.hotness import Activity
from coterie.scheduler.placement import CPU_ONLY, Placement
from coterie.scheduler.profile import FlashChoice
from coterie.scheduler.residency import region_bytes
from coterie.sizes import Memory
from coterie.storage.activations import Activations

VERSION = 8
NUMERICS_VERSION = 1  # of docs/numerics.md: within it, equal inputs give equal bits
MAX_LANES = 64
OVERHEAD = 200_000_000  # bytes: Python, its libraries, and before weights are loaded the compiler, beside the ceiling


@dataclass(frozen=True, kw_only=True)
class Flash(FlashChoice):
    """How weights are streamed. `file`: the packed model; `identity`: the hash it is known by. Once it is open,
    `engine` is the one in use."""

    file: str
    identity: str
    sector: int = 4096  # bytes that reads are multiples of


@dataclass(frozen=True)
class Plan:
    """A decision, and where each value came from: "flag", "environment", "config", "argument" (of the Python API),
    "plan", "session" or "automatic". Sizes are bytes.

    `memory` is the ceiling over all regions and copies together (None: whatever they need); Python and its libraries
    take up to OVERHEAD beside it. `copies`: what units' runtimes keep of weights, and themselves take, by unit.
    `pinned` counts extents in the order of residency.pin_order.
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
    pinned: int
    ring: int
    slots: int  # neurons in the cache of a sparse model
    neurons: int  # that it has, in all layers ...
    pinned_neurons: int  # ... and of these those that stay in memory
    regions: dict[str, int]
    sources: dict[str, str]
    memory: int | None = None
    flash: Flash | None = None
    numerics: str = "exact"
    version: int = VERSION
    placement: Placement = CPU_ONLY
    copies: dict[str, int] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=lambda: {"cpu": "everything"})
    host: str = "threads"  # what the units are: threads of this process, or actors of "ray"
    activity: tuple[Activity, ...] = ()  # what a sparse model's steps are expected to use, by batch size
    hot: dict[int, int] = field(default_factory=dict)  # of a sparse model, by batch size: neurons that are hot
    reasons: tuple[str, ...] = ()  # why units do what they do, for people

    @property
    def total(self) -> int:
        """Bytes of the arena, if the whole context is used, and of units' own copies."""
        return sum(region_bytes(size) for size in self.regions.values()) + sum(self.copies.values())

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
        if self.units.get("cpu", "everything") != "everything":
            cpu += f" ({self.units['cpu']})"
        ceiling = "" if self.memory is None else f" of a ceiling of {self.memory >> 20} MiB"
        lines = [f"{self.model}: {self.architecture}, {self._residency()}, numerics {self.numerics}"]
        lines += [cpu] if "cpu" in self.units else []
        lines += [self._unit_line(unit, work) for unit, work in self.units.items() if unit in ("gpu", "npu")]
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
        if self.host == "ray":
            lines.append(
                f"host Ray: actors {' and '.join(self.units)}; a lost one is replaced, where Ray is gone by threads of "
                "this process"
            )
        counted = {activity.batch for activity in self.activity}
        hot = [f"batch {size}: {hot:,} neurons hot" for size, hot in self.hot.items() if size not in counted]
        return [*lines, *self.reasons, *(activity.line() for activity in self.activity), *hot]

    def _unit_line(self, unit: str, work: str) -> str:
        lengths = " and ".join(map(str, (*self.placement.lengths, *[1] * bool(self.placement.row_kinds))))
        how = f", in graphs of {lengths} rows" if unit == "npu" else ""
        copies = self.copies.get(unit, 0)
        return f"{unit} computes: {work}{how}" + (f"; about {copies >> 20} MiB of its own" if copies else "")

    def _residency(self) -> str:
        weights = self.regions["weights"] / (1 << 20)
        if self.slots:
            cache, rest = self.regions["neurons"] / (1 << 20), self.neurons - self.pinned_neurons
            dense = f"{100 * self.resident:.0f} % of what every token uses in memory ({weights:.0f} MiB)"
            return (
                f"{dense}; of {self.neurons:,} neurons {self.pinned_neurons:,} stay, up to {self.slots:,} of the other "
                f"{rest:,} are in the cache ({cache:.0f} MiB), the others are read when they are live"
            )
        if not self.streamed_per_token:
            return f"all weights in memory ({weights:.0f} MiB), {self.bytes_per_token / 1e6:.0f} MB used a token"
        return (
            f"{100 * self.resident:.0f} % of a token's weights in memory ({weights:.0f} MiB), "
            f"{self.streamed_per_token / 1e6:.0f} MB streamed a token"
        )


@dataclass(frozen=True)
class Wishes:
    """What the user wants of a plan; None is for us to choose. `memory` is a ceiling in bytes, a share of the weights,
    or "auto"; `host` as of Plan. `tracing` records events, `counting` in how many steps a sparse model's neurons were
    live; `activations` are such counts, by which the plan says what it expects; `units` are those that may compute,
    `gpu_share` of the time for a GPU; `split` as of Placement.
    `placement` (of a plan file or a preset; None: as the units' roles are) says who does what, `begin` with how many
    parts of products cuts between units begin (else in the middle), `reasons` why.
    What follows comes from a plan file: extents pinned, bytes of the ring, neurons in the cache, how flash is read, by
    batch size how many neurons are hot and cold, and of which model."""

    threads: int | None = None
    context: int | None = None
    chunk: int | None = None
    memory: Memory | None = None
    tracing: bool = False
    counting: bool = False
    activations: Activations | None = None
    host: str = "threads"
    units: tuple[str, ...] = ("cpu",)
    gpu_share: float = 1.0
    split: str = "layer"
    sources: Mapping[str, str] = field(default_factory=dict)
    placement: Placement | None = None
    begin: Mapping[str, int] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    pinned: int | None = None
    ring: int | None = None
    slots: int | None = None
    block: int | None = None
    depth: int | None = None
    hot: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    identity: str | None = None
