"""Choosing a GPU: CUDA's where there is one, else OpenCL's."""

from coterie.actors.gpu import Device
from coterie.errors import UnitError
from coterie.storage.arena import Arena


def open_device(arena: Arena, share: float = 1.0) -> Device:
    """The best GPU there is for that arena, to be busy for that share of the time at most. Raises UnitError with what
    OpenCL lacks: that is what most machines could have."""
    try:
        return _cuda(arena, share)
    except UnitError:
        return _opencl(arena, share)


def _cuda(arena: Arena, share: float) -> Device:
    from coterie.actors.cuda import CudaDevice

    return CudaDevice(arena, share=share)


def _opencl(arena: Arena, share: float) -> Device:
    from coterie.actors.opencl import OpenCLDevice

    return OpenCLDevice(arena, share=share)
