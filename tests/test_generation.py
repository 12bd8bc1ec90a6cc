"""Choosing tokens and streaming text, against straightforward models of both."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coterie.errors import UnitError, UsageError
from coterie.generation import Sampler, TextStream
from coterie.sampling import SamplingOptions

Floats = NDArray[np.float32]

OFF = SamplingOptions(temperature=1, top_k=0, top_p=1, min_p=0, seed=1)


def floats(*values: float) -> Floats:
    return np.array(values, dtype=np.float32)


def kept_by_llama_cpp(logits: Floats, options: SamplingOptions) -> list[int]:
    """Tokens that survive the filters, one filter after the other as llama.cpp does it."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if options.top_k > 0:
        ranked = ranked[: options.top_k]
    weights = np.exp(logits[ranked].astype(np.float64) - float(logits.max()))
    if options.top_p < 1:
        share = np.cumsum(weights) / weights.sum()
        ranked = ranked[: next((i for i, s in enumerate(share) if s >= options.top_p), len(ranked)) + 1]
    return [i for i in ranked if np.exp(float(logits[i]) - float(logits.max())) >= options.min_p]


def drawn(logits: Floats, options: SamplingOptions, times: int) -> list[int]:
    sampler = Sampler(options)
    return [sampler.pick(logits, []) for _ in range(times)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.8"),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 1.01),
        ("top_p", -0.01),
        ("min_p", 2),
        ("repeat_penalty", 0),
        ("repeat_penalty", 1e300),
        ("repeat_last_n", -2),
        ("seed", -2),
        ("seed", 2**64),
        ("seed", 1.5),
    ],
)
def test_an_option_that_makes_no_sense_is_named(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        dataclasses.replace(OFF, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [None, -1])
def test_without_a_seed_one_is_drawn_and_known(seed: int | None) -> None:
    first, second = SamplingOptions(seed=seed).seed, SamplingOptions(seed=seed).seed
    assert first is not None
    assert 0 <= first < 2**32
    assert first != second


def test_numpy_numbers_are_numbers() -> None:
    SamplingOptions(temperature=np.float32(0.5), top_k=np.int64(3))  # type: ignore[arg-type]


def test_greedy_takes_the_lowest_of_equals() -> None:
    greedy = Sampler(SamplingOptions(temperature=0, top_k=0))
    assert greedy.pick(floats(1, 5, 5, 2), []) == 1
    assert greedy.pick(floats(-np.inf, -np.inf, -3), []) == 2


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_named(temperature: float, bad: float) -> None:
    with pytest.raises(UnitError, match="token 2"):
        Sampler(SamplingOptions(temperature=temperature)).pick(floats(0, 1, bad, 3), [])


def test_all_tokens_masked_is_an_error() -> None:
    with pytest.raises(UnitError, match="token 0 is -inf"):
        Sampler(OFF).pick(floats(-np.inf, -np.inf), [])


def test_the_penalty_divides_positive_and_multiplies_negative_logits_of_recent_tokens() -> None:
    options = SamplingOptions(temperature=0, repeat_penalty=2.0, repeat_last_n=2)
    assert Sampler(options).pick(floats(4, 3, -1), [0]) == 1
    assert Sampler(options).pick(floats(4, 3, -1), [0, 2, 2]) == 0  # token 0 is too long ago
    assert Sampler(dataclasses.replace(options, repeat_last_n=-1)).pick(floats(4, 3, -1), [0, 2, 2]) == 1
    assert Sampler(options).pick(floats(-3, -2, -9), [1]) == 0
    assert Sampler(options).pick(floats(4, 3, -1), [0, 0]) == 1  # counted once, however often it came


def test_the_callers_logits_stay_as_they_are() -> None:
    logits = floats(4, 3, -1)
    Sampler(SamplingOptions(repeat_penalty=2.0, seed=0)).pick(logits, [0, 1])
    assert logits.tolist() == [4, 3, -1]


def test_equal_seeds_draw_equal_tokens() -> None:
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    options = dataclasses.replace(OFF, seed=7)
    assert drawn(logits, options, 50) == drawn(logits, options, 50)
    assert drawn(logits, options, 50) != drawn(logits, dataclasses.replace(options, seed=8), 50)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.integers(-12, 12), min_size=1, max_size=30),
    top_k=st.integers(0, 35),
    top_p=st.sampled_from([0.0, 0.21, 0.53, 0.87, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.3, 1.0]),
)
def test_the_filters_keep_what_llama_cpp_keeps(values: list[int], top_k: int, top_p: float, min_p: float) -> None:
    logits = floats(*values) / np.float32(4)
    # So hot that all tokens that are kept are about equally likely.
    options = SamplingOptions(temperature=1e6, top_k=top_k, top_p=top_p, min_p=min_p, seed=3)
    kept = set(kept_by_llama_cpp(logits, options))
    assert set(drawn(logits, options, 20 * len(kept))) <= kept
    if len(kept) <= 5:
        assert set(drawn(logits, options, 120)) == kept


def test_tokens_come_as_often_as_their_probability_at_this_temperature() -> None:
    logits = floats(0, 1, 2, -np.inf)
    options = dataclasses.replace(OFF, temperature=0.5)
    expected = np.exp(logits / 0.5) / np.exp(logits / 0.5).sum()
    counts = np.bincount(drawn(logits, options, 20_000), minlength=4)
    assert counts[3] == 0
    assert np.abs(counts / 20_000 - expected).max() < 0.015  # six standard errors


def test_a_temperature_next_to_zero_is_greedy() -> None:
    assert set(drawn(floats(1, 1.5, 0), dataclasses.replace(OFF, temperature=5e-324), 20)) == {1}


def cut_at_stop(text: str, stops: list[str]) -> str:
    """Read character by character: the first stop string that is complete ends the text."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def stream_of(pieces: list[bytes], stops: str | list[str]) -> TextStream:
    return TextStream(pieces.__getitem__, stops)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    borders = [0, *sorted(min(each, len(data)) for each in at), len(data)]
    return [data[a:b] for a, b in pairwise(borders)]


few_letters = st.text("abé€😀", max_size=24)
fragments = st.sampled_from([b"a", b"b", b"\xc3", b"\xa9", b"\xe2\x82", b"\xff", b"\xed\xa0", b"\xf0"])
any_bytes = st.lists(fragments).map(b"".join)


@settings(max_examples=1500, deadline=None)
@given(
    data=st.one_of(few_letters.map(str.encode), any_bytes, st.binary(max_size=24)),
    stops=st.lists(st.text("abé€😀\ufffd", min_size=1, max_size=5), max_size=4),
    at=st.lists(st.integers(0, 60), max_size=30),
)
def test_the_text_does_not_depend_on_token_borders(data: bytes, stops: list[str], at: list[int]) -> None:
    pieces = cut(data, at)
    stream = stream_of(pieces, stops)
    whole = data.decode("utf-8", "replace")
    expected = cut_at_stop(whole, stops)

    shown = ""
    for token in range(len(pieces)):
        shown += stream.push(token)
        assert expected.startswith(shown)
    shown += stream.finish()
    assert shown == expected
    assert stream.stopped == any(stop in whole for stop in stops)
    assert stream.finish() == ""


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = stream_of([b"Hello <", b"|b>", b" <|e", b"nd|> more"], ["<|end|>"])
    assert [stream.push(token) for token in range(4)] == ["Hello ", "<|b>", " ", ""]
    assert stream.stopped
    assert stream.push(0) == ""
    assert stream.finish() == ""


def test_a_split_code_point_waits_for_its_rest() -> None:
    stream = stream_of([b"\xf0\x9f", b"\x98", b"\x80!"], [])
    assert [stream.push(token) for token in range(3)] == ["", "", "😀!"]
    broken = stream_of([b"x\xf0\x9f"], [])
    assert broken.push(0) == "x"
    assert broken.finish() == "\ufffd"


def test_one_stop_string_may_stand_alone() -> None:
    stream = stream_of([b"one two"], "two")
    assert stream.push(0) == "one "


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        TextStream(lambda token: b"", ["\n", ""])
