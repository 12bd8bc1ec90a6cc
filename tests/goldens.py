"""Rewrite the outputs that tests compare with (`make goldens`): the oracle's, from SmolLM2 in the user's cache.

Only what must not change is kept here: a difference after a rewrite is a change of the oracle, and needs a reason.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie import fetch
from coterie.models.llama import Floats, forward
from coterie.opening import open_model

MODEL = "smollm2"
TEXT = (
    "Among hackers, though, slang has a subtler aspect, paralleled perhaps in the slang of jazz musicians and some "
    "kinds of fine artists but hard to detect in most technical or scientific cultures; parts of it are code for "
    "shared states of consciousness. There is a whole range of altered states and problem-solving mental stances "
    "basic to high-level hacking which don't fit into conventional linguistic reality any better than a Coltrane "
    "solo or one of Maurits Escher's surreal trompe l'oeil compositions, and hacker slang encodes these subtleties "
    "in many unobvious ways."
)
GOLDEN = Path(__file__).parent / "data" / "smollm2_logits.json"


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """float64[n, vocab] natural logarithms of the probabilities."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def main() -> None:
    model = open_model(fetch.pull(MODEL))

    tokens = model.tokenizer.encode(TEXT)
    chances = log_softmax(forward(model.spec, model.source.floats, tokens))
    order = np.argsort(-chances, axis=-1, kind="stable")[:, :2]
    highest = np.take_along_axis(chances, order, axis=-1)
    golden = {
        "tokens": tokens,
        "top": order[:, 0].tolist(),
        "top_log_probability": highest[:, 0].round(5).tolist(),
        "margin": (highest[:, 0] - highest[:, 1]).round(5).tolist(),
        "next_log_probability": chances[np.arange(len(tokens) - 1), tokens[1:]].round(5).tolist(),
    }
    lines = ",\n".join(f' "{name}": {json.dumps(values)}' for name, values in golden.items())
    GOLDEN.write_text("{\n" + lines + "\n}\n")
    model.close()


if __name__ == "__main__":
    main()
