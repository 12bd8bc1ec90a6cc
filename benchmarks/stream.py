"""A stream of tokens that dwells on topics, for models of weights.py, and what it makes of a model's neurons."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from weights import TOPIC

from coterie.engine import Engine
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes

DWELL = 32  # tokens on a topic, on average


def topical(n: int, vocab: int, seed: int = 3) -> list[int]:
    """n tokens."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    while len(tokens) < n:
        topic, stay = int(rng.integers(vocab // TOPIC)), int(rng.geometric(1 / DWELL))
        tokens += (topic * TOPIC + rng.integers(0, TOPIC, stay)).tolist()
    return tokens[:n]


def record(model: Path, n: int) -> NDArray[np.uint8]:
    """Which neurons were live: uint8[n][layers][neurons / 8], bits."""
    engine = Engine(open_model(model), Wishes(context=n + 8, counting=True))
    try:
        assert engine.layout.shared.uses is not None
        uses, sequence = engine.arena.numpy(engine.layout.shared.uses), engine.sequence()
        before, bits = uses.copy(), []
        for token in topical(n, engine.spec.vocab):
            engine.decode([sequence], [token])
            bits.append(np.packbits(uses != before, axis=1))
            before = uses.copy()
        return np.array(bits)
    finally:
        engine.close()
