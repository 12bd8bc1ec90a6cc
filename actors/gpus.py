"""Choosing a GPU."""

from coterie.actors.gpu import Device
from coterie.errors import UnitError
from coterie.storage.arena import Arena


def open_device(arena: Arena) -> Device:
    """The best GPU there is for that arena. Raises UnitError, with what is missing of either runtime."""
    from coterie.actors.opencl import OpenCLDevice

    reasons = []
    for runtime in (OpenCLDevice,):
        try:
            device: Device = runtime(arena)
            return device
        except UnitError as error:
            reasons.append(str(error))
    raise UnitError("no GPU unit: " + "; ".join(reasons))
