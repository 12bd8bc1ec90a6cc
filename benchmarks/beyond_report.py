"""The tables of benchmarks/beyond_memory.py, in markdown, out of its cells."""

import statistics
from collections.abc import Callable
from typing import Any

Figures = dict[str, Any]
Column = tuple[str, Callable[[Figures, Figures], str]]

# Tokens/s over the peer's that are to be reached, by the end of the model's name and the share in per cent.
BARS = {
    ("1b", 95): 8.0,
    ("1b", 75): 3.0,
    ("1b", 50): 1.6,
    ("1b", 25): 1.15,
    ("8b", 50): 1.6,
    ("8b", 25): 1.1,
}
BOUND_BAR = 1.15


def spread(values: list[float], form: str = ".2f") -> str:
    """Median, and minimum to maximum in parentheses; "-" of nothing."""
    if not values:
        return "-"
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def verdict(value: float, bar: float, most: bool) -> str:
    met = value <= bar if most else value >= bar
    return f"{'≤' if most else '≥'} {bar:g}: {'met' if met else 'MISSED'}"


def values(cell: Figures, part: str, *path: str) -> list[float]:
    """One figure of a part in every round that has it."""
    found = []
    for turn in cell["rounds"]:
        figure: Any = turn.get(part, {})
        for key in path:
            figure = figure.get(key, {}) if isinstance(figure, dict) else {}
        if isinstance(figure, int | float):
            found.append(float(figure))
    return found


def ratios(cell: Figures, ours: str, theirs: str) -> list[float]:
    """Tokens/s of one part over another's, round by round."""
    turns = [turn for turn in cell["rounds"] if all("rate" in turn.get(part, {}) for part in (ours, theirs))]
    return [turn[ours]["rate"] / turn[theirs]["rate"] for turn in turns]


def bounds(cell: Figures) -> list[Figures]:
    """For each whole round, in seconds: our step, the one with everything resident, the one that reading at B would
    take, and the step over the larger of the two. A step is a token, or a prompt."""
    kind = "ours prefill" if cell["kind"] == "prefill" else "ours"
    whole = "resident prefill" if cell["kind"] == "prefill" else "resident"
    found = []
    for turn in cell["rounds"]:
        ours, resident, fio = (turn.get(part, {}) for part in (kind, whole, "fio"))
        if "rate" not in ours or "rate" not in resident or "best" not in fio:
            continue
        tokens = 512 if cell["kind"] == "prefill" else 1
        # A prompt has to read the model once, were it not for what is resident: the bar counts all of it.
        nbytes = ours["model_size"] if cell["kind"] == "prefill" else ours["flash"]["streamed_bytes_per_token"]
        bandwidth = max(fio["best"], turn.get("peer", {}).get("bandwidth", 0))
        step, floor, read = tokens / ours["rate"], tokens / resident["rate"], nbytes / bandwidth
        found.append(
            {"step": step, "resident": floor, "read": read, "bandwidth": bandwidth, "ratio": step / max(floor, read)}
        )
    return found


def error(cell: Figures, *parts: str) -> str:
    """Why a part has no figures, where it has none."""
    said = {
        f"{part}: {turn[part]['error']}" for turn in cell["rounds"] for part in parts if "error" in turn.get(part, {})
    }
    return "; ".join(sorted(said))


def rows(head: str, lines: list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * columns, *lines])


def carried(cell: Figures) -> list[tuple[float, float, float]]:
    """For each round: our bytes a token and bytes/s over the peer's, and our bytes/s, waiting included."""
    found = []
    for turn in cell["rounds"]:
        ours, peer = turn.get("ours", {}), turn.get("peer", {})
        if "flash" in ours and peer.get("bandwidth"):
            nbytes = ours["flash"]["read_bytes_per_token"]
            speed = ours["rate"] * nbytes
            found.append((nbytes / peer["bytes_per_token"], speed / peer["bandwidth"], speed))
    return found


def peer_verdict(cell: Figures) -> str:
    """Whether the bar of this cell is reached, where it has one; at 25 % by fewer bytes at the same bytes/s as well."""
    found = [bar for (name, share), bar in BARS.items() if cell["model"].endswith(name) and share == cell["share"]]
    quotients, bytes_read = ratios(cell, "ours", "peer"), carried(cell)
    if not found or not quotients:
        return ""
    said = verdict(statistics.median(quotients), found[0], most=False)
    if cell["share"] == 25 and bytes_read:
        fewer, speed = (statistics.median(turn[i] for turn in bytes_read) for i in (0, 1))
        said += f"; bytes ≤ 0.8 at ≥ 0.95 of the bytes/s: {'met' if fewer <= 0.8 and speed >= 0.95 else 'MISSED'}"
        said += f" ({fewer:.2f} at {speed:.2f})"
    return said


def against_peer(cells: list[Figures]) -> str:
    lines = []
    for cell in cells:
        ahead = values(cell, "peer", "read_ahead")
        columns = [
            spread(values(cell, "ours", "rate")),
            spread(values(cell, "peer", "rate")),
            f"{ahead[0]:.0f}" if ahead else "-",
            f"**{spread(ratios(cell, 'ours', 'peer'))}**",
            peer_verdict(cell),
            spread([1e-6 * b for b in values(cell, "ours", "flash", "read_bytes_per_token")], ".0f"),
            spread([1e-6 * b for b in values(cell, "peer", "bytes_per_token")], ".0f"),
            spread([1e-9 * speed for _, _, speed in carried(cell)]),
            spread([1e-9 * b for b in values(cell, "peer", "bandwidth")]),
            error(cell, "ours", "peer"),
        ]
        lines.append(f"| {cell['model']} | {cell['share']} % | {' | '.join(columns)} |")
    return rows(
        "| model | share | ours, tokens/s | llama.cpp | its read-ahead, KiB | ratio | bar | ours, MB/token "
        "| llama.cpp | ours, GB/s | llama.cpp | |",
        lines,
    )


def against_bound(cells: list[Figures]) -> str:
    lines = []
    for cell in cells:
        found = bounds(cell)
        quotients = [turn["ratio"] for turn in found]
        part = "ours prefill" if cell["kind"] == "prefill" else "ours"
        columns = [
            *(spread([1e3 * turn[key] for turn in found], ".1f") for key in ("step", "resident", "read")),
            spread([1e-9 * turn["bandwidth"] for turn in found]),
            f"**{spread(quotients)}**",
            verdict(statistics.median(quotients), BOUND_BAR, most=True) if quotients else "",
            spread([1e-9 * b for b in values(cell, part, "flash", "bandwidth")]),
            *(spread(values(cell, part, "flash", key)) for key in ("busy_share", "stall_share")),
            error(cell, part, "fio"),
        ]
        lines.append(f"| {cell['model']} | {cell['share']} % | {' | '.join(columns)} |")
    read = "model bytes" if cells[0]["kind"] == "prefill" else "streamed bytes"
    return rows(
        f"| model | share | step, ms | all resident, ms | {read} / B, ms | B, GB/s | step over the larger | bar "
        "| ours, GB/s while reading | flash busy | stalled | |",
        lines,
    )


def memory(cells: list[Figures]) -> str:
    lines = []
    for cell in cells:
        amounts = [
            spread([1e-6 * b for b in values(cell, part, *path)], ".0f")
            for part, *path in (
                ("ours", "memory", "total"),
                ("ours", "resident"),
                ("ours", "limit"),
                ("ours", "cgroup_peak"),
                ("peer", "anonymous"),
                ("peer", "limit"),
                ("peer", "cgroup_peak"),
            )
        ]
        lines.append(f"| {cell['model']} | {cell['share']} % | {' | '.join(amounts)} |")
    return rows(
        "| model | share | ours: plan, MB | peak RSS | cgroup | its peak | llama.cpp: anonymous | cgroup | its peak |",
        lines,
    )


def ablations(cells: list[Figures]) -> str:
    lines = []
    for cell in cells:
        for part in ("peer", "peer locked", "ours buffered", "ours"):
            rates = values(cell, part, "rate")
            lines.append(
                f"| {cell['model']} | {cell['share']} % | {part} | {spread(rates)} "
                f"| {spread(ratios(cell, part, 'peer'))} | {error(cell, part)} |"
            )
    return rows("| model | share | | tokens/s | over the peer | |", lines)


def runs(cells: list[Figures]) -> str:
    """Every run: tokens/s (fio: GB/s), in the order in which they were taken."""
    lines = []
    for cell in cells:
        for number, turn in enumerate(cell["rounds"], 1):
            said = []
            for part, figures in turn.items():
                if part == "when":
                    continue
                rate = figures.get("rate", figures.get("best", 0) / 1e9)
                said.append(f"{part} {rate:.3g}" if rate else f"{part} failed")
            lines.append(
                f"| {cell['model']} | {cell['share']} % | {cell['kind']} | {number} | {turn['when']} "
                f"| {', '.join(said)} |"
            )
    return rows("| model | share | | round | at | tokens/s; fio: GB/s |", lines)


def report(cells: list[Figures]) -> str:
    """Markdown of all tables that have rows; cells of a model in order of their share, the largest first."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    ordered = sorted(cells, key=lambda cell: (models.index(cell["model"]), -cell["share"]))
    kinds = {
        kind: [c for c in ordered if c["kind"] == kind and c["rounds"]] for kind in ("decode", "prefill", "ablations")
    }
    sections = [
        ("Against llama.cpp", against_peer, kinds["decode"]),
        ("Near the bound", against_bound, kinds["decode"]),
        ("Prefill of 512 tokens", against_bound, kinds["prefill"]),
        ("Memory", memory, kinds["decode"]),
        ("Ablations", ablations, kinds["ablations"]),
        ("Every run", runs, [cell for kind in kinds.values() for cell in kind]),
    ]
    return "\n\n".join(f"### {title}\n\n{table(chosen)}" for title, table, chosen in sections if chosen)
