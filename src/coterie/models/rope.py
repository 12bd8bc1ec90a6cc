"""Tables of cosines and sines for rotary embeddings, the same bits on every machine.

Libraries' sin, cos and pow differ in the last place between versions and instruction sets, and a token must
not depend on the host; so frequencies come from decimal arithmetic, and angles go through our own sine.
"""

from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt

from coterie.models.spec import Rope

Doubles = npt.NDArray[np.float64]
ROWS = 256  # positions of a table computed at a time

# pi/2 in three parts of 33 bits, so that k times a part is exact for k < 2**20 (fdlibm's constants)
HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
SINE = (-1 / 6, 8.33333333332248946124e-03, -1.98412698298579493134e-04, 2.75573137070700676789e-06,
        -2.50507602534068634195e-08, 1.58969099521155010221e-10)  # fmt: skip
COSINE = (4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
          -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11)  # fmt: skip


def _polynomial(coefficients: tuple[float, ...], x: Doubles) -> Doubles:
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


def cos_sin(angles: Doubles) -> tuple[Doubles, Doubles]:
    """Cosine and sine of float64 angles below 1.6 million, by IEEE additions and multiplications only."""
    k = np.rint(angles * (2 / np.pi))
    r = ((angles - k * HALF_PI[0]) - k * HALF_PI[1]) - k * HALF_PI[2]
    z = r * r
    sine = r + r * z * _polynomial(SINE, z)
    cosine = 1 - 0.5 * z + z * z * _polynomial(COSINE, z)
    quadrant = k.astype(np.int64) & 3
    swap, flip_cos, flip_sin = quadrant & 1 == 1, (quadrant == 1) | (quadrant == 2), quadrant >= 2
    c, s = np.where(swap, sine, cosine), np.where(swap, cosine, sine)
    return np.where(flip_cos, -c, c), np.where(flip_sin, -s, s)


def frequencies(rope: Rope) -> Doubles:
    """Angle per position of each pair, float64[dims / 2]."""
    with localcontext() as context:
        context.prec = 40
        log_base = Decimal(rope.base).ln()
        values = [(log_base * (-2 * i) / rope.dims).exp() for i in range(rope.dims // 2)]
        divisors = rope.factors or (1.0,) * len(values)
        scaled = [float(v * Decimal(rope.scale) / Decimal(d)) for v, d in zip(values, divisors, strict=True)]
    return np.array(scaled, np.float64)


def rope_table(rope: Rope, first: int, last: int) -> npt.NDArray[np.float32]:
    """float32[last - first][cos, sin][dims / 2] for positions `first` to `last` (excluded)."""
    angles = np.arange(first, last, dtype=np.float64)[:, None] * frequencies(rope)
    return np.stack(cos_sin(angles), axis=1).astype(np.float32)


def fill_rope_table(rope: Rope, out: npt.NDArray[np.float32]) -> None:
    """`rope_table` of positions 0 to n - 1 into float32[n][2][dims/2], some at a time."""
    for first in range(0, len(out), ROWS):
        last = min(len(out), first + ROWS)
        out[first:last] = rope_table(rope, first, last)
