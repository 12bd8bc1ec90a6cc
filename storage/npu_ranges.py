"""Activation ranges of a model, kept in the cache: found once by the oracle, which takes its time."""

from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from coterie.errors import ModelError
from coterie.models.calibration_text import TEXT
from coterie.models.load import ARCHITECTURES, Model
from coterie.models.part import model_identity
from coterie.models.ranges import LARGEST_FILE, RangeFinder, Ranges
from coterie.paths import cache_dir, replace_file

TOKENS = 512  # of the text at most


def model_ranges(
    model: Model, tokens: int = TOKENS, text: str = TEXT, say: Callable[[str], None] = lambda line: None
) -> Ranges:
    """The ranges of a whole dense model, from the cache or by the oracle. `say` gets a line where it computes: about
    2 * parameters * tokens operations in numpy. Raises UsageError for a packed model, ModelError for damaged or
    sparse ones."""
    source, spec = model.source, model.spec
    if spec.part is not None or spec.sparse:
        raise ModelError(f"{source.path.name}: ranges are found on whole dense models")
    identity = model_identity(source)
    used = model.tokenizer.encode(text)[:tokens]
    path = ranges_path(identity, used)
    found = _read(path, identity, model)
    if found is not None:
        return found
    say(f"finding activation ranges of {source.path.name} on {len(used)} tokens (once)")
    finder = RangeFinder(spec)
    ARCHITECTURES[spec.architecture].forward(spec, source.floats, used, finder.network, finder.product)
    found = finder.ranges(identity)
    with suppress(OSError):  # found again at the next start
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, found.to_bytes())
    return found


def ranges_path(identity: str, tokens: list[int]) -> Path:
    """Where the ranges of a model on these tokens lie."""
    return cache_dir() / "ranges" / f"{identity}-{sha256(repr(tokens).encode()).hexdigest()[:8]}.ranges"


def _read(path: Path, identity: str, model: Model) -> Ranges | None:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            return None
        return Ranges.from_bytes(data, path.name, identity, model.spec)
    except (OSError, ModelError):
        return None
