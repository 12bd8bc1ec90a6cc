"""Tiny sparse models whose live neurons can be learnt, and texts for them."""

from pathlib import Path
from statistics import NormalDist
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray
from tiny_models import write_tiny

from coterie.models.gguf_file import GGUFFile

CONSTANT = 8.0
LIVE = 0.05  # of all neurons
RANK = 28  # of Gate, beside the thresholds: more than a predictor of 32 units copies
SIZES: dict[str, Any] = {"dim": 64, "ffn": 512, "layers": 2, "tied": False}


def write_learnable(path: Path, *, activation: str = "relu", formats: str = "Q8_0", seed: int = 0, **more: Any) -> Path:
    """A sparse model in F16, Q8_0 or F32 whose Gates have a low rank and a threshold each.

    Coordinate 0 of the hidden state is a constant: the embedding has it, and no layer adds to it. Through it a Gate row
    gets its threshold (as benchmarks/weights.py does).
    """
    write_tiny(path, sparse=True, activation=activation, formats=formats, seed=seed, **(SIZES | more))
    rng = np.random.default_rng(seed)
    with GGUFFile(path) as file:
        values = {name: file.floats(name) for name, tensor in file.tensors.items() if tensor.rows > 1}
        values["token_embd.weight"][:, 0] = CONSTANT
        for name, matrix in values.items():
            if name.endswith("attn_output.weight"):
                matrix[0] = 0
            elif name.endswith("ffn_down_t.weight"):
                matrix[:, 0] = 0
            elif name.endswith("ffn_gate.weight"):
                matrix[:] = gate(rng, *matrix.shape)
        write(file, values)
    return path


def gate(rng: np.random.Generator, neurons: int, dim: int) -> NDArray[np.float32]:
    """Rows of rank RANK, whose outputs have deviation 1, less thresholds that LIVE of them exceed on average."""
    basis, _ = np.linalg.qr(rng.standard_normal((dim - 1, RANK)))
    factors = rng.standard_normal((neurons, RANK))
    rows = np.empty((neurons, dim), np.float32)
    rows[:, 1:] = factors / np.linalg.norm(factors, axis=1, keepdims=True) @ basis.T
    shares = LIVE * np.linspace(0.2, 1.8, neurons)
    rows[:, 0] = [NormalDist().inv_cdf(share) / CONSTANT for share in shares]
    return rows


def write(file: GGUFFile, values: dict[str, NDArray[np.float32]]) -> None:
    """Matrices in place of those that a GGUF has, in its formats."""
    with open(file.path, "r+b") as out:
        for name, matrix in values.items():
            tensor = file.tensors[name]
            out.seek(tensor.offset)
            out.write(quantize(matrix, gguf.GGMLQuantizationType[tensor.format]).tobytes())


def some_text(characters: int, seed: int = 0) -> str:
    """Printable ASCII at random: nothing of it is learnt by heart."""
    return bytes(np.random.default_rng(seed).integers(33, 127, characters, dtype=np.uint8)).decode()
