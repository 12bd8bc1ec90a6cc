"""The OpenCL C of a program: one source for all kernels that it names, and over what they run.

The .cl files are templates: formats and T are macros, and what a kernel takes is written from its signature. Two
shapes: `common.cl` says what WIDE is.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from coterie.errors import UnitError
from coterie.kernels import record as r
from coterie.kernels.formats import COLUMNS, FORMATS, ROWS
from coterie.kernels.gpu.signatures import BLOCK, MOST_DIM, NONE, SIGNATURES, TOKENS
from coterie.kernels.shapes import INT8_TOKEN

LANES, SLICES = 16, 8  # of a work-group in the narrow shape, as in common.cl
ACTIVATIONS = ("silu", "gelu", "relu", "relu2", "drelu")
BIAS = 2048  # of quanta, as formats.cl makes them
RESERVED = {"half"}  # names that C has for itself
KINDS = {
    "weights": "const long",
    "arena": "const long",
    "int": "const int",
    "long": "const long",
    "float": "const float",
    "base": "const long",
}
TEMPLATES = {  # a family's macros, in the order of its name's parts
    "embed": ("F",),
    "norm": (),
    "matmul": ("F", "T"),
    "rope": (),
    "attend": (),
    "ffn_up": ("G", "U", "ACTIVATION", "T"),
    "ffn_down": ("D", "T"),
    "post": (),
    "wait": (),
    "take": (),
}
assert set(TEMPLATES) == set(SIGNATURES)


class Launch(NamedTuple):
    """Over what a kernel runs: `units` along dimension 2, and along dimension 0 a step's rows, `rows` together.

    `which`: rows of the step those are; "none": it runs once a step.
    """

    which: Literal["tokens", "outputs", "none"]
    rows: int
    units: int


def entry_point(name: str) -> str:
    """The kernel's name in C."""
    return name.replace(":", "_")


def parts(name: str) -> dict[str, str]:
    """What a kernel is compiled for, by macro. Raises UnitError for a kernel that there is not."""
    family, *values = name.split(":")
    macros = TEMPLATES.get(family, ())
    found = dict(zip(macros, values, strict=False))
    good = family in TEMPLATES and len(values) == len(macros)
    good = good and all(found[m] in FORMATS for m in found if m in "FGUD")
    good = good and found.get("ACTIVATION", "silu") in ACTIVATIONS
    if not good or found.get("T", "1") not in ("1", str(TOKENS)):
        raise UnitError(f"GPU units have no kernel {name[:60]!r}")
    return found


def launch(name: str, values: Mapping[str, int | float], wide: bool) -> Launch:
    """Over what the kernel runs, with these values of its parameters."""
    found = parts(name)
    rows = int(found.get("T", 1))
    v = {key: int(value) for key, value in values.items()}
    which: Literal["tokens", "outputs"] = "outputs" if v.get("select") else "tokens"
    items = 1 if wide else LANES * SLICES
    match name.partition(":")[0]:
        case "embed":
            return Launch(which, rows, -(-v["width"] // (COLUMNS * items)))
        case "norm":
            return Launch(which, rows, 1)
        case "rope":
            return Launch(which, rows, v["heads"] + 2 * v["kv_heads"])
        case "attend":
            unit = COLUMNS // min(v["dim"] & -v["dim"], COLUMNS)  # heads that fill whole blocks
            return Launch(which, rows, -(-v["heads"] // unit))
        case "ffn_up":
            return Launch(which, rows, v["clusters"] * (v["neurons"] // COLUMNS))
        case "post" | "wait":
            return Launch("none", 1, 1)
        case "take":
            return Launch("none", 1, v["blocks"])
        case _:  # matmul, ffn_down
            return Launch(which, rows, -(-v["groups"] // (2 if wide and rows > 1 else 1)))  # PAIR in common.cl


def local_bytes(name: str) -> int:
    """Local memory that a work-group of the narrow shape is given: 16 bytes for each work-item and row."""
    return 16 * LANES * SLICES * int(parts(name).get("T", 1))


def source(names: Iterable[str], wide: bool) -> str:
    """OpenCL C of these kernels, each once."""
    wanted = {name: parts(name) for name in sorted(set(names))}
    products = {(found[m], found["T"]) for found in wanted.values() if "T" in found for m in found if m in "FGUD"}
    if wide:  # of one row two planes
        products |= {(found["F"], "2") for found in wanted.values() if found.get("T") == "1" and "F" in found}
    texts = ["#define WIDE\n" if wide else "", _constants(), _template("common"), _template("formats")]
    texts += [_instance("dots", {"T": t}) for t in sorted({t for _, t in products})]
    product = "product_wide" if wide else "product_narrow"
    texts += [_instance(product, {"F": f, "T": t}) for f, t in sorted(products)]
    for name, found in wanted.items():
        family = name.partition(":")[0]
        texts.append(_instance(family, found | {"NAME": entry_point(name), "PARAMETERS": _parameters(family, wide)}))
    return "\n".join(texts)


def _constants() -> str:
    values = {"NONE": f"({NONE})", "STEP_EPOCH": r.EPOCH, "STEP_TOKENS": r.TOKENS, "STEP_OUTPUTS": r.OUTPUTS}
    values |= {"MOST_DIM": MOST_DIM, "BLOCK_FLOATS": BLOCK, "BIAS": f"{BIAS}.0f", "TILE_BLOCK": INT8_TOKEN}
    for f in FORMATS.values():
        values |= {f"BLOCK_{f.name}": f.block, f"SUBS_{f.name}": f.subs}
        values |= {f"HEADER_{f.name}": f.header, f"SUB_{f.name}": f.sub, f"FLOAT_{f.name}": int(f.is_float)}
        zero = 1 << f.offset_bits if f.offset_bits else 0
        offset = 0 if f.split_scales else BIAS + zero  # quanta of split scales have it off
        values |= {f"ZERO_{f.name}": f"{zero}.0f", f"OFFSET_{f.name}": f"{offset}.0f"}
        values |= {f"MINIMUM_{f.name}": int(f.has_minimum), f"SPLIT_{f.name}": int(f.split_scales)}
    return "".join(f"#define {name} {value}\n" for name, value in values.items())


def _parameters(family: str, wide: bool) -> str:
    own = (f"{KINDS[p.kind]} {p.name}{'_' * (p.name in RESERVED)}" for p in SIGNATURES[family])
    shared = [] if wide else ["local float4 *shared"]
    return ", ".join(["global const uchar *w", "global uchar *a", *shared, *own])


def _instance(template: str, macros: Mapping[str, str]) -> str:
    begin = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    return begin + _template(template) + "".join(f"#undef {name}\n" for name in macros)


@cache
def _template(name: str) -> str:
    return (Path(__file__).parent / f"{name}.cl").read_text()


assert ROWS == LANES
