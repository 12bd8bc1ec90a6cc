"""Presets: plans in general terms (configs/presets/*.toml), made into wishes for a model on this machine.

A preset has ways, in the tables of a plan file with shares in the place of rows; the first way counts that is for such
a model and whose units are there. Where there is none the reason is said: nothing else is done instead.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from coterie.errors import PlanError, UnitError, UsageError
from coterie.models.header import ModelHeader
from coterie.models.source import WeightSource
from coterie.models.spec import ModelSpec
from coterie.scheduler.layout import BATCH
from coterie.scheduler.placement import Placement, fitting
from coterie.scheduler.plan import VERSION, Wishes
from coterie.scheduler.plan_file import read_toml
from coterie.scheduler.plan_schema import parse_placement
from coterie.scheduler.planner import lanes_and_kept
from coterie.scheduler.tables import Table, configured, shown
from coterie.storage.arena import round_up

MOST_WAYS = 16
MODELS = "dense", "sparse"
Lacking = Callable[[str], str]  # why a unit is not there; "": it is


@dataclass(frozen=True)
class Way:
    """One way to run a preset: for `models` ("dense" or "sparse"), on `units`; `because`, for people."""

    because: str
    models: str
    chunk: int
    units: tuple[str, ...]
    placement: Placement


@dataclass(frozen=True)
class Preset:
    name: str
    about: str
    ways: tuple[Way, ...]


def preset_names() -> list[str]:
    """Presets in configs/presets."""
    return configured("presets")


def load_preset(name: str) -> Preset:
    """The preset of that name in configs/presets, or in the TOML file at that path. Raises UsageError where there is
    none, PlanError where it makes no sense."""
    if name in preset_names():
        with resources.as_file(resources.files("coterie.configs") / "presets" / f"{name}.toml") as path:
            return parse_preset(read_toml(path), name)
    if not name.endswith(".toml") and "/" not in name:
        raise UsageError(f"no preset is called {name!r:.60}; there is {', '.join(preset_names())}, or name a TOML file")
    return parse_preset(read_toml(Path(name)), name)


def parse_preset(values: Any, where: str) -> Preset:
    """A preset out of a file's tables. Raises PlanError, in one line."""
    top = Table(values, where)
    version = top.value("version") if top.has("version") else None
    if type(version) is not int or version != VERSION:
        raise PlanError(f"{where}: preset version {shown(version)}, but this Coterie knows {VERSION}")
    preset = Preset(Path(where).stem, top.text("about"), tuple(map(_way, top.tables("ways", MOST_WAYS))))
    top.done()
    return preset


def _way(table: Table) -> Way:
    cpu = table.table("cpu")
    chunk = cpu.whole("chunk", BATCH, 1 << 16, BATCH)
    cpu.done()
    units, placement = parse_placement(table, chunk)
    way = Way(table.text("because"), table.word("models", MODELS), chunk, units, placement)
    table.done()
    return way


def resolve(preset: Preset, file: ModelHeader, spec: ModelSpec, wishes: Wishes, lacking: Lacking) -> Wishes:
    """Wishes for a model as a preset has them. Raises PlanError for a model that it is not for, UnitError where a unit
    is not there, UsageError for wishes that the preset decides."""
    for name in ("units", "split"):
        if name in wishes.sources or getattr(wishes, name) != getattr(Wishes(), name):
            raise UsageError(f"preset {preset.name} decides {name}; drop --{name}, or the preset")
    way = chosen_way(preset, spec, lacking, file.path.name)
    if "npu" in way.units and not isinstance(file, WeightSource):
        raise PlanError(
            f"preset {preset.name}: {file.path.name} is packed, and an NPU's graphs are made of what it was packed "
            "from; name that"
        )
    chunk = way.chunk if wishes.context is None else min(way.chunk, round_up(wishes.context, BATCH))
    lengths = tuple(sorted({min(length, chunk) for length in way.placement.lengths}))
    made = replace(
        wishes,
        units=way.units,
        split=way.placement.split,
        chunk=chunk,
        reasons=(f"preset {preset.name}: {way.because}",),
        sources={**wishes.sources, **dict.fromkeys(("units", "split", "chunk"), "preset")},
    )
    cuts = dict(way.placement.cuts)
    if lengths and "tokens" in cuts:
        cuts |= fitting(cuts.pop("tokens"), lengths, chunk)
    return replace(made, placement=replace(way.placement, lengths=lengths, cuts=cuts, kept=lanes_and_kept(made)[1]))


def chosen_way(preset: Preset, spec: ModelSpec, lacking: Lacking, name: str) -> Way:
    """The first way that is for such a model, called `name`, and whose units are there. Raises PlanError, UnitError."""
    form = "sparse" if spec.sparse else "dense"
    ways = [way for way in preset.ways if way.models == form]
    if not ways:
        other = " and ".join(dict.fromkeys(way.models for way in preset.ways))
        hint = "; coterie pack --sparse makes one of a ReLU model" if form == "dense" else ""
        raise PlanError(f"preset {preset.name} is for {other} models, and {name} is {form}{hint}")
    why = dict[str, str]()
    for way in ways:
        for unit in way.units:
            if unit not in why:
                why[unit] = lacking(unit)
        if not any(why[unit] for unit in way.units):
            return way
    unit = next(unit for unit in ways[-1].units if why[unit])
    raise UnitError(f"preset {preset.name} needs the unit {unit}: {why[unit]}")
