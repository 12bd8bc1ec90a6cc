"""What streaming costs: counted over steps, for the summary at the end and for benchmarks."""

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from coterie.actors.cpu import CpuUnit
from coterie.actors.flash import FlashUnit
from coterie.scheduler.plan import Plan

REMEMBERED = 1 << 16  # decode steps whose times are kept


class Meter:
    """Adds up steps by the units' own counts."""

    def __init__(self, flash: FlashUnit, cpu: CpuUnit) -> None:
        self._flash, self._cpu = flash, cpu
        self.reset()

    def reset(self) -> None:
        self._tokens, self._decode_bytes, self._seconds, self._waited = 0, 0, 0.0, 0.0
        self._begun = self._flash.counters()
        self._steps: deque[tuple[float, int, int]] = deque(maxlen=REMEMBERED)  # seconds, neurons live, asked for
        self._last: int | None = None  # bytes read when the last decoded token was done

    def start(self) -> None:
        self._at, self._stalled_at = time.perf_counter(), self._cpu.stalled_seconds()
        self._bytes_at, self._neurons_at = self._flash.bytes_read, self._cpu.neuron_counts()

    def stop(self, decoded: int) -> None:
        """A step is done, in which `decoded` sequences got a token (0: it was part of a prompt). Reads run ahead of
        tokens, so between two tokens all reads count."""
        seconds = time.perf_counter() - self._at
        self._seconds += seconds
        self._waited += self._cpu.stalled_seconds() - self._stalled_at
        now = self._flash.bytes_read
        if decoded:
            self._decode_bytes += now - (self._bytes_at if self._last is None else self._last)
            self._tokens += decoded
            counts = zip(self._cpu.neuron_counts(), self._neurons_at, strict=True)
            live, asked = (now - before for now, before in counts)
            self._steps.append((seconds, live, asked))
        self._last = now if decoded else None

    def report(self, plan: Plan) -> dict[str, Any]:
        """Bytes read a generated token, planned and measured; bytes/s while reading; the shares of the steps' time in
        which flash read and lanes waited for it; the share of a token's weights that were in memory; how long steps
        took, and of sparse models how many neurons were live, and how many were asked for, of these and in vain."""
        now = self._flash.counters()
        read, busy = now["bytes"] - self._begun["bytes"], now["busy"] - self._begun["busy"]
        per_token = self._decode_bytes / self._tokens if self._tokens else 0.0
        assert plan.flash is not None
        return (self._neurons() if plan.neurons else {}) | {
            "step_ms": spread(1e3 * seconds for seconds, _, _ in self._steps),
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

    def _neurons(self) -> dict[str, Any]:
        live, asked = (sum(step[i] for step in self._steps) for i in (1, 2))
        steps = max(1, len(self._steps))
        return {
            "live_neurons_per_step": live / steps,
            "read_neurons_per_step": asked / steps,
            "miss_rate": spread(asked / live for _, live, asked in self._steps if live),
        }


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean, median, and the values that a tenth and a hundredth of them exceed; all 0 where there are none."""
    found = sorted(values) or [0.0]
    at = {f"p{p}": found[min(len(found) - 1, len(found) * p // 100)] for p in (50, 90, 99)}
    return {"mean": sum(found) / len(found)} | at
