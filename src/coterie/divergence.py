"""How far the units of class `near` are from the CPU unit: measured on a text before the first answer, and printed."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from coterie.engine import Engine

PROMPT, DECODED = 64, 8  # tokens of the text computed as a prompt, and one by one
TEXT = (
    "The lighthouse keeper had kept a diary for thirty years. On calm days he wrote about the weather, the boats "
    "that passed, and the price of oil; on rough ones he wrote nothing at all. When the light was automated, he was "
    "asked to leave, and the diaries went to a small museum, where a student of history found them. She counted the "
    "storms, compared them with the records of the coast guard, and saw that every third one was missing from both."
)
Floats = npt.NDArray[np.float32]


class Divergence(NamedTuple):
    """Kullback-Leibler divergence of the CPU unit's predictions from the others', nats: the mean over `positions`, and
    the worst one."""

    mean: float
    worst: float
    positions: int

    def line(self, units: str) -> str:
        """For people."""
        found = f"{self.mean:.2g} to the CPU unit ({self.worst:.2g} at worst, {self.positions} positions)"
        return f"{units}: near, KL {found}"

    def as_dict(self) -> dict[str, Any]:
        return self._asdict()


def measure_divergence(engine: "Engine") -> Divergence:
    """Of an engine with other units, as they are placed now."""
    assert engine.others is not None
    ids = engine.model.tokenizer.encode(TEXT)[: min(PROMPT + DECODED, engine.plan.context)]
    near = _logits(engine, ids)
    with engine.others.none():
        exact = _logits(engine, ids)
    each = divergences(exact, near)
    return Divergence(float(each.mean()), float(each.max()), each.size)


def _logits(engine: "Engine", ids: list[int]) -> Floats:
    """After each of the ids: float32[n, vocab], of a prompt and then of single tokens."""
    prompt = max(1, len(ids) - DECODED)
    sequence = engine.sequence()
    try:
        rows = [engine.prefill(sequence, ids[:prompt], range(prompt))]
        rows += [engine.decode([sequence], [token])[:1].copy() for token in ids[prompt:]]
    finally:
        sequence.close()
    return np.concatenate(rows)


def divergences(p: Floats, q: Floats) -> npt.NDArray[np.float64]:
    """KL(p || q) of two rows of logits each, nats: float64[n]."""
    p_log, q_log = (_log_softmax(each) for each in (p, q))
    found: npt.NDArray[np.float64] = (np.exp(p_log) * (p_log - q_log)).sum(axis=-1)
    return np.maximum(found, 0)


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found
