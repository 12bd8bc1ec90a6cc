"""Reading devices from configs/soc/*.toml, or from a file like these.

Every table names the `source` of its constants; those that nobody printed are listed by key in `guessed`, and those
found by fitting the model to printed times in `fitted`. A constant without either is refused, so that a simulation can
say how much of it is known. All errors are one line that names the file and the key.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import Any

from coterie.errors import UsageError
from coterie.scheduler.flash_model import CORES, PATTERNS, FlashModel, FlashPoint
from coterie.scheduler.soc import Device, Mark, Rates, UnitModel, Vector
from coterie.scheduler.tables import Table, configured, shown

KINDS = ("cpu", "gpu", "npu")
LARGEST_FILE = 1 << 20  # bytes
MOST = 1e18  # of any number
MOST_POINTS = 1000


def soc_names() -> list[str]:
    """Devices in configs/soc."""
    return configured("soc")


def load_soc(name: str) -> Device:
    """The device of that name in configs/soc, or in the TOML file at that path. Raises UsageError where there is none,
    or where it makes no sense: in one line that names the file and the key."""
    if name in soc_names():
        return _known(name)
    path = Path(name)
    if path.suffix != ".toml" and "/" not in name:
        raise UsageError(f"no device is called {name!r}; there is {', '.join(soc_names())}, or name a TOML file")
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > LARGEST_FILE:
        raise UsageError(f"{path} is too large for a device")
    return parse_soc(data, str(path))


@cache
def _known(name: str) -> Device:
    return parse_soc((resources.files("coterie.configs") / "soc" / f"{name}.toml").read_bytes(), f"{name}.toml")


def flash_of_soc(name: str) -> FlashModel:
    """The flash of a device in configs/soc. Raises UsageError where there is no such device, or it says nothing of
    flash."""
    if name not in soc_names():
        raise UsageError(f"no device is called {name!r}; there is {', '.join(soc_names())}")
    flash = _known(name).flash
    if flash is None:
        raise UsageError(f"nothing is known of the flash of {name}")
    return flash


def parse_soc(data: bytes, where: str) -> Device:
    """A device out of a TOML file's bytes. Raises UsageError."""
    try:
        values = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: {' '.join(str(error).split())[:200]}") from None
    marks: list[Mark] = []
    top = Constants(values, where, "", marks)
    name, about = top.text("name"), top.text("about", "")
    memory = top.table("memory")
    total, together = memory.count("total"), memory.number("together")
    memory.done()
    host = top.table("host", optional=True)
    between, idle = host.number("between", 0.0, least=0.0), host.number_or_none("idle_power")
    host.done()
    units = top.table("units")
    found = {each: _unit(each, units.table(each)) for each in units.names()}
    units.done()
    flash = top.table("flash", optional=True)
    model = _flash(flash) if flash.names() else None
    device = Device(
        name,
        total,
        together,
        found,
        model,
        between=between,
        idle_power=idle,
        about=about,
        flash_beside=flash.part("beside", 1.0),
        flash_power=flash.number_or_none("power"),
        flash_depth=flash.count("depth", 8, most=1 << 10),
        flash_block=flash.count("read", 1 << 20, least=4096, most=1 << 30),
        latency=flash.number("latency", 0.0, least=0.0),
    )
    flash.done()
    top.done(marked=False)
    if not found:
        raise UsageError(f"{where}: units: a device needs at least one")
    _check_sharing(where, found)
    return replace(device, marks=tuple(marks))


def _unit(name: str, table: "Constants") -> UnitModel:
    kind = table.text("kind")
    if kind not in KINDS:
        raise table.wrong("kind", f"is {kind!r}: a unit is one of {', '.join(KINDS)}")
    formats = table.table("formats")
    rates = {each: _rates(formats.table(each)) for each in formats.names()}
    formats.done()
    if not rates:
        raise table.wrong("formats", "is empty: a unit has rates for one format at least")
    default = table.text("default", next(iter(rates)))
    if default not in rates:
        raise table.wrong("default", f"is {default!r}, of which there are no rates")
    unit = UnitModel(
        name,
        kind,
        table.number("bandwidth"),
        rates,
        default,
        step=table.count("step", 1, most=1 << 16),
        launch=table.number("launch", 0.0, least=0.0),
        queued=table.number_or_none("queued", least=0.0),
        drained=table.number_or_none("drained", least=0.0),
        sync=table.number("sync", 0.0, least=0.0),
        fence=table.number("fence", 0.0, least=0.0),
        copy=table.number("copy", 0.0, least=0.0),
        beside_flash=table.part("beside_flash", 1.0),
        power=table.number_or_none("power"),
        shares=table.text("shares", ""),
        window=table.number_or_none("window"),
    )
    table.done()
    return unit


def _rates(table: "Constants") -> Rates:
    rate, vector = table.number("rate", 0.0), None
    if table.has("vector"):
        part = table.table("vector")
        launch, inner = part.number("launch", least=0.0), part.number("inner", 0.0)
        vector = Vector(launch, inner, part.number("power", 0.0, least=0.0))
        part.done()
    rates = Rates(
        rate,
        fill=table.number("fill", 0.0, least=0.0),
        inner=table.number("inner", 0.0),
        power=table.number("power", 0.0, least=0.0),
        weights_per_s=table.number("weights_per_s", 0.0),
        bandwidth=table.number("bandwidth", 0.0),
        launch=table.number_or_none("launch", least=0.0),
        vector=vector,
        swaps=table.flag("swaps"),
    )
    table.done()
    return rates


def _flash(table: "Constants") -> FlashModel:
    points = []
    for row in table.points():
        pattern, core = row.word("pattern", PATTERNS), row.word("core", CORES, "big")
        block, span = row.count("block"), row.count("span", 0, least=0)
        points.append(FlashPoint(pattern, block, row.number("bytes_per_s"), span, core))
        row.done(marked=False)
    if not any(point.core == "big" for point in points):
        raise table.wrong("points", "has none of a big core")
    return FlashModel(tuple(points), table.part("crowd", 1.0))


def _check_sharing(where: str, units: Mapping[str, UnitModel]) -> None:
    """`shares` must lead to a unit with cores of its own."""
    for unit in units.values():
        seen, at = [unit.name], unit
        while at.shares:
            if at.shares not in units:
                raise UsageError(f"{where}: units.{at.name}.shares: there is no unit {at.shares!r}")
            at = units[at.shares]
            if at.name in seen:
                raise UsageError(f"{where}: units.{unit.name}.shares: {' -> '.join([*seen, at.name])} goes in a circle")
            seen.append(at.name)


class Constants(Table):
    """A table with constants; `done` also refuses those of unknown origin, and adds each to `marks`. What has a default
    may be missing."""

    error = UsageError

    def __init__(self, values: Any, where: str, path: str, marks: list[Mark]) -> None:
        super().__init__(values, where, path)
        self.marks, self._constants = marks, list[str]()

    def names(self) -> list[str]:
        return list(self._values)

    def number(self, key: str, default: float | None = None, *, least: float | None = None) -> float:
        """A finite number above 0, or `least` at least."""
        if default is not None and not self.has(key):
            return default
        value = self.value(key)
        if type(value) not in (int, float) or not isfinite(value):
            raise self.wrong(key, f"is {shown(value)}, and must be a finite number")
        if value < least if least is not None else value <= 0:
            raise self.wrong(key, f"is {shown(value)}, and must be {'above 0' if least is None else 'at least 0'}")
        if value > MOST:
            raise self.wrong(key, f"is {shown(value)}, which is too much")
        self._constants.append(key)
        return float(value)

    def number_or_none(self, key: str, *, least: float | None = None) -> float | None:
        return self.number(key, least=least) if self.has(key) else None

    def part(self, key: str, default: float) -> float:
        """A number above 0 and up to 1."""
        if not self.has(key):
            return default
        self._constants.append(key)
        return self.share(key)

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 60) -> int:
        if default is not None and not self.has(key):
            return default
        self._constants.append(key)
        return self.whole(key, least, most)

    def text(self, key: str, default: str | None = None) -> str:
        return super().text(key) if default is None or self.has(key) else default

    def word(self, key: str, allowed: Sequence[str], default: str | None = None) -> str:
        return super().word(key, allowed) if default is None or self.has(key) else default

    def flag(self, key: str) -> bool:
        return self.has(key) and super().flag(key)

    def table(self, key: str, *, optional: bool = False) -> "Constants":
        values = {} if optional and not self.has(key) else self.value(key)
        return Constants(values, self.where, self._name(key), self.marks)

    def points(self) -> "list[Constants]":
        """The tables of the list `points`, which counts as one constant."""
        entries = self._list("points", MOST_POINTS)
        self._constants.append("points")
        return [Constants(each, self.where, f"{self._name('points')}[{i}]", []) for i, each in enumerate(entries)]

    def _keys(self, key: str) -> list[str]:
        """The keys of this table that a list of names mentions."""
        names = self.value(key) if self.has(key) else []
        if not isinstance(names, list) or any(name not in self._constants for name in names):
            raise self.wrong(key, f"must be a list of this table's constants: {', '.join(self._constants)}")
        return names

    def done(self, *, marked: bool = True) -> None:
        """Nothing else may be here; with `marked`, every constant's origin must be known."""
        if marked:
            source = self.text("source", "")
            how = dict.fromkeys(self._keys("fitted"), "fitted") | dict.fromkeys(self._keys("guessed"), "guessed")
            for key in self._constants:
                if not source and key not in how:
                    raise self.wrong(key, "has no source: give the table a `source`, or list the key in `guessed`")
                self.marks.append(Mark(self._name(key), how.get(key, "printed"), source))
        super().done()
