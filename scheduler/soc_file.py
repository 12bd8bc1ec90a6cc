"""Reading devices from configs/soc/*.toml, or from a file like these.

Every table names the `source` of its constants; those that nobody printed are listed by key in `guessed`, and those
found by fitting the model to printed times in `fitted`. A constant without either is refused, so that a simulation can
say how much of it is known. All errors are one line that names the file and the key.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import Any

from coterie.errors import UsageError
from coterie.scheduler.flash_model import CORES, PATTERNS, FlashModel, FlashPoint
from coterie.scheduler.soc import Device, Mark, Rates, UnitModel, Vector

KINDS = ("cpu", "gpu", "npu")
LARGEST_FILE = 1 << 20  # bytes
MOST = 1e18  # of any number


def soc_names() -> list[str]:
    """Devices in configs/soc."""
    folder = resources.files("coterie.configs") / "soc"
    return sorted(path.name.removesuffix(".toml") for path in folder.iterdir() if path.name.endswith(".toml"))


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
    top = _Table(values, where, "", marks)
    name, about = top.text("name"), top.text("about", "")
    memory = top.table("memory")
    total, together = memory.whole("total"), memory.number("together")
    memory.done()
    host = top.table("host", optional=True)
    between, idle = host.number("between", 0.0, least=0.0), host.number_or_none("idle_power")
    host.done()
    units = top.table("units")
    found = {each: _unit(each, units.table(each)) for each in units.names()}
    units.done()
    flash = top.table("flash", optional=True)
    model = _flash(flash) if flash.values else None
    device = Device(
        name,
        total,
        together,
        found,
        model,
        between=between,
        idle_power=idle,
        about=about,
        flash_beside=flash.share("beside", 1.0),
        flash_power=flash.number_or_none("power"),
        flash_depth=flash.whole("depth", 8, most=1 << 10),
        flash_block=flash.whole("read", 1 << 20, least=4096, most=1 << 30),
        latency=flash.number("latency", 0.0, least=0.0),
    )
    flash.done()
    top.done(marked=False)
    if not found:
        raise UsageError(f"{where}: units: a device needs at least one")
    _check_sharing(where, found)
    return replace(device, marks=tuple(marks))


def _unit(name: str, table: "_Table") -> UnitModel:
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
        step=table.whole("step", 1, most=1 << 16),
        launch=table.number("launch", 0.0, least=0.0),
        queued=table.number_or_none("queued", least=0.0),
        drained=table.number_or_none("drained", least=0.0),
        sync=table.number("sync", 0.0, least=0.0),
        fence=table.number("fence", 0.0, least=0.0),
        copy=table.number("copy", 0.0, least=0.0),
        beside_flash=table.share("beside_flash", 1.0),
        power=table.number_or_none("power"),
        shares=table.text("shares", ""),
        window=table.number_or_none("window"),
    )
    table.done()
    return unit


def _rates(table: "_Table") -> Rates:
    rate, vector = table.number("rate", 0.0), None
    if "vector" in table.values:
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


def _flash(table: "_Table") -> FlashModel:
    points = []
    for number, entry in enumerate(table.list_of_tables("points")):
        row = _Table(entry, table.where, f"{table.path}.points[{number}]", [])
        pattern, core = row.word("pattern", PATTERNS), row.word("core", CORES, "big")
        block, span = row.whole("block"), row.whole("span", 0, least=0)
        points.append(FlashPoint(pattern, block, row.number("bytes_per_s"), span, core))
        row.done(marked=False)
    if not any(point.core == "big" for point in points):
        raise table.wrong("points", "has none of a big core")
    return FlashModel(tuple(points), table.share("crowd", 1.0))


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


class _Table:
    """A table that is read key by key; `done` refuses what was not asked for, and constants of unknown origin."""

    def __init__(self, values: Any, where: str, path: str, marks: list[Mark]) -> None:
        self.where, self.path, self.marks = where, path, marks
        if not isinstance(values, dict):
            raise UsageError(f"{where}: {path}: must be a table")
        self.values: dict[str, Any] = values
        self._read, self._constants = set[str](), list[str]()

    def wrong(self, key: str, what: str) -> UsageError:
        return UsageError(f"{self.where}: {self._name(key)}: {what}")

    def _name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _take(self, key: str, default: Any) -> Any:
        self._read.add(key)
        if key not in self.values and default is _NEEDED:
            raise self.wrong(key, "is missing")
        return self.values.get(key, default)

    def number(self, key: str, default: Any = None, *, least: float | None = None) -> float:
        """A finite number above 0, or `least` at least; a constant whose origin `done` asks for."""
        value = self._take(key, _NEEDED if default is None else default)
        if type(value) not in (int, float) or not isfinite(value):
            raise self.wrong(key, f"is {value!r}, and must be a finite number")
        given = key in self.values
        if given and (value < least if least is not None else value <= 0):
            raise self.wrong(key, f"is {value!r}, and must be {'at least 0' if least is not None else 'above 0'}")
        if value > MOST:
            raise self.wrong(key, f"is {value!r}, which is too much")
        if given:
            self._constants.append(key)
        return float(value)

    def number_or_none(self, key: str, *, least: float | None = None) -> float | None:
        if key not in self.values:
            self._read.add(key)
            return None
        return self.number(key, least=least)

    def share(self, key: str, default: float) -> float:
        value = self.number(key, default)
        if value > 1:
            raise self.wrong(key, f"is {value!r}, and must be above 0 and at most 1")
        return value

    def whole(self, key: str, default: Any = None, *, least: int = 1, most: int = 1 << 60) -> int:
        value = self._take(key, _NEEDED if default is None else default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"is {value!r}, and must be a whole number from {least} to {most}")
        if key in self.values:
            self._constants.append(key)
        return value

    def text(self, key: str, default: Any = None) -> str:
        value = self._take(key, _NEEDED if default is None else default)
        if not isinstance(value, str) or len(value) > 500:
            raise self.wrong(key, "must be a short text")
        return value

    def word(self, key: str, allowed: tuple[str, ...], default: Any = None) -> str:
        value = self.text(key, default)
        if value not in allowed:
            raise self.wrong(key, f"is {value!r}: it is one of {', '.join(allowed)}")
        return value

    def flag(self, key: str) -> bool:
        value = self._take(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def table(self, key: str, *, optional: bool = False) -> "_Table":
        return _Table(self._take(key, {} if optional else _NEEDED), self.where, self._name(key), self.marks)

    def names(self) -> list[str]:
        return list(self.values)

    def list_of_tables(self, key: str) -> list[Any]:
        value = self._take(key, _NEEDED)
        if not isinstance(value, list) or not value:
            raise self.wrong(key, "must be a list of tables, not empty")
        self._constants.append(key)
        return value

    def _keys(self, key: str) -> list[str]:
        """The keys of this table that a list of names mentions."""
        names = self._take(key, [])
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
        for key in self.values:
            if key not in self._read:
                raise self.wrong(key, f"is not known; there are {', '.join(sorted(self._read))}")


_NEEDED = object()
