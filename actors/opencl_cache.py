"""Kernels of the OpenCL unit, each built once as a program of its own, whatever models it serves: the driver's binaries
lie in the cache folder.

A binary's name is a hash of the source, the options, the device and its driver; its last bytes are a checksum. What is
damaged, or what the driver does not take back, is built again.
"""

import hashlib
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from coterie.errors import UnitError
from coterie.kernels.gpu.source import source
from coterie.paths import cache_dir, replace_file

DIGEST = 32  # bytes of SHA-256


class Builder:
    """Builds programs for one device; `cpu`: what PoCL was told it is. `builds` counts those that were compiled."""

    def __init__(self, cl: Any, context: Any, device: Any, wide: bool, cpu: str = "") -> None:
        self._cl, self._context, self._device, self._wide, self._cpu = cl, context, device, wide, cpu
        exact = device.single_fp_config & cl.device_fp_config.CORRECTLY_ROUNDED_DIVIDE_SQRT
        # Warnings would reach the user's terminal through the driver's compiler.
        self._options = ["-cl-std=CL1.2", "-w", *(["-cl-fp32-correctly-rounded-divide-sqrt"] if exact else [])]
        self._programs: dict[str, Any] = {}
        self.builds = 0

    def program(self, kernel: str) -> Any:
        """The program of this kernel. Raises UnitError where it cannot be built."""
        if kernel not in self._programs:
            text = source([kernel], self._wide)
            key = self._key(text)
            self._programs[kernel] = self._read(key) or self._build(key, text)
        return self._programs[kernel]

    def _key(self, text: str) -> str:
        device = self._device
        where = (device.name, device.vendor, device.version, device.driver_version, device.platform.version, self._cpu)
        return hashlib.sha256("\0".join([text, *self._options, *where]).encode()).hexdigest()[:32]

    def _path(self, key: str) -> Path:
        folder = cache_dir() / "gpu"
        folder.mkdir(exist_ok=True, mode=0o700)
        return folder / f"{key}.opencl"

    def _read(self, key: str) -> Any:
        """The program from the cache; None where there is none that works."""
        try:
            data = self._path(key).read_bytes()
        except OSError:
            return None
        binary, digest = data[:-DIGEST], data[-DIGEST:]
        if hashlib.sha256(binary).digest() != digest:
            return None
        try:
            return self._compiled(self._cl.Program(self._context, [self._device], [binary]))
        except self._cl.Error:
            return None

    def _build(self, key: str, text: str) -> Any:
        self.builds += 1
        try:
            program = self._compiled(self._cl.Program(self._context, text))
        except self._cl.Error as error:
            why = " ".join(str(error).split())[:300]
            raise UnitError(f"OpenCL device {self._device.name} cannot build Coterie's kernels: {why}") from None
        binary = bytes(program.get_info(self._cl.program_info.BINARIES)[0])
        with suppress(OSError):  # then the next process builds again
            replace_file(self._path(key), binary + hashlib.sha256(binary).digest())
        return program

    def _compiled(self, program: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PoCL has something to say about its own headers
            return program.build(options=self._options, devices=[self._device], cache_dir=False)
