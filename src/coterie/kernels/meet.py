"""The instruction that does nothing: what a program waits with for another unit."""

from collections.abc import Callable
from typing import Any

from coterie.kernels.compiler import kernel
from coterie.kernels.sync import claim, finish


@kernel
def meet() -> Callable[..., Any]:
    """One piece, in which nothing is done."""

    def run(record, step, lane):
        return finish(record, step, 1 if claim(record, step, lane, 1) == 0 else 0, 1)

    return run
