"""Tiny Hugging Face folders, and GGUFs with the same weights: written by hand, as safetensors defines them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray
from tiny_models import CHAT_TEMPLATE, CONTROL, write_tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from coterie.models.gguf_file import GGUFFile
from coterie.models.gguf_header import header_bytes
from coterie.models.header import BLOCKS, TensorInfo

Floats = NDArray[np.float32]
Matrices = Mapping[str, NDArray[Any]]
HEADS = {"attn_q": 4, "attn_k": 2}  # tiny_models' own
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def write_gguf(path: Path, metadata: dict[str, Any], tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> Path:
    """A GGUF of these metadata and tensors: a format, and uint8[rows, row bytes] each."""
    described = []
    for name, (kind, raw) in tensors.items():
        values, size = BLOCKS[kind]
        described.append(TensorInfo(name, kind, len(raw), raw.shape[1] // size * values, 0, raw.size))
    data = header_bytes(metadata, described)
    for _, raw in tensors.values():
        data += bytes(-len(data) % 32) + raw.tobytes()
    path.write_bytes(data)
    return path


def coded(values: Floats, kind: str) -> NDArray[np.uint8]:
    """float32[rows, cols] as uint8[rows, row bytes]."""
    raw = np.ascontiguousarray(quantize(values, gguf.GGMLQuantizationType[kind]))
    return raw.view(np.uint8).reshape(len(values), -1)


def rounded(values: Floats, dtype: str) -> Floats:
    """The nearest values of a type, or for BF16 the next ones towards zero."""
    if dtype == "BF16":
        return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


def stored(values: Floats, dtype: str) -> bytes:
    if dtype == "BF16":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def write_safetensors(path: Path, tensors: Matrices, dtype: str) -> Path:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        raw = stored(values, dtype)
        header[name] = {"dtype": dtype, "shape": [*values.shape], "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_both(
    folder: Path,
    dtype: str,
    *,
    kind: str = "Q4_0",
    shards: int = 1,
    config: Mapping[str, Any] = {},
    **sizes: Any,
) -> tuple[Path, Path]:
    """A folder with weights of `dtype`, and a GGUF with the same ones as `kind`, F16 where rows do not fit."""
    with GGUFFile(write_tiny(folder / "f32.gguf", formats="F32", **sizes)) as file:
        metadata = file.metadata
        weights = {name: rounded(file.floats(name), dtype) for name in file.tensors}
    tensors: dict[str, tuple[str, NDArray[Any]]] = {}
    for name, values in weights.items():
        fits = values.shape[-1] % BLOCKS[kind][0] == 0
        name_of = "F32" if values.ndim == 1 else kind if fits else "F16"
        tensors[name] = name_of, coded(np.atleast_2d(values), name_of)
    write_gguf(folder / "m.gguf", metadata, tensors)
    out = folder / "hf"
    out.mkdir()
    weights.pop("rope_freqs.weight", None)
    write_weights(
        out, {hugging_face(name): interleaved(name, values) for name, values in weights.items()}, dtype, shards
    )
    (out / "config.json").write_text(json.dumps(config_of(metadata) | dict(config)))
    (out / "tokenizer.json").write_text(byte_level(metadata).to_str())
    settings = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": CHAT_TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    return out, folder / "m.gguf"


def write_weights(out: Path, weights: Matrices, dtype: str, shards: int) -> None:
    names = sorted(weights)
    if shards == 1:
        write_safetensors(out / "model.safetensors", weights, dtype)
        return
    where: dict[str, str] = {}
    for i in range(shards):
        part = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(out / part, {name: weights[name] for name in names[i::shards]}, dtype)
        where |= dict.fromkeys(names[i::shards], part)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def hugging_face(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.weight"
    return f"{WHOLE[parts[0]]}.weight"


def interleaved(name: str, values: Floats) -> Floats:
    """GGUF's rotary pairs (2i, 2i + 1) at (i, i + half) again: what convert_hf_to_gguf's `permute` undoes."""
    heads = HEADS.get(name.split(".")[-2], 0)
    if not heads:
        return values
    rows, cols = values.shape
    return values.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def config_of(metadata: dict[str, Any]) -> dict[str, Any]:
    a = metadata["general.architecture"]
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "bamboo": "BambooForCausalLM"}[a]],
        "hidden_act": metadata.get(f"{a}.hidden_activation", "relu" if a == "bamboo" else "silu"),
        "hidden_size": metadata[f"{a}.embedding_length"],
        "intermediate_size": metadata[f"{a}.feed_forward_length"],
        "num_hidden_layers": metadata[f"{a}.block_count"],
        "num_attention_heads": metadata[f"{a}.attention.head_count"],
        "num_key_value_heads": metadata[f"{a}.attention.head_count_kv"],
        "head_dim": metadata[f"{a}.attention.key_length"],
        "max_position_embeddings": metadata[f"{a}.context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "vocab_size": metadata[f"{a}.vocab_size"],
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def byte_level(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizers package's own form of a GGUF's byte-level vocabulary, words cut as SmolLM's."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    known = {token: i for i, token in enumerate(tokens) if not token.startswith("[PAD")}
    made = Tokenizer(models.BPE(known, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    made.add_special_tokens(
        [AddedToken(t, special=True) for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    )
    return made


def sentencepiece(pieces: list[str], merges: list[tuple[str, str]], *, metaspace: bool) -> Tokenizer:
    """A vocabulary as Llama 2's: specials, bytes, pieces; a space is put before a text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    ids = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_special_tokens([AddedToken(token, special=True) for token in tokens[:3]])
    return made
