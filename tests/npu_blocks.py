"""Random blocks of the NPU unit, and how far a graph may be from their reference."""

import numpy as np

from coterie.models.spec import Activation
from coterie.storage.npu_block import Block, Form, Kind, Seen, make_block
from coterie.storage.npu_quantise import FLOAT_SCHEMES, Floats, Scheme

LOUD, QUIET = 5, 1.5  # a channel far out of the others' range; activations beyond what calibration saw


def random_block(
    kind: Kind,
    scheme: Scheme,
    activation: Activation | None = None,
    *,
    n: int = 24,
    dim: int = 70,
    hidden: int = 100,
    padded: int = 96,
    seed: int = 0,
    **form: object,
) -> tuple[Block, Floats]:
    """A block with `padded` columns in and out, of which `dim` are used (w4a16, w8a16: all in, whole groups), and an
    input float32[n, padded] with one loud channel, that goes beyond the ranges in a few places."""
    rng = np.random.default_rng(seed)
    if scheme in FLOAT_SCHEMES:
        dim = hidden = padded
    activation = activation or ("silu" if kind == "ffn" else None)
    shapes = (
        [(hidden, dim), (hidden, dim), (dim, hidden)] if kind == "ffn" else [(dim // 2, dim), (dim - dim // 2, dim)]
    )
    weights = [(rng.standard_normal(shape) / shape[1] ** 0.5).astype(np.float32) for shape in shapes]
    x = np.zeros((n, padded), np.float32)
    x[:, :dim] = rng.standard_normal((n, dim))
    x[:, LOUD] *= 30
    peaks = np.abs(x[:, :dim]).max(axis=0) / QUIET / 1.2
    inner = np.full(hidden, 2, np.float32)
    inner[LOUD] = 40
    seen = [Seen(peaks, peaks**2), Seen(inner, inner**2)]
    made = Form(kind, 3, n, padded, padded, scheme, activation, **form)  # type: ignore[arg-type]
    return make_block(made, weights, seen), x


def tolerance(block: Block, half: bool = False) -> float:
    """The largest difference that rounding explains, for outputs of magnitude about 1 to 50.

    int8: sums of integers are exact, and scaled once per product: float32's 2 ** -24, a few times. Down's input may
    fall on the other side of a tie where the activation differs in its last bit: a step of it times a weight, and two
    such in a row of an output are allowed. Float activations: float32 sums in another order; with `half` bfloat16's
    2 ** -9 per factor, twice a product, over what a sum of a hundred random terms gives, or as much by rounding.
    """
    if block.form.scheme in FLOAT_SCHEMES:
        return 0.05 if half else 1e-4
    floor = 1e-4
    if block.form.kind == "ffn" and block.roundings[1] is not None:
        down = block.matrices[1]
        largest = float(np.abs(down.floats()).max())
        return floor + 2 * block.roundings[1].scale * largest
    return floor
