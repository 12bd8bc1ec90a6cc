"""Write a packed model of any shape with random weights, without a GGUF: there is no disk for both.

    python benchmarks/make_packed.py llama-47b OUT.coterie --tokenizer SmolLM2.gguf [--format Q4_0] [--layers N]

For measuring speed: the text it makes is noise (weights.py says what is in them). The vocabulary is the tokenizer's,
padded. The sparse shapes have a planted activation profile, and Q4_0 is the only format they come in.
"""

import argparse
import hashlib
import io
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from weights import PlantedWeights, PredictedWeights, RandomWeights

from coterie.commands.terminal import Progress
from coterie.errors import CoterieError
from coterie.models.gguf_file import GGUFFile
from coterie.models.header import BLOCKS, HeaderParser, ModelHeader
from coterie.models.llama import read_spec
from coterie.storage.flash_writer import create_flash_file
from coterie.storage.runs import lay_out_runs

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    rope_base: float
    activation: str = "silu"  # others: sparse, with a planted activation profile (weights.py)
    predictor: int = 0  # hidden units of predictors, which Gates of low rank make possible


SHAPES = {
    "tiny": Shape(256, 2, 4, 2, 64, 768, 49152, True, 1e4),
    "llama-1b": Shape(2048, 16, 32, 8, 64, 8192, 128256, True, 5e5),
    "llama-8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, False, 5e5),
    "llama-47b": Shape(8192, 54, 64, 8, 128, 28672, 49152, False, 5e5),  # Llama 70B with two thirds of its layers
    "tiny-sparse": Shape(512, 4, 8, 4, 64, 2048, 49152, False, 1e4, "relu"),
    "bamboo-7b": Shape(4096, 32, 32, 8, 128, 14336, 49152, False, 1e4, "drelu"),
    "tiny-predicted": Shape(512, 4, 8, 4, 64, 2048, 49152, False, 1e4, "relu", 128),
    "bamboo-7b-predicted": Shape(4096, 32, 32, 8, 128, 14336, 49152, False, 1e4, "drelu", 512),
    "mistral-7b": Shape(4096, 32, 32, 8, 128, 14336, 49152, False, 1e4, "relu"),
    "sparse-47b": Shape(8192, 54, 64, 8, 128, 28672, 49152, False, 5e5, "relu"),
    "sparse-47b-predicted": Shape(8192, 54, 64, 8, 128, 28672, 49152, False, 5e5, "relu", 1024),
}


class Header(ModelHeader):
    """A header that no file follows."""

    def __init__(self, data: bytes) -> None:
        self.path = Path("header")
        parser = HeaderParser(io.BytesIO(data), len(data), "header", data=False)
        self.metadata, self.tensors = parser.metadata, parser.tensors

    def vector(self, name: str) -> NDArray[np.float32]:
        raise KeyError(name)


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, (rows, columns) or (values,)."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd.weight", (shape.vocab, shape.dim)
    for i in range(shape.layers):
        yield f"blk.{i}.attn_norm.weight", (shape.dim,)
        yield f"blk.{i}.attn_q.weight", (q, shape.dim)
        yield f"blk.{i}.attn_k.weight", (kv, shape.dim)
        yield f"blk.{i}.attn_v.weight", (kv, shape.dim)
        yield f"blk.{i}.attn_output.weight", (shape.dim, q)
        yield f"blk.{i}.ffn_norm.weight", (shape.dim,)
        yield f"blk.{i}.ffn_gate.weight", (shape.ffn, shape.dim)
        yield f"blk.{i}.ffn_up.weight", (shape.ffn, shape.dim)
        if shape.predictor:
            yield f"blk.{i}.fc1.weight", (shape.predictor, shape.dim)
            yield f"blk.{i}.fc2.weight", (shape.ffn, shape.predictor)
        if shape.activation == "silu":
            yield f"blk.{i}.ffn_down.weight", (shape.dim, shape.ffn)
        else:
            yield f"blk.{i}.ffn_down_t.weight", (shape.ffn, shape.dim)
    yield "output_norm.weight", (shape.dim,)
    if not shape.tied:
        yield "output.weight", (shape.vocab, shape.dim)


def header_bytes(name: str, shape: Shape, weight_format: str, tokenizer: ModelHeader) -> bytes:
    """A GGUF's bytes before its tensors' data."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name(f"synthetic {name} {weight_format}")
        writer.add_block_count(shape.layers)
        writer.add_context_length(131072)
        writer.add_embedding_length(shape.dim)
        writer.add_feed_forward_length(shape.ffn)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(shape.rope_base)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(shape.vocab)
        if shape.activation != "silu":
            writer.add_string("llama.hidden_activation", shape.activation)
        add_tokenizer(writer, tokenizer.metadata, shape.vocab)
        for tensor, dims in tensors(shape):
            if len(dims) == 1:
                writer.add_tensor_info(tensor, dims, np.dtype(np.float32), 4 * dims[0])
            else:
                values, size = BLOCKS[weight_format]
                raw = (dims[0], dims[1] // values * size)
                kind = gguf.GGMLQuantizationType[weight_format]
                writer.add_tensor_info(tensor, raw, np.dtype(np.uint8), raw[0] * raw[1], raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()


def add_tokenizer(writer: Any, metadata: dict[str, Any], vocab: int) -> None:
    """The tokenizer of another model, padded with unused tokens."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    unused = range(vocab - len(tokens))
    writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in unused])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * len(unused))
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(metadata["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(metadata["tokenizer.ggml.eos_token_id"])
    writer.add_add_bos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GGUF with a byte-pair tokenizer")
    parser.add_argument("--format", choices=("Q4_0", "Q8_0", "Q4_K"), default="Q4_0")
    parser.add_argument("--layers", type=int, help="fewer or more than the shape has")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers:
        shape = Shape(**{**vars(shape), "layers": arguments.layers})
    try:
        with GGUFFile(arguments.tokenizer) as tokenizer:
            header = header_bytes(arguments.shape, shape, arguments.format, tokenizer)
        write(header, arguments)
    except CoterieError as error:
        sys.exit(f"make_packed: {error}")


def write(header: bytes, arguments: argparse.Namespace) -> None:
    file = Header(header)
    spec = read_spec(file)
    runs = lay_out_runs(file.tensors, spec)
    source = hashlib.sha256(f"{arguments.seed} ".encode() + header).digest()
    kind = PredictedWeights if spec.predictor else PlantedWeights if spec.sparse else RandomWeights
    weights = kind(file, spec, arguments.seed)
    with Progress() as progress:
        create_flash_file(arguments.out, header, b"", runs, weights.fill, source, progress)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
