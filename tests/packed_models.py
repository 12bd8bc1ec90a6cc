"""Tiny packed models."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exact_models import CASES, CONTEXT
from tiny_models import write_tiny

from coterie.engine import Engine
from coterie.errors import PlanError
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes
from coterie.scheduler.residency import least_budget
from coterie.sizes import Share
from coterie.storage import runs
from coterie.storage.direct import sector_bytes
from coterie.storage.flash_writer import pack_model
from coterie.storage.runs import lay_out_runs


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


@contextmanager
def streaming(
    path: Path, share: float | None, threads: int = 2, trace: Path | None = None, **wishes: Any
) -> Iterator[Engine]:
    """An engine with that share of the weights resident, or as little as can be."""
    model = open_model(path)
    wanted = Wishes(threads=threads, context=CONTEXT, memory=None if share is None else Share(share), **wishes)
    try:
        engine = Engine(model, wanted, trace=trace)
    except PlanError:
        engine = Engine(open_model(path), replace(wanted, memory=smallest(model)), trace=trace)
    try:
        yield engine
    finally:
        engine.close()


def smallest(model: Any) -> Share:
    """The smallest share that can run."""
    runs = lay_out_runs(model.file.tensors, model.spec)
    size = sum(tensor.nbytes for tensor in model.file.tensors.values())
    return Share(min(1.0, (least_budget(runs, sector_bytes(model.file.path)) + 1) / size))


def write_model(folder: Path, name: str) -> Path:
    """One of the tiny models, with more layers."""
    return write_tiny(folder / f"{name}.gguf", context=CONTEXT, seed=len(name), **(CASES[name] | {"layers": 10}))


def packed(folder: Path, name: str) -> Path:
    return pack(write_model(folder, name))
