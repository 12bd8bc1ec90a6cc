"""Cuts of one product across units: against exhaustive search, and against HeteroInfer's table 3."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from coterie.errors import PlanError
from coterie.scheduler.bandwidth import until_all_end
from coterie.scheduler.device_model import Cost
from coterie.scheduler.partition import Costs, Cut, Worker, solve

ROUND = 1e-9


# --- against exhaustive search --------------------------------------------------------------------------


def every_way(rows: int, tokens: int, workers: Sequence[Worker], costs: Costs) -> Iterator[float]:
    """Seconds of all that units could do with a product of few rows, found by trying: each subset, each cut of rows,
    each list of graphs, each rest. Memory is not shared."""

    def runs(worker: Worker, wanted: int) -> Iterator[tuple[int, ...]]:
        if not worker.lengths:
            yield (wanted,)
            return
        most = -(-wanted // min(worker.lengths))
        for count in range(1, most + 1):
            for each in itertools.combinations_with_replacement(worker.lengths, count):
                if sum(each) >= wanted:
                    yield each

    def least(worker: Worker, part: int, wanted: int) -> float:
        return min(sum(costs(worker.name, part, n).seconds for n in each) for each in runs(worker, wanted))

    whole = {tokens}
    for worker in workers:
        for other in workers:
            lengths = {*worker.lengths, *other.lengths}
            for count in range(1, tokens + 1):
                whole |= {sum(e) for e in itertools.combinations_with_replacement(sorted(lengths), count)}
    for covered in sorted(n for n in whole if 0 < n <= tokens):
        takers: list[Worker | None] = [None] if covered == tokens else [w for w in workers if not w.lengths]
        for taker in takers:
            for count in range(1, len(workers) + 1):
                for group in itertools.combinations(workers, count):
                    for cut in itertools.product(range(1, rows + 1), repeat=count):
                        starts = [sum(cut[:i]) for i in range(count)]
                        step = int(np.lcm.reduce([worker.step for worker in group]))
                        if sum(cut) != rows or any(start % step for start in starts):
                            continue
                        busy = dict.fromkeys([w.name for w in workers], 0.0)
                        for worker, part in zip(group, cut, strict=True):
                            busy[worker.name] += least(worker, part, covered)
                        if taker is not None:
                            busy[taker.name] += least(taker, rows, tokens - covered)
                        used = [*group, *([taker] if taker else [])]
                        yield max(busy.values()) + max(worker.join for worker in used)


def a_table(rng: np.random.Generator, workers: Sequence[Worker], rows: int, tokens: int) -> Costs:
    """Random seconds that grow with rows and tokens, by steps and slopes of their own."""
    made: dict[tuple[str, int, int], float] = {}
    for worker in workers:
        launch, slope, step = rng.uniform(0, 2), rng.uniform(0.01, 1), int(rng.integers(1, 4))
        noise = rng.uniform(0, 0.5, (rows + 1, 2 * tokens + 2))
        for r in range(1, rows + 1):
            for n in range(1, 2 * tokens + 2):
                made[worker.name, r, n] = launch + slope * (-(-r // step) * step) * n + float(noise[r, n])
    return lambda unit, r, n: Cost(0.0, made[unit, r, n])


@pytest.mark.parametrize("seed", range(20))
def test_nothing_cheaper_is_found_by_trying_everything(seed: int) -> None:
    """Fifty tables a seed: one to three units, with and without static lengths."""
    rng = np.random.default_rng(seed)
    for _ in range(50):
        rows, tokens = int(rng.integers(1, 9)), int(rng.integers(1, 7))
        workers = [
            Worker("cpu"),
            Worker("gpu", join=float(rng.uniform(0, 1))),
            Worker("npu", int(rng.choice([1, 2])), ((2,), (2, 3), (4,))[int(rng.integers(3))], 0.3),
        ][: int(rng.integers(1, 4))]
        workers = [workers[i] for i in rng.permutation(len(workers))]
        costs = a_table(rng, workers, rows, 8)
        found = solve(rows, tokens, workers, costs)
        assert found.seconds == pytest.approx(min(every_way(rows, tokens, workers, costs)), rel=ROUND)
        assert_whole(found, rows, tokens, workers)


def assert_whole(cut: Cut, rows: int, tokens: int, workers: Sequence[Worker]) -> None:
    """Every output is computed by one unit, and only graphs that there are run."""
    done = np.zeros((rows, tokens), int)
    for piece in cut.pieces:
        done[piece.row : piece.row + piece.rows, piece.token : piece.token + piece.tokens] += 1
        worker = next(each for each in workers if each.name == piece.unit)
        assert not worker.lengths or set(piece.runs) <= set(worker.lengths)
        assert sum(piece.runs) >= piece.tokens
        assert piece.row % worker.step == 0
    assert (done == 1).all()


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_of_equals_the_simplest_is_taken(seconds: float) -> None:
    found = solve(64, 4, [Worker("cpu"), Worker("gpu")], lambda *_: Cost(0.0, seconds))
    assert (found.strategy, found.units) == ("one unit", ("cpu",))


def test_memory_is_shared() -> None:
    """Two units that each want all of it take together what one takes."""
    assert until_all_end([(1.0, 50.0), (1.0, 50.0)], 50.0) == pytest.approx(2.0)
    assert until_all_end([(1.0, 10.0), (2.0, 80.0)], 45.0) == pytest.approx(2.0 + 10.0 / 80.0 * 1.0, rel=0.05)
    assert until_all_end([(1.0, 10.0), (2.0, 20.0)], 50.0) == 2.0
    workers = [Worker("cpu"), Worker("gpu", join=0.01)]

    def costs(unit: str, rows: int, tokens: int) -> Cost:
        return Cost(0.0, rows / 64, float(rows))  # 64 bytes/s each

    assert solve(64, 1, workers, costs).strategy == "rows"
    assert solve(64, 1, workers, costs, together=64.0).strategy == "one unit"
    assert solve(64, 1, workers, costs, together=96.0).seconds == pytest.approx(64 / 96 + 0.01, rel=0.02)


@pytest.mark.parametrize(("rows", "tokens"), [(0, 1), (1, 0), (-1, 5)])
def test_what_is_no_product_is_refused(rows: int, tokens: int) -> None:
    with pytest.raises(PlanError, match="cannot be cut"):
        solve(rows, tokens, [Worker("cpu")], lambda *_: Cost(0.0, 1.0))
    with pytest.raises(PlanError, match="no unit"):
        solve(4, 4, [], lambda *_: Cost(0.0, 1.0))


# --- HeteroInfer, table 3 -------------------------------------------------------------------------------

US = 1e-6
SYNC = 60 * US  # a flag, the GPU's next kernel, and waking up (section 4.3)
RATIOS = tuple(a / (a + b) for a, b in ((1, 3), (1, 2), (2, 3), (1, 1), (3, 2), (2, 1), (3, 1)))
GRAPHS = {  # what the NPU takes for whole operators, us, by rows, columns and tokens of a graph
    (4096, 4096): {1: 693, 128: 912, 256: 1884},
    (28672, 4096): {1: 3886},
    (4096, 14336): {1: 6506, 256: 23445, 384: 32000},
}
# Rows, columns, tokens, what the GPU takes, us; the strategy, and the GPU's share of the work.
TABLE_3 = [
    (4096, 4096, 1, 511, "rows", 1 / 2),
    (28672, 4096, 1, 1903, "rows", 3 / 4),
    (4096, 14336, 1, 1467, "one unit", 1),
    (4096, 4096, 128, 7306, "one unit", 0),
    (4096, 4096, 224, 10000, "padding", 0),
    (4096, 4096, 256, 10841, "one unit", 0),
    (4096, 4096, 264, 11000, "tokens", 0),
    (4096, 14336, 256, 35231, "rows", 2 / 5),
    (4096, 14336, 320, 42500, "hybrid", 2 / 5),
]


@pytest.mark.parametrize(("rows", "columns", "tokens", "gpu", "strategy", "share"), TABLE_3)
def test_table_3(rows: int, columns: int, tokens: int, gpu: float, strategy: str, share: float) -> None:
    """Parts take their share of what the whole takes; the ratio is the paper's, or the next one to it."""
    graphs = GRAPHS[rows, columns]

    def costs(unit: str, part: int, n: int) -> Cost:
        whole = gpu * n / tokens if unit == "gpu" else graphs[n]
        return Cost(0.0, whole * US * part / rows)

    # Two graphs of 128 would take 3 % less than one of 256, by these figures; the paper does not look at that.
    lengths = tuple(n for n in graphs if n >= min(tokens, 256))
    lengths = lengths[:1] if tokens == 1 else lengths
    workers = [Worker("gpu"), Worker("npu", 32, lengths, SYNC)]
    cut = solve(rows, tokens, workers, costs, shares=RATIOS)
    assert cut.strategy == strategy
    taken = sum(piece.rows * piece.tokens for piece in cut.pieces if piece.unit == "gpu") / (rows * tokens)
    known = [0.0, *RATIOS, 1.0]
    nearest = min(known, key=lambda ratio: abs(ratio - taken))
    assert abs(known.index(nearest) - known.index(share)) <= 1
