"""How busy flash was, from a trace: python benchmarks/overlap.py TRACE.json

Prints the share of the recorded time in which at least one read was under way, the
share in which no lane computed, and the bytes/s while reading. Record the trace with `coterie run --trace`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

Interval = tuple[float, float]


def union(intervals: list[Interval], first: float, last: float) -> float:
    """Length of what the intervals cover of first..last together."""
    covered, end = 0.0, first
    for start, stop in sorted(intervals):
        start, stop = max(start, end), min(stop, last)
        if stop > start:
            covered, end = covered + stop - start, stop
    return covered


def summary(events: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the time from the first instruction to the last, and bytes/s."""

    def of(category: str) -> list[dict[str, Any]]:
        return [event for event in events if event.get("cat") == category]

    def spans(found: list[dict[str, Any]]) -> list[Interval]:
        return [(event["ts"], event["ts"] + event["dur"]) for event in found]

    compute, reads = spans(of("compute")), spans(of("io"))
    # Rings keep the newest events, of each unit as many: only the time that both know counts.
    first = max(min(start for start, _ in known) for known in (compute, reads))
    last = min(max(stop for _, stop in known) for known in (compute, reads))
    busy = union(reads, first, last)
    nbytes = sum(event["args"]["bytes"] for event in of("io") if first <= event["ts"] < last)
    return {
        "seconds": (last - first) / 1e6,
        "flash_busy": busy / (last - first),
        "lanes_in_an_instruction": union(compute, first, last) / (last - first),
        "bytes_per_s": nbytes / busy * 1e6 if busy else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    events = json.loads(parser.parse_args().trace.read_text())["traceEvents"]
    for name, value in summary(events).items():
        print(f"{name} {value:.4g}")


if __name__ == "__main__":
    main()
