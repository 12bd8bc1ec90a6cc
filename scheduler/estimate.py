"""Seconds of a part of a product, from what was measured of it (coterie profile --shapes).

A product was measured with a few parts of its rows and a few numbers of tokens. In between, time is linear, in rows and
in tokens; beyond, it is proportional, and never less than an empty kernel's. A unit with graphs takes the time of the
shortest graph that holds the tokens, or of several.

How wrong that is, is known: points that lie between others are left out, and estimated from those.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import ceil
from statistics import median
from typing import NamedTuple

from coterie.errors import PlanError
from coterie.models.spec import ModelSpec
from coterie.scheduler.device_model import Cost, Instruction
from coterie.scheduler.profile import Point, Product, ProductTimes, Shapes, UnitTimes
from coterie.storage.npu_quantise import SCHEMES

P90 = 0.9


class KnownError(NamedTuple):
    """Of estimates, relative to what was measured: the median and the 90th percentile of so many."""

    median: float
    p90: float
    estimates: int


class Estimator:
    """Times of products on units that are still what they were measured as: `keys` by unit (actors/identity.py).
    Raises PlanError for what was not measured."""

    def __init__(self, shapes: Shapes, keys: Mapping[str, str]) -> None:
        self.shapes = shapes
        self._units = {name: unit for name, unit in shapes.units.items() if keys.get(name) == unit.key}
        self._products = {(name, times.product): times for name, unit in self._units.items() for times in unit.products}

    def seconds(self, unit: str, product: Product, rows: int, tokens: int) -> float:
        """Of so many rows of a product, 1 to all, for so many tokens, alone, behind other work of the unit."""
        times = self._times(unit, product)
        if not 0 < rows <= times.product.rows or tokens < 1:
            raise PlanError(f"{_text(product)} has no part of {rows} rows for {tokens} tokens")
        return estimate(times.points, rows, tokens, self._units[unit])

    def cost(self, product: Product, unit: str, rows: int, tokens: int) -> Cost:
        """The same as the partition solver takes it, with the bytes of weights that are read."""
        times, known = self._times(unit, product), self._units[unit]
        seconds = self.seconds(unit, product, rows, tokens)
        launch = min(known.queued, seconds)
        runs = len(graphs(known.lengths, tokens)) if known.lengths else 1
        return Cost(launch, seconds - launch, runs * times.nbytes * rows / times.product.rows, "measured")

    @property
    def meeting(self) -> float:
        """Seconds by which two units have a product later than each its part: both wait for a flag."""
        return 2 * self.shapes.sync

    def known_error(self, unit: str) -> KnownError | None:
        """How far estimates of a unit's points are from them; None where none lies between others."""
        return known_error(self._unit(unit))

    def _unit(self, name: str) -> UnitTimes:
        if name not in self._units:
            raise PlanError(f"{name} has not been measured as it is now: coterie profile --shapes MODEL")
        return self._units[name]

    def _times(self, unit: str, product: Product) -> ProductTimes:
        own = self._unit(unit).format
        times = self._products.get((unit, product if product.format in SCHEMES else _in(product, own)))
        if times is None:
            raise PlanError(f"{unit} has not been measured with {_text(product)}: coterie profile --shapes MODEL")
        return times


def product_of(i: Instruction) -> Product:
    """The product that an instruction of a compiled program computes (operators.Reader)."""
    operator = i.kernel.partition(":")[0]
    return Product("head" if operator == "matmul" and i.layer < 0 else operator, i.rows, i.columns, i.format)


def others_of(spec: ModelSpec) -> Product:
    """All of a layer that is no product, measured as if it were one."""
    return Product("others", spec.qkv_rows, spec.dim, "")


def estimate(points: Sequence[Point], rows: int, tokens: int, unit: UnitTimes) -> float:
    """Seconds, by a product's points on that unit."""
    levels: dict[int, list[tuple[int, float]]] = {}
    for point in sorted(points):
        levels.setdefault(point.rows, []).append((point.tokens, point.seconds))
    least = unit.queued
    if not unit.lengths:
        return linear([(part, linear(level, tokens, least)) for part, level in levels.items()], rows, least)
    lengths = sorted({point.tokens for point in points})
    return sum(
        linear([(part, dict(level)[n]) for part, level in levels.items() if n in dict(level)], rows, least)
        for n in graphs(lengths, tokens)
    )


def graphs(lengths: Sequence[int], tokens: int) -> list[int]:
    """The graphs for so many tokens: as many of the longest as are filled, and the shortest that holds the rest."""
    longest = max(lengths)
    full, rest = divmod(tokens, longest)
    return [longest] * full + ([min(n for n in lengths if n >= rest)] if rest else [])


def linear(points: Sequence[tuple[int, float]], at: int, least: float) -> float:
    """The value at `at` of what goes through these points, ascending: linear between them, proportional beyond, but
    not less than `least` (or the first value, where that is less)."""
    (first, low), (last, high) = points[0], points[-1]
    if at < first:
        return max(low * at / first, min(least, low))
    if at > last:
        return high * at / last
    if at == first:
        return low
    (x, before), (end, after) = next(pair for pair in pairwise(points) if at <= pair[1][0])
    return after if at == end else before + (after - before) * (at - x) / (end - x)


def known_error(unit: UnitTimes) -> KnownError | None:
    """Leave-one-out errors of a unit's estimates: of each point whose rows lie between others', without those rows;
    and, where it takes any number of tokens, of each point between two others of its rows, without it."""
    errors = sorted(error for times in unit.products for error in _errors(times.points, unit))
    if not errors:
        return None
    return KnownError(median(errors), errors[ceil(P90 * len(errors)) - 1], len(errors))


def _errors(points: Sequence[Point], unit: UnitTimes) -> Iterator[float]:
    for point in points:
        others = [p for p in points if p.rows != point.rows]
        if _between(point.rows, [p.rows for p in others if p.tokens == point.tokens]):
            yield abs(estimate(others, point.rows, point.tokens, unit) / point.seconds - 1)
        level = [p for p in points if p.rows == point.rows and p != point]
        if not unit.lengths and _between(point.tokens, [p.tokens for p in level]):
            yield abs(estimate(level, point.rows, point.tokens, unit) / point.seconds - 1)


def _between(value: int, others: Sequence[int]) -> bool:
    return bool(others) and min(others) < value < max(others)


def _in(product: Product, format: str) -> Product:
    """As a unit has it that has all weights in that format ("": as they are)."""
    return product._replace(format=format) if format else product


def _text(product: Product) -> str:
    return f"{product.operator} of {product.rows} x {product.columns} in {product.format}"
