"""The device profile: what was measured of a machine, in one file of the cache (design section 9).

JSON, a section a machine. What is damaged, from another version, or about another machine or file system is not used.
"""

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from coterie.errors import UsageError
from coterie.kernels import target
from coterie.paths import cache_dir, replace_file

VERSION = 2
LARGEST_FILE = 4 << 20  # bytes of a profile
MACHINES = 8  # kept in a profile, which several machines may share
ENGINES = ("io_uring", "preadv")
SINGLE = 8192  # bytes at most of a read that is like a single neuron's
BLOCKS, DEPTHS = (4096, 1 << 30), (1, 1 << 10)  # least and largest
OPERATORS = ("matmul", "ffn_up", "ffn_down", "head", "ffn", "others")
LONGEST = 200  # characters of a name
LARGEST = 1 << 31  # rows, columns and tokens


@dataclass(frozen=True)
class FlashRow:
    """A point of a sweep: reads of `block` bytes, `depth` in flight, "sequential" or "random" within `span` bytes."""

    pattern: str
    engine: str
    block: int
    depth: int
    span: int
    bytes_per_s: float
    cpu_us: float  # processor time a read


@dataclass(frozen=True)
class FlashProfile:
    """How a file system is read fastest; `quick`: found by few measurements."""

    engine: str
    block: int
    depth: int
    bytes_per_s: float
    quick: bool
    rows: tuple[FlashRow, ...] = ()


@dataclass(frozen=True)
class KernelCost:
    """What a kernel of the CPU unit takes (soc.Rates): seconds to launch it, operations/s (0: not a bound), bytes/s (0:
    not a bound), and tokens that loading weights takes the time of. `kernel` as soc.short_name."""

    kernel: str
    launch: float
    rate: float
    bandwidth: float
    fill: float


@dataclass(frozen=True)
class UnitProfile:
    """The CPU unit with so many lanes: `between`: seconds between two steps, `streamed` the same where weights are
    streamed; `flash_beside`: share of its rate that is left to flash while lanes compute."""

    lanes: int
    kernels: tuple[KernelCost, ...]
    between: float
    streamed: float
    flash_beside: float


class Product(NamedTuple):
    """A matrix product of weights, `rows` x `columns` in `format`. `operator`: "matmul" (projections, attention's
    output), "ffn_up" (Gate and Up, whose rows count both), "ffn_down", "head" (logits), or "ffn" (all of an FFN as one
    graph, with the rows and columns of "ffn_up"); "others" is no product, but all else of a layer, measured as if it
    were one (estimate.others_of)."""

    operator: str
    rows: int
    columns: int
    format: str


class Point(NamedTuple):
    """Seconds of a product's first `rows` rows for so many tokens, behind other work of the unit."""

    rows: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class ProductTimes:
    """A product of a model as a unit computes it, `nbytes` of weights."""

    product: Product
    nbytes: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class UnitTimes:
    """A unit's products. `key`: what they were measured with (actors/identity.py); `format`: what the unit has all
    weights in ("": as they are); `lengths`: tokens of its graphs (none: it takes any number); seconds to `launch` an
    empty kernel and be told of its end, and of one `queued` behind another; bytes/s of weights that it reads alone."""

    key: str
    format: str
    lengths: tuple[int, ...]
    launch: float
    queued: float
    bandwidth: float
    products: tuple[ProductTimes, ...]


@dataclass(frozen=True)
class Shapes:
    """Products of models by unit, and how units meet. `together`: bytes/s that two units ("cpu+gpu") read at the same
    time; `sync`: seconds until a thread sees another one's flag; `copy`: bytes/s of copying rows."""

    units: dict[str, UnitTimes] = field(default_factory=dict)
    together: dict[str, float] = field(default_factory=dict)
    sync: float = 0.0
    copy: float = 0.0


@dataclass
class DeviceProfile:
    """What is known of this machine: memory_bandwidth in bytes/s, read by all cores; flash by file system; the CPU unit
    by its lanes; products of models on each unit, and on units that have products to share, beside each other (the last
    three are missing in files of an older Coterie)."""

    memory_bandwidth: float | None = None
    flash: dict[str, FlashProfile] = field(default_factory=dict)
    units: dict[str, UnitProfile] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=Shapes)
    beside: Shapes = field(default_factory=Shapes)


@dataclass(frozen=True)
class FlashChoice:
    """How to read: block in bytes, requests in flight, the rate to expect (None: not known), where it came from
    ("profile", "quick profile", "plan" or "assumed"), and the engine (None: whichever works)."""

    block: int
    depth: int
    bytes_per_s: float | None
    source: str
    engine: str | None = None


ASSUMED = FlashChoice(1 << 20, 8, None, "assumed")


def flash_choice(profile: DeviceProfile, path: Path) -> FlashChoice:
    """How to read the file at `path`, by what was measured of its file system."""
    found = profile.flash.get(file_system(path))
    if found is None:
        return ASSUMED
    source = "quick profile" if found.quick else "profile"
    return FlashChoice(found.block, found.depth, found.bytes_per_s, source, found.engine)


def single_reads(profile: DeviceProfile, path: Path) -> float | None:
    """Reads/s of single neurons, as far as measured: of the smallest blocks, with most of them in flight, anywhere in a
    file; None where a full profile is missing."""
    found = profile.flash.get(file_system(path))
    rows = [row for row in found.rows if row.pattern == "random" and row.block <= SINGLE] if found else []
    best = max(rows, key=lambda row: (row.span, -row.block, row.depth), default=None)
    return None if best is None else best.bytes_per_s / best.block


def profile_path() -> Path:
    """Where the profile lies."""
    return cache_dir() / "profile.json"


def load_profile() -> DeviceProfile:
    """What is known of this machine; nothing, and a line on stderr, where the file is damaged."""
    path = profile_path()
    try:
        return _parsed(_sections(path).get(machine(), {}))
    except (ValueError, RecursionError) as error:
        _warn(f"{path}: {error}; measure again with coterie profile --flash")
        return DeviceProfile()


def save_profile(profile: DeviceProfile) -> Path:
    """Put this machine's profile into the file, whole or not at all. Raises UsageError where it cannot be written."""
    path = profile_path()
    sections: dict[str, Any] = {}
    with suppress(ValueError, RecursionError):  # what is damaged is replaced
        sections = _sections(path)
    sections.pop(machine(), None)
    kept = list(sections.items())[1 - MACHINES :]
    text = json.dumps({"version": VERSION, "machines": dict(kept) | {machine(): asdict(profile)}}, indent=1)
    try:
        replace_file(path, text.encode() + b"\n")
    except OSError as error:
        raise UsageError(f"cannot write the device profile {path}: {error.strerror}") from None
    return path


@cache
def machine() -> str:
    """What tells this machine from others, as a short hash."""
    try:
        identity = Path("/etc/machine-id").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        identity = ""
    parts = identity or os.uname().nodename, target.cpu_name(), str(os.cpu_count())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def file_system(path: Path) -> str:
    """What tells the file system at `path` from others: its device number and what is mounted; "" if not known."""
    try:
        device = os.stat(path).st_dev
        real = os.path.realpath(path)
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    found, source = "", "unknown"
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        point = fields[4] if len(fields) > 4 else ""
        if len(kind) > 1 and len(point) >= len(found) and f"{real}/".startswith(point.rstrip("/") + "/"):
            found, source = point, f"{kind[0]} {kind[1]}"
    return f"{os.major(device)}:{os.minor(device)} {source}"


@cache
def _warn(text: str) -> None:
    """Once a process."""
    print(f"coterie: {text}", file=sys.stderr)


def _sections(path: Path) -> dict[str, Any]:
    """The file's sections, by machine. Raises ValueError where it is none of ours."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    if len(data) > LARGEST_FILE:
        raise ValueError("is too large for a device profile")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("is damaged") from None
    if not isinstance(content, dict) or not isinstance(content.get("machines"), dict):
        raise ValueError("is damaged")
    if content.get("version") != VERSION:
        raise ValueError(f"is of version {str(content.get('version'))[:20]}, and this Coterie knows {VERSION}")
    return dict(content["machines"])


def _parsed(section: Any) -> DeviceProfile:
    """A section as what it means. Raises ValueError for a value that makes no sense."""
    try:
        bandwidth = section.get("memory_bandwidth")
        return DeviceProfile(
            None if bandwidth is None else _rate(bandwidth),
            {str(name): _flash(each) for name, each in section.get("flash", {}).items()},
            {str(name): _unit(each) for name, each in section.get("units", {}).items()},
            *(_shapes(section[name]) if name in section else Shapes() for name in ("shapes", "beside")),
        )
    except (AttributeError, KeyError, TypeError):
        raise ValueError("is damaged") from None


def _flash(values: dict[str, Any]) -> FlashProfile:
    return FlashProfile(
        _word(values["engine"], ENGINES),
        _whole(values["block"], *BLOCKS) // 4096 * 4096,
        _whole(values["depth"], *DEPTHS),
        _rate(values["bytes_per_s"]),
        bool(values["quick"]),
        tuple(_row(row) for row in values["rows"]),
    )


def _unit(values: dict[str, Any]) -> UnitProfile:
    left = _rate(values["flash_beside"])
    if not 0 < left <= 1 or not values["kernels"]:
        raise ValueError("is damaged")
    return UnitProfile(
        _whole(values["lanes"], 1, 1 << 10),
        tuple(_kernel(each) for each in values["kernels"]),
        _rate(values["between"]),
        _rate(values["streamed"]),
        left,
    )


def _kernel(values: dict[str, Any]) -> KernelCost:
    name = _name(values["kernel"])
    return KernelCost(name, *(_rate(values[key]) for key in ("launch", "rate", "bandwidth", "fill")))


def _shapes(values: dict[str, Any]) -> Shapes:
    return Shapes(
        {_name(name): _unit_times(each) for name, each in values["units"].items()},
        {_name(name): _rate(each) for name, each in values["together"].items()},
        _rate(values["sync"]),
        _rate(values["copy"]),
    )


def _unit_times(values: dict[str, Any]) -> UnitTimes:
    return UnitTimes(
        _name(values["key"]),
        _name(values["format"]),
        tuple(_whole(length, 1, LARGEST) for length in values["lengths"]),
        _rate(values["launch"]),
        _rate(values["queued"]),
        _rate(values["bandwidth"]),
        tuple(_product_times(each) for each in values["products"]),
    )


def _product_times(values: dict[str, Any]) -> ProductTimes:
    operator, rows, columns, format = _items(values["product"], 4)
    product = Product(_word(operator, OPERATORS), _whole(rows, 1, LARGEST), _whole(columns, 1, LARGEST), _name(format))
    points = tuple(
        Point(_whole(part, 1, product.rows), _whole(tokens, 1, LARGEST), _rate(seconds))
        for part, tokens, seconds in (_items(point, 3) for point in values["points"])
    )
    if not points or any(not point.seconds for point in points) or len({point[:2] for point in points}) < len(points):
        raise ValueError("is damaged")
    return ProductTimes(product, _whole(values["nbytes"], 1, 1 << 62), points)


def _row(values: dict[str, Any]) -> FlashRow:
    return FlashRow(
        _word(values["pattern"], ("sequential", "random")),
        _word(values["engine"], ENGINES),
        _whole(values["block"], *BLOCKS),
        _whole(values["depth"], *DEPTHS),
        _whole(values["span"], 0, 1 << 62),
        _rate(values["bytes_per_s"]),
        _rate(values["cpu_us"]),
    )


def _word(value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError("is damaged")
    return str(value)


def _items(value: Any, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError("is damaged")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or len(value) > LONGEST:
        raise ValueError("is damaged")
    return value


def _whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError("is damaged")
    return value


def _rate(value: Any) -> float:
    if type(value) not in (int, float) or not isfinite(value) or not 0 <= value < 1e15:
        raise ValueError("is damaged")
    return float(value)
