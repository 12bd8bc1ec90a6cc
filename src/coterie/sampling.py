"""How the next token is chosen: the options, apart from their use, so that the command's help needs no numpy."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self

from coterie.errors import UsageError


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; names and defaults are llama.cpp's.

    After construction `seed` is always a number: None and -1 draw one, so that a run can be
    reported and repeated. Raises UsageError for a value that makes no sense.
    """

    temperature: float = 0.8  # 0: the most probable token, nothing is drawn
    top_k: int = 40  # 0: all tokens
    top_p: float = 0.95  # 1: off
    min_p: float = 0.05  # 0: off
    repeat_penalty: float = 1.0  # 1: off
    repeat_last_n: int = 64  # tokens the penalty looks back on; 0: off, -1: all
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, Real, 0, math.inf)
        _check("top_k", self.top_k, Integral, 0, math.inf)
        _check("top_p", self.top_p, Real, 0, 1)
        _check("min_p", self.min_p, Real, 0, 1)
        _check("repeat_penalty", self.repeat_penalty, Real, 0.01, 100)
        _check("repeat_last_n", self.repeat_last_n, Integral, -1, math.inf)
        if self.seed is None or self.seed == -1:
            object.__setattr__(self, "seed", secrets.randbits(32))
        _check("seed", self.seed, Integral, 0, 2**64 - 1)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The options by their names. Raises UsageError also for a name that there is not."""
        try:
            return cls(**values)
        except TypeError:
            known = ", ".join(cls.__dataclass_fields__)
            raise UsageError(f"unknown sampling option among {', '.join(values)}; there are {known}") from None


def _check(name: str, value: object, kind: type, low: float, high: float) -> None:
    what = "a whole number" if kind is Integral else "a number"
    if not isinstance(value, kind) or not isinstance(value, Real) or isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}: it must be {what}")
    if not low <= float(value) <= high or math.isinf(value):
        limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise UsageError(f"{name} is {value}: it must be {what}, {limits}")
