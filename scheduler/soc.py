"""What is known of a device: its units, memory and flash, and where every constant comes from; soc_file.py reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from coterie.errors import UsageError
from coterie.scheduler.flash_model import FlashModel

# What weight formats are like, where a unit's own rates for a format are not known.
GROUPS = {
    "w4": ("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_K"),
    "int8": ("Q8_0", "Q6_K"),
    "f16": ("F16", "BF16", "F32"),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


@dataclass(frozen=True)
class Vector:
    """A kernel for few tokens, which reads the weights once a token and is bound by memory: seconds to launch it, and
    how it slows with rows longer than `inner` (device_model.lengthening)."""

    launch: float
    inner: float = 0.0
    power: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What a unit does with weights of one format; device_model.time is the formula.

    `rate`: operations/s (a multiplication and an addition are two), 0: not a bound; `fill`: stream rows that putting a
    stationary operand in place takes the time of; `swaps`: either operand may be the stationary one; `inner`, `power`:
    rows longer than `inner` lower all rates by (length / inner) ** power; `weights_per_s`: weights that can be unpacked
    a second (0: not a bound); `bandwidth`: bytes/s of its own (0: the unit's); `launch`: seconds (None: the unit's);
    `vector`: a kernel for few tokens.
    """

    rate: float
    fill: float = 0.0
    inner: float = 0.0
    power: float = 0.0
    weights_per_s: float = 0.0
    bandwidth: float = 0.0
    launch: float | None = None
    vector: Vector | None = None
    swaps: bool = False


@dataclass(frozen=True)
class UnitModel:
    """A compute unit. `bandwidth`: bytes/s it reads alone; `step`: dimensions are padded to multiples of it;
    `launch`: seconds that a kernel takes beside its work when it runs alone, `queued` behind another one in the unit's
    queue, `drained` when the queue had run empty (None: as alone); `sync`: until another unit knows by a flag that one
    is finished, `fence`: by a call of the runtime; `copy`: for the buffers of one kernel, where they are not shared;
    `beside_flash`: share of its speed that is left while flash is read; `power`: watts while it is busy (None: not
    known); `shares`: the unit whose cores it runs on ("": its own); `window`: bytes of weights that it can address
    (None: all memory); `rates` by format, or by the name of a kernel."""

    name: str
    kind: str
    bandwidth: float
    rates: Mapping[str, Rates]
    default: str
    step: int = 1
    launch: float = 0.0
    queued: float | None = None
    drained: float | None = None
    sync: float = 0.0
    fence: float = 0.0
    copy: float = 0.0
    beside_flash: float = 1.0
    power: float | None = None
    shares: str = ""
    window: float | None = None
    measured: bool = False

    def rates_of(self, kernel: str, format: str) -> Rates:
        """Rates for a kernel by its name ("matmul:Q4_0:4"), else for the format, formats like it, the family, or as of
        the unit's default format. Raises UsageError for a kernel that a unit which was `measured` has not been
        measured with."""
        family = kernel.partition(":")[0]
        for name in (short_name(kernel), format, GROUP_OF.get(format, ""), family):
            if name in self.rates:
                return self.rates[name]
        if self.measured:
            format = [*kernel.split(":"), format][1]
            raise UsageError(
                f"{short_name(kernel)} has not been measured here: coterie profile --units --formats {format}"
            )
        return self.rates[self.default]


def short_name(kernel: str) -> str:
    """A kernel's family, first format and tile: what else is in its name does not change its time much."""
    parts = kernel.split(":")
    return kernel if len(parts) < 4 else f"{parts[0]}:{parts[1]}:{parts[-1]}"


@dataclass(frozen=True)
class Mark:
    """Where a constant comes from: `how` is "printed", "fitted", "guessed" or "measured"."""

    path: str
    how: str
    source: str


@dataclass(frozen=True)
class Device:
    """A device. `memory`: bytes there are; `together`: bytes/s that all units read together at most; `between`: seconds
    between two steps that no unit works, `streamed` where weights are streamed (None: as many); `flashes`: the flash by
    how many requests are in flight, where that is known; `flash_beside`: share of its rate that is left while units
    compute; `flash_power`, `idle_power`: watts (None: not known); `flash_depth`, `flash_block`: how it is read;
    `latency`: seconds from asking an idle flash for something to its first byte; `emulated`: it is not this machine."""

    name: str
    memory: int
    together: float
    units: Mapping[str, UnitModel]
    flash: FlashModel | None
    marks: tuple[Mark, ...] = ()
    between: float = 0.0
    flash_beside: float = 1.0
    flash_power: float | None = None
    idle_power: float | None = None
    flash_depth: int = 8
    flash_block: int = 1 << 20
    emulated: bool = True
    latency: float = 0.0
    about: str = ""
    streamed: float | None = None
    flashes: Mapping[int, FlashModel] = field(default_factory=dict)

    def guesses(self) -> tuple[str, ...]:
        """Constants that nobody printed or measured."""
        return tuple(mark.path for mark in self.marks if mark.how == "guessed")

    def unit(self, name: str) -> UnitModel:
        """Raises UsageError where there is no such unit."""
        if name not in self.units:
            raise UsageError(f"{self.name} has no unit {name!r}; it has {', '.join(self.units)}")
        return self.units[name]

    def core_of(self, name: str) -> str:
        """The unit whose cores a unit runs on in the end."""
        while self.units[name].shares:
            name = self.units[name].shares
        return name
