"""Trace rings to Chrome's trace format, which Perfetto and chrome://tracing show offline."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.errors import UsageError
from coterie.kernels.record import EVENT, RING_HEADER, Opcode

NO_LAYER = 0xFFFF


def read_rings(rings: npt.NDArray[np.uint8]) -> list[npt.NDArray[Any]]:
    """Each lane's events (record.EVENT), oldest first, from uint8[lanes][ring bytes]. A ring that overflowed
    holds the newest."""
    lanes = []
    for ring in rings:
        count, capacity = (int(n) for n in ring[:16].view(np.int64))
        events = ring[RING_HEADER : RING_HEADER + capacity * EVENT.itemsize].view(EVENT)
        lanes.append(events[:count] if count <= capacity else np.roll(events, -(count % capacity)))
    return lanes


def write_chrome_trace(path: Path, rings: npt.NDArray[np.uint8], cycles_per_second: float) -> None:
    """Write {"traceEvents": ...}: a slice an instruction and one for the wait before it, times in microseconds
    from the first event. Raises UsageError where the file cannot be written."""
    lanes = read_rings(rings)
    begin = min((int(events["start"][0]) - int(events["waited"][0]) for events in lanes if events.size), default=0)
    scale = 1e6 / cycles_per_second
    try:
        with path.open("w") as file:
            file.write('{"displayTimeUnit":"ns","traceEvents":[\n')
            names = [_name("process_name", 0, "cpu")]
            names += [_name("thread_name", lane, f"lane {lane}") for lane in range(len(lanes))]
            file.write(",\n".join(map(json.dumps, names)))
            for lane, events in enumerate(lanes):
                for event in _slices(lane, events, begin, scale):
                    file.write(",\n" + json.dumps(event))
            file.write("\n]}\n")
    except OSError as error:
        raise UsageError(f"cannot write the trace to {path}: {error.strerror}") from None


def _name(kind: str, lane: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 1, "tid": lane, "args": {"name": name}}


def _slices(lane: int, events: npt.NDArray[Any], begin: int, scale: float) -> Iterator[dict[str, Any]]:
    for event in events.tolist():
        start, end, waited, epoch, opcode, layer, pieces = event
        common = {"ph": "X", "pid": 1, "tid": lane}
        if waited:
            at = (start - waited - begin) * scale
            yield {
                "name": "wait",
                "cat": "sync",
                "ts": round(at, 3),
                "dur": round(waited * scale, 3),
                **common,
            }
        arguments = {"step": epoch, "pieces": pieces} | ({} if layer == NO_LAYER else {"layer": layer})
        yield {
            "name": Opcode(opcode).name.lower(),
            "cat": "compute",
            "ts": round((start - begin) * scale, 3),
            "dur": round((end - start) * scale, 3),
            "args": arguments,
            **common,
        }
