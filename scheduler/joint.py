"""Choosing for many products at once, where they want the same memory: exactly, by HiGHS.

An NPU may address less than a model has (4 GB on Hexagon: llm.npu, arXiv 2407.05858, section 4). Which layers' products
it then takes is a knapsack with a few kinds of things, each as often as there are layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coterie.errors import PlanError, UsageError


@dataclass(frozen=True)
class Option:
    """A way to compute a product: seconds, and bytes of the memory that is limited."""

    seconds: float
    nbytes: float


@dataclass(frozen=True)
class Kind:
    """Products that are alike: how many, and the ways to compute one."""

    count: int
    options: tuple[Option, ...]


def share_out(kinds: Sequence[Kind], limit: float) -> list[list[int]]:
    """How many products of each kind take each of its options, so that all take least time and want `limit` bytes at
    most. Raises PlanError where nothing is small enough, UsageError where HiGHS is needed and missing."""
    fastest = [min(kind.options, key=lambda option: option.seconds) for kind in kinds]
    if sum(kind.count * option.nbytes for kind, option in zip(kinds, fastest, strict=True)) <= limit:
        return [
            [kind.count * (n == kind.options.index(option)) for n in range(len(kind.options))]
            for kind, option in zip(kinds, fastest, strict=True)
        ]
    least = sum(kind.count * min(option.nbytes for option in kind.options) for kind in kinds)
    if least > limit:
        wanted = f"products want at least {least:.0f} bytes of a memory of {limit:.0f}"
        raise PlanError(f"{wanted}; name another unit beside it")
    return _solved(kinds, limit)


def _solved(kinds: Sequence[Kind], limit: float) -> list[list[int]]:
    try:
        import highspy
    except ImportError:
        raise UsageError(
            "this plan has to fit an NPU's memory, for which HiGHS is needed: pip install 'coterie[plan]'"
        ) from None
    model: Any = highspy.Highs()
    model.setOptionValue("output_flag", False)
    model.setOptionValue("mip_rel_gap", 0.0)
    scale = max(option.seconds for kind in kinds for option in kind.options) or 1.0
    counts: list[list[Any]] = [
        [
            model.addVariable(0, kind.count, obj=option.seconds / scale, type=highspy.HighsVarType.kInteger)
            for option in kind.options
        ]
        for kind in kinds
    ]
    for kind, each in zip(kinds, counts, strict=True):
        model.addConstr(sum(each) == kind.count)
    used = [
        option.nbytes / limit * count
        for kind, each in zip(kinds, counts, strict=True)
        for option, count in zip(kind.options, each, strict=True)
        if option.nbytes
    ]
    model.addConstr(sum(used) <= 1.0)
    model.minimize()
    if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise PlanError(f"HiGHS found no plan: {model.modelStatusToString(model.getModelStatus())}")
    values = iter(round(value) for value in model.getSolution().col_value)
    return [[next(values) for _ in kind.options] for kind in kinds]
