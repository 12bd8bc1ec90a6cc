"""What streaming costs: counted over steps, for the summary at the end and for benchmarks."""

import time
from typing import Any

from coterie.actors.cpu import CpuUnit
from coterie.actors.flash import FlashUnit
from coterie.scheduler.plan import Plan


class Meter:
    """Adds up steps by the units' own counts."""

    def __init__(self, flash: FlashUnit, cpu: CpuUnit) -> None:
        self._flash, self._cpu = flash, cpu
        self.reset()

    def reset(self) -> None:
        self._tokens, self._decode_bytes, self._seconds, self._waited = 0, 0, 0.0, 0.0
        self._begun, self._neurons_begun = self._flash.counters(), self._cpu.neuron_counts()
        self._last: int | None = None  # bytes read when the last decoded token was done

    def start(self) -> None:
        self._at, self._stalled_at = time.perf_counter(), self._cpu.stalled_seconds()
        self._bytes_at = self._flash.bytes_read

    def stop(self, decoded: int) -> None:
        """A step is done, in which `decoded` sequences got a token (0: it was part of a prompt). Reads run ahead of
        tokens, so between two tokens all reads count."""
        self._seconds += time.perf_counter() - self._at
        self._waited += self._cpu.stalled_seconds() - self._stalled_at
        now = self._flash.bytes_read
        if decoded:
            self._decode_bytes += now - (self._bytes_at if self._last is None else self._last)
            self._tokens += decoded
        self._last = now if decoded else None

    def report(self, plan: Plan) -> dict[str, Any]:
        """Bytes read a generated token, planned and measured; bytes/s while reading; the shares of the steps' time in
        which flash read and lanes waited for it; the share of a token's weights that were in memory."""
        now = self._flash.counters()
        read, busy = now["bytes"] - self._begun["bytes"], now["busy"] - self._begun["busy"]
        per_token = self._decode_bytes / self._tokens if self._tokens else 0.0
        assert plan.flash is not None
        live, missed = (
            now - before for now, before in zip(self._cpu.neuron_counts(), self._neurons_begun, strict=True)
        )
        neurons = {
            "live_neurons_per_token": live / self._tokens if self._tokens else 0.0,
            "read_neurons_per_token": missed / self._tokens if self._tokens else 0.0,
            "neuron_hit_rate": 1 - missed / live if live else 1.0,
        }
        return (neurons if plan.neurons else {}) | {
            "streamed_bytes_per_token": plan.streamed_per_token,
            "read_bytes_per_token": per_token,
            "bandwidth": read / busy if busy else 0.0,
            "busy_share": min(1.0, busy / self._seconds) if self._seconds else 0.0,
            "stall_share": self._waited / self._seconds if self._seconds else 0.0,
            "hit_rate": plan.resident,
            "retries": now["retries"] - self._begun["retries"],
            "engine": plan.flash.engine,
            "block": plan.flash.block,
            "depth": plan.flash.depth,
        }
