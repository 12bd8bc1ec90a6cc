"""CUDA as a unit's runtime: a model's arena as the device sees it, and programs of kernels that run in order.

Kernels read the arena through two pointers, to pinned weights and to everything else. A device that shares the host's
memory gets both in place. Another has a copy: of the weights, extent by extent, so that the host's can be given back;
of tables, state, activations, flags and KV blocks, which from then on live there, and of which a step sends and
fetches only what it names. Unverified on hardware (docs/cuda.md).
"""

import ctypes
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from coterie.errors import UnitError
from coterie.kernels.gpu.signatures import NONE, SIGNATURES
from coterie.kernels.record import OPERANDS
from coterie.kernels.shapes import SPAN
from coterie.storage.arena import Arena, BufferRef, round_up

if TYPE_CHECKING:
    from coterie.kernels.gpu.cuda_kernels import Kernel

PAGE = 4096
WEIGHTS = "weights"
MIRRORED = ("tables", "state", "activations", "flags", "kv")  # regions that kernels read or write, with what is between
WRITTEN_ONCE = ("tables", "state")
MOST_PARTS = 65535  # of a row, in a grid
THREADS = 256


class Span(NamedTuple):
    """A stretch of the arena as the device has it: offsets `first` to `end`, the first at address `device`."""

    first: int
    end: int
    device: int

    @property
    def base(self) -> int:
        """Where the arena would begin."""
        return self.device - self.first

    def at(self, offset: int, nbytes: int) -> int:
        """The device's address of some bytes. Raises UnitError for bytes outside."""
        if not self.first <= offset <= offset + nbytes <= self.end:
            raise UnitError(f"bytes {offset} to {offset + nbytes} of the arena are not on the device")
        return self.base + offset


class Record(NamedTuple):
    """A launch that is ready but for its grid. `values`: the parameters, 8 bytes each; `pointers`: their addresses."""

    kernel: "Kernel"
    function: Any
    operands: dict[str, int | float]
    values: npt.NDArray[np.int64]
    pointers: npt.NDArray[np.uint64]


class Loaded:
    """A program on a device."""

    def __init__(self, device: "CudaDevice", records: Sequence[Record]) -> None:
        self._device, self._records = device, records

    def close(self) -> None:
        """Wait for what of it is under way."""
        self._device.finish()

    def units(self, record: int) -> int:
        """Raises UnitError: CUDA units compute whole products."""
        raise UnitError("CUDA units share no products with others: drop --split tensor")

    def limit(self, record: int, first: int, units: int) -> None:
        self.units(record)

    def run(self, tokens: int, outputs: int, records: range | None = None) -> None:
        """Enqueue these records, by default all, for that many rows, of which `outputs` want logits, and come back at
        once. The step header must say the same. Raises UnitError naming the kernel where the device failed."""
        some = records or range(len(self._records))
        self._device.enqueue(self._records[some.start : some.stop], tokens, outputs)


class CudaDevice:
    """The first CUDA device, computing in `arena`, of which it uses at most `share` of the time (0.01 to 1). `driver`:
    in tests, one without a device. Raises UnitError where packages, driver or device are missing."""

    def __init__(self, arena: Arena, *, share: float = 1.0, driver: Any = None) -> None:
        from coterie.actors.cuda_driver import Driver

        if not 0.01 <= share <= 1:
            raise UnitError(f"a GPU unit cannot have a share of {share:g}; 0.01 to 1 can be")
        self._arena, self.share = arena, share
        self._driver = driver or Driver()
        self._functions: dict[str, Any] = {}
        self._spans: tuple[Span, Span] | None = None
        self._last = "(none)"

    @property
    def integrated(self) -> bool:
        """Whether it shares the host's memory."""
        return bool(self._driver.integrated)

    @property
    def builds(self) -> int:
        """Kernels that were compiled, and not found on disk."""
        return int(self._driver.builds)

    def describe(self) -> dict[str, Any]:
        """What it is, truthfully."""
        d = self._driver
        return {
            "name": d.name,
            "runtime": "CUDA",
            "stand_in": False,
            "capability": ".".join(map(str, d.capability)),
            "compute_units": d.multiprocessors,
            "memory": d.memory,
            "integrated": self.integrated,
            "share": self.share,
            "verified": False,  # no kernel of ours has run on NVIDIA hardware yet
        }

    # --- memory ----------------------------------------------------------------------------------------

    def upload(self, offset: int, nbytes: int) -> None:
        """Copy pinned weights to a device that has its own memory; when it returns the host's copy may go. Raises
        UnitError for bytes that are no pinned weights."""
        weights, _ = self._placed()
        target = weights.at(offset, nbytes)
        if not self.integrated:
            self._driver.upload(target, self._arena.base + offset, nbytes)
            self._driver.synchronize("upload")

    def before_step(self, refs: Iterable[BufferRef]) -> None:
        """Send what the host wrote: the step header, the rows' arrays, block tables. Nothing to do where memory is
        shared."""
        _, rest = self._placed()
        if not self.integrated:
            for ref in refs:
                self._driver.upload(rest.at(ref.offset, ref.nbytes), self._arena.base + ref.offset, ref.nbytes)

    def after_step(self, refs: Iterable[BufferRef]) -> None:
        """Fetch results, once the step is done. Nothing to do where memory is shared: there the flag of `post` says
        when. Raises UnitError where the step failed."""
        _, rest = self._placed()
        if not self.integrated:
            for ref in refs:
                self._driver.download(self._arena.base + ref.offset, rest.at(ref.offset, ref.nbytes), ref.nbytes)
            self._driver.synchronize(self._last)

    def finish(self) -> None:
        """Wait until everything enqueued is done. Raises UnitError where it failed."""
        self._driver.synchronize(self._last)

    def _placed(self) -> tuple[Span, Span]:
        """The arena's weights and the rest on the device; made when it is first asked for, when weights are cut."""
        if self._spans is None:
            regions = self._arena.regions
            weights = regions[WEIGHTS]
            others = [regions[name] for name in MIRRORED if name in regions]
            first = min(region.offset for region in others) // PAGE * PAGE
            end = round_up(max(region.offset + region.size for region in others), PAGE)
            bounds = [(weights.offset, weights.offset + round_up(weights.used, PAGE)), (first, end)]
            wanted, room = sum(last - begin for begin, last in bounds), self._driver.memory
            if not self.integrated and wanted > room:
                raise UnitError(f"the model takes {wanted >> 20} MiB, and {self._driver.name} has {room >> 20} MiB")
            one = self._span(*bounds[0])
            self._spans = one, self._span(*bounds[1])
            if not self.integrated:  # rope tables and what else is written once
                self.before_step([self._arena.whole(name) for name in WRITTEN_ONCE if name in regions])
        return self._spans

    def _span(self, first: int, end: int) -> Span:
        if first == end:
            return Span(first, end, 0)
        if self.integrated:
            return Span(first, end, self._driver.register(self._arena.base + first, end - first))
        return Span(first, end, self._driver.allocate(end - first))

    # --- programs --------------------------------------------------------------------------------------

    def load(self, words: npt.NDArray[np.int64], kernels: Sequence[str]) -> Loaded:
        """A program: int64[n][WORDS] records with offsets into the arena, and each one's kernel (signatures.py). Raises
        UnitError for kernels that there are not, and for offsets that the device does not have."""
        if len(words) != len(kernels):
            raise UnitError(f"{len(words)} records, but {len(kernels)} kernels")
        return Loaded(self, [self._record(row, name) for row, name in zip(words, kernels, strict=True)])

    def _record(self, words: npt.NDArray[np.int64], name: str) -> Record:
        from coterie.kernels.gpu.cuda_kernels import kernel

        made = kernel(name)
        if name not in self._functions:
            self._functions[name] = self._driver.build(name)
        weights, rest = self._placed()
        parameters = SIGNATURES[made.family]
        values = np.zeros(2 + len(parameters), np.int64)
        values[:2] = weights.base, rest.base
        operands: dict[str, int | float] = {}
        for i, parameter in enumerate(parameters):
            bits = words[OPERANDS + i : OPERANDS + i + 1]
            # A parameter of 4 bytes is the low half of its word, as in the record.
            values[2 + i] = self._arena.base if parameter.kind == "base" else bits[0]
            if parameter.kind == "float":
                operands[parameter.name] = float(bits.astype(np.int32).view(np.float32)[0])
            else:
                operands[parameter.name] = int(bits[0])
            if parameter.kind in ("weights", "arena") and bits[0] != NONE:
                (weights if parameter.kind == "weights" else rest).at(int(bits[0]), 1)  # complains of what is not there
        made.grid(operands, 1)  # complains now of what it would complain of later
        pointers = np.arange(len(values), dtype=np.uint64) * np.uint64(8) + np.uint64(values.ctypes.data)
        return Record(made, self._functions[name], operands, values, pointers)

    def enqueue(self, records: Sequence[Record], tokens: int, outputs: int) -> None:
        """Launch records for a step's rows; those that have none to compute are left out. With a share below 1 it comes
        back when the last is done."""
        self._driver.prepare()
        if not self.integrated:
            self._send_block_tables(records, tokens)
        for record in records:
            rows = outputs if record.operands.get("select") else tokens
            if rows > 0 or record.kernel.family == "post":
                grid = record.kernel.grid(record.operands, rows)
                if grid[1] > MOST_PARTS:
                    raise UnitError(f"kernel {record.kernel.name} would need a grid of {grid[1]} rows; CUDA has 65535")
                self._last = record.kernel.name
                start = time.monotonic()
                self._driver.launch(record.function, grid, THREADS, int(record.pointers.ctypes.data), self._last)
                if self.share < 1:  # other users' frames get the rest of the time
                    self._driver.synchronize(self._last)
                    time.sleep((time.monotonic() - start) * (1 / self.share - 1))
                if record.kernel.family == "post" and not self.integrated:  # the host looks at its own
                    _, rest = self._placed()
                    flag = int(record.operands["flag"])
                    self._driver.download(self._arena.base + flag, rest.at(flag, 8), 8)

    def _send_block_tables(self, records: Sequence[Record], tokens: int) -> None:
        """What rows read of their KV block tables, which nobody names: they grow as sequences do."""
        _, rest = self._placed()
        base = self._arena.base
        found = [record.operands for record in records if record.kernel.family in ("rope", "attend")]
        for tables, positions in {(int(each["tables"]), int(each["positions"])) for each in found}:
            addresses = (ctypes.c_int64 * tokens).from_address(base + tables)
            last = (ctypes.c_int32 * tokens).from_address(base + positions)
            needed: dict[int, int] = {}
            for address, position in zip(addresses, last, strict=True):
                needed[address] = max(needed.get(address, 0), 8 * (position // SPAN + 1))
            for address, nbytes in needed.items():
                self._driver.upload(rest.at(address - base, nbytes), address, nbytes)

    def close(self) -> None:
        """Give the device's memory back, or let go of the host's. A second call does nothing."""
        spans, self._spans = self._spans or (), None
        for span in spans:
            if span.device and self.integrated:
                self._driver.unregister(self._arena.base + span.first)
            elif span.device:
                self._driver.free(span.device)
        self._functions.clear()
        if self._driver is not None:
            self._driver.close()
            self._driver = None
