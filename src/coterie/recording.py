"""Counting in how many decode steps each neuron of a sparse model is live."""

from collections.abc import Callable, Sequence

from coterie.engine import Engine
from coterie.errors import UsageError
from coterie.scheduler.layout import BATCH
from coterie.storage.activations import Activations, model_key

Progress = Callable[[str, int, int], None]


def record(
    engine: Engine, tokens: Sequence[int], batches: Sequence[int], steps: int, progress: Progress
) -> Activations:
    """Decode `steps` tokens of each of 1 to BATCH sequences for every batch size, the sequences being parts of the text
    `tokens`, and count. The engine must have been opened with `Wishes(counting=True)` and a context of steps * the
    largest batch.

    Raises UsageError for a model that is not sparse, batch sizes that cannot be, and texts that are too short.
    """
    if engine.layout.shared.uses is None:
        raise UsageError(f"{engine.model.file.path.name} is not a sparse model: its neurons are never idle")
    if not batches or not all(1 <= batch <= BATCH for batch in batches):
        raise UsageError(f"batch sizes are 1 to {BATCH}")
    if len(tokens) < steps + max(batches) - 1:
        raise UsageError(f"the text has {len(tokens)} tokens, too few for {steps} steps of {max(batches)} sequences")
    uses = engine.arena.numpy(engine.layout.shared.uses)
    live, total, done = {}, steps * len(batches), 0
    for batch in batches:
        uses[:] = 0
        firsts = [i * (len(tokens) - steps) // max(1, batch - 1) for i in range(batch)]
        sequences = [engine.sequence() for _ in firsts]
        try:
            for step in range(steps):
                engine.decode(sequences, [tokens[first + step] for first in firsts])
                done += 1
                progress(f"counting, batch size {batch}", done, total)
        finally:
            for sequence in sequences:
                sequence.close()
        live[batch] = uses[:, : engine.spec.ffn_dim].astype("int64")
    return Activations(model_key(engine.model.file), dict.fromkeys(batches, steps), live)
