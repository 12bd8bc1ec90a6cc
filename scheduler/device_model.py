"""How long an instruction takes on a unit that has its memory for itself: one function, `time`.

    seconds = launch + max(operations, unpacking, bytes / bandwidth) * lengthening

Matrix units hold one operand still and stream the rows of the other one past it. Dimensions are padded to the array's
size, so times move in steps; putting a stationary tile in place costs as much as `fill` rows that stream by, so that
the same product in another order takes another time; rows longer than what the array's memory holds of them are put
in place piece by piece (HeteroLLM, arXiv 2501.14794, section 3.2: stage, order and shape). Processors and GPUs follow
the same formula with steps of 1: there, `fill` is what unpacking weights costs, which many tokens share. For few
tokens they have another kernel, which reads the weights once a token and is bound by memory.

What several units do to each other (they share the memory's bandwidth) is left to the drivers, scheduler/simulate.py
and actors/dilated.py: `Cost.bytes_per_s` is what an instruction wants of it.
"""

from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from coterie.errors import UsageError
from coterie.scheduler.flash_model import FlashModel
from coterie.scheduler.soc import Device, Rates, UnitModel, Vector

Kind = Literal["matmul", "ffn", "attention", "norm", "embed", "read", "copy", "sync", "host"]
Order = Literal["best", "weights", "activations"]  # which operand is the stationary one


@dataclass(frozen=True)
class Instruction:
    """What one unit does at a time: an operator, or a part of its rows.

    `rows` x `columns` is the weight matrix (of an FFN's first half Gate and Up together), `tokens` its other operand's
    length; `inner`: columns of the whole matrix, where this is a part of them (0: these are all); `format`: of the
    weights; `nbytes`: read from memory; `flops`: of what is no matrix product. `kernel`: the compiled one's name, where
    there is one. A read is of `nbytes` bytes in requests of `block`, "sequential" or "random" within `span` bytes, by
    `readers` cores of kind `core`.
    """

    kind: Kind
    unit: str
    rows: int = 0
    columns: int = 0
    tokens: int = 1
    format: str = ""
    nbytes: float = 0.0
    flops: float = 0.0
    kernel: str = ""
    order: Order = "best"
    pattern: str = "sequential"
    block: int = 0
    span: int = 0
    core: str = "big"
    readers: int = 1
    layer: int = -1
    inner: int = 0


@dataclass(frozen=True)
class Cost:
    """Seconds alone: `launch` in which no memory is used, then `work`, in which `nbytes` are read."""

    launch: float
    work: float
    nbytes: float = 0.0
    bound: str = "compute"  # or "memory", "flash", "sync"

    @property
    def seconds(self) -> float:
        return self.launch + self.work

    @property
    def bytes_per_s(self) -> float:
        """What it wants of the memory's bandwidth."""
        return self.nbytes / self.work if self.work > 0 else 0.0


def time(instruction: Instruction, profile: Device) -> float:
    """Seconds that an instruction takes alone. Raises UsageError for a unit that the device lacks."""
    return cost(instruction, profile).seconds


def cost(i: Instruction, device: Device) -> Cost:
    """The same in parts."""
    if i.kind == "read":
        return _read(i, device)
    if i.kind == "host":
        return Cost(device.between, 0.0, bound="sync")
    unit = device.unit(i.unit)
    if i.kind == "sync":
        return Cost(unit.sync, 0.0, bound="sync")
    if i.kind == "copy":
        return Cost(unit.copy, i.nbytes / unit.bandwidth, i.nbytes, "memory")
    rates = unit.rates_of(i.kernel, i.format) if i.kernel else unit.rates_of(i.kind, i.format)
    if i.kind in ("matmul", "ffn"):
        return _product(i, unit, rates)
    return _plain(i, unit, rates)


def launches(found: Cost, unit: UnitModel) -> tuple[float, float, float]:
    """Seconds to launch a kernel alone, behind another one in the unit's queue, and on a queue that has run empty."""
    queued, drained = (inf if known is None else known for known in (unit.queued, unit.drained))
    return found.launch, min(found.launch, queued), min(found.launch, drained)


def in_format(i: Instruction, format: str) -> Instruction:
    """The same with weights in a format that only its unit has ("": as they are), for which there is no kernel here."""
    return replace(i, format=format, kernel="") if format else i


def _read(i: Instruction, device: Device) -> Cost:
    if device.flash is None:
        raise UsageError(f"nothing is known of the flash of {device.name}")
    rate = flash_rate(device.flash, i)
    return Cost(0.0, i.nbytes / rate, i.nbytes, "flash")


def flash_rate(flash: FlashModel, i: Instruction) -> float:
    """Bytes/s of a read."""
    return flash.bandwidth(i.pattern, i.block or int(i.nbytes), span=i.span, core=i.core, readers=i.readers)


def _plain(i: Instruction, unit: UnitModel, rates: Rates) -> Cost:
    """Norms, attention and what else is no product with weights."""
    bandwidth = rates.bandwidth or unit.bandwidth
    compute = i.flops / rates.rate if rates.rate else 0.0
    memory = i.nbytes / bandwidth
    own = i.kernel in unit.rates or i.kind in unit.rates  # else these are rates of products, launched otherwise
    launch = rates.launch if own and rates.launch is not None else unit.launch
    return Cost(launch, max(compute, memory), i.nbytes, "memory" if memory > compute else "compute")


def _product(i: Instruction, unit: UnitModel, rates: Rates) -> Cost:
    """A matrix product: by the matrix kernel, or by the one for few tokens where that is faster."""
    whole = _matrix(i, unit, rates)
    if rates.vector is None:
        return whole
    single = _vector(i, unit, rates, rates.vector)
    return min(whole, single, key=lambda each: each.seconds)


def _matrix(i: Instruction, unit: UnitModel, rates: Rates) -> Cost:
    rows, columns, tokens = (padded(n, unit.step) for n in (i.rows, i.columns, i.tokens))
    compute = 0.0
    if rates.rate:
        operations = 2.0 * rows * columns * tokens
        compute = operations / rates.rate * (1 + rates.fill / streamed(i.order, rows, tokens, rates.swaps))
    unpack = i.rows * i.columns / rates.weights_per_s if rates.weights_per_s else 0.0
    memory = i.nbytes / (rates.bandwidth or unit.bandwidth)
    work = max(compute, unpack, memory) * lengthening(i.inner or i.columns, rates.inner, rates.power)
    launch = unit.launch if rates.launch is None else rates.launch
    return Cost(launch, work, i.nbytes, "memory" if memory >= max(compute, unpack) else "compute")


def _vector(i: Instruction, unit: UnitModel, rates: Rates, vector: Vector) -> Cost:
    memory = i.nbytes / (rates.bandwidth or unit.bandwidth)
    work = i.tokens * memory * lengthening(i.inner or i.columns, vector.inner, vector.power)
    return Cost(vector.launch, work, i.tokens * i.nbytes, "memory")


def padded(n: int, step: int) -> int:
    """A dimension as the array sees it."""
    return -(-n // step) * step


def streamed(order: Order, rows: int, tokens: int, swaps: bool) -> int:
    """Rows that pass by each stationary tile: of activations while weights stay in place, else of weights. Without a
    wish, the longer of the two, if the operands can be swapped."""
    if order == "best":
        return max(rows, tokens) if swaps else tokens
    return tokens if order == "weights" else rows


def lengthening(columns: int, inner: float, power: float) -> float:
    """How much longer a product takes because its inner dimension is longer than the stationary memory."""
    return max(1.0, columns / inner) ** power if inner else 1.0


def part(i: Instruction, share: float, unit: str, step: int = 1) -> Instruction:
    """The share of a product's rows, in whole steps, that another unit takes: a cut by rows, whose results lie one
    below the other (HeteroLLM, section 4.2, "weight-centric")."""
    rows = min(i.rows, max(step, round(i.rows * share / step) * step)) if i.rows else 0
    scale = rows / i.rows if i.rows else share
    return replace(i, unit=unit, rows=rows, nbytes=i.nbytes * scale, flops=i.flops * scale)
