"""What a plan decides, and the tables in which plan files and messages say it (docs/plan.md).

Tables are dicts of what TOML and msgpack both have. They are written by `tables` and read by `parse`, which takes
nothing on trust: both forms have the same meaning, limits and messages.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coterie.errors import CoterieError, PlanError
from coterie.scheduler.balance import Given
from coterie.scheduler.layout import BATCH
from coterie.scheduler.placement import (
    DECODE,
    GPU_PARTS,
    PARTS,
    ROW_KINDS,
    ROW_PARTS,
    SPLITS,
    UNITS,
    Placement,
    check_units,
    fitting,
    most_first,
)
from coterie.scheduler.plan import MAX_LANES, VERSION, Plan, Wishes
from coterie.scheduler.tables import Table, printable, shown
from coterie.sizes import MOST

MOST_PARTS = 1 << 10  # of a cut
MOST_LENGTHS = 8  # of graphs: each is another copy of all weights
MOST_POINTS = 32  # to which a cut may move: each is another graph a layer
PHASES = "prefill", "decode"
KINDS = {"prefill": ("matmul", "ffn", "tokens"), "decode": (*DECODE, *ROW_KINDS)}  # of cuts with the CPU unit
OTHER = dict.fromkeys(("matmul", "ffn", *ROW_KINDS), "npu") | dict.fromkeys(("tokens", *DECODE), "gpu")  # unit of a cut


@dataclass(frozen=True)
class Decisions:
    """A plan for one model on one device. `identity`: of the model (opening.plan_identity); `machine`: which one
    (profile.machine), or a described device's name; `ceiling` in bytes, or None; `flash`: bytes read at a time and
    reads in flight, of a packed model; `hot`: by batch size, how many neurons are hot, and how many cold."""

    model: str
    identity: str
    machine: str
    context: int
    lanes: int
    chunk: int
    units: tuple[str, ...]
    placement: Placement
    pinned: int
    ring: int
    slots: int
    ceiling: int | None = None
    flash: tuple[int, int] | None = None
    hot: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, identity: str, machine: str) -> "Decisions":
        """Those of a plan that was made for a model on a device."""
        return cls(
            printable(plan.model),
            identity,
            machine,
            plan.context,
            plan.lanes,
            plan.chunk,
            tuple(unit for unit in UNITS if unit in plan.units or (unit == "cpu" and plan.placement.split == "tensor")),
            plan.placement,
            plan.pinned,
            plan.ring,
            plan.slots,
            plan.memory,
            None if plan.flash is None else (plan.flash.block, plan.flash.depth),
            {batch: (hot, plan.neurons - hot) for batch, hot in plan.hot.items()},
        )

    def wishes(self, wishes: Wishes, where: str) -> Wishes:
        """Wishes as the plan has them; what the user said beside it may not contradict it. Raises PlanError."""
        decided: dict[str, Any] = {
            "threads": self.lanes,
            "context": self.context,
            "memory": self.ceiling,
            "units": self.units,
            "split": self.placement.split,
        }
        for name, value in decided.items():
            said = getattr(wishes, name)
            unsaid = said is None or (name not in wishes.sources and said == getattr(Wishes(), name))
            if not unsaid and said != value:
                source = wishes.sources.get(name, "argument")
                text = ",".join(said) if isinstance(said, tuple) else said
                raise PlanError(f"{where}: the plan decides {name}, and the {source} says {text}; drop one of them")
        block, depth = self.flash or (None, None)
        return replace(
            wishes,
            **decided,
            chunk=self.chunk,
            placement=self.placement,
            pinned=self.pinned,
            ring=self.ring,
            slots=self.slots,
            block=block,
            depth=depth,
            hot=self.hot,
            identity=self.identity,
            sources=dict.fromkeys(("threads", "context", "memory", "chunk", "units", "split"), "plan"),
        )


# --- writing -----------------------------------------------------------------------------------------


def tables(made: Decisions) -> dict[str, Any]:
    """The tables that say it; parse reads them back."""
    placement = made.placement
    found: dict[str, Any] = {
        "version": VERSION,
        "model": {"name": made.model, "identity": made.identity},
        "device": {"machine": made.machine},
        "memory": ({} if made.ceiling is None else {"ceiling": made.ceiling}) | {"context": made.context},
        "cpu": {"lanes": made.lanes, "chunk": made.chunk, "left": placement.kept},
        "units": {"names": list(made.units), "split": placement.split, "flags": placement.fast},
    }
    for phase, unit in zip(PHASES, (placement.prefill, placement.decode), strict=True):
        found[phase] = {"unit": unit}
        if phase == "prefill" and unit == "npu":
            found[phase]["lengths"] = list(placement.lengths)
        kinds = [kind for kind in KINDS[phase] if kind in placement.cuts]
        if kinds and placement.split == "tensor":
            found[phase]["cuts"] = {kind: _cut_table(placement.cuts[kind], OTHER[kind]) for kind in kinds}
    found["residency"] = {"pinned": made.pinned, "ring": made.ring, "slots": made.slots}
    if made.flash is not None:
        found["flash"] = {"block": made.flash[0], "depth": made.flash[1]}
    if made.hot:
        splits = [{"size": size, "hot": hot, "cold": cold} for size, (hot, cold) in sorted(made.hot.items())]
        found["batch"] = {"splits": splits}
    return found


def _cut_table(cut: Given, unit: str) -> dict[str, Any]:
    bounds = [(unit, 0, cut.parts), ("cpu", cut.parts, cut.of)]
    pieces = [{"unit": who, "first": first, "last": last} for who, first, last in bounds if first < last]
    return {"of": cut.of, "pieces": pieces, "points": list(cut.points)}


# --- reading -----------------------------------------------------------------------------------------


def parse(values: Any, where: str) -> Decisions:
    """What tables decide; `where` they are, for messages. Raises PlanError, in one line."""
    top = Table(values, where)
    version = top.value("version") if top.has("version") else None  # another one may know other keys
    if type(version) is not int or version != VERSION:
        raise PlanError(
            f"{where}: plan version {shown(version)}, but this Coterie writes {VERSION}; make it anew with coterie "
            "plan --save"
        )
    model, device, memory, cpu = (top.table(name) for name in ("model", "device", "memory", "cpu"))
    chunk, left = cpu.whole("chunk", BATCH, 1 << 16, BATCH), cpu.whole("left", 0, MAX_LANES)
    units, placement = parse_placement(top, chunk)
    residency, flash = top.table("residency"), top.table("flash") if top.has("flash") else None
    made = Decisions(
        model.text("name"),
        model.text("identity"),
        device.text("machine"),
        memory.whole("context", 1, 1 << 30),
        cpu.whole("lanes", 1, MAX_LANES),
        chunk,
        units,
        replace(placement, kept=left),
        residency.whole("pinned", 1, 1 << 30),
        residency.whole("ring", 0, MOST, 4096),
        residency.whole("slots", 0, 1 << 30),
        memory.whole("ceiling", 1, MOST) if memory.has("ceiling") else None,
        None if flash is None else (flash.whole("block", 4096, 1 << 30, 4096), flash.whole("depth", 1, 1 << 10)),
        dict(_hot(top.table("batch"))) if top.has("batch") else {},
    )
    for table in (model, device, memory, cpu, residency, *([flash] if flash else []), top):
        table.done()
    if flash is None and (made.ring or made.slots):
        raise residency.wrong("", "streams weights, but there is no table flash: say how it is read, or pin all")
    return made


def parse_placement(top: Table, chunk: int) -> tuple[tuple[str, ...], Placement]:
    """Who does what: the tables units, prefill and decode, of a plan or of a preset."""
    units, phases = top.table("units"), {phase: top.table(phase) for phase in PHASES}
    names = units.words("names", UNITS)
    try:
        names = check_units(names)
    except CoterieError as error:
        raise units.wrong("names", f"is {','.join(names)}: {error}") from None
    split = units.word("split", SPLITS)
    fast = units.flag("flags") if units.has("flags") else True
    units.done()
    roles = {
        phase: table.word("unit", names if phase == "prefill" else [name for name in names if name != "npu"])
        for phase, table in phases.items()
    }
    if split == "tensor" and "cpu" not in names:
        raise units.wrong("split", "is tensor, but no unit shares products with the gpu; add cpu to the names")
    lengths: tuple[int, ...] = ()
    if roles["prefill"] == "npu":
        lengths = phases["prefill"].wholes("lengths", BATCH, chunk, MOST_LENGTHS, BATCH)
    cuts = dict[str, Given]()
    for phase, table in phases.items():
        sharing = [roles[phase]] if phase == "prefill" and roles[phase] != "npu" else names
        cuts |= _cuts(table, [kind for kind in KINDS[phase] if OTHER[kind] in sharing], split)
        if phase == "decode" and len({OTHER[kind] for kind in cuts if kind in KINDS[phase]}) > 1:
            raise table.wrong("cuts", "are with the gpu and with the npu: a token is cut between two units; drop one")
        if not cuts.keys().isdisjoint(ROW_KINDS) and (roles["prefill"], roles["decode"]) != ("npu", "cpu"):
            raise table.wrong("cuts", "with the npu need prefill.unit npu and decode.unit cpu; say so, or drop them")
        table.done()
    cut = cuts.get("tokens") if lengths else None
    if cut is not None:
        most = most_first(lengths, chunk, cut.of)
        if most < max(1, cut.parts):
            text = f"can give the gpu {most} of {cut.of} parts at most: of a chunk's {chunk} tokens a graph takes "
            raise phases["prefill"].wrong("cuts.tokens", f"{text}{lengths[-1]}; give it less, or drop the cut")
        cuts |= fitting(cut, lengths, chunk)
    if idle := [name for name in names if name not in ("cpu", *roles.values(), *(OTHER[kind] for kind in cuts))]:
        raise units.wrong("names", f"has {idle[0]}, which neither computes prompts nor decodes; drop it")
    return names, Placement(roles["prefill"], roles["decode"], lengths, split, cuts, fast=fast)


def _cuts(phase: Table, kinds: Sequence[str], split: str) -> dict[str, Given]:
    """The cuts of a phase, of these kinds; what is not cut, an NPU computes whole."""
    given = {kind: Given.whole() for kind in kinds if OTHER[kind] == "npu" and kind not in ROW_KINDS}
    if not phase.has("cuts"):
        return given
    table = phase.table("cuts")
    if split != "tensor":
        raise phase.wrong("cuts", 'has no meaning where units.split is "layer"; make that "tensor", or drop the cuts')
    given |= {kind: _cut(table.table(kind), kind) for kind in kinds if table.has(kind)}
    table.done()
    return given


def _cut(table: Table, kind: str) -> Given:
    """A cut of which another unit computes the first parts, and the CPU unit the rest."""
    pieces, unit = table.tables("pieces", MOST_POINTS), OTHER[kind]
    if not table.has("of") and pieces[0].has("share"):
        of = GPU_PARTS if unit == "gpu" else ROW_PARTS if kind in ROW_KINDS else PARTS
        ends = list(_shares(table, pieces, unit, of))
    else:
        of = table.whole("of", 1, MOST_PARTS)
        ends = list(_ranges(table, pieces, unit, of))
    order = [who for who, _ in ends]
    if order not in ([unit], ["cpu"], [unit, "cpu"]):
        raise table.wrong("pieces", f"are {', '.join(order)}: first one piece of the {unit}, then one of the cpu")
    parts = ends[0][1] if order[0] == unit else 0
    free = unit == "gpu" and of <= MOST_POINTS  # its kernels take any number of rows
    points = tuple(range(1, of + 1)) if free else Given.around(max(1, parts), of).points
    points = table.wholes("points", 1, of, MOST_POINTS) if table.has("points") else points
    table.done()
    if parts and parts not in points:
        raise table.wrong("points", f"has no {parts}, which the {unit} is to compute; add it, or leave points out")
    return Given(parts, of, points)


def _ranges(table: Table, pieces: Sequence[Table], unit: str, of: int) -> Iterator[tuple[str, int]]:
    """Who computes each piece, and its end: they cover all parts, none twice."""
    end = 0
    for piece in pieces:
        who = piece.word("unit", (unit, "cpu"))
        first, last = piece.whole("first", 0, of), piece.whole("last", 0, of)
        piece.done()
        if last <= first:
            raise piece.wrong("", f"is empty: it begins at {first} and ends at {last}; drop it, or let it end later")
        if first < end:
            raise piece.wrong("", f"overlaps the one before it, which ends at {end}; let it begin there")
        if first > end:
            raise piece.wrong("", f"leaves a gap: parts {end} to {first} are nobody's; let it begin at {end}")
        end = last
        yield who, end
    if end < of:
        raise table.wrong("pieces", f"leave a gap: parts {end} to {of} are nobody's; let the last end at {of}")


def _shares(table: Table, pieces: Sequence[Table], unit: str, of: int) -> Iterator[tuple[str, int]]:
    """The same in general terms: shares that add up to 1, to the nearest of so many parts."""
    end = 0.0
    for piece in pieces:
        who, share = piece.word("unit", (unit, "cpu")), piece.share("share")
        piece.done()
        end += share
        yield who, round(min(1.0, end) * of)
    if abs(end - 1) > 1e-6:
        raise table.wrong("pieces", f"have shares that add up to {end:g}; they must to 1")


def _hot(table: Table) -> Iterator[tuple[int, tuple[int, int]]]:
    """By batch size, neurons that are hot and cold."""
    before = 0, 0
    for split in table.tables("splits", BATCH):
        size, hot = split.whole("size", 1, BATCH), split.whole("hot", 0, 1 << 30)
        cold = split.whole("cold", 0, 1 << 30)
        split.done()
        if size <= before[0]:
            raise split.wrong("size", f"is {size}, behind {before[0]}: sizes ascend")
        if hot < before[1]:
            raise split.wrong("hot", f"is {hot}, fewer than the {before[1]} of {before[0]} sequences; raise it")
        before = size, hot
        yield size, (hot, cold)
    table.done()
