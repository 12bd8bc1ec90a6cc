"""CUDA kernels by name (signatures.py): the function, and how many blocks of 256 threads a launch takes."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from coterie.errors import UnitError
from coterie.kernels.formats import FORMATS
from coterie.kernels.gpu import cuda_attention, cuda_ffn, cuda_matmul, cuda_rows

Grid = tuple[int, int]
Operands = Mapping[str, int | float]


class Kernel(NamedTuple):
    """`function`: what numba compiles; its parameters are w, a and those of `family`. `streams`: groups of 16 rows that
    a block of threads has. `tokens`: rows of a tile."""

    name: str
    family: str
    function: Callable[..., Any]
    tokens: int = 1
    streams: int = 1

    def grid(self, operands: Operands, rows: int) -> Grid:
        """Blocks of threads for `rows` rows: (rows or tiles of them, parts of a row), both at least 1. Raises UnitError
        for attention that does not fit into shared memory."""
        tiles, value = max(1, -(-rows // self.tokens)), {key: int(number) for key, number in operands.items()}
        match self.family:
            case "matmul" | "ffn_down":
                return tiles, -(-value["groups"] // self.streams)
            case "ffn_up":
                return tiles, value["clusters"] * (value["neurons"] // cuda_ffn.PAIR)
            case "rope":
                return tiles, value["heads"] + 2 * value["kv_heads"]
            case "attend":
                if not cuda_attention.fits(value["dim"]):
                    raise UnitError(f"heads of {value['dim']} dimensions do not fit CUDA's kernel of attention")
                return tiles, -(-value["heads"] // cuda_attention.together(value["dim"]))
            case "post":
                return 1, 1
        return tiles, 1


def _formats(*names: str) -> None:
    for name in names:
        if name not in FORMATS:
            raise UnitError(f"CUDA has no kernels for the format {name[:40]!r}")


@cache
def kernel(name: str) -> Kernel:
    """The kernel of that name. Raises UnitError where there is none."""
    family, *rest = name.split(":")
    match family, rest:
        case "embed", [form]:
            _formats(form)
            return Kernel(name, family, cuda_rows.embed(form))
        case "norm", []:
            return Kernel(name, family, cuda_rows.norm())
        case "rope", []:
            return Kernel(name, family, cuda_attention.rope())
        case "attend", []:
            return Kernel(name, family, cuda_attention.attend())
        case "post", []:
            return Kernel(name, family, cuda_rows.post())
        case (("matmul" | "ffn_down"), [form, ("1" | "8") as tokens]):
            _formats(form)
            make = cuda_matmul.matmul if family == "matmul" else cuda_matmul.ffn_down
            streams = cuda_matmul.sizes_of(form, int(tokens)).streams
            return Kernel(name, family, make(form, int(tokens)), int(tokens), streams)
        case "ffn_up", [gate, up, activation, ("1" | "8") as tokens] if activation in cuda_ffn.ACTIVATIONS:
            _formats(gate, up)
            if FORMATS[gate].is_float == FORMATS[up].is_float and FORMATS[gate].subs == FORMATS[up].subs:
                made = cuda_ffn.ffn_up(gate, up, activation, int(tokens))
                return Kernel(name, family, made, int(tokens), cuda_ffn.STREAMS)
    raise UnitError(f"CUDA has no kernel {name[:80]!r}")
