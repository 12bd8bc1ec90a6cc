"""Prompts: cut into chunks, and those into subgraphs, which a dispatcher orders one by one (design, section 6)."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.actors.unit import Rows
from coterie.errors import UsageError
from coterie.models.spec import ModelSpec
from coterie.scheduler.dispatch import Chunk, Dispatcher, Subgraph, Task
from coterie.scheduler.layout import OUTPUT_ROWS, WITH_GPU
from coterie.scheduler.placement import Placement
from coterie.scheduler.plan import Plan
from coterie.stepping import Again, Stepping
from coterie.storage.kv import Sequence as KVSequence

Floats = npt.NDArray[np.float32]


@dataclass
class Prompt:
    """A prompt under way: `start` is its first token's position, `wanted` are rows whose logits are to be `logits`,
    `placed` is what its cuts depend on, `losses` how many the supervisor had seen."""

    sequence: KVSequence
    start: int
    ids: Sequence[int]
    wanted: npt.NDArray[np.int64]
    logits: Floats
    placed: Any
    losses: int
    begun: float = field(default_factory=time.perf_counter)

    def now(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.begun


def to_cpu(subgraph: Subgraph, unit: str) -> Subgraph:
    """What the CPU unit does in place of units that are lost: all of it."""
    return replace(subgraph, program=re.split("[@+]", subgraph.program)[0], units=("cpu",))


class Prompting(Stepping):
    """What an engine is made of, as far as prompts need it."""

    plan: Plan
    spec: ModelSpec
    dispatcher: Dispatcher | None  # of the prompt that began last
    _progress: Callable[..., None]
    _logits: Floats

    def check(self, tokens: Sequence[int]) -> None:
        """Raise UsageError for ids that are no tokens of this model."""
        wrong = [t for t in tokens if not isinstance(t, int | np.integer) or not 0 <= t < self.spec.vocab]
        if wrong:
            raise UsageError(f"token {wrong[0]} does not exist: this model's ids are 0 to {self.spec.vocab - 1}")

    def _check_open(self) -> None:
        raise NotImplementedError

    def prefill(
        self,
        sequence: KVSequence,
        tokens: Sequence[int],
        rows: Sequence[int] | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> Floats:
        """Append tokens to a sequence, in chunks, `after` each of which that is called; logits float32[n, vocab] of
        `rows` (indices into `tokens`, ascending; default: the last)."""
        self.check(tokens)
        if not len(tokens):
            raise UsageError("there are no tokens to compute")
        wanted = np.array([len(tokens) - 1] if rows is None else rows, np.int64)
        sequence.reserve(sequence.length + len(tokens))
        logits = np.empty((wanted.size, self.spec.vocab), np.float32)
        losses = len(self.supervisor.losses)
        prompt = Prompt(sequence, sequence.length, tokens, wanted, logits, self._placed, losses)
        dispatcher = self.dispatcher = Dispatcher(self._cut(prompt, 0, 0), to_cpu)
        number = 0
        while number < len(dispatcher.chunks):
            with self._lock:
                self._fit(prompt, dispatcher, number)
                while not self._chunk(prompt, dispatcher, number):
                    self._fit(prompt, dispatcher, number, again=True)
            after()
            self._progress("prompt", dispatcher.chunks[number][0].rows.stop, len(tokens))
            number += 1
        return logits

    # --- cutting --------------------------------------------------------------------------------------

    @property
    def _placement(self) -> Placement:
        """Where steps are computed now."""
        return self.plan.placement if self.others is None else self.others.placement

    @property
    def _placed(self) -> Any:
        """What decides how a prompt is cut, and where it is computed."""
        return self._placement, self.plan.chunk, None if self.others is None else self.others.parts

    def _cut(self, prompt: Prompt, number: int, first: int, keep: int = 0) -> tuple[Chunk, ...]:
        """The chunks from that number and token on, as they would be computed now; `keep`: tokens of the first one."""
        chunks, tokens = list[Chunk](), len(prompt.ids)
        while first < tokens:
            parts = 0 if self.others is None else self.others.parts.get("tokens", 0)
            count = keep or self._placement.piece(tokens - first, self.plan.chunk, parts)
            chunks.append(self._subgraphs(number + len(chunks), range(first, first + count), prompt.wanted))
            first, keep = first + count, 0
        return tuple(chunks)

    def _subgraphs(self, number: int, tokens: range, wanted: npt.NDArray[np.int64]) -> Chunk:
        """All layers, and as many heads as there are batches of rows that want logits: ranges of `wanted`."""
        which, alone, whose = "", "cpu", 0
        if self.others is not None:
            which = self.others.program_for(len(tokens))
            alone = "gpu" if self.others.on_gpu("prefill") and not which else "cpu"
            if which.endswith(WITH_GPU):
                whose = self._placement.first_tokens(len(tokens), self.others.parts["tokens"])
        shared = "cpu", *["gpu"] * which.endswith(WITH_GPU), *["npu"] * which.startswith("@")
        units = shared if which else (alone,)
        layers = Subgraph("layers", f"prefill{which}", tokens, units, (Task(number - 1, 0),) if number else ())
        low, middle, high = np.searchsorted(wanted, [tokens.start, tokens.start + whose, tokens.stop]).tolist()
        heads = list[Subgraph]()
        for begin, end, unit in ((low, middle, "gpu"), (middle, high, alone)):  # no batch has rows of two units
            for row in range(begin, end, OUTPUT_ROWS):
                rows = range(row, min(row + OUTPUT_ROWS, end))
                heads.append(Subgraph(f"head {len(heads)}", f"head{which}", rows, (unit,), (Task(number, 0),)))
        return (layers, *heads)

    def _fit(self, prompt: Prompt, dispatcher: Dispatcher, number: int, again: bool = False) -> None:
        """Before a chunk begins, or begins `again`: have it, and those behind it, as units are placed and cut now."""
        self._check_open()
        self._tell_losses(prompt, dispatcher)
        if prompt.placed != self._placed:
            prompt.placed, tokens = self._placed, dispatcher.chunks[number][0].rows
            chunks = self._cut(prompt, number, tokens.start, len(tokens) if again else 0)
            if chunks != dispatcher.chunks[number:]:
                dispatcher.refit(number, chunks, prompt.now())

    def _tell_losses(self, prompt: Prompt, dispatcher: Dispatcher) -> None:
        """Of units that are lost for good."""
        losses = self.supervisor.losses
        for loss in losses[prompt.losses :]:
            if loss.by == "cpu":
                dispatcher.lost(loss.unit, prompt.now())
        prompt.losses = len(losses)

    # --- running --------------------------------------------------------------------------------------

    def _chunk(self, prompt: Prompt, dispatcher: Dispatcher, number: int) -> bool:
        """Compute a chunk's subgraphs. False if it must be computed again."""
        while not dispatcher.chunk_done(number):
            (task,) = dispatcher.orders(dispatcher.idle, prompt.now())  # in order, it is one
            dispatcher.started(task, prompt.now())
            try:
                self._compute(prompt, dispatcher.chunks[number], task.subgraph)
            except Again:
                prompt.sequence.length = prompt.start + dispatcher.chunks[number][0].rows.start
                dispatcher.failed(task, prompt.now())
                return False
            dispatcher.ended(task, prompt.now())
            self._tell_losses(prompt, dispatcher)  # it may have ended on another unit
        return True

    def _compute(self, prompt: Prompt, chunk: Chunk, which: int) -> None:
        """Append a chunk's tokens, or have logits of some of its rows. Raises Again."""
        tokens, rows = chunk[0].rows, chunk[which].rows
        outputs = prompt.wanted[rows.start : rows.stop] - tokens.start if which else ()
        positions = prompt.start + np.arange(tokens.start, tokens.stop)
        tables = np.full(len(tokens), prompt.sequence.table_address)
        given = Rows(prompt.ids[tokens.start : tokens.stop], positions, tables, outputs)
        self._run(chunk[which].program, given, more=which + 1 < len(chunk))
        if which:
            prompt.logits[rows.start : rows.stop] = self._logits[: len(rows)]
        else:
            prompt.sequence.length = prompt.start + tokens.stop
