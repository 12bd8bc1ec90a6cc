"""Llama: SmolLM2, Llama 2 and 3, Mistral, TinyLlama.

Pre-norm transformer with RMS norms, rotary positions, grouped-query attention and a SwiGLU FFN
(https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783). `forward` is the oracle: plain
numpy in float32 over the whole sequence, without a cache, to measure everything else against.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ModelError
from coterie.models.header import ModelHeader
from coterie.models.part import VOCAB, own_layers, read_part
from coterie.models.spec import Activation, LayerSpec, ModelSpec, Rope

Floats = NDArray[np.float32]
Weights = Callable[[str], Floats]
Network = Callable[[ModelSpec, Weights, int, Floats], Floats]  # as feed_forward
Product = Callable[[Weights, str, Floats], Floats]  # as matrix_product

QUERY_BLOCK = 256  # rows of attention at a time: bounds the memory of scores


def read_spec(file: ModelHeader) -> ModelSpec:
    """The model in a GGUF file of architecture "llama" or "bamboo"; ModelError if it makes no sense.

    PowerInfer's files have Down transposed, and mean ReLU by it. Others say it in `hidden_activation`.
    """
    name = file.text("general.architecture")
    sizes = read_sizes(file, name)
    head_dim = sizes["head_dim"]
    dims = file.integer(f"{name}.rope.dimension_count", 2, head_dim, head_dim)
    if dims % 2:
        raise ModelError(f"{file.path.name}: {name}.rope.dimension_count is {dims}, but must be even")
    if file.integer(f"{name}.expert_count", 0, 1 << 16, 0):
        raise ModelError(f"{file.path.name}: mixtures of experts are not supported yet; use a dense model")
    rope = Rope(
        base=file.number(f"{name}.rope.freq_base", 1.0, 1e12, 10_000.0),
        dims=dims,
        scale=1 / linear_scaling(file, name),
        factors=rope_factors(file, dims // 2),
    )
    sparse = "blk.0.ffn_down_t.weight" in file.tensors
    part = read_part(file, sizes["n_layers"])
    spec = ModelSpec(
        architecture=name,
        name=file.text("general.name", file.path.stem),
        norm_eps=file.number(f"{name}.attention.layer_norm_rms_epsilon", 1e-12, 1.0),
        activation=_activation(file, name, sparse),
        interleaved_rope=True,
        attention_scale=head_dim**-0.5,
        embedding_scale=1.0,
        qk_norm=False,
        post_norms=False,
        tied="output.weight" not in file.tensors,
        layers=own_layers(part, [LayerSpec(rope)] * sizes.pop("n_layers")),
        sparse=sparse,
        predictor=file.tensor("blk.0.fc1.weight").rows if sparse and "blk.0.fc1.weight" in file.tensors else 0,
        part=part,
        **sizes,
    )
    if sparse and spec.activation == "silu":
        raise ModelError(f"{file.path.name}: neurons that are never idle gain nothing from a transposed Down")
    expect_tensors(file, spec, norms=("attn_norm", "ffn_norm"))
    return spec


def _activation(file: ModelHeader, architecture: str, sparse: bool) -> Activation:
    usual = "drelu" if architecture == "bamboo" else "relu" if sparse else "silu"
    named = file.text(f"{architecture}.hidden_activation", usual)
    for known in ("silu", "relu", "relu2", "drelu"):
        if named == known:
            return cast(Activation, known)
    raise ModelError(f"{file.path.name}: activation {named[:40]!r} is not supported; silu, relu, relu2 and drelu are")


def read_sizes(file: ModelHeader, architecture: str) -> dict[str, int]:
    """The sizes that dense transformers share: fields of ModelSpec, and n_layers."""
    a = architecture
    dim = file.integer(f"{a}.embedding_length", 1, 1 << 18)
    n_heads = file.integer(f"{a}.attention.head_count", 1, 1 << 12)
    n_kv_heads = file.integer(f"{a}.attention.head_count_kv", 1, n_heads, n_heads)
    head_dim = file.integer(f"{a}.attention.key_length", 2, 1 << 12, dim // n_heads)
    value_dim = file.integer(f"{a}.attention.value_length", 2, 1 << 12, head_dim)
    if n_heads % n_kv_heads or head_dim % 2 or value_dim != head_dim:
        raise ModelError(
            f"{file.path.name}: {n_heads} heads, {n_kv_heads} keys of {head_dim}, values of {value_dim}; "
            "heads must divide evenly, and keys and values have one even length"
        )
    return {
        "dim": dim,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "n_layers": file.integer(f"{a}.block_count", 1, 1 << 10),
        "ffn_dim": file.integer(f"{a}.feed_forward_length", 1, 1 << 20),
        "context": file.integer(f"{a}.context_length", 1, 1 << 24),
        "vocab": file.integer(VOCAB, 1, 1 << 31) if VOCAB in file.metadata else file.tensor("token_embd.weight").rows,
    }


def linear_scaling(file: ModelHeader, architecture: str) -> float:
    """By how much positions are stretched: 1 where there is no rope scaling."""
    kind = file.text(f"{architecture}.rope.scaling.type", "linear")
    if kind == "none":
        return 1.0
    if kind != "linear":
        raise ModelError(f"{file.path.name}: rope scaling {kind[:40]!r} is not supported, only 'linear'")
    older = file.number(f"{architecture}.rope.scale_linear", 0.0, 1e6, 1.0)
    factor = file.number(f"{architecture}.rope.scaling.factor", 0.0, 1e6, older)
    return factor or 1.0  # 0 says that there is none


def rope_factors(file: ModelHeader, pairs: int) -> tuple[float, ...]:
    """Llama 3's divisors of the rotary frequencies, one a pair; () where there are none."""
    if "rope_freqs.weight" not in file.tensors:
        return ()
    file.expect("rope_freqs.weight", 1, pairs)
    factors = file.vector("rope_freqs.weight")
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelError(f"{file.path.name}: rope_freqs.weight holds factors that are not positive numbers")
    return tuple(factors.tolist())


def expect_tensors(file: ModelHeader, spec: ModelSpec, norms: Sequence[str], head_norms: Sequence[str] = ()) -> None:
    """Require the tensors of a dense transformer in their shapes, and no others, which would go unused."""
    q_dim, kv_dim = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    layer_shapes = {
        "attn_q": (q_dim, spec.dim),
        "attn_k": (kv_dim, spec.dim),
        "attn_v": (kv_dim, spec.dim),
        "attn_output": (spec.dim, q_dim),
        "ffn_gate": (spec.ffn_dim, spec.dim),
        "ffn_up": (spec.ffn_dim, spec.dim),
        **({"ffn_down_t": (spec.ffn_dim, spec.dim)} if spec.sparse else {"ffn_down": (spec.dim, spec.ffn_dim)}),
        **({"fc1": (spec.predictor, spec.dim), "fc2": (spec.ffn_dim, spec.predictor)} if spec.predictor else {}),
        **dict.fromkeys(norms, (1, spec.dim)),
        **dict.fromkeys(head_norms, (1, spec.head_dim)),
    }
    shapes = {"token_embd.weight": (spec.vocab, spec.dim)} if spec.has_embedding else {}
    if spec.has_head:
        shapes["output_norm.weight"] = 1, spec.dim
    if spec.has_head and not spec.tied:
        shapes["output.weight"] = spec.vocab, spec.dim
    if spec.layers[0].rope.factors:
        shapes["rope_freqs.weight"] = (1, spec.layers[0].rope.dims // 2)
    for layer in range(len(spec.layers)):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in layer_shapes.items()}
    for name, (rows, cols) in shapes.items():
        file.expect(name, rows, cols)
    unused = file.tensors.keys() - shapes.keys()
    if unused:
        raise ModelError(
            f"{file.path.name}: tensor {min(unused)[:60]!r} has no place in the {spec.architecture} model "
            "that Coterie knows; this variant is not supported"
        )


def matrix_product(weights: Weights, name: str, x: Floats) -> Floats:
    """float32[n, rows] of x float32[n, cols] with the matrix of that name: what attention's projections do."""
    return x @ weights(name).T


def feed_forward(spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
    """A layer's feed-forward network: float32[n, dim] of h float32[n, dim], which is normed."""
    return down(spec, weights, layer, activated(spec.activation, *gate_and_up(weights, layer, h)))


def gate_and_up(weights: Weights, layer: int, h: Floats) -> tuple[Floats, Floats]:
    """Gate's and Up's outputs, float32[n, ffn_dim] each."""
    blk = f"blk.{layer}."
    return h @ weights(blk + "ffn_gate.weight").T, h @ weights(blk + "ffn_up.weight").T


def down(spec: ModelSpec, weights: Weights, layer: int, hidden: Floats) -> Floats:
    """Down's output, float32[n, dim] of float32[n, ffn_dim]."""
    blk = f"blk.{layer}."
    return hidden @ (weights(blk + "ffn_down_t.weight") if spec.sparse else weights(blk + "ffn_down.weight").T)


def forward(
    spec: ModelSpec,
    weights: Weights,
    tokens: Sequence[int],
    network: Network = feed_forward,
    product: Product = matrix_product,
) -> Floats:
    """Logits float32[n, vocab] after each of n tokens.

    `weights(name)` gives a float32 matrix, or a vector for norms; `network` may look on at, or change, what is done in
    place of `feed_forward`, and `product` what is done in place of attention's four projections.
    """
    x = weights("token_embd.weight")[np.asarray(tokens)]
    for i in range(len(spec.layers)):
        x = block(spec, weights, i, x, network, product)
    return logits(spec, weights, x)


def block(
    spec: ModelSpec,
    weights: Weights,
    i: int,
    x: Floats,
    network: Network = feed_forward,
    product: Product = matrix_product,
) -> Floats:
    """Layer `i`, attention and network: the hidden states float32[n, dim] after it, of those before it."""
    blk, layer = f"blk.{i}.", spec.layers[i]
    h = rms_norm(x, weights(blk + "attn_norm.weight"), spec.norm_eps)
    q = split_heads(product(weights, blk + "attn_q.weight", h), spec.head_dim)
    k = split_heads(product(weights, blk + "attn_k.weight", h), spec.head_dim)
    v = split_heads(product(weights, blk + "attn_v.weight", h), spec.head_dim)
    q = rotate(q, layer.rope, spec.interleaved_rope)
    k = rotate(k, layer.rope, spec.interleaved_rope)
    mixed = attention(q, k, v, spec.attention_scale, layer.window)
    x = x + product(weights, blk + "attn_output.weight", mixed)

    return x + network(spec, weights, i, rms_norm(x, weights(blk + "ffn_norm.weight"), spec.norm_eps))


def logits(spec: ModelSpec, weights: Weights, x: Floats) -> Floats:
    """Logits float32[n, vocab] of hidden states float32[n, dim] after the last layer."""
    x = rms_norm(x, weights("output_norm.weight"), spec.norm_eps)
    found: Floats = x @ weights("token_embd.weight" if spec.tied else "output.weight").T
    return found


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / rms(x) * weight over the last axis."""
    mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    normed: Floats = (x / np.sqrt(mean + eps)).astype(np.float32) * weight
    return normed


def silu(x: Floats) -> Floats:
    """x * sigmoid(x), without overflow for large negative x."""
    activated: Floats = x * (0.5 * (1 + np.tanh(0.5 * x)))
    return activated


def gelu(x: Floats) -> Floats:
    """GELU by its tanh approximation, as Gemma was trained with."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    activated: Floats = 0.5 * x * (1 + np.tanh(inner))
    return activated


def activated(activation: Activation, gate: Floats, up: Floats) -> Floats:
    """What Down gets of Gate's and Up's outputs."""
    match activation:
        case "relu":
            return np.maximum(gate, 0) * up
        case "relu2":
            return np.square(np.maximum(gate, 0)) * up
        case "drelu":
            return np.maximum(gate, 0) * np.maximum(up, 0)
        case "gelu":
            return gelu(gate) * up
    return silu(gate) * up


def split_heads(x: Floats, head_dim: int) -> Floats:
    """(n, heads * head_dim) -> (heads, n, head_dim)."""
    return x.reshape(len(x), -1, head_dim).transpose(1, 0, 2)


def rotate(x: Floats, rope: Rope, interleaved: bool) -> Floats:
    """Rotary positions for (heads, n, head_dim); angles in float64."""
    half = rope.dims // 2
    frequencies = rope.base ** (-2 * np.arange(half) / rope.dims) * rope.scale / (rope.factors or 1.0)
    angles = np.arange(x.shape[1])[:, None] * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first = np.s_[..., 0 : rope.dims : 2] if interleaved else np.s_[..., :half]
    second = np.s_[..., 1 : rope.dims : 2] if interleaved else np.s_[..., half : rope.dims]
    rotated = x.copy()
    rotated[first] = x[first] * cos - x[second] * sin
    rotated[second] = x[first] * sin + x[second] * cos
    return rotated


def attention(q: Floats, k: Floats, v: Floats, scale: float, window: int) -> Floats:
    """Causal grouped-query attention of (heads, n, head_dim) to (n, heads * head_dim).

    Position i attends to j <= i, and with a window to j > i - window only.
    """
    heads, n, head_dim = q.shape
    group = heads // len(k)
    mixed = np.empty((heads, n, head_dim), np.float32)
    for start in range(0, n, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, n)
        first = max(0, start - window + 1) if window else 0
        rows, cols = np.arange(start, end)[:, None], np.arange(first, end)
        hidden = (cols > rows) | (cols <= rows - window if window else False)
        for head in range(heads):
            keys, values = k[head // group, first:end], v[head // group, first:end]
            scores = q[head, start:end] @ keys.T * np.float32(scale)
            scores[hidden] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            mixed[head, start:end] = scores @ values / scores.sum(axis=-1, keepdims=True)
    return mixed.transpose(1, 0, 2).reshape(n, heads * head_dim)
