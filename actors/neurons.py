"""The neuron unit: one lane of compiled code that reads single neurons into a cache as the CPU's lanes ask for them."""

import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.actors.flash import CODES, ReadFailure
from coterie.actors.host import Actor, ThreadActor, UnitLost
from coterie.actors.lanes import NAP, cycles_per_second
from coterie.kernels import cache as c
from coterie.kernels import library
from coterie.kernels import tape as t
from coterie.kernels.shapes import CLUSTER
from coterie.storage.arena import Arena
from coterie.storage.flash_buffers import TRACE_EVENTS
from coterie.storage.neuron_buffers import DEPTH, NeuronBuffers, bundle_runs
from coterie.storage.runs import Run
from coterie.storage.weights import SparseFFN, Weights


def neuron_kernels(engine: str) -> list[str]:
    """What the unit has compiled."""
    return [f"neuron_lane:{engine}", "neuron_wake"]


class NeuronUnit:
    """Reads bundles of the file `fd` into the cache in `buffers`. Its lane lives in `actor` (by default, a thread of
    this process), which takes a duplicate of `fd`.

    sums: uint64, checksums of all bundles, in the order of the file; sector: bytes that reads are multiples of; abort:
    address of a word that is set to 1 when reading has failed; engine: as of FlashUnit.
    """

    def __init__(
        self,
        arena: Arena,
        buffers: NeuronBuffers,
        runs: tuple[Run, ...],
        weights: Weights,
        sums: npt.NDArray[np.uint64],
        fd: int,
        *,
        sector: int,
        abort: int,
        engine: str | None = None,
        actor: Actor | None = None,
    ) -> None:
        self.arena, self.buffers, self.actor = arena, buffers, actor or ThreadActor(arena)
        self._cache: npt.NDArray[np.int64] = arena.numpy(buffers.control)
        self._reader: npt.NDArray[np.int64] = arena.numpy(buffers.reader)
        arena.numpy(buffers.sums)[:] = sums
        self._fill_reader(abort)
        self._fill_cache(runs, weights, sector)
        wake = library.function("neuron_wake", 1)
        self._stop = weakref.finalize(self, _stop_lane, os.getpid(), self._cache, wake, self.actor)
        try:
            found = self.actor.open(
                "neurons", lane="neuron_lane", control=buffers.reader, more=(buffers.control,),
                file=(os.getpid(), fd), engine=engine, depth=DEPTH,
            )  # fmt: skip
        except BaseException:
            self._stop()  # now, and not when its successor has these buffers
            raise
        self.engine = str(found["engine"])
        self.depth = int(found["readers"]) or DEPTH  # reads in flight at most

    @property
    def _address(self) -> int:
        return self.arena.address(self.buffers.reader)

    def _fill_reader(self, abort: int) -> None:
        arena, buffers, control = self.arena, self.buffers, self._reader
        control[:] = 0
        arena.numpy(buffers.requests)[:] = 0
        words = {
            t.SLOTS: arena.address(buffers.requests),
            t.QUEUE: arena.address(buffers.queue),
            t.SLOT_COUNT: DEPTH,
            t.DEPTH: DEPTH,
            t.ABORT: abort,
            t.NAP: self._address + 8 * t.SECONDS,
            t.NANOSECONDS: NAP,
            t.ENDED: 1,  # until it runs
        }
        if buffers.trace is not None:
            arena.numpy(buffers.trace)[:, 8:16].view(np.int64)[:] = TRACE_EVENTS
            words[t.TRACE] = arena.address(buffers.trace)
        for word, value in words.items():
            control[word] = value

    def _fill_cache(self, runs: tuple[Run, ...], weights: Weights, sector: int) -> None:
        arena, buffers, control = self.arena, self.buffers, self._cache
        control[:] = 0
        for ref in (buffers.demands, buffers.owners, buffers.stamps, buffers.counts):
            arena.numpy(ref)[:] = 0
        arena.numpy(buffers.free)[:] = np.arange(DEPTH)
        bundles, at = bundle_runs(runs), 0
        layers = arena.numpy(buffers.layers)
        for i, run in enumerate(bundles):
            ffn = weights.layers[i].ffn
            assert isinstance(ffn, SparseFFN)
            layers[i, c.ENTRIES] = arena.address(ffn.addresses)
            layers[i, c.PLACE], layers[i, c.PER], layers[i, c.STRIDE] = run.offset, run.per * CLUSTER, run.stride
            layers[i, c.SUMS] = arena.address(buffers.sums) + 8 * at
            at += run.items * CLUSTER
        words = {
            c.QUEUE: arena.address(buffers.demands),
            c.QUEUE_MASK: buffers.demands.shape[0] - 1,
            c.LAYERS: arena.address(buffers.layers),
            c.LAYER_COUNT: len(bundles),
            c.SLOT_BASE: arena.address(buffers.slots),
            c.SLOT_COUNT: buffers.slots.shape[0],
            c.SLOT_BYTES: buffers.slots.shape[1],
            c.BUNDLE: bundles[0].item_bytes // CLUSTER,
            c.ALIGN: sector,
            c.FREE: arena.address(buffers.free),
            c.FREE_COUNT: DEPTH,
            c.OWNERS: arena.address(buffers.owners),
            c.STAMPS: arena.address(buffers.stamps),
            c.COUNTS: arena.address(buffers.counts),
        }
        for word, value in words.items():
            control[word] = value

    def describe(self) -> dict[str, Any]:
        return {"unit": "neurons", "runtime": self.engine, "engine": self.engine, "depth": self.depth, "real": True}

    @property
    def in_flight(self) -> int:
        """Reads that the disk has not answered yet."""
        return int(self._reader[t.IN_FLIGHT])

    @property
    def ended(self) -> bool:
        """Whether its lane has left."""
        return bool(self._reader[t.ENDED])

    def served(self) -> int:
        """Demands that were answered."""
        return int(self._cache[c.SERVED // 8])

    def failure(self) -> ReadFailure | None:
        """Why a read failed, until `forgive`."""
        code = int(self._reader[t.FAILED])
        if code == 0:
            return None
        return ReadFailure(CODES[code], int(self._reader[t.FAILED_POSITION]), int(self._reader[t.FAILED_ERRNO]))

    def forgive(self) -> None:
        """Forget a failure: the next step tries again. Raises UnitLost as `check` does."""
        self.check()
        self._reader[t.FAILED] = 0

    def check(self) -> None:
        """Raise UnitLost where the actor, or its lane, has gone."""
        reason = self.actor.lost() or ("its lane has ended" if self._reader[t.ENDED] else None)
        if reason is not None:
            raise UnitLost("neurons", reason)

    def counters(self) -> dict[str, float]:
        """Since the unit was made: bytes and requests read, retries, seconds with a read in flight (busy) and checking
        sums (checking), neurons dropped (evictions), and slots in use."""
        seconds = {"busy": t.BUSY, "checking": t.CHECKING}
        counts = {"bytes": t.BYTES, "requests": t.REQUESTS, "retries": t.RETRIES, "naps": t.NAPS}
        found = {name: float(self._reader[word]) for name, word in counts.items()}
        found |= {name: float(self._reader[word]) / cycles_per_second() for name, word in seconds.items()}
        return found | {"evictions": float(self._cache[c.EVICTIONS]), "used": float(self._cache[c.USED])}

    def close(self) -> None:
        """Stop the lane; a second call does nothing. A disk that does not answer is not waited for longer than 2 s."""
        self._stop()


def _stop_lane(maker: int, cache: npt.NDArray[np.int64], wake: Callable[..., int], actor: Actor) -> None:
    """Tell the lane to leave, and wait a little."""
    if os.getpid() != maker:
        return  # a fork's copy of the unit is no unit
    cache[c.STOP] = 1
    wake(cache.ctypes.data)
    actor.close("neurons")
