"""What --explain prints: where a step's time goes, and what more of something would give."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coterie.scheduler.explain import Explanation, Line
    from coterie.scheduler.operators import Rows
    from coterie.scheduler.sharing import Candidate, Portion
    from coterie.scheduler.simulate import Answer, Phase

LEAST = 0.005  # of a step: operators that take less are added up


def explanation_lines(found: "Explanation", answer: "Answer") -> list[str]:
    """An explanation for people."""
    lines = list[str]()
    for name, (rows, operators) in found.tables.items():
        phase = answer.prefill if name == "prefill" else answer.decode
        assert phase is not None
        lines += ["", f"{name}, {_what(name, rows)}: bound by {phase.bottleneck}", *_table(operators)]
        lines += _waits(phase)
    if found.changes:
        lines += ["", "what would change it, in times of the speed (predicted):"]
    for change in found.changes:
        parts = [("prefill", change.prefill), ("decode", change.decode)]
        said = ", ".join(f"{label} {ratio:.2f}" for label, ratio in parts if ratio is not None)
        lines.append(f"  {change.name:20}{said}")
    return lines


def portion_lines(mine: "Candidate", others: "list[Candidate]") -> list[str]:
    """For people: what products take on several units of this machine, and other ways to share them."""
    from coterie.scheduler.sharing import PROMPT, TOKENS, way

    lines = list[str]()
    for phase, what in (("prefill", f"a prompt of {PROMPT} tokens"), ("decode", "a token")):
        portions = [portion for portion in mine.portions if portion.phase == phase]
        busy, total = mine.busy(phase), sum(portion.seconds for portion in portions)
        lines += ["", f"{phase}, {what}: {1e3 * total:.1f} ms, bound by {max(busy, key=busy.__getitem__)}"]
        lines.append(f"  {'products':12}{'ms':>10}{'%':>6}  where, and ms alone")
        for each in sorted(portions, key=lambda portion: -portion.seconds):
            numbers = f"{1e3 * each.seconds:10.3f}{100 * each.seconds / total:6.1f}"
            lines.append(f"  {each.kind:12}{numbers}  {_shared(each)}")
    if others:
        lines += ["", f"other ways, in times of the speed over {PROMPT} + {TOKENS} tokens (predicted):"]
    for other in sorted(others, key=lambda each: each.seconds):
        lines.append(f"  {way(other.units, other.split):20}{mine.seconds / other.seconds:.2f}")
    return lines


def _shared(portion: "Portion") -> str:
    rest = portion.of - portion.parts
    if not portion.parts or not rest:
        return portion.unit if portion.parts else "cpu"
    own, others = (f"{1e3 * seconds:.3f}" for seconds in (portion.there, portion.cpu))
    mine = f"{portion.unit} {portion.parts}/{portion.of} {own}"
    return f"{mine}, cpu {rest}/{portion.of} {others}" if portion.cpu else mine


def _what(name: str, rows: "Rows") -> str:
    return f"a chunk of {rows.tokens} tokens" if name == "prefill" else f"a token at position {rows.position}"


def _table(operators: "list[Line]") -> list[str]:
    total = sum(line.seconds for line in operators)
    lines, rest = [f"  {'operator':28}{'times':>6}{'ms':>10}{'%':>6}  where"], 0.0
    for line in operators:
        if line.seconds < LEAST * total:
            rest += line.seconds
        else:
            numbers = f"{line.count:6}{1e3 * line.seconds:10.3f}{100 * line.seconds / total:6.1f}"
            lines.append(f"  {line.name:28}{numbers}  {line.where}")
    return lines + ([f"  {'others':34}{1e3 * rest:10.3f}{100 * rest / total:6.1f}"] if rest else [])


def _waits(phase: "Phase") -> list[str]:
    """What the table does not show: it has operators alone, with their weights in memory."""
    shares = {unit: each.get("weights", 0.0) for unit, each in phase.waits.items()}
    said = [f"{unit} waits for weights {100 * share:.0f} % of the time" for unit, share in shares.items()]
    kept = [text for text, share in zip(said, shares.values(), strict=True) if share >= LEAST]
    return [f"  besides, {', '.join(kept)}"] if kept else []
