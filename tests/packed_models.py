"""Tiny packed models."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coterie.opening import open_model
from coterie.storage import runs
from coterie.storage.flash_writer import pack_model


@contextmanager
def small_extents() -> Iterator[None]:
    """Tiny models have many extents, as large ones have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SMALL", 2 * runs.PAGE)
        patch.setattr(runs, "LOOKUP", 1)
        yield


def pack(path: Path) -> Path:
    """Pack a GGUF beside it."""
    model, out = open_model(path), path.with_suffix(".coterie")
    pack_model(model, out, lambda label, done, total: None)
    model.close()
    return out
