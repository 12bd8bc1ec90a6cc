"""The policies that benchmarks/policies.py compares are what they are called, by their definitions written out."""

from collections import OrderedDict
from itertools import pairwise

import numpy as np
import pytest
from policies import by_rank, next_uses, second_chance, windowed

TOKENS, NEURONS = 200, 512


@pytest.fixture(params=range(3))
def live(request: pytest.FixtureRequest) -> list[set[int]]:
    """Neurons live for each token: a power law, and topics that come again."""
    rng = np.random.default_rng(request.param)
    hot = np.minimum(0.9, 0.02 / rng.random(NEURONS))
    topics = rng.random((6, NEURONS)) < 0.05
    spoken = np.repeat(rng.integers(0, 6, TOKENS // 10), 10)
    return [set(np.flatnonzero((rng.random(NEURONS) < hot) | topics[topic]).tolist()) for topic in spoken]


def flat(live: list[set[int]]) -> tuple[list[int], list[int]]:
    """Uses in order, and the token of each."""
    uses = [neuron for neurons in live for neuron in sorted(neurons)]
    return uses, [token for token, neurons in enumerate(live) for _ in neurons]


def test_windows_are_sets_of_the_last_tokens(live: list[set[int]]) -> None:
    """LLM in a flash, section 3.1: kept is what the last k tokens used; read is what a token adds to it."""
    bits = np.zeros((TOKENS, NEURONS), np.bool_)
    for token, neurons in enumerate(live):
        bits[token, list(neurons)] = True
    half = TOKENS // 2
    wanted = sum(len(neurons) for neurons in live[half:])
    for slots in (150, 250, 400):
        best = 1.0, 0
        for k in range(1, half):
            kept = [set[int]().union(*live[max(0, token - k) : token]) for token in range(TOKENS)]
            if max(len(window) for window in kept[half:]) > slots:
                break
            best = sum(len(live[token] - kept[token]) for token in range(half, TOKENS)) / wanted, k
        assert windowed(np.packbits(bits, axis=1), slots) == pytest.approx(best)
        assert slots < 400 or best[1] > 1


def test_what_is_read_is_what_the_window_gains(live: list[set[int]]) -> None:
    """From token to token the window reads what it gains, and drops what it loses."""
    k, held = 5, set[int]()
    windows = [set[int]().union(*live[max(0, token - k + 1) : token + 1]) for token in range(TOKENS)]
    for token, (before, after) in enumerate(pairwise([set[int](), *windows])):
        read, dropped = live[token] - held, before - after
        assert read == after - before
        held = (held | read) - dropped
        assert held == after


@pytest.mark.parametrize("slots", [60, 150, 300])
def test_lru_and_belady(slots: int, live: list[set[int]]) -> None:
    uses, _ = flat(live)
    array = np.array(uses)
    recent, missed = OrderedDict[int, None](), 0
    for neuron in uses:
        missed += neuron not in recent
        recent[neuron] = None
        recent.move_to_end(neuron)
        if len(recent) > slots:
            recent.popitem(last=False)
    assert by_rank(array, np.arange(array.size), NEURONS, slots, 0) == missed

    places: dict[int, list[int]] = {}
    for i, neuron in enumerate(uses):
        places.setdefault(neuron, []).append(i)
    held, optimal = set[int](), 0
    for i, neuron in enumerate(uses):
        if neuron not in held:
            optimal += 1
            if len(held) == slots:
                held.remove(max(held, key=lambda n: next((at for at in places[n] if at > i), 1 << 40)))
            held.add(neuron)
    assert by_rank(array, -next_uses(array), NEURONS, slots, 0) == optimal <= missed


@pytest.mark.parametrize("most", [1, 2, 7])
def test_second_chance(most: int, live: list[set[int]]) -> None:
    uses, tokens = flat(live)
    slots = max(map(len, live)) + 20
    owner, counts, stamps, hand, missed = list[int](), list[int](), list[int](), -1, 0
    for neuron, token in zip(uses, tokens, strict=True):
        if neuron in owner:
            slot = owner.index(neuron)
            counts[slot] = min(most, counts[slot] + 1)
            stamps[slot] = token
            continue
        missed += 1
        if len(owner) < slots:
            owner.append(neuron)
            counts.append(0)
            stamps.append(token)
            continue
        while True:
            hand = (hand + 1) % slots
            if stamps[hand] == token:
                continue
            if counts[hand] == 0:
                break
            counts[hand] -= 1
        owner[hand], counts[hand], stamps[hand] = neuron, 0, token
    assert second_chance(np.array(uses), np.array(tokens), NEURONS, slots, most, 0) == missed
