"""Cuts that follow what their parts take: from measured times alone, the same for the same times."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.scheduler.balance import Balance, Given

EIGHTHS = Given.around(4, 8)
ANY = Given(8, 16, tuple(range(1, 17)))
rates = st.floats(1e-4, 1e-1)


def run(balance: Balance, steps: int, other: float, cpu: float) -> None:
    """Steps in which a part takes so many seconds on either unit."""
    for _ in range(steps):
        parts, of = balance.parts["ffn"], balance.given["ffn"].of
        balance.observe({"ffn": (other * parts, cpu * (of - parts))})


def best(cut: Given, other: float, cpu: float) -> float:
    return min(max(parts * other, (cut.of - parts) * cpu) for parts in (0, *cut.points))


def taken(balance: Balance, other: float, cpu: float) -> float:
    parts, of = balance.parts["ffn"], balance.given["ffn"].of
    return max(parts * other, (of - parts) * cpu)


@given(st.sampled_from([EIGHTHS, ANY]), rates, rates)
def test_a_cut_comes_to_where_both_end_soonest(cut: Given, other: float, cpu: float) -> None:
    balance = Balance({"ffn": cut})
    run(balance, 3, other, cpu)
    assert taken(balance, other, cpu) <= best(cut, other, cpu) / 0.97
    moves = len(balance.moves)
    if 0 < balance.parts["ffn"] < cut.of:  # a unit without parts is tried again in time
        run(balance, 20, other, cpu)
        assert len(balance.moves) == moves  # and stays there


@given(rates, rates, st.floats(1.5, 6))
@settings(max_examples=200)
def test_a_unit_that_slows_down_is_followed_within_ten_steps(other: float, cpu: float, slower: float) -> None:
    balance = Balance({"ffn": ANY})
    run(balance, 5, other, cpu)
    for which in (0, 1):
        load = (other * slower, cpu) if which else (other, cpu * slower)
        costs = list[float]()
        for _ in range(10):
            run(balance, 1, *load)
            costs.append(taken(balance, *load))
        if 0 < balance.parts["ffn"] < ANY.of:  # else one unit is not measured any more
            assert min(costs[-3:]) <= best(ANY, *load) / 0.9  # one of them may be a try
        run(balance, 10, other, cpu)


@given(st.lists(st.tuples(rates, rates), min_size=1, max_size=20))
def test_the_same_times_give_the_same_cuts(times: list[tuple[float, float]]) -> None:
    twice = []
    for _ in range(2):
        balance = Balance({"ffn": ANY})
        for other, cpu in times:
            balance.observe({"ffn": (other, cpu)})
        twice.append((balance.parts, balance.moves, balance.story()))
    assert twice[0] == twice[1]


@given(rates, rates)
def test_waits_tell_how_long_a_unit_took_that_nobody_sees(other: float, cpu: float) -> None:
    balance = Balance({"ffn": ANY})
    for _ in range(60):
        parts = balance.parts["ffn"]
        computed = cpu * (ANY.of - parts)
        balance.observe_waits({"ffn": (computed, max(0.0, other * parts - computed))})
    if 0 < balance.parts["ffn"] < ANY.of:
        assert taken(balance, other, cpu) <= best(ANY, other, cpu) + 1.01 * max(other, cpu)  # a part more or less


def test_what_a_cut_can_be() -> None:
    assert Given.around(4, 8).points == (2, 4, 5, 6)
    assert Given.around(1, 8).points == (1, 2, 3)
    assert Given.around(8, 8).points == (4, 8)
    assert Given.whole().pieces() == [(0, 1)]
    cut = Given.around(4, 8)
    assert cut.bounds(48) == [0, 12, 24, 30, 36]
    assert cut.pieces() == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert [cut.pieces_of(parts) for parts in (0, 2, 4, 6)] == [0, 1, 2, 4]


def test_moves_are_told() -> None:
    balance = Balance({"ffn": ANY})
    run(balance, 1, 0.003, 0.001)
    assert balance.story() == "step 1: ffn 8 -> 4 parts; one takes 3 ms there, 1 ms on the CPU unit"


@pytest.mark.parametrize("parts", [0, 8])
def test_what_is_not_measured_keeps_its_rate(parts: int) -> None:
    balance = Balance({"ffn": EIGHTHS})
    run(balance, 1, 1e-3, 1e-3)
    balance.parts["ffn"] = parts
    balance.observe({"ffn": (0.0, 8e-3) if parts == 0 else (8e-3, 0.0)})
    assert balance.parts["ffn"] == 4
