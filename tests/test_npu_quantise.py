"""Few bits for NPUs: what is rounded how, and that outliers apart are worth it (checklist, row 22)."""

from collections.abc import Iterator

import numpy as np
import pytest

from coterie import fetch
from coterie.models.load import open_source
from coterie.models.source import WeightSource
from coterie.storage.npu_block import KINDS, Form, Seen, make_block
from coterie.storage.npu_quantise import (
    GROUP,
    SCHEMES,
    Floats,
    Quantised,
    Scheme,
    clipped_away,
    eight_bits,
    eight_bits_in_groups,
    fit_rounding,
    four_bits,
    four_bits_and_outliers,
    four_bits_in_groups,
    product,
    quantise,
    rounded,
)

MODEL = "smollm2"


def error(weights: Floats, made: Quantised) -> float:
    """Squared, of the weights' squares."""
    return float(np.square(weights - made.floats()).sum() / np.square(weights).sum())


def planted(seed: int, rows: int = 96, cols: int = 256, loud: int = 9) -> Floats:
    """Random weights with some columns of ten times the size, as real ones have."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, cols)).astype(np.float32)
    weights[:, rng.permutation(cols)[:loud]] *= 10
    return weights


@pytest.mark.parametrize("seed", range(5))
def test_outliers_apart_are_far_better_than_plain_int4(seed: int) -> None:
    weights = planted(seed)
    plain, apart, groups = (
        error(weights, f(weights)) for f in (four_bits, four_bits_and_outliers, four_bits_in_groups)
    )
    assert groups < plain
    assert apart < 0.5 * plain


@pytest.fixture(scope="module")
def smollm2() -> Iterator[WeightSource]:
    pulled = {model.name: model.path for model in fetch.list_models()}
    if MODEL not in pulled:
        pytest.skip(f"{MODEL} is not in the cache (coterie pull {MODEL})")
    source = open_source(pulled[MODEL])
    yield source
    source.close()


@pytest.mark.parametrize("layer", [0, 15, 29])
@pytest.mark.parametrize("role", ["attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"])
def test_so_they_are_on_real_weights(smollm2: WeightSource, layer: int, role: str) -> None:
    """A sixteenth of the columns takes more than a third of the error away, and at least half of what groups do; in the
    first layer's attention more than groups."""
    weights = smollm2.floats(f"blk.{layer}.{role}.weight")
    plain, apart, groups = (
        error(weights, f(weights)) for f in (four_bits, four_bits_and_outliers, four_bits_in_groups)
    )
    assert groups < plain
    assert apart < 0.65 * plain
    assert plain - apart > 0.5 * (plain - groups)


def test_columns_that_meet_large_activations_are_the_ones_kept() -> None:
    weights = np.random.default_rng(1).standard_normal((32, 128)).astype(np.float32)
    importance = np.ones(128, np.float32)
    importance[[3, 77]] = 1000
    made = four_bits_and_outliers(weights, importance=importance)
    assert {3, 77} <= set(made.outliers.index.tolist())
    assert len(made.outliers.index) == 32
    assert not made.values[:, made.outliers.index].any()
    assert abs(made.values).max() <= 7


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_within_half_a_step(scheme: Scheme) -> None:
    """But for those that are clipped in favour of all others."""
    weights = np.random.default_rng(2).standard_normal((40, 96)).astype(np.float32)
    made = quantise(weights, scheme)
    steps = np.repeat(np.abs(made.scales), 96 // made.scales.shape[1], axis=1)
    off = np.abs(weights - made.floats()) > 0.5001 * steps
    assert off.mean() < (0.05 if scheme == "w4a8-outliers" else 1 / GROUP + 0.01 if scheme == "w4a16" else 1e-9)


def test_weights_of_q4_0_and_q8_0_are_kept_exactly_in_groups() -> None:
    from coterie.models.dequant import dequantise
    from coterie.models.dequant import quantise as coded

    weights = dequantise(coded(planted(3), "Q4_0"), "Q4_0")
    assert (four_bits_in_groups(weights).floats() == weights).all()
    weights = dequantise(coded(planted(3), "Q8_0"), "Q8_0")
    assert (eight_bits_in_groups(weights).floats() == weights).all()


def test_one_scale_for_all_or_one_a_row() -> None:
    weights = planted(4)
    assert len(np.unique(eight_bits(weights, per_tensor=True).scales)) == 1
    assert error(weights, eight_bits(weights)) < error(weights, eight_bits(weights, per_tensor=True)) < 2e-3


def test_zeros_stay_zeros() -> None:
    nothing = np.zeros((8, 64), np.float32)
    for scheme in SCHEMES:
        assert not quantise(nothing, scheme).floats().any()
    assert fit_rounding(np.zeros(64, np.float32)).scale == 1


def test_groups_are_whole() -> None:
    with pytest.raises(ValueError, match="70 columns are not whole groups of 32"):
        quantise(np.ones((4, 70), np.float32), "w4a16")


def loud_input(n: int = 50, width: int = 128) -> Floats:
    x = np.random.default_rng(5).standard_normal((n, width)).astype(np.float32)
    x[:, 17] *= 40
    x[0, 90] *= 500
    return x


def test_hot_channels_keep_their_range_and_others_their_steps() -> None:
    """llm.npu's shadow: what is clipped of the loudest channels is added by a second product (checklist, row 40)."""
    x, weights = loud_input(), np.random.default_rng(6).standard_normal((64, 128)).astype(np.float32)
    peaks, exact = np.abs(x).max(axis=0), x @ weights.T
    hot, all_in_range = fit_rounding(peaks, margin=1), fit_rounding(peaks, hot=0, margin=1)
    assert {17, 90} <= set(hot.hot.tolist())
    assert hot.scale < all_in_range.scale / 20
    apart = product(x, quantise(weights, "w8a8", hot.hot), hot)
    together = product(x, quantise(weights, "w8a8"), all_in_range)
    assert np.square(apart - exact).sum() < 0.05 * np.square(together - exact).sum()


def test_clipped_and_clipped_away_are_the_whole() -> None:
    x, scale = loud_input(), 0.02
    kept = np.clip(x, np.float32(-128 * scale), np.float32(127 * scale))
    assert (kept + clipped_away(x, scale) == x).mean() > 0.99
    assert np.abs(kept + clipped_away(x, scale) - x).max() < 1e-4
    assert np.abs(kept - rounded(x, scale) * np.float32(scale)).max() <= 0.5001 * scale


def test_no_channel_is_hot_where_all_are_alike() -> None:
    assert not len(fit_rounding(np.linspace(1, 1.2, 100, dtype=np.float32)).hot)
    assert not len(fit_rounding(np.ones(16, np.float32)).hot)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_block_computes_the_same(kind: str, scheme: Scheme) -> None:
    rng = np.random.default_rng(7)
    dim, hidden, wide = 64, 128, 96
    shapes = [(hidden, dim), (hidden, dim), (dim, hidden)] if kind == "ffn" else [(dim, dim)]
    weights = [rng.standard_normal(shape).astype(np.float32) / 8 for shape in shapes]
    seen = [Seen(np.full(width, 3, np.float32), np.ones(width, np.float32)) for width in (dim, hidden)]
    activation = "gelu" if kind == "ffn" else None
    x = rng.standard_normal((8, dim)).astype(np.float32)
    narrow = make_block(Form(kind, 0, 8, dim, dim, scheme, activation), weights, seen)  # type: ignore[arg-type]
    padded = make_block(Form(kind, 0, 8, wide, wide, scheme, activation), weights, seen)  # type: ignore[arg-type]
    y = padded.reference(np.pad(x, ((0, 0), (0, wide - dim)), constant_values=0))
    np.testing.assert_allclose(y[:, :dim], narrow.reference(x), rtol=1e-5, atol=1e-5)
    assert not y[:, dim:].any()
    assert narrow.digest() != padded.digest()


def test_a_digest_is_of_weights_and_ranges() -> None:
    weights, seen = [planted(8, 32, 64)], Seen(np.ones(64, np.float32), np.ones(64, np.float32))
    form = Form("out", 0, 8, 64, 32, "w8a8")
    first = make_block(form, weights, [seen]).digest()
    assert first == make_block(form, weights, [seen]).digest()
    other = [weights[0] * np.float32(1.001)]
    wider = Seen(seen.peaks * 2, seen.squares)
    assert len({first, make_block(form, other, [seen]).digest(), make_block(form, weights, [wider]).digest()}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "silu"}, "an ffn has an activation"),
        ({"n": 0}, "at least 1"),
        ({"folded": (3, 4)}, "8 rows are not 3 x 4"),
        ({"folded": (2, 4), "swapped": True}, "has its rows as they are"),
    ],
)
def test_forms_that_make_no_sense(change: dict[str, object], message: str) -> None:
    form: dict[str, object] = {
        "kind": "out", "layer": 0, "n": 8, "width_in": 64, "width_out": 64, "scheme": "w8a8",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Form(**(form | change))  # type: ignore[arg-type]


def test_weights_that_do_not_fit_their_form() -> None:
    with pytest.raises(ValueError, match=r"cannot be padded to 64 x 64"):
        make_block(Form("out", 0, 8, 64, 64, "w4a16"), [np.ones((96, 64), np.float32)], [None])
    with pytest.raises(ValueError, match="it needs their ranges"):
        make_block(Form("out", 0, 8, 64, 64, "w8a8"), [np.ones((64, 64), np.float32)], [None])
