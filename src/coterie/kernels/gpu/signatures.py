"""What kernels of GPU units take: one list for OpenCL and CUDA, in the order of the operands in a record.

A kernel's name is its family and what it is compiled for: `embed:F`, `norm`, `matmul:F:T`, `rope`, `attend`,
`ffn_up:G:U:activation:T`, `ffn_down:D:T`, `post`; F, G, U, D are packed formats (kernels/formats.py), T is 1 for one
row a step, else TOKENS: rows that are computed together.

Every kernel begins with two pointers: `w`, to pinned weights and norm vectors, and `a`, to everything else; both are of
the whole arena where a device shares memory. Local memory is third in the narrow shape (kernels/gpu/common.cl). Then
come the parameters below. Activations are float32 rows, `..._row` bytes apart, filled up with zeros to a multiple of 32
columns. What the CPU unit quantises (docs/numerics.md) is rounded the same way: a block of 32 columns is 34 floats,
whole numbers, their scale and their sum. All arithmetic is in the order of class `exact`; on a device that divides and
takes roots as IEEE says, a GPU unit has the CPU unit's bits.

A packed matrix is `groups` of 16 rows, each `blocks` blocks; groups lie `group` bytes apart, `per` of them in an
extent, extents `stride` bytes apart (docs/packed-format.md). Neuron clusters lie alike, `bundle` bytes apart.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeVar

from coterie.kernels.record import OPERANDS

TOKENS = 8  # rows computed together where there are several
MOST_DIM = 512  # of a head
BLOCK = 34  # floats of 32 rounded columns
NONE = -1  # of a reference: there is no such buffer

Kind = Literal["weights", "arena", "int", "long", "float", "base"]


class Parameter(NamedTuple):
    """`weights`, `arena`: offset from the arena's start, int64, into `w` or `a`; `base`: the arena's address, int64,
    which block tables count from; `int`, `long`, `float`: int32, int64, float32."""

    name: str
    kind: Kind


def _parameters(text: str) -> tuple[Parameter, ...]:
    kinds: dict[str, Kind] = {"w": "weights", "a": "arena", "i": "int", "l": "long", "f": "float", "b": "base"}
    pairs = (word.split(":") for word in text.split())
    return tuple(Parameter(name, kinds[kind]) for name, kind in pairs)


# `step`: the step header, int64 (kernels/record.py): TOKENS rows, of which OUTPUTS want logits; `select` 1: the
# kernel's rows are those, row i being `outputs[i]` (int32) of what is read.
SIGNATURES: dict[str, tuple[Parameter, ...]] = {
    # out[row][0:width] = scale * embedding row ids[row] (int32); zeros where there is no such row, and behind it
    "embed": _parameters(
        "step:a ids:a weights:w per:i stride:i group:i blocks:i vocab:i out:a out_row:i width:i scale:f"
    ),
    # x_out = x + y, or x + rms_norm(y) * post; out = rms_norm(x_out) * weight, `rounded` the same rounded. y (then
    # x_out is not used), post, out, rounded may be NONE. Rows of x, y and x_out are `row` apart; those of x_out are the
    # selected ones. With 2 planes each row becomes two of `rounded`: the second is what rounding left, rounded.
    "norm": _parameters(
        "step:a select:i outputs:a x:a y:a x_out:a row:i post:w weight:w dim:i eps:f out:a out_row:i rounded:a "
        "rounded_row:i planes:i width:i"
    ),
    # y[row][16 g + r] = sum over columns of weights[g][r] * x[row], or of 2 planes of x[row] each, added
    "matmul": _parameters(
        "step:a select:i weights:w groups:i blocks:i group:i per:i stride:i x:a x_row:i planes:i y:a y_row:i"
    ),
    # Of qkv[row] = queries, keys, values: norms of heads (NONE: none), rotation of the first 2 * half dimensions by
    # `angles`, float32[position][cos half, sin half], queries times `scale` in place, keys and values into the KV block
    # of positions[row] (int32) by the block table at tables[row] (int64 address), which has int64 addresses
    "rope": _parameters(
        "step:a positions:a tables:a base:b qkv:a qkv_row:i heads:i kv_heads:i dim:i half:i angles:a query_norm:w "
        "key_norm:w eps:f scale:f layer:l values:l"
    ),
    # out[row][head][dim]: softmax attention over positions 0 (or position - window + 1) to positions[row]; zeros from
    # there to width; the same rounded, where `rounded` is not NONE
    "attend": _parameters(
        "step:a positions:a tables:a base:b qkv:a qkv_row:i heads:i kv_heads:i dim:i window:i layer:l values:l out:a "
        "out_row:i rounded:a rounded_row:i width:i"
    ),
    # hidden[row][cluster * neurons + n] = activation(Gate) * Up, `rounded` 1: rounded; Up's groups `up` bytes behind
    # Gate's
    "ffn_up": _parameters(
        "step:a weights:w clusters:i neurons:i bundle:i per:i stride:i up:i blocks:i x:a x_row:i hidden:a hidden_row:i "
        "rounded:i"
    ),
    # y[row][16 g + r] = sum over clusters of Down's block column, `down` bytes behind each bundle's begin
    "ffn_down": _parameters(
        "step:a weights:w clusters:i neurons:i bundle:i per:i stride:i down:i groups:i hidden:a hidden_row:i y:a "
        "y_row:i"
    ),
    # The flag at `flag` (int64) takes the step's EPOCH, once everything before is done
    "post": _parameters("step:a flag:a"),
    # Nothing before the flag at `flag` has come to the step's EPOCH, or the word at `abort_word` (int64) is not 0. Only
    # on devices that share memory with who posts
    "wait": _parameters("step:a flag:a abort_word:a"),
    # Blocks of 32 neurons of one hidden row, from the CPU unit's tile of one token at `source` to ours at `out`: all
    # from that on at which this kernel is enqueued. Of devices that share its memory
    "take": _parameters("step:a blocks:i source:a out:a rounded:i"),
}


Value = TypeVar("Value")


def operands(family: str, values: Mapping[str, Value]) -> dict[int, Value]:
    """The operand words of a record, by number; every parameter must be named."""
    names = [parameter.name for parameter in SIGNATURES[family]]
    assert set(values) == set(names), set(values) ^ set(names)
    return {OPERANDS + i: values[name] for i, name in enumerate(names)}
