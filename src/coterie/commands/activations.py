"""coterie profile --activations: counting which neurons of a sparse model are live."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.commands import terminal
from coterie.commands.options import read_text
from coterie.errors import UsageError
from coterie.paths import check_writable

if TYPE_CHECKING:
    from coterie.storage.activations import Activations


def count(
    counts: Path,
    name: str,
    text: Path | None,
    steps: int,
    batches: str,
    wanted: Mapping[str, Any],
    progress: terminal.Progress,
) -> dict[str, Any]:
    """Decode the text in `steps` steps of each of the batch sizes, and add what was live to the file `counts`. Returns
    what was found, for people and programs."""
    if text is None:
        raise UsageError("which text shall the model read? give -f FILE")
    if wanted["memory"] == "auto":
        raise UsageError("--memory auto changes while counts are taken; give a size")
    sizes, content = _sizes(batches), read_text(text)

    from coterie import fetch
    from coterie.engine import Engine
    from coterie.kernels.shapes import SPAN
    from coterie.models.load import read_spec
    from coterie.opening import open_file, open_to_run
    from coterie.recording import record
    from coterie.scheduler.layout import BATCH
    from coterie.scheduler.plan import Wishes
    from coterie.storage.activations import activations_of
    from coterie.storage.arena import round_up

    if not 1 <= sizes[0] <= sizes[-1] <= BATCH:
        raise UsageError(f"--batches {batches}: give numbers from 1 to {BATCH}")
    check_writable(counts)
    context = max(sizes) * round_up(steps, SPAN)  # sequences take whole blocks of the KV cache
    wishes = Wishes(context=context, counting=True, **wanted)
    path = fetch.resolve(name, progress)
    with open_file(path) as file:
        most = read_spec(file).context
    if context > most:
        raise UsageError(
            f"-n {steps} in {max(sizes)} sequences takes {context} positions, the model has {most}; lower one"
        )
    model = open_to_run(path, wishes, progress)
    known = activations_of(counts, model.spec, model.file) if counts.exists() else None
    engine = Engine(model, wishes, progress=progress)
    try:
        found = record(engine, model.tokenizer.encode(content), sizes, steps, progress)
    finally:
        engine.close()
    found = found if known is None else known.merged(found)
    found.save(counts)
    progress.say([f"wrote {counts}"])
    return {"path": counts, "model": model.file.path, "batches": [_facts(found, batch) for batch in found.batches]}


def lines(facts: Mapping[str, Any]) -> list[str]:
    """What was found, for people."""
    said = [f"{facts['model']}: neurons live, by batch size"]
    for row in facts["batches"]:
        said.append(
            f"  {row['batch']}: {100 * row['live_share']:.1f} % a step over {row['steps']:,} steps; half of the uses "
            f"are those of {100 * row['half_of_uses']:.1f} % of the neurons, {100 * row['never']:.1f} % were never live"
        )
    return said


def _facts(found: "Activations", batch: int) -> dict[str, Any]:
    import numpy as np

    live = np.sort(found.live[batch].ravel())[::-1]
    sums = np.cumsum(live)
    half = int(np.searchsorted(sums, sums[-1] / 2)) + 1 if sums[-1] else 0
    return {
        "batch": batch,
        "steps": found.steps[batch],
        "live_share": float(live.mean()) / found.steps[batch],
        "half_of_uses": half / live.size,
        "never": float((live == 0).mean()),
    }


def _sizes(batches: str) -> list[int]:
    try:
        return sorted({int(size) for size in batches.split(",")})
    except ValueError:
        raise UsageError(f"batch sizes {batches!r}: give numbers with commas between them, as 1,2,4") from None
