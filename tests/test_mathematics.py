"""Our own exp, activations, cosine and sine against better numbers."""

from collections.abc import Callable
from decimal import Decimal, getcontext

import numpy as np
import pytest
from harness import lanewise
from reference import Doubles, Floats

from coterie.kernels import mathematics
from coterie.models.rope import cos_sin, frequencies, rope_table
from coterie.models.spec import Rope


@pytest.fixture(scope="module")
def functions() -> dict[str, Callable[[Floats], Floats]]:
    return {
        **{name: lanewise(gate) for name, (gate, _) in mathematics.ACTIVATIONS.items()},
        "exp": lanewise(mathematics.exp),
    }


def ulps(got: Floats, exact: Doubles) -> float:
    """The largest error in units in the last place of float32."""
    units = np.spacing(np.maximum(np.abs(exact), 2.0**-126).astype(np.float32)).astype(np.float64)
    return float((np.abs(got - exact) / units).max())


GRID = np.unique(np.concatenate([np.linspace(-87, 88, 2_000_001), np.geomspace(1e-30, 87, 100_001), [0.0]]))
GRID = np.unique(np.concatenate([GRID, -GRID[(GRID > 0) & (GRID < 87)]])).astype(np.float32)


def test_exp_is_within_two_units(functions: dict[str, Callable[[Floats], Floats]]) -> None:
    assert ulps(functions["exp"](GRID), np.exp(GRID.astype(np.float64))) <= 2


def test_exp_at_special_values(functions: dict[str, Callable[[Floats], Floats]]) -> None:
    top = functions["exp"](np.array([88], np.float32))[0]
    x = np.array([0, -0.0, -np.inf, -87.00001, -1e30, 88.1, 1e30, np.inf, np.nan], np.float32)
    assert functions["exp"](x).tolist() == [1, 1, 0, 0, 0, top, top, top, top]  # NaN counts as large


def silu(x: Doubles) -> Doubles:
    exact: Doubles = x / (1 + np.exp(-x))
    return exact


def gelu(x: Doubles) -> Doubles:
    exact: Doubles = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return exact


def test_activations_are_near_the_exact_functions(functions: dict[str, Callable[[Floats], Floats]]) -> None:
    x = GRID.astype(np.float64)
    assert ulps(functions["silu"](GRID), silu(x)) <= 4
    middle = np.abs(x) <= 4  # beyond, the error of z in exp(-2z) counts z-fold
    assert ulps(functions["gelu"](GRID[middle]), gelu(x)[middle]) <= 64
    np.testing.assert_allclose(functions["gelu"](GRID), gelu(x), rtol=2e-6, atol=1e-7)
    for name in ("relu", "drelu"):
        np.testing.assert_array_equal(functions[name](GRID), np.maximum(GRID, 0))
    np.testing.assert_array_equal(functions["relu2"](GRID), np.square(np.maximum(GRID, 0)))


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_activations_at_special_values(name: str, functions: dict[str, Callable[[Floats], Floats]]) -> None:
    x = np.array([0, 100, 1e10, np.inf, -100, -1e10, np.nan], np.float32)
    got = functions[name](x)
    assert got[:4].tolist() == [0, 100, np.float32(1e10), np.inf]
    assert np.abs(got[4:6]).max() < 1e-27
    assert np.isnan(got[6])


# --- rotary tables -----------------------------------------------------------------------------------

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


def exact_cos_sin(angle: Decimal) -> tuple[Decimal, Decimal]:
    """By Taylor's series, to 50 digits."""
    x = angle % (2 * PI)
    sums, term = [Decimal(0), Decimal(0)], Decimal(1)
    for i in range(80):
        sums[i % 2] += term if i % 4 < 2 else -term
        term *= x / (i + 1)
    return sums[0], sums[1]


def test_cos_sin_against_fifty_digits() -> None:
    getcontext().prec = 60
    rng = np.random.default_rng(8)
    angles = np.concatenate([rng.uniform(0, 1.5e6, 300), np.arange(60) * (np.pi / 4), [0.0, 1e-12, 131071.0]])
    cos, sin = cos_sin(angles)
    for angle, c, s in zip(angles, cos, sin, strict=True):
        exact = exact_cos_sin(Decimal(float(angle)))
        assert abs(Decimal(float(c)) - exact[0]) < Decimal(2) ** -51
        assert abs(Decimal(float(s)) - exact[1]) < Decimal(2) ** -51


@pytest.mark.parametrize(
    "rope",
    [Rope(10_000.0, 64), Rope(1e6, 256), Rope(5e5, 32, scale=0.125, factors=tuple(np.linspace(1, 8, 16).tolist()))],
    ids=["llama", "gemma3", "scaled"],
)
def test_rope_table_against_fifty_digits(rope: Rope) -> None:
    getcontext().prec = 60
    exact_frequencies = []
    for i in range(rope.dims // 2):
        power = (Decimal(rope.base).ln() * (-2 * i) / rope.dims).exp()
        exact_frequencies.append(power * Decimal(rope.scale) / Decimal(rope.factors[i] if rope.factors else 1))
    np.testing.assert_allclose(frequencies(rope), [float(f) for f in exact_frequencies], rtol=3e-16)
    for first in (0, 1000, 131_000):
        table = rope_table(rope, first, first + 2)
        for position, i in ((first, 0), (first + 1, 1), (first + 1, rope.dims // 2 - 1)):
            exact = exact_cos_sin(position * exact_frequencies[i])
            for got, wanted in zip(table[position - first, :, i], exact, strict=True):
                # a float32 in [-1, 1], and an angle rounded to float64
                error = abs(Decimal(float(got)) - wanted)
                assert error <= Decimal(2) ** -25 + position * Decimal(2) ** -52
