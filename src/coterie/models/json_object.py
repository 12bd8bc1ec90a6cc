"""Reading JSON that nobody vouches for: small enough, an object, and entries of the kind that is expected."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from coterie.errors import ModelError
from coterie.models.header import open_regular

Kind = TypeVar("Kind")
KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a whole number"}


def read_object(path: Path, most: int) -> dict[str, Any]:
    """The object in a file of at most `most` bytes. Raises ModelError."""
    return parse_object(read_small(path, most), path.name)


def read_small(path: Path, most: int) -> bytes:
    """A file of at most `most` bytes. Raises ModelError."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ModelError(f"{path.name} is larger than {most >> 20} MiB; it is no such file")
        try:
            return file.read(size)
        except OSError as error:
            raise ModelError(f"cannot read {str(path)!r}: {error.strerror}") from None


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The object in UTF-8 JSON. Raises ModelError."""
    try:
        found = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where} is no sound JSON ({str(error)[:80]}); download it again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{where} holds no JSON object; download it again")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def entry(table: dict[str, Any], key: str, kind: type[Kind], where: str, default: Kind | None = None) -> Kind:
    """What `key` has, of this very kind; null and nothing are the default, without which it must be there."""
    value = table.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not kind:
        found = "missing" if value is None else repr(value)[:40]
        raise ModelError(f"{where}: {key!r} is {found}, but must be {KINDS[kind]}")
    return value


def number(table: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    """The number under `key`, rounded to float32 as a GGUF has it."""
    value = table.get(key)
    if value is None and default is not None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        found = "missing" if value is None else repr(value)[:40]
        raise ModelError(f"{where}: {key!r} is {found}, but must be a number")
    return float(np.float32(value))
