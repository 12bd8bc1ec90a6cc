"""Tiny models for the exact class, and their logits; run as a program, it writes those of this process's path.

python exact_models.py FOLDER OUT.npz: for each model in FOLDER, float32[2, n, vocab]: one-shot, then decoded.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference import FORMATS
from tiny_models import write_tiny

from coterie.engine import Engine
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes

Floats = NDArray[np.float32]
CONTEXT = 2560  # ten KV blocks: nine sequences live at once


def _case(architecture: str, name: str, **more: Any) -> dict[str, Any]:
    wide = name.endswith("K")
    sizes = {"dim": 256, "ffn": 256, "head_dim": 64} if wide else {"dim": 64, "ffn": 96, "head_dim": 16}
    return {"architecture": architecture, "formats": name, **sizes, **more}


def _mixed(attention: Sequence[str], gate: str, up: str, down: str, embedding: str, output: str = "") -> dict[str, str]:
    roles = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd", "output")
    return dict(zip(roles, (*attention, gate, up, down, embedding, output or embedding), strict=True))


WIDE = {"dim": 256, "ffn": 512, "head_dim": 64}
CASES: dict[str, dict[str, Any]] = {
    **{f"{a} {name}": _case(a, name) for a in ("llama", "gemma3") for name in FORMATS},
    "llama as Q4_K_M": {
        "architecture": "llama",
        "formats": _mixed(("Q4_K", "Q4_K", "Q6_K", "Q4_K"), "Q4_K", "Q4_K", "Q6_K", "Q6_K"),
        **WIDE,
    },
    "gemma3 270M as Q4_K_M": {  # rows of 640 columns hold no K-quants: the small formats stand in
        "architecture": "gemma3",
        "formats": _mixed(("Q5_0", "Q5_0", "Q8_0", "Q5_0"), "Q5_0", "Q5_0", "Q6_K", "Q8_0"),
        **WIDE,
    },
    "floats and integers": {
        "architecture": "llama",
        "formats": _mixed(("Q4_0", "F16", "Q8_0", "BF16"), "F32", "F16", "Q4_0", "F16", "Q4_1"),
        "tied": False,
        "rope_factors": True,
    },
    "integers and floats": {
        "architecture": "gemma3",
        "formats": _mixed(("F32", "Q5_0", "Q5_0", "Q4_0"), "Q4_0", "Q8_0", "BF16", "Q8_0", "F32"),
        "tied": False,
        "kv_heads": 1,
    },
    "odd sizes": {
        "architecture": "llama",
        "formats": "F16",
        "dim": 72,
        "ffn": 100,
        "vocab": 301,
        "heads": 6,
        "head_dim": 32,
    },
    "clusters of 256, rows of 64": {
        "architecture": "llama",
        "formats": _mixed(("Q4_0",) * 4, "Q4_0", "Q4_0", "Q4_K", "Q4_0"),
        "ffn": 256,
    },
}


SPARSE: dict[str, dict[str, Any]] = {  # single neurons, Gate first
    "sparse Q4_0": {"architecture": "llama", "formats": "Q4_0", "activation": "relu", "sparse": True},
    "sparse Q8_0": {
        "architecture": "bamboo",
        "formats": "Q8_0",
        "sparse": True,
        "dim": 576,
        "heads": 9,
        "head_dim": 64,
        "kv_heads": 3,
    },
    "sparse F16": {"architecture": "llama", "formats": "F16", "activation": "relu2", "sparse": True, "ffn": 130},
}
ALL = CASES | SPARSE


def write_model(folder: Path, name: str) -> Path:
    return write_tiny(folder / f"{name}.gguf", context=CONTEXT, seed=len(name), **ALL[name])


def some_tokens(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 300, n)]


@contextmanager
def opened(path: Path, threads: int = 1) -> Iterator[Engine]:
    engine = Engine(open_model(path), Wishes(threads=threads, context=CONTEXT))
    try:
        yield engine
    finally:
        engine.close()


def prefilled(engine: Engine, tokens: Sequence[int], chunks: Sequence[int] = ()) -> Floats:
    """Logits of all tokens by prefill steps of these sizes, and one for the rest."""
    parts, first = list[Floats](), 0
    with closing(engine.sequence()) as sequence:
        for size in (*chunks, len(tokens) - sum(chunks)):
            parts.append(engine.prefill(sequence, tokens[first : first + size], range(size)))
            first += size
    return np.concatenate(parts)


def decoded(engine: Engine, tokens: Sequence[int]) -> Floats:
    """Logits of all tokens, one after the other."""
    with closing(engine.sequence()) as sequence:
        return np.concatenate([engine.decode([sequence], [token]).copy() for token in tokens])


def main(folder: Path, out: Path) -> None:
    results: dict[str, Any] = {}
    for path in sorted(folder.glob("*.gguf")):
        with opened(path, threads=2) as engine:
            tokens = some_tokens(40)
            results[path.stem] = np.stack([prefilled(engine, tokens), decoded(engine, tokens)])
    np.savez(out, **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
