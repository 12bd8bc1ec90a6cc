"""Trace rings to Chrome's trace format, which Perfetto and chrome://tracing show offline."""

import json
from collections.abc import Iterator, Sequence
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


def write_chrome_trace(
    path: Path, units: Sequence[tuple[str, npt.NDArray[np.uint8]]], cycles_per_second: float
) -> None:
    """Write {"traceEvents": ...} of units' rings: a process a unit, a slice an instruction and one for the wait before
    it; of a flash unit a slice a read, a row a place in its queue. Times in microseconds from the first event. Raises
    UsageError where the file cannot be written."""
    lanes = [(name, read_rings(rings)) for name, rings in units]
    starts = [int((e["start"] - e["waited"]).min()) for _, rings in lanes for e in rings if e.size]
    begin, scale = min(starts, default=0), 1e6 / cycles_per_second
    try:
        with path.open("w") as file:
            file.write('{"displayTimeUnit":"ns","traceEvents":[\n')
            names = [_name("process_name", number, 0, name) for number, (name, _) in enumerate(lanes, start=1)]
            file.write(",\n".join(map(json.dumps, names or [_name("process_name", 1, 0, "cpu")])))
            for number, (name, rings) in enumerate(lanes, start=1):
                for event in _unit(number, name, rings, begin, scale):
                    file.write(",\n" + json.dumps(event))
            file.write("\n]}\n")
    except OSError as error:
        raise UsageError(f"cannot write the trace to {path}: {error.strerror}") from None


def _name(kind: str, unit: int, lane: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": unit, "tid": lane, "args": {"name": name}}


def _unit(number: int, name: str, rings: list[npt.NDArray[Any]], begin: int, scale: float) -> Iterator[dict[str, Any]]:
    if name == "neurons":
        for events in rings:
            yield from _neurons(number, events, begin, scale)
    elif name == "flash":
        slots = sorted({int(slot) for events in rings for slot in events["epoch"]})
        yield from (_name("thread_name", number, slot, f"queue {slot}") for slot in slots)
        for events in rings:
            yield from _reads(number, events, begin, scale)
    else:
        yield from (_name("thread_name", number, lane, f"lane {lane}") for lane in range(len(rings)))
        for lane, events in enumerate(rings):
            yield from _slices(number, lane, events, begin, scale)


def _neurons(unit: int, events: npt.NDArray[Any], begin: int, scale: float) -> Iterator[dict[str, Any]]:
    """Reads of single neurons are answered in any order: each has a row that is free."""
    rows = _free_rows(events)
    yield from (_name("thread_name", unit, row, f"queue {row}") for row in range(int(rows.max(initial=-1)) + 1))
    for row, (start, end, _, neuron, _, layer, nbytes) in zip(rows.tolist(), events.tolist(), strict=True):
        common = {"ph": "X", "pid": unit, "tid": row, "name": "read", "cat": "io"}
        arguments = {"layer": layer, "neuron": neuron, "bytes": nbytes}
        yield {**common, **_span(start, end, begin, scale), "args": arguments}


def _free_rows(events: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """For each event the lowest row that is free when it starts."""
    rows, ends = np.zeros(events.size, np.int64), list[int]()
    for i in np.argsort(events["start"], kind="stable").tolist():
        start, end = int(events["start"][i]), int(events["end"][i])
        rows[i] = next((row for row, busy in enumerate(ends) if busy <= start), len(ends))
        ends[rows[i] : rows[i] + 1] = [end]
    return rows


def _span(start: int, end: int, begin: int, scale: float) -> dict[str, float]:
    return {"ts": round((start - begin) * scale, 3), "dur": round((end - start) * scale, 3)}


def _reads(unit: int, events: npt.NDArray[Any], begin: int, scale: float) -> Iterator[dict[str, Any]]:
    for start, end, _, slot, _, layer, nbytes in events.tolist():
        common = {"ph": "X", "pid": unit, "tid": slot, "name": "read", "cat": "io"}
        yield {**common, **_span(start, end, begin, scale), "args": {"layer": layer, "bytes": nbytes}}


def _slices(unit: int, lane: int, events: npt.NDArray[Any], begin: int, scale: float) -> Iterator[dict[str, Any]]:
    for start, end, waited, epoch, opcode, layer, pieces in events.tolist():
        common = {"ph": "X", "pid": unit, "tid": lane}
        if waited:
            yield {"name": "wait", "cat": "sync", **_span(start - waited, start, begin, scale), **common}
        arguments = {"step": epoch, "pieces": pieces} | ({} if layer == NO_LAYER else {"layer": layer})
        name = Opcode(opcode).name.lower()
        yield {"name": name, "cat": "compute", **_span(start, end, begin, scale), "args": arguments, **common}
