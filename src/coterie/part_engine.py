"""An engine for a part of a model that is cut by layers: hidden states in, hidden states out (docs/link.md)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from coterie.actors.frames import Phase
from coterie.actors.host import Host
from coterie.actors.unit import Rows
from coterie.engine import Engine, Floats, Progress
from coterie.errors import UsageError
from coterie.models.load import Model
from coterie.scheduler.layout import BATCH
from coterie.scheduler.plan import Wishes
from coterie.storage.kv import Sequence as KVSequence


class Front(Protocol):
    """The layers before these, wherever they run."""

    def hidden(
        self, phase: Phase, sequences: Sequence[KVSequence], positions: Sequence[int], ids: Sequence[int]
    ) -> Floats:
        """Hidden states float32[n, dim] of n rows, the caller's own. Asked again for positions it has had, it computes
        them again. Raises UnitError where it cannot; nothing has then changed that matters."""

    def lines(self) -> list[str]:
        """Where they run, for people."""

    def report(self) -> dict[str, Any]:
        """What asking them costs, since `count_anew` was called."""

    def count_anew(self) -> None: ...

    def close(self) -> None:
        """Let go of them. A second call does nothing."""


class PartEngine(Engine):
    """A part in memory. With a head and a `front` it is used as any engine; without a head by `hidden`."""

    def __init__(
        self,
        model: Model,
        wishes: Wishes = Wishes(),  # noqa: B008 - it is frozen
        *,
        trace: Path | None = None,
        progress: Progress | None = None,
        host: Host | None = None,
    ) -> None:
        self.front: Front | None = None
        self._entering: Floats | None = None  # of the step under way: a retry begins with them again
        self._live: dict[int, KVSequence] = {}  # by the address of its block table
        super().__init__(model, wishes, trace=trace, progress=progress, host=host)

    def sequence(self) -> KVSequence:
        sequence = super().sequence()
        self._live[sequence.table_address] = sequence
        return sequence

    def prefill(
        self,
        sequence: KVSequence,
        tokens: Sequence[int],
        rows: Sequence[int] | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> Floats:
        self._check_ends()
        return super().prefill(sequence, tokens, rows, after)

    def decode(self, sequences: Sequence[KVSequence], tokens: Sequence[int]) -> Floats:
        self._check_ends()
        return super().decode(sequences, tokens)

    def _check_ends(self) -> None:
        if not self.spec.has_head or (self.front is None and not self.spec.has_embedding):
            raise UsageError(f"{self.model.file.path.name} is {self.spec.part}; alone it answers nothing")

    def hidden(
        self, phase: Phase, sequences: Sequence[KVSequence], ids: Sequence[int], entering: Floats | None = None
    ) -> Floats:
        """Append rows to sequences, a chunk to one ("prefill") or a token to each of several ("decode"): hidden states
        float32[n, dim] behind this part's last layer. `entering`, float32[n, dim], stand in for the ids where the
        part has no embedding. Raises UsageError for rows that make no step."""
        n, prefill = len(ids), phase == "prefill"
        if not 1 <= n <= (self.plan.chunk if prefill else BATCH) or len(sequences) != (1 if prefill else n):
            raise UsageError(f"{n} rows of {len(sequences)} sequences are no step")
        if self.spec.has_embedding:
            self.check(ids)
        name, each = ("prefill", n) if prefill else ("decode" if n == 1 else "batch", 1)
        for s in sequences:
            s.reserve(s.length + each)
        positions = np.concatenate([s.length + np.arange(each) for s in sequences])
        tables = np.repeat([s.table_address for s in sequences], each)
        with self._lock:
            self._check_open()
            self._entering = entering
            super()._run(name, Rows(ids, positions, tables, ()))
            for s in sequences:
                s.length += each
            leaving: Floats = self.arena.numpy(self.layout.hidden[name][1])
            return leaving[:n, : self.spec.dim].copy()

    def _run(self, name: str, rows: Rows, *, more: bool = False) -> None:
        """First has the front compute what enters."""
        if self.front is not None and name != "head":
            phase: Phase = "prefill" if name == "prefill" else "decode"
            tables = list(dict.fromkeys(np.asarray(rows.tables).tolist()))
            sequences, positions = [self._live[table] for table in tables], np.asarray(rows.positions).tolist()
            self._entering = self.front.hidden(phase, sequences, positions, rows.ids)
        super()._run(name, rows, more=more)

    def _step(self, name: str, rows: Rows, more: bool) -> None:
        if not self.spec.has_embedding and name != "head":
            assert self._entering is not None
            self.unit.settle()
            into: Floats = self.arena.numpy(self.layout.hidden[name][0])
            n, dim = self._entering.shape
            into[:n, :dim], into[:n, dim:] = self._entering, 0
        super()._step(name, rows, more)

    def _embeddings(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        return super()._embeddings(ids) if self.spec.has_embedding else np.empty(0, np.int64)

    def count_anew(self) -> None:
        if self.front is not None:
            self.front.count_anew()
        super().count_anew()

    def close(self) -> None:
        if self.front is not None:
            self.front.close()
        super().close()
