"""Weights on flash: what is pinned is loaded, the rest streamed while steps run, single embeddings looked up."""

import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.actors.flash import PATIENCE, FlashUnit
from coterie.actors.host import Actor
from coterie.actors.neurons import NeuronUnit
from coterie.errors import UnitError
from coterie.kernels.tape import READ
from coterie.scheduler.layout import LOOKUPS, ModelLayout
from coterie.scheduler.plan import Plan
from coterie.scheduler.program import Program
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.checksum import checksum
from coterie.storage.flash_buffers import FlashBuffers
from coterie.storage.flash_file import FlashFile
from coterie.storage.neuron_buffers import NeuronBuffers
from coterie.storage.weights import Weights

LAST_WAIT = 2.0  # seconds that close waits for a lookup
ATTEMPTS = 3  # of a lookup
Progress = Callable[..., None]


class Stream:
    """A packed model's file and the flash unit that reads it. Raises ModelError where the file is not what it was, and
    UnitError where it cannot be read."""

    def __init__(
        self,
        arena: Arena,
        file: FlashFile,
        plan: Plan,
        buffers: FlashBuffers,
        abort: int,
        actor: Actor,
    ) -> None:
        assert plan.flash is not None
        self.arena, self.file = arena, file
        # Buffered reads are for measuring what direct ones are worth: the cache takes memory that the plan left free.
        self._fd = file.open_direct(buffered=os.environ.get("COTERIE_FLASH_BUFFERED") == "1")
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        staging = arena.regions["staging"]
        ring = BufferRef("staging", staging.offset, staging.size, "|u1", (staging.size,))
        self.unit = FlashUnit(
            arena, buffers, self._fd,
            depth=plan.flash.depth, block=plan.flash.block, ring=ring, abort=abort, patience=PATIENCE,
            engine="preadv" if plan.flash.engine == "preadv" else None,  # io_uring may have gone since it was measured
            actor=actor,
        )  # fmt: skip
        self._abort = abort
        self.neurons: NeuronUnit | None = None  # reads the bundles of a sparse model that decode wants
        self._lookups: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(LOOKUPS, "coterie-lookup")
        self._pinned = 0  # extents that are in memory, in the order of their addresses
        self._weights: Weights | None = None
        self._whole: Weights | None = None
        self._lost = True  # where the tape stands is not known
        self._seen, self._since = -1, 0.0

    # --- residency ------------------------------------------------------------------------------------

    def adopt(self, layout: ModelLayout, pinned: npt.NDArray[np.int64], block: int, progress: Progress) -> None:
        """Stream by this layout's tapes from now on, up to `block` bytes at a time; read those pinned extents that are
        not in memory yet."""
        self.unit.set_block(block)
        self.file.check_unchanged()
        weights, whole = layout.weights, layout.whole
        if pinned.size > self._pinned:
            self._load(weights, pinned[self._pinned :], progress)
        self._pinned = pinned.size
        self._weights, self._whole, self._lost = weights, whole, True
        tapes = [self._entries(each, each.tape) for each in ([weights] if whole is weights else [weights, whole])]
        self.unit.set_tape(np.concatenate(tapes))

    def open_neurons(self, buffers: NeuronBuffers, sector: int) -> None:
        """Read single neurons into these buffers from now on; the tables are filled."""
        assert self._weights is not None
        self.neurons = NeuronUnit(
            self.arena, buffers, self.file.runs, self._weights, self.file.neuron_sums, self._fd,
            sector=sector, abort=self._abort, engine="preadv" if self.unit.engine == "preadv" else None,
            actor=self.unit.actor,
        )  # fmt: skip

    def _load(self, weights: Weights, numbers: npt.NDArray[np.int64], progress: Progress) -> None:
        entries = self._entries(weights, numbers)
        ends = np.cumsum(entries["nbytes"])
        self.unit.set_tape(entries)
        first = self.unit.begin(0, entries.size, redirect=True)
        self._watch_anew()
        try:
            while not self.unit.wait(first + entries.size, 0.05):
                self.watch()
                here = min(max(self.unit.arrived_count() - first, 0), entries.size)
                progress("loading", int(ends[here - 1]) if here else 0, int(ends[-1]))
        finally:
            self.unit.halt()

    def _entries(self, weights: Weights, numbers: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        entries = np.zeros(numbers.size, READ)
        extents = weights.extents
        entries["offset"], entries["nbytes"] = extents.offset[numbers], extents.nbytes[numbers]
        entries["address"] = self.arena.base + weights.where[numbers]
        entries["checksum"] = self.file.checksums[numbers]
        entries["layer"] = np.array([run.layer for run in weights.runs], np.int32)[extents.run[numbers]]
        return entries

    def forget(self, keep: int) -> None:
        """The extents behind the first `keep` pinned ones are no longer in memory, nor is any neuron in the cache."""
        self.unit.halt()
        self.end_neurons()
        self._settle()
        self._pinned = min(self._pinned, keep)

    def end_neurons(self) -> None:
        """Stop reading single neurons, and forget the cache. Raises UnitError when the disk does not answer."""
        neurons, actor = self.neurons, self.unit.actor
        if neurons is None:
            return
        neurons.close()
        end = time.monotonic() + PATIENCE
        while not neurons.ended and actor.lost() is None:
            if time.monotonic() > end:
                raise self._silent()
            time.sleep(0.01)
        if neurons.in_flight:  # they may still land in memory that others will use
            self.arena.discard(neurons.buffers.slots.region)
        self.neurons = None

    def revive(self, actor: Actor) -> None:
        """Go on with the lane of another actor, after `fence` of the one that was lost, and the end of its neurons'."""
        self.unit.revive(actor)
        self._lost = True

    # --- steps ----------------------------------------------------------------------------------------

    def begin(self, program: Program, *, again: bool = False) -> int:
        """Announce a step, and what is expected after it; `again`: a prompt's chunk whose rows want logits, or more of
        them. Returns the number of the read that stands for tape position 0."""
        assert self._weights is not None
        assert self._whole is not None
        if self.neurons is not None:
            self.neurons.forgive()
        (begin, head, end), (whole, whole_head, whole_end) = self._weights.positions, self._whole.positions
        ranges = {"prefill": (whole, whole_head), "head": (whole_head, whole_end)}
        first = ranges.get(program.name, (begin, end))
        self._watch_anew()
        if first[0] == first[1]:
            return 0
        ahead = ranges["head"] if again and whole_head < whole_end else (begin, head)
        if ahead[0] == ahead[1]:
            ahead = 0, 0
        lost, self._lost = self._lost, False
        return self.unit.begin(*first, ahead=ahead, redirect=lost)

    def lose(self) -> None:
        """A step was abandoned: the next one starts its reads anew."""
        self._lost = True

    def _watch_anew(self) -> None:
        self._seen, self._since = -1, time.monotonic()

    def watch(self) -> None:
        """Raise what the unit complains of, or that it has been silent for too long."""
        failure = self.unit.failure()
        if failure is not None:
            raise UnitError(f"cannot read {self.file.path}: {failure.reason}")
        self.unit.check()
        arrived, in_flight = self.unit.arrived_count(), self.unit.in_flight
        if self.neurons is not None:
            failure = self.neurons.failure()
            if failure is not None:
                raise UnitError(f"cannot read {self.file.path}: {failure.reason}")
            self.neurons.check()
            arrived, in_flight = arrived + self.neurons.served(), in_flight + self.neurons.in_flight
        if arrived != self._seen or in_flight == 0:
            self._seen, self._since = arrived, time.monotonic()
        elif time.monotonic() - self._since > PATIENCE:
            raise self._silent()

    def _silent(self) -> UnitError:
        return UnitError(f"cannot read {self.file.path}: the disk has not answered for {PATIENCE:.0f} seconds")

    # --- embeddings -----------------------------------------------------------------------------------

    def look_up(self, ids: npt.NDArray[np.int64], slots: BufferRef, bounce: BufferRef) -> npt.NDArray[np.int64]:
        """Addresses of the groups that hold the ids' embeddings; those that are not pinned are read into `slots`
        uint8[rows][group bytes], through `bounce` uint8[LOOKUPS][extent bytes]."""
        assert self._weights is not None
        assert self._weights.embedding is not None
        weights, size = self._weights, self._weights.embedding.run.item_bytes
        extents, within, offsets = weights.embedding_places(ids)
        addresses = self.arena.base + offsets
        missing = np.flatnonzero(~weights.is_pinned(extents))
        if missing.size:
            room, buffers = self.arena.numpy(slots), self.arena.numpy(bounce)
            addresses[missing] = self.arena.address(slots) + missing * size

            def read(share: npt.NDArray[np.int64], buffer: npt.NDArray[np.uint8]) -> None:
                for extent in share.tolist():
                    data = self._read(extent, buffer)
                    for row in np.flatnonzero(extents == extent).tolist():
                        room[row] = data[within[row] : within[row] + size]

            self._settle()  # of a step that was interrupted: they write where these will
            shares = np.array_split(np.unique(extents[missing]), LOOKUPS)
            self._lookups = [self._pool.submit(read, s, b) for s, b in zip(shares, buffers, strict=True) if s.size]
            self._await(self._lookups)
        return addresses

    def _await(self, jobs: list[Future[None]]) -> None:
        """Wait for lookups, and raise what one of them raised."""
        self._settle()
        for job in jobs:
            job.result()

    def _settle(self) -> None:
        """Wait until no lookup is under way, but not for ever, and so that an interrupt gets through."""
        end = time.monotonic() + PATIENCE
        while wait(self._lookups, timeout=0.05).not_done:
            if time.monotonic() > end:
                raise self._silent()

    def _read(self, number: int, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """One extent, now; checked."""
        assert self._weights is not None
        offset, size = (int(a[number]) for a in (self._weights.extents.offset, self._weights.extents.nbytes))
        data, problem = buffer[:size], ""
        for _ in range(ATTEMPTS):
            try:
                count = os.preadv(self._fd, [memoryview(data)], offset)  # type: ignore[arg-type]
            except OSError as error:
                problem = str(error.strerror)
                continue
            if count == size and checksum(data) == int(self.file.checksums[number]):
                return data
            problem = f"only {count} bytes of {size}" if count < size else "the checksum is wrong"
        raise UnitError(f"cannot read {self.file.path} at byte {offset}: {problem}")

    def close(self) -> None:
        """Stop the units. A second call does nothing."""
        self.unit.close()
        if self.neurons is not None:
            self.neurons.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        idle = not wait(self._lookups, timeout=LAST_WAIT).not_done
        if idle:  # a lookup that hangs on a dead disk keeps it
            self._close_fd()
            self._fd = -1
