"""One answer: the tokens of a request one after the other, their text, and where it is wanted their journal."""

import time
import weakref
from collections.abc import Generator, Iterator

import numpy as np
import numpy.typing as npt

from coterie.engine import Engine
from coterie.generation import Sampler, TextStream
from coterie.sampling import SamplingOptions
from coterie.storage.journal import Journal, Request, kv_path
from coterie.storage.kv import Sequence
from coterie.storage.kv_file import KVFile


class Generation:
    """Iterate to get the answer's text as it grows; afterwards its record.

    `text`, `tokens` (ids, an end-of-turn token not among them), `finish_reason` ("stop", "length", "context"; None
    before the end) and `timings` (seconds and tokens/s). Leaving the iteration early gives the cache back.
    """

    def __init__(self, engine: Engine, request: Request, load: float) -> None:
        self.request, self.prompt_tokens = request, request.prompt
        self.tokens, self.text = list[int](), ""
        self.finish_reason: str | None = None
        options = SamplingOptions.of(request.sampling)
        self.seed = options.seed
        self._engine, self._sampler, self._load = engine, Sampler(options), load
        self._limit = request.max_tokens if request.max_tokens >= 0 else request.context
        tokenizer = engine.model.tokenizer
        self._end_ids = tokenizer.end_ids
        self._stream = TextStream(tokenizer.token_bytes, request.stop)
        self._ids = list(request.prompt)  # and those of the answer
        self._prompt_seconds = self._seconds = 0.0
        self._read_tokens = 0  # computed, not chosen
        self._journal: Journal | None = None
        self._kv: KVFile | None = None
        self._files: list[Journal | KVFile] = []
        # The generator does not hold this object: dropping it ends the generator, and frees the cache.
        self._pieces = Generation._run(weakref.proxy(self))

    def keep(self, journal: Journal) -> None:
        """Begin with what the journal has, and write to it what follows. Raises UsageError where the KV file cannot be
        opened."""
        if self.request.kv:
            about = f"{self.request.identity} {self.request.numerics}"
            self._kv = KVFile(kv_path(journal.path), self._engine.cache.layout, about)
            self._files.append(self._kv)
        self._journal = journal
        self._files.append(journal)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()
        for file in self._files:
            file.close()

    @property
    def timings(self) -> dict[str, float]:
        def rate(n: int, seconds: float) -> float:
            return n / seconds if seconds > 0 else 0.0

        prompt, generated = len(self.prompt_tokens), len(self.tokens)
        resumed = len(self._journal.tokens) if self._journal is not None else 0
        return {
            "load_seconds": self._load,
            "prompt_tokens": prompt,
            "prompt_seconds": self._prompt_seconds,
            "prompt_tokens_per_s": rate(self._read_tokens, self._prompt_seconds),
            "resumed_tokens": resumed,
            "generated_tokens": generated,
            "generated_seconds": self._seconds,
            "tokens_per_s": rate(generated - resumed, self._seconds),
        }

    def _run(self) -> Generator[str, None, None]:
        """Text pieces that are not empty."""
        journal, files, reason = self._journal, self._files, None
        sequence = self._engine.sequence()
        try:
            if journal is not None:
                for token in journal.tokens:
                    if piece := self._take(token):
                        yield piece
                reason = journal.finish_reason or (self._ended() if self.tokens else None)
            begun = time.perf_counter()
            if reason is None:
                logits = self._read(sequence)
                reason = self._ended()
                begun = time.perf_counter()
            while reason is None:
                token = self._sampler.pick(logits, self._ids)
                if token in self._end_ids:
                    reason = "stop"
                    break
                if journal is not None:
                    journal.append(token)
                piece = self._take(token)
                self._seconds = time.perf_counter() - begun
                if piece:
                    yield piece
                reason = self._ended()
                if reason is None:
                    logits = self._decode(sequence, token)
            self._seconds = time.perf_counter() - begun
            if journal is not None and journal.finish_reason is None:
                journal.end(reason)
            self.finish_reason = reason
            if piece := self._stream.finish():
                self.text += piece
                yield piece
        finally:
            sequence.close()
            for file in files:
                file.close()

    def _take(self, token: int) -> str:
        """One more token of the answer; the text that can be shown now."""
        self.tokens.append(token)
        self._ids.append(token)
        piece = self._stream.push(token)
        self.text += piece
        return piece

    def _ended(self) -> str | None:
        """The reason to end, if there is one."""
        if self._stream.stopped:
            return "stop"
        if len(self.tokens) >= self._limit:
            return "length"
        if len(self._ids) > self.request.context:
            return "context"
        return None

    def _read(self, sequence: Sequence) -> npt.NDArray[np.float32]:
        """Compute all ids there are; the logits of what comes next.

        A prefill gives the bits of decoding, but where predictors leave neurons out of decoding. There an answer that
        was begun is decoded once more.
        """
        engine, ids = self._engine, self._ids
        start = time.perf_counter()
        engine.ready("prefill", "head", "decode")
        self._sampler.skip(len(self.tokens))
        if self._kv is not None:
            self._kv.restore(sequence, ids)
        self._read_tokens = len(ids) - sequence.length
        together = len(ids) if engine.plan.numerics == "exact" else len(self.prompt_tokens)
        if sequence.length < together:
            rows = engine.prefill(sequence, ids[sequence.length : together], after=lambda: self._save(sequence))
            logits: npt.NDArray[np.float32] = rows[0]
        for token in ids[sequence.length :]:  # at least one, where nothing was read together
            logits = self._decode(sequence, token)
        self._prompt_seconds = time.perf_counter() - start
        return logits

    def _decode(self, sequence: Sequence, token: int) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = self._engine.decode([sequence], [token])[0]
        self._save(sequence)
        return logits

    def _save(self, sequence: Sequence) -> None:
        """Put finished blocks into the KV file, if there is one."""
        if self._kv is not None:
            self._kv.save(sequence, self._ids)
