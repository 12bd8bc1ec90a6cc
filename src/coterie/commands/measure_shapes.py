"""Measuring what the products of a model take on this machine's units, where that is not known."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import combinations

from coterie.actors.gpus import open_device
from coterie.actors.identity import There
from coterie.commands.measure_meeting import copying, hand_over, reading
from coterie.commands.model_bench import ModelBench, Progress
from coterie.commands.npu_meter import NpuMeter, graph_products
from coterie.commands.shape_meters import SHARES, CpuMeter, GpuMeter, Meter, model_products
from coterie.errors import UnitError, UsageError
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
from coterie.scheduler.estimate import known_error, others_of
from coterie.scheduler.placement import CPU_ONLY, Placement
from coterie.scheduler.profile import Point, Product, ProductTimes, Shapes, UnitTimes
from coterie.scheduler.resident import CHUNK, Resident, Tensors

COLD = 256 << 20  # bytes of layers that no cache holds: of a larger model, the first ones of each kind
ALIKE = 2  # layers of a kind at least
BUSY = 0.1  # median error of estimates that needs a word
MOST = 128  # products of a unit that are kept, those of the latest models


def measure_shapes(
    file: ModelHeader,
    spec: ModelSpec,
    there: There,
    lanes: int,
    known: Shapes,
    progress: Progress,
    *,
    again: bool = False,
    cores: Collection[int] = (),
) -> tuple[Shapes, list[str]]:
    """`known` with all products of this model on the units that are there, and a line a unit about it; what was
    measured with the same keys is reused, unless `again`. `cores`: those that stand-ins keep to, when units compute
    beside each other (none: all). Raises UnitError where there is no unit, UsageError for a sparse model, or a part of
    one."""
    if spec.sparse or spec.part is not None:
        raise UsageError(f"{file.path.name} is sparse, or a part: only whole dense models are profiled by shapes")
    said = [f"{name}: not measured, {why}" for name, why in there.missing.items()]
    if not there.keys:
        raise UnitError("; ".join(said))
    spec, tensors = representative(spec, file.tensors)
    products = model_products(Resident(spec, tensors, lanes).on_paper(), spec)
    todo = {}
    for name, key in there.keys.items():
        own = graph_products(products, spec) if name == "npu" else [*products, others_of(spec)]
        before = known.units.get(name)
        same = before is not None and before.key == key
        reused = {times.product for times in before.products} if before and same and not again else set()
        todo[name] = [product for product in own if product not in reused]
        stale = "" if before is None or same else f" (those known were measured with {before.key}, not with {key})"
        kept = f", {len(own) - len(todo[name])} reused" if len(own) > len(todo[name]) else ""
        said.append(f"{name}: {len(todo[name])} products measured{kept}{stale}")
    if any(todo.values()):
        placement = Placement("gpu", "gpu") if "gpu" in todo else CPU_ONLY
        bench = ModelBench(spec, tensors, lanes, progress, placement=placement, variants=len(SHARES))
        with bench, _meters(bench, there, cores) as meters:
            known = _measured(known, meters, there.keys, todo, progress, again)
    for name in there.keys:
        error = known_error(known.units[name])
        if error and error.median > BUSY:
            said.append(f"{name}: points are off by {100 * error.median:.0f} %, perhaps of a busy machine; try --again")
    return known, said


def representative(spec: ModelSpec, tensors: Tensors) -> tuple[ModelSpec, Tensors]:
    """The model, or if it is large as many layers of it as no cache holds, of each kind of formats a few."""
    kinds, kept, nbytes = dict[tuple[str, ...], int](), list[int](), 0
    for i in range(len(spec.layers)):
        own = [tensor for name, tensor in tensors.items() if name.startswith(f"blk.{i}.")]
        kind = tuple(tensor.format for tensor in own)
        if nbytes < COLD or kinds.get(kind, 0) < ALIKE:
            kinds[kind] = kinds.get(kind, 0) + 1
            nbytes += sum(tensor.nbytes for tensor in own)
            kept.append(i)
    numbers, made = {old: new for new, old in enumerate(kept)}, dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith("blk."):
            del made[name]
            _, layer, rest = name.split(".", 2)
            if int(layer) in numbers:
                renamed = f"blk.{numbers[int(layer)]}.{rest}"
                made[renamed] = replace(tensor, name=renamed)
    return replace(spec, layers=tuple(spec.layers[i] for i in kept)), made


@contextmanager
def _meters(bench: ModelBench, there: There, cores: Collection[int]) -> Iterator[dict[str, Meter]]:
    with ExitStack() as stack:
        meters: dict[str, Meter] = {}
        if "cpu" in there.keys:
            meters["cpu"] = CpuMeter(bench)
        if "gpu" in there.keys:
            device = open_device(bench.arena, cores=cores)
            stack.callback(device.close)
            meters["gpu"] = GpuMeter(bench, device)
        if there.runtime is not None:
            meters["npu"] = NpuMeter(bench, there.runtime)
        yield meters


def _measured(
    known: Shapes,
    meters: Mapping[str, Meter],
    keys: Mapping[str, str],
    todo: Mapping[str, Sequence[Product]],
    progress: Progress,
    again: bool,
) -> Shapes:
    units, together, new = dict(known.units), dict(known.together), set[str]()
    for name, meter in meters.items():
        before = units.get(name)
        before = before if before and before.key == keys[name] else None
        others = tuple(times for times in before.products if times.product not in todo[name]) if before else ()
        if before is None or again:
            progress(f"measuring what {name} takes to start, and to read")
            new.add(name)
            launch, queued = meter.launches()
            rate = reading([meter.reader()])
            before = UnitTimes(keys[name], meter.format, meter.lengths, launch, queued, rate, ())
        products = [product for product in todo[name] if product.operator != "others"]
        found: list[ProductTimes] = list(meter.times(products, progress)) if products else []
        for each in (product for product in todo[name] if product.operator == "others"):
            progress(f"measuring what {name} takes beside products")
            points = tuple(Point(each.rows, tokens, seconds) for tokens, seconds in meter.others())
            found.append(ProductTimes(each, 1, points))
        units[name] = replace(before, products=(*others, *found)[-MOST:])
    together = {pair: rate for pair, rate in together.items() if not new & set(pair.split("+"))}
    for one, other in combinations(meters, 2):
        if f"{one}+{other}" not in together:
            progress(f"measuring {one} and {other} together")
            together[f"{one}+{other}"] = reading([meters[one].reader(), meters[other].reader()])
    if not new:
        return replace(known, units=units, together=together)
    progress("measuring hand-overs")
    width = max(product.columns for products in todo.values() for product in products)
    return Shapes(units, together, hand_over(), copying(CHUNK, width))
