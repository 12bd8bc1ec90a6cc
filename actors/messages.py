"""What a unit's scheduler and its actor say to each other: msgpack, with buffer refs as a type of their own.

Only names, numbers and buffer refs travel; what they stand for lies in the arena. Nothing is ever unpickled.
"""

from dataclasses import astuple
from typing import Any

import msgpack

from coterie import errors
from coterie.errors import CoterieError, UnitError
from coterie.storage.arena import BufferRef

REF = 1  # the extension type's code
LIMIT = 1 << 20  # bytes of a message


def pack(message: Any) -> bytes:
    """A message of plain values and buffer refs."""
    return bytes(msgpack.packb(message, default=_pack_ref))


def unpack(data: bytes) -> Any:
    """The message; lists come back as tuples. Raises UnitError for what is none."""
    try:
        if len(data) > LIMIT:
            raise ValueError("too long")
        return msgpack.unpackb(data, ext_hook=_unpack_ref, use_list=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise UnitError(f"a unit's message cannot be read ({error}); both sides must be the same Coterie") from None


def _pack_ref(value: object) -> msgpack.ExtType:
    if not isinstance(value, BufferRef):
        raise TypeError(f"a {type(value).__name__} has no place in a message")
    return msgpack.ExtType(REF, msgpack.packb(astuple(value)))


def _unpack_ref(code: int, data: bytes) -> BufferRef:
    region, offset, nbytes, dtype, shape = msgpack.unpackb(data, use_list=False)
    numbers = offset, nbytes, *shape
    if code != REF or not isinstance(region, str) or not isinstance(dtype, str):
        raise ValueError("no buffer ref")
    if not all(type(number) is int for number in numbers):
        raise ValueError("no buffer ref")
    return BufferRef(region, offset, nbytes, dtype, shape)


def complaint(error: CoterieError) -> dict[str, str]:
    """An error as an answer."""
    return {"error": str(error), "kind": type(error).__name__}


def raise_complaint(answer: dict[str, Any]) -> None:
    """Raise the error that an answer is, if it is one."""
    if "error" in answer:
        kind = getattr(errors, str(answer.get("kind")), UnitError)
        known = isinstance(kind, type) and issubclass(kind, CoterieError)
        raise (kind if known else UnitError)(str(answer["error"]))
