"""The end of a link that asks: the layers before an engine's own, at one peer or several (docs/link.md).

What carries frames is a function that takes the bytes of one and returns those of its answer.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from coterie.actors.frames import (
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
    size_limit,
)
from coterie.errors import UnitError
from coterie.storage.kv import Sequence as KVSequence

Call = Callable[[bytes], bytes]  # raises UnitError where the other end cannot be reached
Answer = TypeVar("Answer", bound=Frame)
Ints = npt.NDArray[Any]


@dataclass
class Cost:
    """Of steps: `rows` in all, bytes `sent` and `received`, `seconds` from question to answer, and how many of them
    the part `computed`."""

    rows: int = 0
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    computed: float = 0.0


class Link:
    """The way to one part; `costs` of its steps by phase."""

    def __init__(self, call: Call, contract: Contract) -> None:
        self.contract = contract
        self._call, self._numbers = call, count(1)
        self.rows, self.weights = 1, 0  # as the part says
        self.count_anew()

    def count_anew(self) -> None:
        self.costs: dict[Phase, Cost] = {"prefill": Cost(), "decode": Cost()}

    def check(self) -> None:
        """See whether the two ends fit together, before anything is computed. Raises UnitError."""
        number = new_number()
        self.open(number)
        self.close(number)

    def open(self, sequence: int) -> None:
        """Begin a sequence there. Raises UnitError where the two ends do not fit together."""
        frame = Open(number=next(self._numbers), sequence=sequence, **vars(self.contract))
        opened = self._ask(frame, Opened)
        if opened.sequence != sequence or not opened.rows:
            raise self._wrong("it opened something else")
        self.rows, self.weights = opened.rows, opened.weights

    def step(self, phase: Phase, sequences: Ints, positions: Ints, ids: Ints | None, entering: Floats | None) -> Floats:
        """Hidden states float32[n, dim] of int64[n], int32[n], and ids int32[n] or float32[n, dim]. Raises UnitError;
        the same step can be asked for again."""
        n, cost = positions.size, self.costs[phase]
        frame = Step(
            next(self._numbers),
            phase,
            sequences.astype("<i8").tobytes(),
            positions.astype("<i4").tobytes(),
            b"" if ids is None else ids.astype("<i4").tobytes(),
            b"" if entering is None else entering.astype("<f4", copy=False).tobytes(),
        )
        start = time.perf_counter()
        answer = self._ask(frame, Hidden, n, cost)
        states = hidden_states(answer.hidden, n, self.contract.dim)
        cost.rows, cost.seconds = cost.rows + n, cost.seconds + time.perf_counter() - start
        cost.computed += answer.nanoseconds / 1e9
        return states

    def close(self, sequence: int) -> None:
        """Forget a sequence there. Raises UnitError where that cannot be said."""
        if self._ask(Close(next(self._numbers), sequence), Closed).sequence != sequence:
            raise self._wrong("it closed something else")

    def _ask(self, frame: Frame, wanted: type[Answer], rows: int = 0, cost: Cost | None = None) -> Answer:
        data = encode(frame)
        reply = self._call(data)
        if cost:
            cost.sent, cost.received = cost.sent + len(data), cost.received + len(reply)
        try:
            answer = decode(reply, size_limit(rows, self.contract.dim))
        except UnitError as error:
            raise self._wrong(str(error)) from None
        if isinstance(answer, Error):
            raise self._wrong(answer.text)
        if not isinstance(answer, wanted) or answer.number != frame.number:
            raise self._wrong("it answered another question")
        return answer

    def _wrong(self, what: str) -> UnitError:
        return UnitError(f"the part with layers {self.contract.first} to {self.contract.last - 1}: {what}")


def new_number() -> int:
    """Of a sequence: of several clients of a part each has its own."""
    return secrets.randbits(62)


class Chain:
    """The layers before an engine's own: one link or several, each with the layers behind the one before it."""

    def __init__(self, links: Sequence[Link], close: Callable[[], None] = lambda: None) -> None:
        self.links, self._end = tuple(links), close
        self._numbers: dict[KVSequence, int] = {}  # what the parts call a sequence ...
        self._opened: set[KVSequence] = set()  # ... and those that are known there
        self._closed = False

    def hidden(
        self, phase: Phase, sequences: Sequence[KVSequence], positions: Sequence[int], ids: Sequence[int]
    ) -> Floats:
        """As of Front in part_engine.py."""
        self._forget()
        named = np.array([self._number(sequence) for sequence in sequences], np.int64)
        named = np.repeat(named, len(positions) if phase == "prefill" else 1)
        at, tokens, states = np.asarray(positions), np.asarray(ids), list[Floats]()
        most = at.size if phase == "decode" else min(link.rows for link in self.links)
        for first in range(0, at.size, most):
            rows = slice(first, first + most)
            entering: Floats | None = None
            for link in self.links:
                entering = link.step(phase, named[rows], at[rows], tokens[rows] if entering is None else None, entering)
            assert entering is not None
            states.append(entering)
        return states[0] if len(states) == 1 else np.concatenate(states)

    def _number(self, sequence: KVSequence) -> int:
        """What the parts call it; opened there if it is new, again under the same number where that failed."""
        number = self._numbers.setdefault(sequence, new_number())
        if sequence not in self._opened:
            for link in self.links:
                link.open(number)
            self._opened.add(sequence)
        return number

    def _forget(self) -> None:
        """Close what was closed here. Only now: a sequence may be closed while its generation is thrown away, which is
        no time to wait for another machine."""
        for sequence in [sequence for sequence in self._numbers if sequence.closed]:
            for link in self.links:
                link.close(self._numbers[sequence])
            del self._numbers[sequence]
            self._opened.discard(sequence)

    def lines(self) -> list[str]:
        """Where these layers run, for people."""
        found = [(link.contract, link.weights / (1 << 20)) for link in self.links]
        return [
            f"layers {at.first} to {at.last - 1} of {at.layers} run in another process ({mib:.0f} MiB of weights); "
            "their hidden states come in frames"
            for at, mib in found
        ]

    def count_anew(self) -> None:
        for link in self.links:
            link.count_anew()

    def report(self) -> dict[str, dict[str, float]]:
        """What the links cost a row since `count_anew`, by phase: bytes, and milliseconds on the way, which are those
        that the parts did not compute in; `rows` there were."""

        def of(phase: Phase) -> dict[str, float]:
            costs = [link.costs[phase] for link in self.links]
            rows = costs[0].rows
            on_the_way = sum(cost.seconds - cost.computed for cost in costs)
            nbytes = sum(cost.sent + cost.received for cost in costs)
            return {"rows": rows, "bytes": nbytes / max(1, rows), "added_ms": 1e3 * on_the_way / max(1, rows)}

        return {"prefill": of("prefill"), "decode": of("decode")}

    def close(self) -> None:
        """Let go of the parts. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._end()
