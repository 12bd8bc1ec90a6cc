"""The OpenCL unit: an integrated GPU, or a CPU that stands in for one, computing in the very arena.

The driver gets the arena's memory as one buffer and copies nothing. Kernels are built
once and kept on disk; a step is one call of compiled code that enqueues every record (kernels/opencl_queue.py).
"""

import ctypes
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.actors.opencl_cache import Builder
from coterie.actors.pocl import name_cpu
from coterie.errors import UnitError
from coterie.kernels import library
from coterie.kernels import opencl_queue as oq
from coterie.kernels.gpu.signatures import SIGNATURES, Kind
from coterie.kernels.gpu.source import LANES, SLICES, entry_point, launch, local_bytes
from coterie.kernels.record import OPERANDS
from coterie.storage.arena import Arena, BufferRef

SLICE = 4_000_000  # nanoseconds of other users' frames that one slice may take
COUNTS = {"none": oq.ONCE, "tokens": oq.TOKENS, "outputs": oq.OUTPUTS}
FUNCTIONS = {
    oq.ENQUEUE: "clEnqueueNDRangeKernel",
    oq.FLUSH: "clFlush",
    oq.WAIT: "clWaitForEvents",
    oq.PROFILE: "clGetEventProfilingInfo",
    oq.RELEASE: "clReleaseEvent",
}
SCALARS: dict[Kind, Callable[[int], Any]] = {
    "weights": np.int64,
    "arena": np.int64,
    "int": np.int32,
    "long": np.int64,
    "float": lambda bits: np.int64(bits).astype(np.int32).view(np.float32),
}


class OpenCLDevice:
    """The device for `arena`, of which it uses at most `share` of the time (0.01 to 1). `wide`: the kernels' shape, by
    default what suits the device.

    Raises UnitError where pyopencl, a driver, or a device that shares the machine's memory is missing.
    """

    def __init__(self, arena: Arena, *, share: float = 1.0, wide: bool | None = None) -> None:
        if not 0.01 <= share <= 1:
            raise UnitError(f"a GPU unit cannot have a share of {share:g}; 0.01 to 1 can be")
        self._cl = cl = _pyopencl()
        self.arena, self.share = arena, share
        self.device = _find_device(cl)
        self.name = str(self.device.name).strip()
        pocl = self.device.platform.name == "Portable Computing Language"
        cpu = name_cpu(self.device.int_ptr) if pocl else ""
        self.is_cpu = bool(self.device.type & cl.device_type.CPU)
        self.wide = self.is_cpu if wide is None else wide
        try:
            self._context = cl.Context([self.device])
            profiling = cl.command_queue_properties.PROFILING_ENABLE if share < 1 else 0
            self.queue = cl.CommandQueue(self._context, properties=profiling)
            self.buffer = self._wrap()
        except cl.Error as error:
            raise UnitError(f"OpenCL device {self.name} cannot be used: {_line(error)}") from None
        self._builder = Builder(cl, self._context, self.device, self.wide, cpu)
        self._programs: list[Loaded] = []
        self._closed = False

    @property
    def builds(self) -> int:
        """Programs that were compiled, and not found in the cache."""
        return self._builder.builds

    def describe(self) -> dict[str, Any]:
        """What the device is, truthfully; a CPU is a stand-in, whatever its driver is called."""
        device = self.device
        return {
            "name": self.name,
            "runtime": "OpenCL",
            "platform": f"{device.platform.name} {device.platform.version}",
            "driver": str(device.driver_version),
            "stand_in": self.is_cpu,
            "compute_units": int(device.max_compute_units),
            "largest_buffer": int(device.max_mem_alloc_size),
            "shape": "wide" if self.wide else "narrow",
            "share": self.share,
        }

    def load(self, words: npt.NDArray[np.int64], kernels: Sequence[str]) -> "Loaded":
        """Get ready to run records int64[n][WORDS], which hold arena offsets, each with its kernel's name. Operands of
        kind `base` are put in here. Raises UnitError for a kernel that there is not, or that cannot be built."""
        loaded = Loaded(self, np.asarray(words), list(kernels))
        self._programs.append(loaded)
        return loaded

    integrated = True

    def upload(self, offset: int, nbytes: int) -> None:
        """The device sees what this process sees."""

    def before_step(self, refs: Sequence[BufferRef]) -> None:
        """The same."""

    def after_step(self, refs: Sequence[BufferRef]) -> None:
        """And the other way round."""

    def finish(self) -> None:
        """Wait until everything enqueued is done. Raises UnitError where it failed."""
        try:
            self.queue.finish()
        except self._cl.Error as error:
            raise UnitError(f"OpenCL device {self.name} failed: {_line(error)}") from None

    def close(self) -> None:
        """Wait for the device and let the arena go; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            for loaded in self._programs:
                loaded.close()
            self.queue.finish()
        except self._cl.Error:
            pass  # a device that is gone computes nothing more
        self.buffer.release()

    def _wrap(self) -> Any:
        """The arena as a buffer of the device. Raises UnitError where the device would compute in a copy."""
        device, arena = self.device, self.arena
        if arena.size > device.max_mem_alloc_size:
            raise UnitError(
                f"the arena's {arena.size >> 20} MiB are more than {self.name} takes as one buffer, "
                f"{device.max_mem_alloc_size >> 20} MiB; give less memory (--memory)"
            )
        if not _shares(self._cl, self._context, self.queue, device):
            raise UnitError(f"{self.name} has memory of its own and cannot compute in the machine's; CUDA is for such")
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * arena.size).from_address(arena.base))
        flags = self._cl.mem_flags
        return self._cl.Buffer(self._context, flags.READ_WRITE | flags.USE_HOST_PTR, hostbuf=memory)


class Loaded:
    """A program that is ready to run: a kernel object a record, and the table for compiled code."""

    def __init__(self, device: OpenCLDevice, words: npt.NDArray[np.int64], kernels: list[str]) -> None:
        assert len(words) == len(kernels)
        self.device, self.names = device, kernels
        self.table = np.zeros((len(kernels), oq.ENTRY_WORDS), np.int64)
        self._programs = {name: device._builder.program(name) for name in dict.fromkeys(kernels)}
        self._kernels = [self._fill(i, name, words[i]) for i, name in enumerate(kernels)]
        self._units: list[int] = self.table[:, oq.UNITS].tolist()
        self.control = np.zeros(oq.CONTROL_WORDS, np.int64)
        driver = ctypes.CDLL(device._cl._cl.__file__)  # which has loaded libOpenCL: its names are found through it
        for word, function in FUNCTIONS.items():
            self.control[word] = ctypes.cast(getattr(driver, function), ctypes.c_void_p).value or 0
        self.control[oq.QUEUE], self.control[oq.SHARE] = device.queue.int_ptr, round(1000 * device.share)
        self.control[oq.LIMIT] = SLICE
        self._run, self._settle = library.function("opencl_run", 5), library.function("opencl_settle", 1)
        self._warm()

    def limit(self, record: int, first: int, units: int) -> None:
        """Run a record over some of its work-groups only, from now on."""
        self.table[record, oq.FIRST], self.table[record, oq.UNITS] = first, units

    def units(self, record: int) -> int:
        """A record's work-groups, all of them."""
        return self._units[record]

    def run(self, tokens: int, outputs: int, records: range | None = None) -> None:
        """Enqueue these records, by default all, of a step of `tokens` rows, of which `outputs` want logits; the step
        header says the same. Comes back when all is enqueued, which with a share below 1 is when all but the last
        slices are done. Raises UnitError where the driver refuses."""
        some = records or range(len(self.names))
        table = self.table.ctypes.data + some.start * self.table.strides[0]
        failed = self._run(self.control.ctypes.data, table, len(some), tokens, outputs)
        if failed:
            code, where = -(failed & 0xFFFFFFFF), some.start + (failed >> 32)
            what = f"kernel {self.names[where]}" if where < len(self.names) else "the queue"
            raise UnitError(f"OpenCL device {self.device.name} failed at {what}: {self._code(code)} ({code})")

    def close(self) -> None:
        """Wait for what of it is under way."""
        if self.control[oq.PENDING]:
            self._settle(self.control.ctypes.data)

    def _code(self, code: int) -> str:
        return str(self.device._cl.status_code.to_string(code, "<unknown error %d>"))

    def _fill(self, i: int, name: str, words: npt.NDArray[np.int64]) -> Any:
        """Record i's kernel object with its arguments, and its entry of the table."""
        device, family = self.device, name.partition(":")[0]
        values: dict[str, int | float] = {}
        arguments: list[Any] = [device.buffer, device.buffer, *self._shared(name)]
        for word, parameter in enumerate(SIGNATURES[family], OPERANDS):
            value = int(words[word]) if parameter.kind != "base" else device.arena.base
            if parameter.kind == "int" and not -(1 << 31) <= value < 1 << 31:
                raise UnitError(f"kernel {name}: {parameter.name} is {value}, more than the kernel can take")
            values[parameter.name] = value
            arguments.append(SCALARS.get(parameter.kind, np.int64)(value))
        made = device._cl.Kernel(self._programs[name], entry_point(name))
        made.set_args(*arguments)
        over = launch(name, values, device.wide)
        lanes, slices = (1, 1) if device.wide else (LANES, SLICES)
        entry = self.table[i]
        entry[oq.HANDLE], entry[oq.COUNT], entry[oq.TOGETHER] = made.int_ptr, COUNTS[over.which], over.rows
        entry[oq.GLOBAL : oq.GLOBAL + 3] = lanes, slices, over.units
        entry[oq.LOCAL : oq.LOCAL + 3] = lanes, slices, 1
        entry[oq.UNITS] = over.units
        return made

    def _shared(self, name: str) -> list[Any]:
        """The argument for local memory, in the shape that has one."""
        return [] if self.device.wide else [self.device._cl.LocalMemory(local_bytes(name))]

    def _warm(self) -> None:
        """Run each kernel for no rows, on other memory; drivers that compile at a kernel's first run do it now."""
        cl, device = self.device._cl, self.device
        nothing = cl.Buffer(device._context, cl.mem_flags.READ_WRITE, 4096)
        cl.enqueue_fill_buffer(device.queue, nothing, np.uint8(0), 0, 4096)
        local = tuple(int(n) for n in self.table[0, oq.LOCAL : oq.LOCAL + 3]) if len(self.table) else ()
        for name, program in self._programs.items():
            made = cl.Kernel(program, entry_point(name))
            # Whole numbers that can be divided by, should the compiler do that before it looks at the rows.
            kinds = [parameter.kind for parameter in SIGNATURES[name.partition(":")[0]]]
            harmless = [SCALARS.get(kind, np.int64)(32 * (kind == "int")) for kind in kinds]
            made.set_args(nothing, nothing, *self._shared(name), *harmless)
            for offset in ((0, 0, 0), (0, 0, 1)) if device.share < 1 else ((0, 0, 0),):
                cl.enqueue_nd_range_kernel(device.queue, made, local, local, global_work_offset=offset)
        device.finish()


def _pyopencl() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its helpers that we do without
            import pyopencl
    except ImportError:
        raise UnitError("a GPU unit needs pyopencl: pip install 'coterie[gpu]'") from None
    return pyopencl


def _find_device(cl: Any) -> Any:
    """A GPU that shares the machine's memory, else a CPU. Raises UnitError where there is none."""
    try:
        devices = [device for platform in cl.get_platforms() for device in _devices(cl, platform)]
    except cl.Error:
        devices = []
    if not devices:
        raise UnitError(
            "no OpenCL driver is installed: install the GPU vendor's, or pip install pocl-binary-distribution"
        )
    gpus = [device for device in devices if device.type & cl.device_type.GPU]
    sharing = [device for device in gpus if device.host_unified_memory]
    if gpus and not sharing:
        raise UnitError(f"{gpus[0].name} has memory of its own and cannot compute in the machine's; CUDA is for such")
    return sharing[0] if sharing else devices[0]


def _devices(cl: Any, platform: Any) -> list[Any]:
    try:
        kinds = cl.device_type.GPU | cl.device_type.CPU
        return [device for device in platform.get_devices(kinds) if device.available and device.compiler_available]
    except cl.Error:
        return []  # a platform without devices says so like this


def _shares(cl: Any, context: Any, queue: Any, device: Any) -> bool:
    """Whether device and host see the same bytes: what one writes, the other reads, and nobody maps or copies."""
    if not device.host_unified_memory:
        return False
    room = np.zeros(2 * 4096, np.uint8)
    page = room[-room.ctypes.data % 4096 :][:4096].view(np.int64)
    buffer = cl.Buffer(context, cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR, hostbuf=page)
    for value in (3, 5):
        cl.enqueue_fill_buffer(queue, buffer, np.int64(value), 0, 8)
        queue.finish()
        if page[0] != value:
            return False
        page[1] = value
        cl.enqueue_copy(queue, buffer, buffer, byte_count=8, src_offset=8, dst_offset=16)
        queue.finish()
        if page[2] != value:
            return False
    return True


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
