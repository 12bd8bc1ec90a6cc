"""Programs for the CUDA runtime: an arena, records, and numba's simulator as a device (or a real one, see
benchmarks/cuda_check.py).

The simulator is for processes with NUMBA_ENABLE_CUDASIM=1, set before anything imports numba.
"""

import ctypes
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.actors.cuda import CudaDevice, Loaded
from coterie.kernels.formats import FORMATS
from coterie.kernels.gpu import cuda_simulated
from coterie.kernels.gpu.cuda_kernels import kernel
from coterie.kernels.gpu.signatures import SIGNATURES
from coterie.kernels.record import (
    EPOCH,
    HEADER_WORDS,
    OPERANDS,
    OUTPUT_ROWS,
    OUTPUTS,
    TOKENS,
    WORDS,
    float_bits,
)
from coterie.storage.arena import Arena, BufferRef, round_up
from coterie.storage.pack import pack, padded_columns

Array = npt.NDArray[Any]
Value = BufferRef | int | float | None
REGIONS = {"weights": 8 << 20, "staging": 4096, "state": 1 << 20, "activations": 1 << 20, "flags": 4096, "kv": 4 << 20}
KINDS = {"int": ctypes.c_int32, "float": ctypes.c_float}


class Simulator:
    """A driver whose device is numba's simulator: device memory is host memory, kernels run when they are launched."""

    name, memory, capability, multiprocessors, builds = "simulator", 1 << 30, (9, 0), 1, 0

    def __init__(self, *, integrated: bool) -> None:
        self.integrated = integrated
        self.made: dict[int, Array] = {}
        self.launched: list[str] = []
        cuda_simulated.MEMORY.clear()

    def allocate(self, nbytes: int) -> int:
        room = np.zeros(nbytes + 4096, np.uint8)
        at = round_up(room.ctypes.data, 4096)
        self.made[at] = room
        return self.register(at, nbytes)

    def free(self, at: int) -> None:
        del self.made[at]

    def register(self, address: int, nbytes: int) -> int:
        cuda_simulated.MEMORY.append((address, address + nbytes))
        return address

    def unregister(self, address: int) -> None:
        cuda_simulated.MEMORY[:] = [(first, end) for first, end in cuda_simulated.MEMORY if first != address]

    def upload(self, to: int, source: int, nbytes: int) -> None:
        ctypes.memmove(to, source, nbytes)

    download = upload

    def build(self, name: str) -> Any:
        self.builds += 1
        return kernel(name).function

    def launch(self, function: Any, grid: tuple[int, int], threads: int, parameters: int, name: str) -> None:
        kinds: list[Any] = [ctypes.c_int64] * 2 + [
            KINDS.get(p.kind, ctypes.c_int64) for p in SIGNATURES[kernel(name).family]
        ]
        pointers = (ctypes.c_void_p * len(kinds)).from_address(parameters)
        values = [kind.from_address(at).value for kind, at in zip(kinds, pointers, strict=True)]
        arguments = tuple(np.float32(v) if kind is ctypes.c_float else v for kind, v in zip(kinds, values, strict=True))
        self.launched.append(name)
        cuda_simulated.launch(function, grid, threads, arguments)

    def synchronize(self, name: str) -> None:
        pass

    def prepare(self) -> None:
        pass

    def close(self) -> None:
        pass


def make_driver(integrated: bool) -> Any:
    """What benches run on."""
    return Simulator(integrated=integrated)


class Bench:
    """An arena with a step header, and the runtime over it."""

    def __init__(self, *, integrated: bool = True) -> None:
        sys.setswitchinterval(5e-3)
        self.arena = Arena(REGIONS)
        self.driver = make_driver(integrated)
        self.refs: list[BufferRef] = []
        self.device = CudaDevice(self.arena, driver=self.driver)
        self.header = self.put(np.zeros(HEADER_WORDS, np.int64))
        self.chosen = self.put(np.zeros(16, np.int32))

    def __enter__(self) -> "Bench":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.device.close()
        self.arena.close()

    def put(self, values: Array, region: str = "state") -> BufferRef:
        ref = self.arena.allocate(region, values.shape, values.dtype)
        self.look(ref)[...] = values
        self.refs.append(ref)
        return ref

    def room(self, *shape: int) -> BufferRef:
        """Float rows that hold nonsense."""
        return self.put(np.full(shape, np.nan, np.float32), "activations")

    def look(self, ref: BufferRef) -> Array:
        return self.arena.numpy(ref)

    def pack(self, name: str, raw: Array, columns: int, per: int) -> tuple[BufferRef, dict[str, Value]]:
        """A matrix in extents of `per` groups, and the operands that say how it lies."""
        f = FORMATS[name]
        blocks, groups = padded_columns(name, columns) // f.columns, -(-len(raw) // 16)
        group, stride = blocks * f.block, round_up(per * blocks * f.block, 4096)
        ref = self.arena.allocate("weights", -(-groups // per) * stride, np.uint8, align=4096)
        data = self.look(ref)
        for g in range(groups):
            at = g // per * stride + g % per * group
            pack(name, raw[16 * g : 16 * g + 16], data[at : at + group].reshape(1, blocks, f.block))
        return ref, {"weights": ref, "blocks": blocks, "group": group, "per": per, "stride": stride}

    def load(self, records: Sequence[tuple[str, Mapping[str, Value]]]) -> Loaded:
        words = np.zeros((len(records), WORDS), np.int64)
        for row, (name, operands) in zip(words, records, strict=True):
            parameters = SIGNATURES[name.partition(":")[0]]
            given: dict[str, Value] = {"step": self.header, "outputs": self.chosen, "base": 0}
            given |= operands
            assert {p.name for p in parameters} <= set(given), {p.name for p in parameters} - set(given)
            for i, parameter in enumerate(parameters, OPERANDS):
                row[i] = _word(given[parameter.name])
        return self.device.load(words, [name for name, _ in records])

    def step(self, tokens: int, outputs: Sequence[int] = (), epoch: int = 1) -> None:
        """Write the header of a step."""
        header = self.look(self.header)
        header[[EPOCH, TOKENS, OUTPUTS]] = epoch, tokens, len(outputs)
        header[OUTPUT_ROWS] = self.arena.address(self.chosen)
        self.look(self.chosen)[: len(outputs)] = outputs

    def run(self, name: str, operands: Mapping[str, Value], tokens: int, outputs: Sequence[int] = ()) -> None:
        """One kernel, for one step, and everything there and back."""
        self.step(tokens, outputs)
        loaded = self.load([(name, operands)])
        weights = self.arena.whole("weights")
        self.device.upload(weights.offset, weights.nbytes)
        rest = [ref for ref in self.refs if ref.region != "weights"]
        self.device.before_step(rest)
        loaded.run(tokens, len(outputs))
        self.device.after_step(rest)
        self.device.finish()


def _word(value: Value) -> int:
    if isinstance(value, BufferRef):
        return value.offset
    if value is None:
        return -1
    return float_bits(value) if isinstance(value, float) else value
