"""How far the units of class `near` are from the CPU unit: measured on a text before the first answer, and printed."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from coterie.engine import Engine

PROMPT, DECODED = 128, 8  # tokens of the text computed as a prompt, and one by one
APART = 8  # of the prompt's positions every so many are compared: vocabularies are large
TEXT = (
    "The lighthouse keeper had kept a diary for thirty years. On calm days he wrote about the weather, the boats "
    "that passed, and the price of oil; on rough ones he wrote nothing at all. When the light was automated, he was "
    "asked to leave, and the diaries went to a small museum, where a student of history found them. She counted the "
    "storms, compared them with the records of the coast guard, and saw that every third one was missing from both. "
    "It took her a winter to find out why. The keeper had been paid by the day, the coast guard by the report, and "
    "neither had been paid for the nights of the new moon, when no ship was allowed to leave the harbour. She wrote "
    "this down in a small book of forty pages, with a map, two tables and a photograph of the lamp, and the museum "
    "printed three hundred copies. The first was sent to the keeper, who by then was ninety, and lived inland."
)
Floats = npt.NDArray[np.float32]


class Divergence(NamedTuple):
    """Kullback-Leibler divergence of the other units' predictions from the CPU unit's, nats: the mean over `positions`,
    and the worst one; `identical`: the logits are the same bits."""

    mean: float
    worst: float
    positions: int
    identical: bool

    def line(self, units: str) -> str:
        """For people."""
        if self.identical:
            return f"{units}: the CPU unit's bits, over {self.positions} positions of a text"
        found = f"{self.mean:.2g} to the CPU unit ({self.worst:.2g} at worst, {self.positions} positions of a text)"
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
    identical = bool((exact.view(np.int32) == near.view(np.int32)).all())
    return Divergence(float(each.mean()), float(each.max()), each.size, identical)


def _logits(engine: "Engine", ids: list[int]) -> Floats:
    """After some ids of a prompt, and each of those that are decoded behind it: float32[n, vocab]."""
    prompt = max(1, len(ids) - DECODED)
    rows = range(0, prompt, APART)
    found = np.empty((len(rows) + len(ids) - prompt, engine.spec.vocab), np.float32)
    sequence = engine.sequence()
    try:
        found[: len(rows)] = engine.prefill(sequence, ids[:prompt], rows)
        for i, token in enumerate(ids[prompt:], len(rows)):
            found[i] = engine.decode([sequence], [token])[0]
    finally:
        sequence.close()
    return found


def divergences(p: Floats, q: Floats) -> npt.NDArray[np.float64]:
    """KL(p || q) of two rows of logits each, nats: float64[n]. One at a time: vocabularies are large."""
    return np.array([max(0.0, _divergence(*rows)) for rows in zip(p, q, strict=True)])


def _divergence(p: Floats, q: Floats) -> float:
    p_log, q_log = _log_softmax(p), _log_softmax(q)
    return float((np.exp(p_log) * (p_log - q_log)).sum())


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return found
