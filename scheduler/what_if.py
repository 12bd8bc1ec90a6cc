"""Changes to a device and a question, as people ask for them: `flash=2x,memory=+1GiB,npu=1.5x,sync=fence`."""

from dataclasses import replace

from coterie.errors import UsageError
from coterie.scheduler.flash_model import FlashModel
from coterie.scheduler.simulate import Question
from coterie.scheduler.soc import Device, Rates, UnitModel
from coterie.sizes import Share, parse_memory

MOST_TIMES = 1e6


def changed(text: str, device: Device, question: Question) -> tuple[Device, Question]:
    """The device and the question with every change of `text` made. `flash`, `bandwidth`, or a unit, by a factor; and
    `memory` by a size to add, a size or a share; `sync=fence` or `sync=flag`. Raises UsageError."""
    for change in text.split(","):
        key, sign, value = (word.strip() for word in change.partition("="))
        if not sign or not value:
            raise UsageError(f"--what-if {change!r}: write what changes, as flash=2x or memory=+1GiB")
        if key == "memory":
            question = replace(question, memory=_memory(value, device, question))
        elif key == "sync":
            if value not in ("fence", "flag"):
                raise UsageError(f"--what-if sync={value}: it is fence or flag")
            question = replace(question, fence=value == "fence")
        else:
            device = _faster(device, key, _times(key, value))
    return device, question


def _times(key: str, value: str) -> float:
    try:
        factor = float(value.removesuffix("x"))
    except ValueError:
        factor = 0.0
    if not 1 / MOST_TIMES <= factor <= MOST_TIMES:
        raise UsageError(f"--what-if {key}={value}: give a factor, as 2x or 0.5x")
    return factor


def _memory(value: str, device: Device, question: Question) -> int | Share:
    if value[0] not in "+-":
        size = parse_memory(value)
        if size == "auto":
            raise UsageError("--what-if memory=auto: give a size or a share")
        return size
    more = parse_memory(value[1:])
    if not isinstance(more, int):
        raise UsageError(f"--what-if memory={value}: give bytes to add, as +1GiB")
    now = question.memory
    if not isinstance(now, int):
        raise UsageError(f"--what-if memory={value} adds to a size: give --memory one")
    return min(device.memory, max(1, now + more if value[0] == "+" else now - more))


def _faster(device: Device, key: str, times: float) -> Device:
    if key == "flash":
        if device.flash is None:
            raise UsageError(f"nothing is known of the flash of {device.name}")
        flashes = {depth: _flash(each, times) for depth, each in device.flashes.items()}
        return replace(device, flash=_flash(device.flash, times), flashes=flashes, latency=device.latency / times)
    if key == "bandwidth":
        units = {name: _wider(unit, times) for name, unit in device.units.items()}
        return replace(device, together=device.together * times, units=units)
    if key in device.units:
        return replace(device, units={**device.units, key: _quicker(device.units[key], times)})
    known = ", ".join(["flash", "memory", "bandwidth", "sync", *device.units])
    raise UsageError(f"--what-if {key}: there is {known}")


def _flash(flash: FlashModel, times: float) -> FlashModel:
    return replace(flash, points=tuple(replace(p, bytes_per_s=p.bytes_per_s * times) for p in flash.points))


def _wider(unit: UnitModel, times: float) -> UnitModel:
    """A unit that reads faster."""
    rates = {name: replace(each, bandwidth=each.bandwidth * times) for name, each in unit.rates.items()}
    return replace(unit, bandwidth=unit.bandwidth * times, rates=rates)


def _quicker(unit: UnitModel, times: float) -> UnitModel:
    """A unit that computes and reads faster."""

    def of(each: Rates) -> Rates:
        return replace(each, rate=each.rate * times, weights_per_s=each.weights_per_s * times)

    return _wider(replace(unit, rates={name: of(each) for name, each in unit.rates.items()}), times)
