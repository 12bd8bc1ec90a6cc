"""Many products that want the same memory: against trying everything."""

import itertools
import sys

import numpy as np
import pytest

from coterie.errors import PlanError, UsageError
from coterie.scheduler.joint import Kind, Option, share_out

pytest.importorskip("highspy", reason="pip install -e .[plan]")


def every_way(kind: Kind) -> list[tuple[int, ...]]:
    ways = itertools.product(range(kind.count + 1), repeat=len(kind.options))
    return [way for way in ways if sum(way) == kind.count]


def cost(kinds: list[Kind], counts: tuple[tuple[int, ...], ...] | list[list[int]]) -> tuple[float, float]:
    pairs = [
        (n, option)
        for kind, each in zip(kinds, counts, strict=True)
        for n, option in zip(each, kind.options, strict=True)
    ]
    return sum(n * option.seconds for n, option in pairs), sum(n * option.nbytes for n, option in pairs)


@pytest.mark.parametrize("seed", range(100))
def test_nothing_faster_fits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = [
        Kind(int(rng.integers(1, 5)), tuple(Option(*rng.uniform(0, 1, 2)) for _ in range(int(rng.integers(1, 4)))))
        for _ in range(int(rng.integers(1, 4)))
    ]
    totals = [cost(kinds, way) for way in itertools.product(*map(every_way, kinds))]
    limit = float(rng.uniform(min(n for _, n in totals), max(n for _, n in totals)))
    found = share_out(kinds, limit)
    seconds, nbytes = cost(kinds, found)
    assert [sum(each) for each in found] == [kind.count for kind in kinds]
    assert nbytes <= limit * (1 + 1e-6)
    assert seconds == pytest.approx(min(s for s, n in totals if n <= limit), rel=1e-6)
    assert share_out(kinds, limit) == found


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(PlanError, match="at least 30 bytes of a memory of 20"):
        share_out([Kind(3, (Option(1.0, 10.0),))], 20.0)


def test_without_highs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    kinds = [Kind(3, (Option(1.0, 10.0), Option(2.0, 0.0)))]
    assert share_out(kinds, 30.0) == [[3, 0]]
    with pytest.raises(UsageError, match=r"pip install 'coterie\[plan\]'"):
        share_out(kinds, 20.0)
