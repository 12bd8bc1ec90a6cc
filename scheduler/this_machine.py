"""This machine as a device, out of its measured profile (coterie profile --flash, --units)."""

import statistics
from dataclasses import replace
from pathlib import Path

from coterie.errors import UsageError
from coterie.paths import cache_dir, packed_dir
from coterie.scheduler.flash_model import FlashModel, FlashPoint
from coterie.scheduler.planner import available_cores
from coterie.scheduler.profile import DeviceProfile, FlashProfile, UnitProfile, file_system, load_profile
from coterie.scheduler.soc import Device, Mark, Rates, UnitModel
from coterie.storage.available import available_memory

UNBOUND = 1e15  # bytes/s: what units do to each other here is in beside_flash and flash_beside
LEAST_LEFT = 0.1  # of a lane's time


def this_machine(profile: DeviceProfile | None = None, *, lanes: int | None = None, path: Path | None = None) -> Device:
    """The device that `profile` (default: the one on disk) tells of, with so many lanes (default: as measured), reading
    the file system of `path` (default: where packed models lie). Raises UsageError for what has not been measured."""
    profile = load_profile() if profile is None else profile
    unit = profile.units.get(str(lanes)) if lanes else next(iter(profile.units.values()), None)
    if unit is None or profile.memory_bandwidth is None:
        wanted = f" with {lanes} lanes" if lanes else ""
        raise UsageError(f"this machine's units have not been measured{wanted}: coterie profile --units")
    place = path or packed_dir()
    flash = profile.flash.get(file_system(place if place.exists() else cache_dir()))
    marks = [Mark(f"units.cpu.{cost.kernel}.{key}", "measured", "") for cost in unit.kernels for key in KEYS]
    for row in flash.rows if flash else ():
        marks.append(Mark(f"flash.{row.pattern}.{row.block}.{row.depth}", "measured", ""))
    return Device(
        "this machine",
        max(available_memory(), 1),
        UNBOUND,
        {"cpu": _cpu(unit, profile.memory_bandwidth, flash)},
        _flash(flash) if flash else None,
        tuple(marks),
        between=unit.between,
        streamed=unit.streamed,
        flashes=_flashes(flash) if flash else {},
        flash_beside=unit.flash_beside,
        flash_depth=flash.depth if flash else 8,
        flash_block=flash.block if flash else 1 << 20,
        emulated=False,
    )


KEYS = ("launch", "rate", "bandwidth", "fill")


def _cpu(unit: UnitProfile, bandwidth: float, flash: FlashProfile | None) -> UnitModel:
    rates = {
        cost.kernel: Rates(cost.rate, cost.fill, bandwidth=cost.bandwidth or UNBOUND, launch=cost.launch)
        for cost in unit.kernels
    }
    left = _beside_flash(flash, unit.lanes) if flash else 1.0
    return UnitModel("cpu", "cpu", bandwidth, rates, next(iter(rates)), beside_flash=left, measured=True)


def _beside_flash(flash: FlashProfile, lanes: int) -> float:
    """What share of their time is left to lanes on all cores while flash is read at its full rate: the flash unit takes
    the processor to ask for reads, and to go through what came for its checksum."""
    cores = available_cores()
    rows = [r for r in flash.rows if (r.engine, r.block, r.depth) == (flash.engine, flash.block, flash.depth)]
    if lanes < cores or not rows:
        return 1.0
    busy = statistics.median(1e-6 * row.cpu_us / row.block for row in rows)
    return max(LEAST_LEFT, 1 - busy * flash.bytes_per_s / lanes)


def _flashes(found: FlashProfile) -> dict[int, FlashModel]:
    """The flash by depth, as far as it was measured with the engine that is used."""
    rows = [row for row in found.rows if row.engine == found.engine]
    return {depth: _flash(replace(found, depth=depth)) for depth in sorted({row.depth for row in rows})}


def _flash(found: FlashProfile) -> FlashModel:
    """Reads with so many in flight, over the widest span; the chosen way's rate was measured best."""
    rows = [row for row in found.rows if row.engine == found.engine and row.depth == found.depth]
    widest = max((row.span for row in rows), default=0)
    points = [FlashPoint(row.pattern, row.block, row.bytes_per_s) for row in rows if row.span == widest]
    if not points:
        points = [FlashPoint("sequential", found.block, found.bytes_per_s)]
    return FlashModel(tuple(points))
