"""Frames between the parts of a model that is cut by layers: what they hold, and how bytes become them (docs/link.md).

    magic and version, 4 bytes | a map in msgpack | BLAKE2b of both, 16 bytes

They come from another machine: sizes are bounded before anything is made of them, keys and types are exactly those of
the kind, and nothing but maps, whole numbers, text and bytes is ever decoded. What numbers may be, and how they go
together, is for who acts on a frame to check (actors/link.py).
"""

from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any, Literal

import msgpack
import numpy as np
import numpy.typing as npt

from coterie.errors import UnitError

MAGIC, VERSION = b"COT", 1
SEAL = 16  # bytes; it finds damage, it does not say who wrote the frame
LEAST = 2048  # bytes that any frame may have, beside those of its rows
MOST_TEXT = 400  # characters
MOST_NUMBER = (1 << 63) - 1

Phase = Literal["prefill", "decode"]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Contract:
    """What both ends must agree on. `model`: its identity; layers `first` to `last` (excluded) of `layers`; `dim`
    values in a hidden state, ids below `vocab`, positions below `context`; `numerics`: the class and its version."""

    model: str
    first: int
    last: int
    layers: int
    dim: int
    vocab: int
    context: int
    numerics: str


@dataclass(frozen=True)
class Open(Contract):
    """Begin a sequence under a number of the sender's choice; one that is open stays as it is."""

    number: int  # of the frame; its answer carries it too
    sequence: int


@dataclass(frozen=True)
class Opened:
    """`rows`: of a step at most; `weights`: bytes that these layers' weights take in memory."""

    number: int
    sequence: int
    rows: int
    weights: int


@dataclass(frozen=True)
class Step:
    """Rows to compute: a chunk of one sequence ("prefill"), or a token of each of several ("decode"). Little-endian:
    sequences int64[n], positions int32[n], and either ids int32[n] or hidden float32[n][dim], the other one empty."""

    number: int
    phase: str
    sequences: bytes
    positions: bytes
    ids: bytes
    hidden: bytes


@dataclass(frozen=True)
class Hidden:
    """A step's hidden states, float32[n][dim], little-endian, and how long computing them took."""

    number: int
    nanoseconds: int
    hidden: bytes


@dataclass(frozen=True)
class Close:
    """A sequence is no longer needed; closing it again does nothing."""

    number: int
    sequence: int


@dataclass(frozen=True)
class Closed:
    number: int
    sequence: int


@dataclass(frozen=True)
class Error:
    """A frame was refused, or computing failed: one line. The sender's number, 0 where that could not be read."""

    number: int
    text: str


Frame = Open | Opened | Step | Hidden | Close | Closed | Error
KINDS: dict[str, type[Frame]] = {
    kind.__name__.lower(): kind for kind in (Open, Opened, Step, Hidden, Close, Closed, Error)
}
TYPES = {name: {field.name: field.type for field in fields(kind)} for name, kind in KINDS.items()}


def size_limit(rows: int, dim: int) -> int:
    """Bytes of a frame with so many rows at most."""
    return LEAST + rows * (8 + 4 + 4 + 4 * dim)


def encode(frame: Frame) -> bytes:
    """A frame's bytes."""
    body: bytes = msgpack.packb({"kind": type(frame).__name__.lower(), **vars(frame)})
    return seal(MAGIC + bytes([VERSION]) + body)


def seal(data: bytes) -> bytes:
    return data + blake2b(data, digest_size=SEAL).digest()


def decode(data: bytes, most: int) -> Frame:
    """The frame in up to `most` bytes. Raises UnitError."""
    if not isinstance(data, bytes) or not len(MAGIC) + 1 + SEAL < len(data) <= most:
        raise UnitError(f"a frame must be {len(MAGIC) + 1 + SEAL} to {most} bytes; the two ends do not fit together")
    if not data.startswith(MAGIC):
        raise UnitError("what came is no frame of Coterie's")
    if data[len(MAGIC)] != VERSION:
        raise UnitError(
            f"a frame of version {data[len(MAGIC)]}, but this Coterie speaks {VERSION}; use the same on both ends"
        )
    if blake2b(data[:-SEAL], digest_size=SEAL).digest() != data[-SEAL:]:
        raise UnitError("a frame was damaged on its way")
    return _frame(_unpacked(data[len(MAGIC) + 1 : -SEAL]))


def _unpacked(body: bytes) -> dict[str, Any]:
    try:
        found = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_without_doubles,
            ext_hook=_no_extension,
            max_array_len=0,
            max_map_len=16,
            max_ext_len=0,
            max_str_len=LEAST,
            max_bin_len=len(body),
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        raise UnitError("a frame holds what no frame holds") from None
    if not isinstance(found, dict):
        raise UnitError("a frame holds no map")
    return found


def _without_doubles(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _no_extension(code: int, data: bytes) -> None:
    raise ValueError


def _frame(found: dict[str, Any]) -> Frame:
    """The frame that a map is of. Raises UnitError."""
    name = found.pop("kind", None)
    if not isinstance(name, str) or name not in KINDS:
        raise UnitError(f"a frame of the unknown kind {str(name)[:20]!r}")
    types = TYPES[name]
    if found.keys() != types.keys():
        raise UnitError(f"a frame {name!r} has other keys than {', '.join(types)}")
    for key, wanted in types.items():
        value = found[key]
        fits = type(value) is wanted
        if wanted is int:
            fits = fits and 0 <= value <= MOST_NUMBER
        elif wanted is str:
            fits = fits and len(value) <= MOST_TEXT and value.isprintable()
        if not fits:
            raise UnitError(f"a frame {name!r} has a {key} that cannot be")
    return KINDS[name](**found)


def numbers(data: bytes, kind: str, n: int) -> npt.NDArray[Any]:
    """`n` numbers of a dtype from a frame's bytes. Raises UnitError where there are more or fewer."""
    if len(data) != n * np.dtype(kind).itemsize:
        raise UnitError(f"a frame has {len(data)} bytes where {n} numbers of {kind} belong")
    return np.frombuffer(data, kind)


def hidden_states(data: bytes, n: int, dim: int) -> Floats:
    """float32[n, dim] from a frame's bytes. Raises UnitError for others, and for what is no number."""
    states: Floats = numbers(data, "<f4", n * dim).reshape(n, dim)
    if not np.isfinite(states).all():
        raise UnitError("a frame has hidden states that are not numbers")
    return states
