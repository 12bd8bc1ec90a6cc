"""Which units this machine's model is best computed on, by what was measured of its own products (--preset auto).

Candidates are every unit that can compute a model alone, and pairs in which each operator is one unit's. Units of class
near are candidates only where that is allowed. Products that are cut across units are not: a stand-in computes on the
CPU unit's own cores, where there is nothing to gain from two at a time, and no real GPU or NPU has been met yet.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from coterie.actors.identity import units_there
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
from coterie.scheduler.estimate import Estimator, product_of
from coterie.scheduler.operators import Reader, Rows
from coterie.scheduler.placement import LENGTHS, ROLES
from coterie.scheduler.plan import Wishes
from coterie.scheduler.planner import lanes_and_kept
from coterie.scheduler.profile import Product, load_profile
from coterie.scheduler.resident import Resident
from coterie.storage.npu_quantise import SCHEME

PROMPT, TOKENS = 256, 64  # that a plan is chosen for
CANDIDATES: tuple[tuple[str, ...], ...] = (("cpu",), ("gpu",), ("cpu", "gpu"), ("cpu", "npu"))


@dataclass(frozen=True)
class Candidate:
    """Units, and the seconds that products of PROMPT tokens and of TOKENS more are expected to take."""

    units: tuple[str, ...]
    prefill: float
    decode: float

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode

    def line(self) -> str:
        """For people."""
        return f"{','.join(self.units)}: {1e3 * self.prefill:.0f} + {1e3 * self.decode:.0f} ms"


def auto_wishes(file: ModelHeader, spec: ModelSpec, wishes: Wishes, *, near: bool) -> Wishes:
    """`wishes` with the units that need least for the products of a prompt and an answer; of class exact, unless
    `near`. Raises PlanError where products have not been measured on a unit that could be the best."""
    if not near:
        return _chosen(wishes, ("cpu",), "of class exact; --allow-near lets GPU and NPU take part")
    if wishes.memory is not None or spec.sparse or spec.part is not None:
        why = "only the CPU unit streams" if wishes.memory is not None else "sparse models are the CPU unit's"
        return _chosen(wishes, ("cpu",), why)
    found = candidates(file, spec, wishes)
    best = min(found, key=lambda candidate: candidate.seconds)
    rest = "; ".join(each.line() for each in sorted(found, key=lambda each: each.seconds) if each is not best)
    what = f"products of {PROMPT} prompt tokens + {TOKENS} tokens, {best.line()}"
    return _chosen(wishes, best.units, f"{what}{'; expected of others: ' * bool(rest)}{rest}")


def _chosen(wishes: Wishes, units: tuple[str, ...], why: str) -> Wishes:
    return replace(wishes, units=units, split="layer", reasons=(f"preset auto: {','.join(units)}, {why}",))


def candidates(file: ModelHeader, spec: ModelSpec, wishes: Wishes) -> list[Candidate]:
    """All that can be had here, with times by what was measured."""
    lanes, _ = lanes_and_kept(replace(wishes, units=("cpu",), split="layer"))
    there = units_there(("cpu", "gpu", "npu"), lanes)
    estimator = Estimator(load_profile().shapes, there.keys)
    prompts, tokens = _products(file, spec, lanes)
    found = []
    for units in CANDIDATES:
        if not set(units) <= set(there.keys):
            continue
        prefill, decode = ROLES[units]
        on = estimator.seconds
        if prefill == "npu":
            first = _on_npu(estimator, prompts, spec)
        else:
            first = sum(count * on(prefill, each, each.rows, _rows(each, PROMPT)) for each, count in prompts.items())
        then = sum(count * on(decode, each, each.rows, 1) for each, count in tokens.items())
        found.append(Candidate(units, first, TOKENS * then))
    return found


def _rows(product: Product, tokens: int) -> int:
    """Of a prompt only the last token's logits are wanted."""
    return 1 if product.operator == "head" else tokens


def _products(file: ModelHeader, spec: ModelSpec, lanes: int) -> tuple[Counter[Product], Counter[Product]]:
    """How often a prompt has each product, and a token."""
    layout = Resident(spec, file.tensors, lanes).on_paper()
    reader = Reader(spec, layout)

    def of(tokens: int, *names: str) -> Counter[Product]:
        operators = (each for name in names for each in reader.operators(layout.programs[name], Rows(tokens, 0)))
        return Counter(product_of(each.instruction) for each in operators if each.instruction.kind in ("matmul", "ffn"))

    return of(PROMPT, "prefill", "head"), of(1, "decode")


def _on_npu(estimator: Estimator, products: Mapping[Product, int], spec: ModelSpec) -> float:
    """Seconds of a prompt's products as graphs: one of all projections, one of attention's output, one of the FFN; the
    head is the CPU unit's."""
    length, layers = LENGTHS[-1], len(spec.layers)
    heads = spec.n_heads + 2 * spec.n_kv_heads
    qkv = Product("matmul", heads * spec.head_dim, spec.dim, SCHEME)
    out = Product("matmul", spec.dim, spec.n_heads * spec.head_dim, SCHEME)
    ffn = Product("ffn", 2 * spec.ffn_dim, spec.dim, SCHEME)
    graphs = sum(estimator.seconds("npu", each, each.rows, length) for each in (qkv, out, ffn))
    head = sum(
        count * estimator.seconds("cpu", each, each.rows, 1)
        for each, count in products.items()
        if each.operator == "head"
    )
    return layers * graphs * -(-PROMPT // length) + head
