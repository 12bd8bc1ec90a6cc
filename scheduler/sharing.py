"""What a model's products take on the units that there are, and where cuts between two of them should begin: by what
was measured of these very products (coterie profile --shapes), with the solver for one product (partition.py).

What is no product (norms, attention) was measured a layer at a time.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import inf
from typing import Any

from coterie.models.spec import ModelSpec
from coterie.scheduler.balance import Given
from coterie.scheduler.bandwidth import until_all_end
from coterie.scheduler.device_model import Cost
from coterie.scheduler.estimate import Estimator, others_of, product_of
from coterie.scheduler.operators import Reader, Rows
from coterie.scheduler.partition import Costs, Worker, solve
from coterie.scheduler.placement import DECODE, Placement
from coterie.scheduler.profile import Product
from coterie.scheduler.resident import Resident, Tensors
from coterie.storage.npu_quantise import SCHEME, token_scheme

PROMPT, TOKENS = 256, 64  # that plans are chosen and explained for
FAMILIES = {"head": "head", "ffn_up": "up", "ffn_down": "down"}  # kinds by operator; other matrices by where they stand
ROW_NAMES = {"row_ffn": ("up", "down"), "row_head": ("head",)}  # kinds by what an NPU has of a token
Kinds = dict[str, Counter[Product]]  # how often a step has each product, by kind


@dataclass(frozen=True)
class Portion:
    """Products of a kind in a phase, a prompt of PROMPT tokens or a token: of `of` equal parts `parts` are `unit`'s,
    the rest the CPU unit's. Seconds that each takes for its own, and until both are done and have met; of a GPU's
    tokens beside products of CPU and NPU (which are other portions), by how much it ends later."""

    phase: str
    kind: str
    unit: str
    parts: int
    of: int
    there: float
    cpu: float
    seconds: float


@dataclass(frozen=True)
class Candidate:
    """Units, whether products are cut between them ("tensor") or not ("layer"), and what they are expected to take."""

    units: tuple[str, ...]
    split: str
    portions: tuple[Portion, ...]

    @property
    def prefill(self) -> float:
        """Seconds of a prompt."""
        return sum(portion.seconds for portion in self.portions if portion.phase == "prefill")

    @property
    def token(self) -> float:
        """Seconds of a token behind it."""
        return sum(portion.seconds for portion in self.portions if portion.phase == "decode")

    @property
    def decode(self) -> float:
        """Seconds of TOKENS tokens."""
        return TOKENS * self.token

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode

    def busy(self, phase: str) -> dict[str, float]:
        """Seconds that each unit computes in a phase, alone."""
        found = dict.fromkeys(self.units, 0.0)
        for portion in self.portions:
            if portion.phase == phase:
                found[portion.unit] += portion.there
                found["cpu"] = found.get("cpu", 0.0) + portion.cpu
        return found

    @property
    def begin(self) -> dict[str, int]:
        """With how many parts each kind of cut begins."""
        return {portion.kind: portion.parts for portion in self.portions if portion.of > 1}

    def as_dict(self) -> dict[str, Any]:
        return {
            "units": list(self.units),
            "split": self.split,
            "prefill_s": self.prefill,
            "decode_s": self.decode,
            "products": [vars(portion) for portion in self.portions],
        }

    def line(self) -> str:
        """For people."""
        return f"{way(self.units, self.split)}: {1e3 * self.prefill:.0f} + {1e3 * self.decode:.0f} ms"


def way(units: Sequence[str], split: str) -> str:
    """What people call units that compute together, or share products."""
    return ",".join(units) + " cut" * (split == "tensor")


def kinds_of(spec: ModelSpec, tensors: Tensors, lanes: int, tokens: int) -> Kinds:
    """The products of a model, for a chunk of so many tokens, or for one. Of a chunk the last token's logits are
    wanted."""
    layout = Resident(spec, tensors, lanes).on_paper()
    reader, found, behind = Reader(spec, layout), {kind: Counter[Product]() for kind in DECODE}, False
    for name in ("decode",) if tokens == 1 else ("prefill", "head"):
        for operator in reader.operators(layout.programs[name], Rows(tokens, 0)):
            i = operator.instruction
            behind = i.kind == "attention" or (behind and i.kind != "ffn")
            if i.kind in ("matmul", "ffn"):
                product = product_of(i)
                found[FAMILIES.get(product.operator, "out" if behind else "qkv")][product] += 1
    return found


def graphs_of(spec: ModelSpec) -> Kinds:
    """The same of a chunk on an NPU, whose graphs hold all projections, or a whole feed-forward network."""
    layers, qkv = len(spec.layers), Product("matmul", spec.qkv_rows, spec.dim, SCHEME)
    out = Product("matmul", spec.dim, spec.n_heads * spec.head_dim, SCHEME)
    ffn = Product("ffn", 2 * spec.ffn_dim, spec.dim, SCHEME)
    return {"matmul": Counter({qkv: layers}) + Counter({out: layers}), "ffn": Counter({ffn: layers})}


def row_graphs_of(spec: ModelSpec, products: Collection[Product]) -> dict[str, Product]:
    """The same of a token, by kinds of cuts, whose other products are the CPU unit's. `products`: those of the model;
    where layers differ in how they are coded, as if none were coded in four bits."""
    head = next(product for product in products if product.operator == "head")
    networks = [product.format for product in products if product.operator in ("ffn_up", "ffn_down")]
    ffn = Product("ffn", 2 * spec.ffn_dim, spec.dim, token_scheme(networks))
    return {"row_ffn": ffn, "row_head": head._replace(format=token_scheme([head.format]))}


class Sharing:
    """A model on measured units, for prompts of so many tokens, with cuts where they take least, or where a placement
    has them (`told`). Raises PlanError for what was not measured."""

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Tensors,
        lanes: int,
        estimator: Estimator,
        *,
        prompt: int = PROMPT,
        told: bool = False,
    ) -> None:
        self.spec, self.estimator, self.prompt, self.told = spec, estimator, prompt, told
        self._prompt, self._token = (kinds_of(spec, tensors, lanes, tokens) for tokens in (prompt, 1))
        self._row_graphs = row_graphs_of(spec, list(chain(*self._token.values())))

    def candidate(self, units: tuple[str, ...], placement: Placement) -> Candidate:
        """What a placement is expected to take."""
        portions = [*self._prefill(placement), *self._decode(placement)]
        return Candidate(units, placement.split, tuple(portions))

    def _prefill(self, placement: Placement) -> Iterator[Portion]:
        head, cut = self._prompt["head"], placement.cuts.get("tokens")
        if placement.prefill != "npu" and cut is None:
            unit = placement.prefill
            yield from self._others("prefill", unit, self.prompt)
            for kind, products in self._prompt.items():
                tokens = 1 if kind == "head" else self.prompt
                yield self._portion("prefill", kind, unit, None, (products, products), tokens)
            return
        if cut is None:
            yield from self._others("prefill", "cpu", self.prompt)
            yield from (times(-(-self.prompt // placement.lengths[-1]), one) for one in self._graphs(placement))
        elif placement.prefill == "npu":
            yield from self._by_three(placement, cut)
        else:
            yield self._tokens(cut)
        yield self._portion("prefill", "head", "cpu", None, (head, head), 1)

    def _graphs(self, placement: Placement) -> Iterator[Portion]:
        """A chunk that fills the longest graphs, and what CPU and NPU have of its products."""
        graphs = graphs_of(self.spec)
        for kind, names in {"matmul": ("qkv", "out"), "ffn": ("up", "down")}.items():
            mine = sum((self._prompt[name] for name in names), Counter[Product]())
            cut = placement.cuts[kind] if placement.split == "tensor" else None
            yield self._portion("prefill", kind, "npu", cut, (graphs[kind], mine), placement.lengths[-1])

    def _by_three(self, placement: Placement, cut: Given) -> Iterator[Portion]:
        """Chunks of which a GPU computes the first tokens, and CPU and NPU as many others as graphs take. GPU and CPU
        meet once a layer, and at the end."""
        length, products = placement.lengths[-1], self._layers()
        chunk = [*self._graphs(placement), *self._others("prefill", "cpu", length)]
        rest = sum(portion.seconds for portion in chunk)

        def first(parts: int) -> tuple[float, float]:
            """The GPU's seconds of a chunk, and how many such chunks a prompt has."""
            tokens = placement.before_graphs(parts)
            own = self._cost("gpu", products, 1.0, tokens).seconds + self._rest("gpu", tokens) if tokens else 0.0
            return own, self.prompt / (tokens + length)

        def seconds(parts: int) -> float:
            own, chunks = first(parts)
            return chunks * max(own, rest)

        parts = cut.parts if self.told else min((0, *cut.points), key=seconds)
        own, chunks = first(parts)
        yield from (times(chunks, portion) for portion in chunk)
        late = max(0.0, own - rest) + len(self.spec.layers) * self.estimator.meeting * (parts > 0)
        yield times(chunks, Portion("prefill", "tokens", "gpu", parts, cut.of, own, 0.0, late))

    def _layers(self) -> Counter[Product]:
        """All products of a chunk but the head."""
        return sum((self._prompt[kind] for kind in ("qkv", "out", "up", "down")), Counter[Product]())

    def _others(self, phase: str, unit: str, tokens: int) -> Iterator[Portion]:
        """What is no product, on one unit."""
        seconds = self._rest(unit, tokens)
        yield Portion(phase, "others", unit, 1, 1, seconds, 0.0, seconds)

    def _rest(self, unit: str, tokens: int) -> float:
        rest = others_of(self.spec)
        return len(self.spec.layers) * self.estimator.seconds(unit, rest, rest.rows, tokens)

    def _decode(self, placement: Placement) -> Iterator[Portion]:
        yield from self._others("decode", "cpu" if placement.shares_decode else placement.decode, 1)
        yield from (self._row(kind, placement.cuts[kind]) for kind in placement.row_kinds)
        shared = {name for kind in placement.row_kinds for name in ROW_NAMES[kind]}
        for kind, products in self._token.items():
            if kind in shared:
                continue
            cut = placement.cuts.get(kind)
            unit = "gpu" if cut is not None else placement.decode
            yield self._portion("decode", kind, unit, cut, (products, products), 1)

    def _row(self, kind: str, cut: Given) -> Portion:
        """What CPU and NPU have of a token's products of a kind."""
        mine = sum((self._token[name] for name in ROW_NAMES[kind]), Counter[Product]())
        graphs = Counter({self._row_graphs[kind]: len(self.spec.layers) if kind == "row_ffn" else 1})
        return self._portion("decode", kind, "npu", cut, (graphs, mine), 1)

    def _tokens(self, cut: Given) -> Portion:
        """A chunk of which the GPU computes the first tokens, with all that belongs to them."""
        products = self._layers()

        def cost(unit: str, parts: int, tokens: int) -> Cost:
            own = self._cost(unit, products, 1.0, max(1, self.prompt * parts // cut.of))
            return replace(own, work=own.work + self._rest(unit, self.prompt) * parts / cut.of)

        return self._solved("prefill", "tokens", "gpu", cut, cost, len(self.spec.layers))

    def _portion(
        self,
        phase: str,
        kind: str,
        unit: str,
        cut: Given | None,
        products: tuple[Counter[Product], Counter[Product]],
        tokens: int,
    ) -> Portion:
        """Products of a kind, `products` as the unit and as the CPU unit have them: of one unit, or cut by rows."""
        there, here = products
        if cut is None:
            seconds = self._cost(unit, there, 1.0, tokens).seconds
            return Portion(phase, kind, unit, 1, 1, seconds, 0.0, seconds)

        def cost(name: str, parts: int, _: int) -> Cost:
            if name != "npu":
                return self._cost(name, here if name == "cpu" else there, parts / cut.of, tokens)
            # As many graphs as there are pieces, of which each costs more than its share.
            points = cut.points if self.told else Given.around(parts, cut.of).points
            pieces = Given(parts, cut.of, tuple(sorted({min(point, parts) for point in points}))).pieces()
            return added([self._cost(name, there, (last - first) / cut.of, tokens) for first, last in pieces])

        return self._solved(phase, kind, unit, cut, cost, sum(there.values()))

    def _solved(self, phase: str, kind: str, unit: str, cut: Given, cost: Costs, meetings: int) -> Portion:
        """Products that a cut divides; the units meet so often."""
        join, together = meetings * self.estimator.meeting, self.estimator.shapes.together.get(f"cpu+{unit}", inf)
        parts = cut.parts
        if not self.told:
            workers, shares = (Worker(unit, join=join), Worker("cpu")), [n / cut.of for n in range(1, cut.of)]
            pieces = solve(cut.of, 1, workers, cost, together=together, shares=shares).pieces
            parts = sum(piece.rows for piece in pieces if piece.unit == unit)
        own = cost(unit, parts, 1) if parts else Cost(0.0, 0.0)
        rest = cost("cpu", cut.of - parts, 1) if parts < cut.of else Cost(0.0, 0.0)
        both = until_all_end([(each.seconds, each.nbytes) for each in (own, rest)], together)
        return Portion(phase, kind, unit, parts, cut.of, own.seconds, rest.seconds, both + join * (parts > 0))

    def _cost(self, unit: str, products: Mapping[Product, int], share: float, tokens: int) -> Cost:
        """Of a share of these products' rows, one after the other."""
        found = [
            (count, self.estimator.cost(product, unit, max(1, round(share * product.rows)), tokens))
            for product, count in products.items()
        ]
        return added([Cost(n * one.launch, n * one.work, n * one.nbytes) for n, one in found])


def times(count: float, portion: Portion) -> Portion:
    """As often."""
    there, cpu, seconds = (count * getattr(portion, name) for name in ("there", "cpu", "seconds"))
    return replace(portion, there=there, cpu=cpu, seconds=seconds)


def added(costs: Sequence[Cost]) -> Cost:
    """Of work one after the other."""
    launch, work, nbytes = (sum(getattr(one, name) for one in costs) for name in ("launch", "work", "nbytes"))
    return Cost(launch, work, nbytes, "measured")
