"""Tiny sparse models, packed, and what engines make of their neurons."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from exact_models import CONTEXT
from packed_models import pack
from tiny_models import write_tiny

from coterie.actors.neurons import NeuronUnit
from coterie.engine import Engine
from coterie.storage.weights import SparseFFN

LARGE: dict[str, Any] = {"dim": 512, "heads": 8, "head_dim": 64, "ffn": 1000, "layers": 4}


def write_gated(path: Path) -> Path:
    """A packed model whose Gates decide."""
    return pack(write_tiny(path, sparse=True, formats="Q4_0", activation="relu", context=CONTEXT, **LARGE))


def write_predicted(path: Path) -> Path:
    """One with predictors that are never wrong."""
    return pack(
        write_tiny(path, sparse=True, oracle=True, formats="Q4_0", activation="drelu", context=CONTEXT, **LARGE)
    )


def reader_of(engine: Engine) -> NeuronUnit:
    """The unit that reads single neurons."""
    assert engine.stream is not None
    assert engine.stream.neurons is not None
    return engine.stream.neurons


def addresses_of(engine: Engine, layer: int) -> npt.NDArray[np.int64]:
    """Where a layer's neurons are in memory, as lanes see it: 0 where they are not."""
    ffn = engine.layout.weights.layers[layer].ffn
    assert isinstance(ffn, SparseFFN)
    addresses: npt.NDArray[np.int64] = engine.arena.numpy(ffn.addresses)
    return addresses
