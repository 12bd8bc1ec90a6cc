"""The NVIDIA driver as Coterie uses it: one device's context, one stream, memory, modules, launches.

A thin layer over cuda-bindings, so that the runtime (cuda.py) can be shown with another one that has no device. Every
call raises UnitError with one line when the driver refuses; a lost device says so at the next call.
"""

import threading
from typing import Any

from coterie.errors import UnitError

INSTALL = "install the GPU unit's packages (pip install 'coterie[cuda]') and an NVIDIA driver"
SUCCESS = 0
UNSUPPORTED_PTX = 222


class Driver:
    """Device number `ordinal`. Raises UnitError where packages, driver or device are missing.

    Device addresses are int, sizes bytes. `integrated`: the device shares the host's memory.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._api = _bindings()
        try:
            self._check("no CUDA device can be used", self._api.cuInit(0))
        except UnitError:
            raise
        except Exception as error:  # the package's own, of a class that moves with its version
            raise UnitError(f"no NVIDIA driver was found ({str(error)[:80]}); {INSTALL}") from None
        if ordinal >= self._call("cuDeviceGetCount"):
            raise UnitError(f"there is no CUDA device number {ordinal}")
        self._device = self._call("cuDeviceGet", ordinal)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._thread = threading.local()
        self._current()
        self._stream = self._call("cuStreamCreate", 1)  # 1: does not wait for the default stream
        self._modules: list[Any] = []
        self.builds = 0  # kernels that numba compiled
        self.name = self._call("cuDeviceGetName", 128, self._device).split(b"\0")[0].decode(errors="replace")
        self.memory = int(self._call("cuDeviceTotalMem", self._device))
        self.capability = self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR")
        self.multiprocessors = self._attribute("MULTIPROCESSOR_COUNT")
        self.integrated = bool(self._attribute("INTEGRATED"))

    def allocate(self, nbytes: int) -> int:
        """Device memory, zeroed."""
        self._current()
        at = int(self._call("cuMemAlloc", max(1, nbytes)))
        self._call("cuMemsetD8Async", at, 0, max(1, nbytes), self._stream)
        return at

    def free(self, at: int) -> None:
        self._current()
        self._call("cuMemFree", at)

    def register(self, address: int, nbytes: int) -> int:
        """Let the device use host memory where it is, a whole number of pages: its address there."""
        self._current()
        if not self._attribute("HOST_REGISTER_SUPPORTED"):
            raise UnitError(f"{self.name} cannot use the host's memory in place; it needs a newer driver")
        self._call("cuMemHostRegister", address, nbytes, 2)  # 2: map it for the device
        return int(self._call("cuMemHostGetDevicePointer", address, 0))

    def unregister(self, address: int) -> None:
        self._current()
        self._call("cuMemHostUnregister", address)

    def upload(self, to: int, source: int, nbytes: int) -> None:
        """Copy from the host, in the stream's order."""
        self._current()
        self._call("cuMemcpyHtoDAsync", to, source, nbytes, self._stream)

    def download(self, to: int, source: int, nbytes: int) -> None:
        self._current()
        self._call("cuMemcpyDtoHAsync", to, source, nbytes, self._stream)

    def build(self, name: str) -> Any:
        """A kernel, ready to launch."""
        from coterie.kernels.gpu.cuda_ptx import kept_ptx

        self._current()
        text, entry, compiled = kept_ptx(name, self.capability)
        self.builds += compiled
        code, *made = self._api.cuModuleLoadData(text.encode() + b"\0")
        if int(code) == UNSUPPORTED_PTX:
            raise UnitError("the NVIDIA driver is older than NVVM; install nvidia-nvvm of the driver's CUDA version")
        self._check(f"kernel {name} cannot be loaded", (code,))
        self._modules.append(made[0])
        return self._call("cuModuleGetFunction", made[0], entry.encode())

    def launch(self, function: Any, grid: tuple[int, int], threads: int, parameters: int, name: str) -> None:
        """Enqueue a kernel; `parameters` is the address of an array of the parameters' addresses."""
        result = self._api.cuLaunchKernel(
            function, grid[0], grid[1], 1, threads, 1, 1, 0, self._stream, parameters, 0
        )  # fmt: skip
        self._check(f"kernel {name} failed, or one before it", result)

    def synchronize(self, name: str) -> None:
        """Wait for all that was enqueued, of which `name` is the last."""
        self._current()
        self._check(f"kernel {name} failed, or one before it", self._api.cuStreamSynchronize(self._stream))

    def prepare(self) -> None:
        """Let the calling thread launch kernels."""
        self._current()

    def close(self) -> None:
        """Give everything back. Errors are not told: the device may be the reason why."""
        self._current()
        self._api.cuStreamSynchronize(self._stream)
        for module in self._modules:
            self._api.cuModuleUnload(module)
        self._modules.clear()
        self._api.cuStreamDestroy(self._stream)
        self._api.cuDevicePrimaryCtxRelease(self._device)

    def _current(self) -> None:
        if not getattr(self._thread, "ready", False):
            self._call("cuCtxSetCurrent", self._context)
            self._thread.ready = True

    def _attribute(self, name: str) -> int:
        which = getattr(self._api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call("cuDeviceGetAttribute", which, self._device))

    def _call(self, function: str, *arguments: Any) -> Any:
        """The result of a driver function that has one."""
        result = getattr(self._api, function)(*arguments)
        self._check(function, result)
        return result[1] if len(result) > 1 else None

    def _check(self, what: str, result: tuple[Any, ...]) -> None:
        if int(result[0]) != SUCCESS:
            raise UnitError(f"CUDA: {what}: {getattr(result[0], 'name', result[0])}")


def _bindings() -> Any:
    """cuda.bindings.driver. Raises UnitError where a package is missing."""
    from importlib.util import find_spec

    try:
        from cuda.bindings import driver
    except ImportError:
        raise UnitError(f"the CUDA packages are not installed; {INSTALL}") from None
    if find_spec("numba_cuda") is None:
        raise UnitError(f"numba-cuda is not installed; {INSTALL}")
    return driver
