"""The end of a link that computes: a part of a model behind frames (docs/link.md).

A frame is checked as a whole before anything happens, so one that is refused has changed nothing. A step may be sent
again, also at positions that were computed before: it does the same once more.
"""

import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import fields
from typing import Protocol

import numpy as np

from coterie.actors.frames import (
    MOST_TEXT,
    Close,
    Closed,
    Contract,
    Error,
    Floats,
    Frame,
    Hidden,
    Open,
    Opened,
    Phase,
    Step,
    decode,
    encode,
    hidden_states,
    numbers,
    size_limit,
)
from coterie.errors import CoterieError, UnitError
from coterie.scheduler.layout import BATCH
from coterie.storage.kv import Sequence as KVSequence


class Part(Protocol):
    """What a server needs of the engine that computes its layers."""

    def sequence(self) -> KVSequence: ...

    def hidden(
        self, phase: Phase, sequences: Sequence[KVSequence], ids: Sequence[int], entering: Floats | None = None
    ) -> Floats: ...


class Server:
    """Answers frames for the layers of `contract`, in steps of up to `rows` rows; `weights` as of Opened."""

    def __init__(self, part: Part, contract: Contract, *, rows: int, weights: int) -> None:
        self.part, self.contract, self.rows, self.weights = part, contract, rows, weights
        self.sequences: dict[int, KVSequence] = {}
        self._most = size_limit(max(rows, BATCH), contract.dim)
        self._lock = threading.Lock()

    def handle(self, data: bytes) -> bytes:
        """The answer to a frame, an error frame for one that is refused. Raises nothing."""
        number = 0
        try:
            frame = decode(data, self._most)
            number = frame.number
            with self._lock:
                return encode(self._answer(frame))
        except CoterieError as error:
            return encode(Error(number, one_line(str(error))))
        except Exception as error:  # a defect of ours: said here, and to the other end as far as it may know
            traceback.print_exc(file=sys.stderr)
            return encode(Error(number, f"a defect of the part: {type(error).__name__}"))

    def _answer(self, frame: Frame) -> Frame:
        match frame:
            case Open():
                return self._open(frame)
            case Step():
                return self._step(frame)
            case Close():
                if sequence := self.sequences.pop(frame.sequence, None):
                    sequence.close()
                return Closed(frame.number, frame.sequence)
            case _:
                raise UnitError(f"a frame {type(frame).__name__.lower()!r} is no question")

    def _open(self, frame: Open) -> Opened:
        for field in fields(Contract):
            theirs, mine = getattr(frame, field.name), getattr(self.contract, field.name)
            if theirs != mine:
                raise UnitError(f"the two ends differ: {field.name} is {theirs} there and {mine} here")
        if frame.sequence not in self.sequences:
            self.sequences[frame.sequence] = self.part.sequence()
        return Opened(frame.number, frame.sequence, self.rows, self.weights)

    def _step(self, frame: Step) -> Hidden:
        """Check all of it, and only then begin."""
        n = len(frame.positions) // 4
        prefill = frame.phase == "prefill"
        if frame.phase not in ("prefill", "decode") or not 1 <= n <= (self.rows if prefill else BATCH):
            raise UnitError(f"a step of {n} rows of kind {frame.phase[:20]!r} is not possible")
        positions = numbers(frame.positions, "<i4", n)
        named = numbers(frame.sequences, "<i8", n).tolist()
        sequences = self._find(named if not prefill else named[:1])
        if prefill and set(named) != {named[0]}:
            raise UnitError("a chunk of a prompt has rows of several sequences")
        firsts = positions[:1] if prefill else positions
        if prefill and (positions != positions[0] + np.arange(n)).any():
            raise UnitError("the positions of a chunk do not follow one another")
        for sequence, first in zip(sequences, firsts.tolist(), strict=True):
            if not 0 <= first <= sequence.length:
                raise UnitError(f"position {first} does not continue a sequence of {sequence.length}")
        ids, entering = self._inputs(frame, n)
        for sequence, first in zip(sequences, firsts.tolist(), strict=True):
            sequence.reserve(first + (n if prefill else 1))
        return self._run(frame, sequences, firsts.tolist(), ids, entering)

    def _find(self, named: list[int]) -> list[KVSequence]:
        unknown = [name for name in named if name not in self.sequences]
        if unknown:
            raise UnitError(f"sequence {unknown[0]} is not open")
        if len(set(named)) != len(named):
            raise UnitError("a step has two rows of one sequence")
        return [self.sequences[name] for name in named]

    def _inputs(self, frame: Step, n: int) -> tuple[list[int], Floats | None]:
        """Token ids, or zeros and the hidden states that stand in for them."""
        if self.contract.first:
            numbers(frame.ids, "<i4", 0)
            return [0] * n, hidden_states(frame.hidden, n, self.contract.dim)
        numbers(frame.hidden, "<f4", 0)
        ids = numbers(frame.ids, "<i4", n)
        if ids.min() < 0 or ids.max() >= self.contract.vocab:
            raise UnitError(f"ids are 0 to {self.contract.vocab - 1}, but a step has {ids.min()} to {ids.max()}")
        return ids.tolist(), None

    def _run(
        self, frame: Step, sequences: list[KVSequence], firsts: list[int], ids: list[int], entering: Floats | None
    ) -> Hidden:
        for sequence, first in zip(sequences, firsts, strict=True):
            sequence.length = first  # from here on it is computed anew
        phase: Phase = "prefill" if frame.phase == "prefill" else "decode"
        start = time.perf_counter_ns()
        states = self.part.hidden(phase, sequences, ids, entering)
        return Hidden(frame.number, time.perf_counter_ns() - start, states.astype("<f4", copy=False).tobytes())


def one_line(text: str) -> str:
    """What a frame may carry of a message."""
    return "".join(c if c.isprintable() else " " for c in text)[:MOST_TEXT]
