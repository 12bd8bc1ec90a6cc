"""From logits to a token, and from tokens to text that may be shown."""

import codecs
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from coterie.errors import UnitError, UsageError
from coterie.sampling import SamplingOptions


class Sampler:
    """Chooses tokens in llama.cpp's order: repetition penalty, top-k, top-p, min-p, temperature, draw.

    Top-p and min-p look at the probabilities before temperature. Equal options, seed and logits
    give equal tokens.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._bits = np.random.PCG64(options.seed)
        self._random = np.random.Generator(self._bits)

    def skip(self, tokens: int) -> None:
        """Go on as if that many had been chosen: each takes one number, if any does."""
        self._bits.advance(tokens)

    def pick(self, logits: NDArray[np.float32], history: Sequence[int]) -> int:
        """The next token.

        `logits` is float32[vocab] (not changed), `history` the ids of prompt and answer so far.
        Raises UnitError where the logits hold NaN or no finite maximum.
        """
        options = self.options
        scores = self._penalised(logits, history)
        best = int(scores.argmax())  # the first of equals, and the first NaN if there is one
        if not np.isfinite(scores[best]):
            raise UnitError(
                f"the logit of token {best} is {scores[best]}: the weights are damaged or a kernel is wrong; "
                "check the model file"
            )
        if options.temperature == 0 or options.top_k == 1:
            return best

        ids = _highest(scores, options.top_k)
        relative = scores[ids].astype(np.float64) - float(scores[best])
        weights = np.exp(relative)
        mass = weights.sum()
        # Top-p and min-p each keep the first so many in falling order, so what min-p drops can be
        # dropped before the sort; top-p's share is still of the whole mass.
        kept = np.flatnonzero(weights >= options.min_p)
        if options.top_p < 1:
            kept = kept[np.argsort(-relative[kept], kind="stable")]
            share = np.cumsum(weights[kept]) / mass
            kept = kept[: int(np.searchsorted(share, options.top_p)) + 1]
        with np.errstate(over="ignore"):  # a tiny temperature makes -inf, whose weight is 0
            weights = np.exp(relative[kept] / options.temperature)
        upto = np.cumsum(weights)
        drawn = int(np.searchsorted(upto, self._random.random() * upto[-1], side="right"))
        return int(ids[kept[min(drawn, len(kept) - 1)]])

    def _penalised(self, logits: NDArray[np.float32], history: Sequence[int]) -> NDArray[np.float32]:
        """Logits with those of recent tokens made less likely: divided if positive, else multiplied."""
        penalty, last_n = self.options.repeat_penalty, self.options.repeat_last_n
        if penalty == 1 or last_n == 0 or not history:
            return logits
        recent = np.unique(np.asarray(history if last_n < 0 else history[-last_n:], dtype=np.int64))
        scores = logits.copy()
        scores[recent] = np.where(scores[recent] <= 0, scores[recent] * penalty, scores[recent] / penalty)
        return scores


def _highest(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Ids of the k highest scores in ascending order (k = 0: all); of equal scores the lowest ids."""
    if not 0 < k < len(scores):
        return np.arange(len(scores))
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > least)
    equal = np.flatnonzero(scores == least)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))


class TextStream:
    """Bytes of tokens in, text that is safe to show out.

    Tokens may split code points; bytes that are not UTF-8 become U+FFFD as in `bytes.decode`. Text
    that may be the beginning of a stop string is held back. The stop string that is completed first
    ends the text (of several completed by the same character, the longest): nothing from its first
    character on is ever shown. So the text does not depend on how the bytes were cut into tokens.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: str | Iterable[str] = ()) -> None:
        """`token_bytes` gives the bytes of a token. Raises UsageError for an empty stop string."""
        self._token_bytes = token_bytes
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(each, str) and each for each in self._stop):
            raise UsageError("a stop string is empty: leave it out")
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one more token; return the text that can be shown now."""
        return self._take(self._decoder.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """No more tokens: return what was held back."""
        text = self._take(self._decoder.decode(b"", final=True))
        text, self._pending = text + self._pending, ""
        return text

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        pending = self._pending + text
        found = [(at + len(stop), at) for stop in self._stop if (at := pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._pending = min(found)[1], ""
        else:
            shown = len(pending) - self._beginning(pending)
            self._pending = pending[shown:]
        return pending[:shown]

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)
