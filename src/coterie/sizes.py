"""Amounts of memory as people write them."""

import re
from dataclasses import dataclass
from typing import Literal

from coterie.errors import UsageError

MOST = 1 << 50  # bytes: more memory than any machine has
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{unit}B": factor for unit, factor in UNITS.items()}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Share:
    """Part of the weights' bytes that may be resident, above 0 and up to 1."""

    part: float

    def __str__(self) -> str:
        return f"{100 * self.part:g}%"


Memory = int | Share | Literal["auto"]  # bytes, a share of the weights, or what the machine can spare


def parse_size(text: str) -> int:
    """Bytes of "64MiB", "1.5 GiB", "2G" (10^9) or "65536"; raises UsageError."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    if match and match[2].upper() in UNITS:
        size = int(float(match[1]) * UNITS[match[2].upper()])
        if size > MOST:
            raise UsageError(f"--memory {text!r} is more than any machine has")
        if size > 0:
            return size
    raise UsageError(f"--memory {text!r} is not a size: write it as 64MiB, 1.5GiB, 2G (10^9 bytes), 50% or auto")


def parse_memory(text: str) -> Memory:
    """A size, a share such as "50%" of the weights' bytes, or "auto"; raises UsageError."""
    if text.strip().lower() == "auto":
        return "auto"
    if match := re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)\s*%", text.strip(), re.ASCII):
        if not 0 < float(match[1]) <= 100:
            raise UsageError(f"--memory {text!r}: a share of the weights is above 0% and at most 100%")
        return Share(float(match[1]) / 100)
    return parse_size(text)


def as_ceiling(memory: int | str | Share | None) -> Memory | None:
    """A ceiling as the Python API takes it; raises UsageError."""
    if isinstance(memory, str):
        return parse_memory(memory)
    if memory is not None and not isinstance(memory, Share) and (type(memory) is not int or not 1 <= memory <= MOST):
        raise UsageError(f'memory is {memory!r}: give bytes, or text such as "6GiB", "50%" or "auto"')
    return memory


def required_ceiling(memory: int | str | Share) -> Memory:
    """The same where there must be one."""
    ceiling = as_ceiling(memory)
    if ceiling is None:
        raise UsageError('memory is None: give bytes, or text such as "6GiB", "50%" or "auto"')
    return ceiling


def as_part(share: float | None) -> float:
    """A share of a GPU's time as the Python API takes it; raises UsageError."""
    if share is not None and not (isinstance(share, int | float) and 0.01 <= share <= 1):
        raise UsageError(f"gpu_share is {share!r}: give a number from 0.01 to 1")
    return 1.0 if share is None else float(share)
