"""Which unit does what, where several are asked for. The partition solver will decide this by measured times; until
then it follows the seed systems: prompts' products on the NPU or the GPU, decode on the GPU where both are busy
otherwise."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from coterie.errors import UsageError
from coterie.kernels.record import PRODUCTS
from coterie.scheduler.balance import Given

UNITS = ("cpu", "gpu", "npu")
LENGTHS = (128,)  # rows of graphs; each length costs another copy of all weights
SHORT = 32  # tokens of a chunk below which two units would mostly wait for each other
FILLED = 0.6  # of a graph's rows at least: with fewer, it is not used
ROLES = {  # of the units asked for: who computes prompts, and who decodes
    ("cpu",): ("cpu", "cpu"),
    ("gpu",): ("gpu", "gpu"),
    ("cpu", "gpu"): ("gpu", "cpu"),
    ("cpu", "npu"): ("npu", "cpu"),
    ("cpu", "gpu", "npu"): ("npu", "gpu"),
}


SPLITS = ("layer", "tensor")
DECODE = dict(zip(("qkv", "out", "up", "down", "head"), PRODUCTS, strict=True))  # kinds of cuts, and their header words
ROW_PARTS = 16  # equal parts of a product of decode, of which an NPU takes some
ROW_KINDS = {"row_ffn": 4, "row_head": 6}  # of those: large ones, since small ones cost more to start; to begin with
PARTS = 8  # equal parts of a product, of which an NPU takes some
KINDS = "matmul", "ffn"  # of prompts' products that are cut alike
GPU_PARTS = 32  # of a chunk's tokens, or of a product's rows, of which a GPU takes some


@dataclass(frozen=True)
class Placement:
    """Who computes prompts, "cpu", "gpu" or "npu" (graphs of `lengths` rows, and the CPU unit all else), and who
    decodes.

    split  "layer": an operator is one unit's; "tensor": the CPU unit computes a part of other units' products
    cuts   between the CPU unit and another one: of prompts' products (KINDS) and some of decode's (ROW_KINDS) with the
           NPU, of prompts' chunks by tokens ("tokens") and of decode's products by rows (DECODE) with the GPU; with
           both, the GPU has a chunk's first tokens, and CPU and NPU share products of as many others as the longest
           graphs take; decode is cut between two units at most
    kept   cores, the last ones, that the CPU unit leaves to units which compute on cores
    fast   units in one step meet by flags alone; else by their runtimes' own calls
    """

    prefill: str = "cpu"
    decode: str = "cpu"
    lengths: tuple[int, ...] = ()
    split: str = "layer"
    cuts: Mapping[str, Given] = field(default_factory=dict)
    kept: int = 0
    fast: bool = True

    @classmethod
    def of(
        cls,
        units: Sequence[str],
        chunk: int,
        split: str = "layer",
        kept: int = 0,
        begin: Mapping[str, int] = MappingProxyType({}),
    ) -> "Placement":
        """The placement for a set of units and chunks of so many tokens; `begin`: with how many parts cuts begin, else
        in the middle. Raises UsageError for a set that cannot be."""
        prefill, decode = ROLES[check_units(units)]
        if split not in SPLITS:
            raise UsageError(f"split is {split!r:.40}: there are {' and '.join(SPLITS)}")
        if split == "tensor" and len(units) == 1:
            raise UsageError(f"{units[0]} alone shares its products with no unit: --split tensor needs --units")
        lengths = tuple(sorted({min(length, chunk) for length in LENGTHS})) if prefill == "npu" else ()
        cuts = dict[str, Given]()
        if prefill == "npu":  # of which each point is another graph a layer, and none may be missing
            some = {kind: Given.around(max(1, begin.get(kind, PARTS // 2)), PARTS) for kind in KINDS}
            cuts = some if split == "tensor" else dict.fromkeys(KINDS, Given.whole())
            if split == "tensor" and decode == "cpu":
                first = {kind: max(1, begin.get(kind, usual)) for kind, usual in ROW_KINDS.items()}
                cuts |= {kind: Given.around(parts, ROW_PARTS) for kind, parts in first.items()}
        if split == "tensor" and "gpu" in units:
            kinds, points = [*["tokens"] * (prefill == "gpu"), *DECODE], tuple(range(1, GPU_PARTS + 1))
            cuts |= {kind: Given(begin.get(kind, GPU_PARTS // 2), GPU_PARTS, points) for kind in kinds}
            if lengths:  # prompts' products are shared by all three
                cuts |= fitting(Given(begin.get("tokens", GPU_PARTS // 3), GPU_PARTS, points), lengths, chunk)
        return cls(prefill, decode, lengths, split, cuts, kept)

    def own_cores(self) -> tuple[int, ...]:
        """The cores of units beside the CPU unit; none: they may use all."""
        return tuple(sorted(os.sched_getaffinity(0))[-self.kept :]) if self.kept else ()

    @property
    def exact(self) -> bool:
        """Whether the CPU unit computes everything."""
        return self.prefill == self.decode == "cpu" and not self.shares_decode

    @property
    def gpu(self) -> bool:
        return "gpu" in (self.prefill, self.decode) or self.shares_decode

    @property
    def shares_decode(self) -> bool:
        """Whether CPU and GPU unit may decode a token together."""
        return not DECODE.keys().isdisjoint(self.cuts)

    @property
    def row_kinds(self) -> list[str]:
        """Kinds of cuts of a token between CPU and NPU unit."""
        return [kind for kind in ROW_KINDS if kind in self.cuts]

    @cached_property
    def decode_kinds(self) -> list[tuple[str, ...]]:
        """Kinds of products that may be cut in one decode step, fewest first: meetings cost most where layers are
        small, and least for what is large, the head above all."""
        always = set(DECODE) - set(self.cuts) if self.decode == "gpu" else set[str]()  # what is the GPU unit's whole
        found = list[tuple[str, ...]]()
        for some in (("head",), ("up", "head"), tuple(DECODE)):
            kinds = tuple(kind for kind in DECODE if kind in always or (kind in some and kind in self.cuts))
            if kinds and kinds not in found:
                found.append(kinds)
        return found

    def first_tokens(self, tokens: int, parts: int) -> int:
        """How many of a chunk's tokens, the first ones, are the GPU unit's, when it computes so many parts of chunks: a
        multiple of 8; none of a short chunk, all of which are the CPU unit's. Where there are graphs, all but those
        that the longest take."""
        if "tokens" not in self.cuts or tokens < SHORT:
            return 0
        if self.prefill == "npu":
            first = max(0, tokens - self.lengths[-1])
            return first if first % 8 == 0 else 0
        return min(tokens, round(tokens * parts / self.cuts["tokens"].of / 8) * 8)

    def describe(self) -> dict[str, str]:
        """What each unit does, for people."""
        parts: dict[str, list[str]] = {"cpu": [], "gpu": [], "npu": []}
        if self.prefill == "npu":
            some = "a part of " * (self.split == "tensor")
            parts["npu"].append(f"{some}prompts' matrix products")
            parts["npu"] += ["of decode's networks and head"] * bool(self.row_kinds)
            parts["gpu"] += ["prompts' first tokens"] * ("tokens" in self.cuts)
            parts["cpu"].append("the rest of prompts")
        else:
            parts[self.prefill].append("prompts")
        parts[self.decode].append("decode")
        said = {unit: " and ".join(work) for unit, work in parts.items() if work}
        return {unit: "everything" if work == "prompts and decode" else work for unit, work in said.items()}

    def before_graphs(self, parts: int) -> int:
        """How many tokens before those of the longest graphs are so many parts of both: a multiple of 8."""
        longest, others = self.lengths[-1], max(1, self.cuts["tokens"].of - parts)
        return max(8, longest * parts // others // 8 * 8) if parts else 0

    def piece(self, tokens: int, chunk: int, parts: int = 0) -> int:
        """How many of a prompt's tokens make the next step: a chunk of at most `chunk`; where there are graphs, as many
        as one of them takes, and those before them of which a GPU unit computes so many parts of chunks."""
        piece = min(tokens, chunk)
        if self.prefill == "npu" and "tokens" in self.cuts:  # padding costs as much as tokens, so a graph is full
            longest = self.lengths[-1]
            first = min((piece - longest) // 8 * 8, self.before_graphs(parts))
            if first > 0 and first + longest >= SHORT:
                return first + longest
        if self.lengths and self.length_for(piece) is None:
            piece = max((length for length in self.lengths if length <= piece), default=piece)
        return piece

    def length_for(self, tokens: int) -> int | None:
        """The graphs' length for a step of so many tokens: the shortest that holds them, if they fill most of it; None:
        they are the CPU unit's (HeteroInfer, section 4.2: padding, and the rest on another unit)."""
        fitting = [length for length in self.lengths if length >= tokens]
        return fitting[0] if fitting and FILLED * fitting[0] <= tokens else None


CPU_ONLY = Placement()


def most_first(lengths: Sequence[int], chunk: int, of: int) -> int:
    """How many of so many parts of a chunk may be the GPU unit's, where graphs of these lengths take the rest."""
    return max(0, chunk - lengths[-1]) * of // chunk


def fitting(cut: Given, lengths: Sequence[int], chunk: int) -> dict[str, Given]:
    """A cut of chunks by tokens that leaves graphs of these lengths full; none where chunks have no more tokens."""
    most = most_first(lengths, chunk, cut.of)
    points = tuple(point for point in cut.points if point <= most)
    return {"tokens": Given(min(cut.parts, points[-1]), cut.of, points)} if points else {}


def check_units(units: Sequence[str]) -> tuple[str, ...]:
    """The units in our order. Raises UsageError for one that there is not, or a set that cannot be."""
    for unit in units:
        if unit not in UNITS:
            raise UsageError(f"unit is {unit!r:.40}: there are {', '.join(UNITS)}")
    wanted = tuple(unit for unit in UNITS if unit in units)
    if wanted not in ROLES:
        raise UsageError("the NPU unit needs the CPU unit beside it: --units cpu,npu or cpu,gpu,npu")
    return wanted


def parse_units(text: str | None) -> tuple[str, ...]:
    """Units as text such as "cpu,npu"; None: the CPU unit. Raises UsageError."""
    if text is None:
        return ("cpu",)
    return check_units([word.strip() for word in text.split(",")])
