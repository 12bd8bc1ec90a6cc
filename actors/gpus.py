"""Choosing a GPU: CUDA's where there is one, else OpenCL's."""

import os
from collections.abc import Collection

from coterie.actors.gpu import Device
from coterie.actors.lanes import only_on
from coterie.errors import UnitError
from coterie.storage.arena import Arena


def open_device(arena: Arena, share: float = 1.0, cores: Collection[int] = ()) -> Device:
    """The best GPU there is for that arena, to be busy for that share of the time at most. `cores`: what a stand-in on
    the processor keeps to (none: any). Raises UnitError with what OpenCL lacks: that is what most machines could
    have."""
    try:
        return _cuda(arena, share)
    except UnitError:
        with only_on(cores):
            if cores:  # PoCL asks for this once a process
                os.environ.setdefault("POCL_MAX_PTHREAD_COUNT", str(len(cores)))
            return _opencl(arena, share)


def _cuda(arena: Arena, share: float) -> Device:
    from coterie.actors.cuda import CudaDevice

    return CudaDevice(arena, share=share)


def _opencl(arena: Arena, share: float) -> Device:
    from coterie.actors.opencl import OpenCLDevice

    return OpenCLDevice(arena, share=share)
