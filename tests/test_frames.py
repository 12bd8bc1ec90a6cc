"""Frames: what they become, and that damaged and forged ones are refused in one line, with little memory."""

import random
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import msgpack
import numpy as np
import pytest
from damage import GIANTS, damaged_bytes, little_memory_and_no_hang, survives

from coterie.actors import frames as f
from coterie.errors import UnitError

CONTRACT: dict[str, Any] = {
    "model": "ab" * 16, "first": 0, "last": 3, "layers": 7, "dim": 64, "vocab": 300, "context": 256,
    "numerics": "exact, version 1",
}  # fmt: skip
ROWS = 3
MOST = f.size_limit(ROWS, 64)
HIDDEN = np.random.default_rng(0).standard_normal((ROWS, 64)).astype("<f4")
FRAMES: list[f.Frame] = [
    f.Open(number=1, sequence=5, **CONTRACT),
    f.Opened(1, 5, 256, 1 << 20),
    f.Step(
        2, "decode", np.arange(ROWS, dtype="<i8").tobytes(), np.arange(ROWS, dtype="<i4").tobytes(),
        np.arange(ROWS, dtype="<i4").tobytes(), b"",
    ),
    f.Hidden(2, 1000, HIDDEN.tobytes()),
    f.Close(3, 5),
    f.Closed(3, 5),
    f.Error(4, "position 7 does not continue a sequence of 3"),
]  # fmt: skip


def packed(frame: f.Frame) -> dict[str, Any]:
    """The map inside."""
    found: dict[str, Any] = msgpack.unpackb(f.encode(frame)[4 : -f.SEAL])
    return found


def sealed(content: Any) -> bytes:
    return f.seal(f.MAGIC + bytes([f.VERSION]) + msgpack.packb(content))


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_a_frame_comes_back_as_it_went(frame: f.Frame) -> None:
    assert f.decode(f.encode(frame), MOST) == frame
    assert sealed(packed(frame)) == f.encode(frame)  # what the mutants of other tests are made of


def test_hidden_states_come_back_bit_by_bit() -> None:
    states = f.hidden_states(HIDDEN.tobytes(), ROWS, 64)
    assert states.tobytes() == HIDDEN.tobytes()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_hidden_states_that_are_no_numbers_are_refused(wrong: float) -> None:
    states = HIDDEN.copy()
    states[1, 63] = wrong
    with pytest.raises(UnitError, match="not numbers"):
        f.hidden_states(states.tobytes(), ROWS, 64)
    with pytest.raises(UnitError, match="numbers of <f4 belong"):
        f.hidden_states(HIDDEN.tobytes(), ROWS - 1, 64)


def test_other_versions_and_other_things_are_named() -> None:
    good = f.encode(FRAMES[0])
    with pytest.raises(UnitError, match="version 2, but this Coterie speaks 1"):
        f.decode(f.seal(good[:3] + b"\x02" + good[4 : -f.SEAL]), MOST)
    with pytest.raises(UnitError, match="no frame of Coterie's"):
        f.decode(b"GET / HTTP/1.1\r\nHost: localhost\r\n", MOST)
    with pytest.raises(UnitError, match="must be 20 to"):
        f.decode(b"", MOST)
    with pytest.raises(UnitError, match="must be 20 to"):
        f.decode(good + bytes(MOST), MOST)
    with pytest.raises(UnitError, match="damaged on its way"):
        f.decode(good[:-1], MOST)


def forged(frame: f.Frame) -> Iterator[Any]:
    """Contents that no frame may have, each made of a good one."""
    content = packed(frame)
    for key, value in content.items():
        yield {k: v for k, v in content.items() if k != key}
        yield {("x" + k if k == key else k): v for k, v in content.items()}
        others: list[Any] = [None, True, 1.0, -1, 1 << 63, [], [value], {}, {"a": value}, msgpack.ExtType(1, b"a")]
        others += [msgpack.Timestamp(1, 0), "x" * 401, "a\nb", "\x00", "\u202e" * 401]
        others += [b"bytes"] if not isinstance(value, bytes) else ["text", 3]
        others += ["5"] if isinstance(value, int) else [5]
        yield from ({**content, key: other} for other in others)
    yield {**content, "more": 1}
    yield {**content, "kind": "reboot"}
    yield from ([], [content], 1, None, "open", {}, list(content.items()))


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_forged_frames_are_refused(frame: f.Frame) -> None:
    """Well sealed, but not what a frame of this kind holds."""
    count = 0
    with little_memory_and_no_hang():
        for content in forged(frame):
            count += 1
            assert not survives(f.decode, sealed(content), 1 << 16), content
    assert count > 40


def test_msgpack_that_is_no_map_of_plain_values() -> None:
    good = f.encode(FRAMES[4])[4 : -f.SEAL]
    bodies = [
        b"", good + b"\x00", good[:-1], b"\xc1", b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01",
        b"\x81\xa4kind" * 5000, b"\x91" * 50_000,
        b"\x84" + 2 * b"\xa4kind\xa5close" + b"\xa6number\x01\xa8sequence\x01", b"\x81\x01\x02", b"\x81\xc0\x02",
        b"\x81\xa1\xff\x01",
    ]  # fmt: skip
    with little_memory_and_no_hang():
        for body in bodies:
            assert not survives(f.decode, f.seal(f.MAGIC + bytes([f.VERSION]) + body), 1 << 20), body[:20]


def test_damaged_bytes_are_refused_sealed_anew_or_not() -> None:
    """What is sealed anew may still be a frame, then of the types that its kind has."""
    chance, refused = random.Random(1), 0
    with little_memory_and_no_hang():
        for _ in range(6000):
            good = f.encode(chance.choice(FRAMES))
            bad = damaged_bytes(chance, good, len(good))
            assert bad == good or not survives(f.decode, bad, MOST)
            refused += bad != good
            again = f.seal(f.MAGIC + bytes([f.VERSION]) + damaged_bytes(chance, good[4 : -f.SEAL], len(good)))
            if survives(f.decode, again, MOST):
                frame = f.decode(again, MOST)
                for field in fields(frame):
                    value = getattr(frame, field.name)
                    assert type(value) is field.type
                    assert not isinstance(value, int) or value in range(GIANTS[-2])
            else:
                refused += 1
    assert refused > 8000
