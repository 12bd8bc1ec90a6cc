"""Events with times in seconds to Chrome's trace format: what simulators write, in the form of trace/chrome.py."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from coterie.errors import UsageError


class Span(NamedTuple):
    """What a unit did from `start` to `end`, seconds, after it had had nothing to do for `waited`; a read has
    `nbytes`."""

    unit: str
    name: str
    layer: int
    step: int
    start: float
    end: float
    waited: float
    nbytes: int = 0


def write_timeline(path: Path, spans: Iterable[Span], note: str) -> None:
    """Write {"traceEvents": ...}: a process a unit, a slice a span and one for the wait before it, microseconds. `note`
    says beside every unit what it is. Raises UsageError where the file cannot be written."""
    spans = sorted(spans, key=lambda span: span.start)
    units = list(dict.fromkeys(span.unit for span in spans))
    numbers = {name: number for number, name in enumerate(units, start=1)}
    entries = [_name("process_name", numbers[name], f"{name} ({note})") for name in units]
    entries += [_name("thread_name", numbers[name], "queue 0" if name == "flash" else "unit") for name in units]
    entries += [entry for span in spans for entry in _slices(numbers[span.unit], span)]
    try:
        with path.open("w") as file:
            file.write('{"displayTimeUnit":"ns","traceEvents":[\n')
            file.write(",\n".join(map(json.dumps, entries)))
            file.write("\n]}\n")
    except OSError as error:
        raise UsageError(f"cannot write the timeline to {path}: {error.strerror}") from None


def _name(kind: str, unit: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": unit, "tid": 0, "args": {"name": name}}


def _slices(unit: int, span: Span) -> Sequence[dict[str, Any]]:
    common = {"ph": "X", "pid": unit, "tid": 0}
    start, end = round(span.start * 1e6, 3), round(span.end * 1e6, 3)
    arguments: dict[str, Any] = {"step": span.step} if not span.nbytes else {"bytes": span.nbytes}
    arguments |= {"layer": span.layer} if span.layer >= 0 else {}
    category = "io" if span.nbytes else "compute"
    work = {"name": span.name, "cat": category, "ts": start, "dur": round(end - start, 3), "args": arguments, **common}
    if span.waited * 1e6 < 0.001 or span.nbytes:
        return [work]
    begun = round((span.start - span.waited) * 1e6, 3)
    return [{"name": "wait", "cat": "sync", "ts": begun, "dur": round(start - begun, 3), **common}, work]
