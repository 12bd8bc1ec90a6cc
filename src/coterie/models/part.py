"""A model cut by layers: each part is a model of its own, with only the tensors that its layers need (docs/link.md).

Layers are renamed to begin at 0. The metadata stay those of the whole model, beside them stands which part it is: what
follows from a layer's number or from how many there are is read as of the whole.
"""

from collections.abc import Sequence
from hashlib import sha256

from coterie.errors import UsageError
from coterie.models.header import ModelHeader
from coterie.models.source import Bytes, DerivedModel, Made, WeightSource
from coterie.models.spec import LayerSpec, ModelSpec, Part

FIRST, LAST, MODEL, VOCAB = (f"coterie.part.{key}" for key in ("first", "last", "model", "vocab"))
EMBEDDING, OUTPUT, OUTPUT_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
FACTORS = "rope_freqs.weight"
IDENTITY = 32  # hexadecimal digits of an identity


def read_part(file: ModelHeader, layers: int) -> Part | None:
    """Which part of a model of so many layers the file says that it is; None: all of it. Raises ModelError."""
    if FIRST not in file.metadata:
        return None
    last = file.integer(LAST, 1, layers)
    return Part(file.integer(FIRST, 0, last - 1), last, layers, file.text(MODEL))


def own_layers(part: Part | None, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """Of all layers of a model those that the part has."""
    return tuple(layers if part is None else layers[part.first : part.last])


def model_identity(source: WeightSource) -> str:
    """What two processes know a model by: of its header and the first row of every tensor. The same on every machine,
    and another one for other weights of the same shape."""
    digest = sha256(source.header_bytes())
    for name in sorted(source.tensors):
        digest.update(source.read(name, 0, 1).tobytes())
    return digest.hexdigest()[:IDENTITY]


def part_of(source: WeightSource, spec: ModelSpec, first: int, last: int) -> DerivedModel:
    """Layers `first` to `last` (excluded) of the whole model in `source`, of shape `spec`: the first part has the
    embedding, the last one the head. Raises UsageError for layers that are not there."""
    if spec.part is not None:
        raise UsageError(f"{source.path.name} is {spec.part} already; cut the whole model")
    layers = len(spec.layers)
    if last == layers <= first:
        raise UsageError(
            f"{source.path.name} has layers 0 to {layers - 1}: cut it at 1 to {layers - 1}, not at {first}"
        )
    if not 0 <= first < last <= layers:
        raise UsageError(
            f"no part goes from layer {first} up to {last}: {source.path.name} has layers 0 to {layers - 1}"
        )
    names = {name: name for name in source.tensors if name == FACTORS}
    for name in source.tensors:
        kind, number, rest = (*name.split(".", 2), "", "")[:3]
        if kind == "blk" and first <= int(number) < last:
            names[f"blk.{int(number) - first}.{rest}"] = name
    if first == 0:
        names[EMBEDDING] = EMBEDDING
    if last == layers:
        names |= {OUTPUT_NORM: OUTPUT_NORM, OUTPUT: EMBEDDING if spec.tied else OUTPUT}
    identity = model_identity(source)
    return DerivedModel(
        source,
        {new: _renamed(source, old) for new, old in names.items()},
        dropped=frozenset(source.tensors),
        metadata={FIRST: first, LAST: last, MODEL: identity, VOCAB: spec.vocab},
        salt=f"layers {first} to {last}, {identity}",
    )


def _renamed(source: WeightSource, name: str) -> Made:
    tensor = source.tensor(name)

    def read(rows: range) -> Bytes:
        return source.read(name, rows.start, rows.stop)

    return Made(tensor.format, (tensor.rows, tensor.cols), read)
