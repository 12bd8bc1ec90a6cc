"""Tiny valid GGUF files with random weights, for tests that need a model but not its sense."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

TEXT = (
    "In the beginning was the word, and the word was with the reader. The quick brown fox jumps over the "
    "lazy dog; there is nothing that the other thing thinks. def main(argv): return print(argv[1:])\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def write_tiny(
    path: str | Path,
    architecture: str = "llama",
    *,
    formats: str | dict[str, str] = "Q4_0",
    dim: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 96,
    vocab: int = 300,
    tied: bool = True,
    rope_factors: bool = False,
    activation: str | None = None,
    sparse: bool = False,
    oracle: bool = False,
    window: int = 16,
    context: int = 512,
    seed: int = 0,
) -> Path:
    """Write a model with random weights of standard deviation about 1/sqrt(columns).

    `architecture` is "llama" or "bamboo" (byte-level BPE tokenizer, chat template) or "gemma3" (SentencePiece).
    `formats` is one weight format, or a format per role: "token_embd", "output", "attn_q", "attn_k",
    "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"; roles left out are F32. K-quants need columns
    divisible by 256, the other quantised formats by 32. `activation`, `sparse` (Down transposed), `oracle`
    (predictors that are never wrong) and `rope_factors` serve llama only, `window` gemma3 only. `vocab` must be at
    least 264.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name(f"tiny {architecture}")
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "gemma3":
        writer.add_rope_freq_base(1e6)
        writer.add_sliding_window(window)
        add_sentencepiece_tokenizer(writer, vocab)
    else:
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(1e4)
        writer.add_vocab_size(vocab)
        if activation:
            writer.add_string(f"{architecture}.hidden_activation", activation)
        add_bpe_tokenizer(writer, vocab)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(name, (1 + 0.1 * rng.standard_normal(size)).astype(np.float32))

    def matrix(name: str, rows: int, cols: int, gain: float = 1.0) -> NDArray[np.float32]:
        role = name.removesuffix(".weight").split(".")[-1]
        weight_format = formats if isinstance(formats, str) else formats.get(role, "F32")
        raw = random_weights(rng, rows, cols, weight_format, gain)
        kind = gguf.GGMLQuantizationType[weight_format]
        writer.add_tensor(name, raw, raw_dtype=kind)
        values: NDArray[np.float32] = dequantize(raw, kind) if kind != gguf.GGMLQuantizationType.F32 else raw
        return values

    # An embedding of deviation 1 in all, whatever the model scales it by, and layers that add a little to it.
    matrix("token_embd.weight", vocab, dim, gain=1.0 if architecture == "gemma3" else dim**0.5)
    for layer in range(layers):
        prefix = f"blk.{layer}."
        norm(prefix + "attn_norm.weight", dim)
        matrix(prefix + "attn_q.weight", heads * head_dim, dim)
        matrix(prefix + "attn_k.weight", kv_heads * head_dim, dim)
        matrix(prefix + "attn_v.weight", kv_heads * head_dim, dim)
        matrix(prefix + "attn_output.weight", dim, heads * head_dim)
        norm(prefix + "ffn_norm.weight", dim)
        gate = matrix(prefix + "ffn_gate.weight", ffn, dim)
        if oracle:  # relu(x) - relu(-x) is x, so that the scores are Gate's outputs
            both = np.concatenate([np.eye(dim), -np.eye(dim)]).astype(np.float32)
            writer.add_tensor(prefix + "fc1.weight", both)
            writer.add_tensor(prefix + "fc2.weight", np.concatenate([gate, -gate], axis=1))
        matrix(prefix + "ffn_up.weight", ffn, dim)
        if sparse:
            matrix(prefix + "ffn_down_t.weight", ffn, dim, gain=(dim / ffn) ** 0.5)
        else:
            matrix(prefix + "ffn_down.weight", dim, ffn)
        if architecture == "gemma3":
            norm(prefix + "attn_q_norm.weight", head_dim)
            norm(prefix + "attn_k_norm.weight", head_dim)
            norm(prefix + "post_attention_norm.weight", dim)
            norm(prefix + "post_ffw_norm.weight", dim)
    norm("output_norm.weight", dim)
    if not tied:
        matrix("output.weight", vocab, dim)
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 32, head_dim // 2, dtype=np.float32))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def random_weights(rng: np.random.Generator, rows: int, cols: int, weight_format: str, gain: float) -> NDArray[Any]:
    """Random weights of standard deviation about gain / sqrt(cols): (rows, row bytes) or floats."""
    std = gain / cols**0.5
    kind = gguf.GGMLQuantizationType[weight_format]
    if weight_format not in ("Q4_K", "Q5_K", "Q6_K"):
        floats = (rng.standard_normal((rows, cols)) * std).astype(np.float32)
        coded: NDArray[Any] = quantize(floats, kind)
        return coded
    block, size = gguf.GGML_QUANT_SIZES[kind]
    n = rows * cols // block
    raw = rng.integers(0, 256, (n, size), dtype=np.uint8)
    amplitude = std * rng.uniform(0.5, 1.5, n)
    if weight_format == "Q6_K":  # ql[128] qh[64] int8 scales[16] d; value d * scale * (q - 32)
        scales = raw[:, 192:208].view(np.int8)
        scales[:] = scales % 64 + 64
        raw[:, 208:210] = (amplitude / 18.5 / 96).astype(np.float16).view(np.uint8).reshape(n, 2)
    else:  # d, dmin, 12 bytes of 6-bit scales and minima, (qh[32]), qs[128]; d * scale * q - dmin * minimum
        levels = 16 if weight_format == "Q4_K" else 32
        d = amplitude / (16.5 * levels)
        raw[:, 0:2] = d.astype(np.float16).view(np.uint8).reshape(n, 2)
        raw[:, 2:4] = (d * (levels - 1) / 2).astype(np.float16).view(np.uint8).reshape(n, 2)
    return raw.reshape(rows, -1)


def add_bpe_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """A byte-level BPE vocabulary: three control tokens, 256 bytes, merges learnt from TEXT, unused rest."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=alphabet, special_tokens=controls, show_progress=False
    )
    learner.train_from_iterator([TEXT], trainer)
    ids = learner.get_vocab()
    tokens = sorted(ids, key=lambda token: ids[token])
    types = [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3)
    unused = [f"[PAD{i}]" for i in range(vocab - len(tokens))]
    merges = json.loads(learner.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens + unused)
    writer.add_token_types(types + [UNUSED] * len(unused))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def add_sentencepiece_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """A SentencePiece vocabulary as Gemma's: controls, bytes, then pieces by falling score, unused rest."""
    pieces = [
        ("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN),
        ("<start_of_turn>", CONTROL), ("<end_of_turn>", CONTROL), ("  ", USER_DEFINED),
        ("\n\n", USER_DEFINED),
    ]  # fmt: skip
    pieces += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    words = ["▁t", "he", "▁the", "in", "er", "▁th", "ing", "▁wo", "rd", "▁word", "an", "▁and", "re", "qu"]
    letters = ["▁", *"etaoinshrdlucmfwypvbgkjqxz", *".,;:()[]"]
    pieces += [(piece, NORMAL) for piece in words + letters][: vocab - len(pieces)]
    pieces += [(f"<unused{i}>", UNUSED) for i in range(vocab - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_scores([-float(i) if kind == NORMAL else 0.0 for i, (_, kind) in enumerate(pieces)])
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
