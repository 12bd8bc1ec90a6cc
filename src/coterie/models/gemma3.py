"""Gemma 3, text only: 270M to 27B.

Beside llama (https://arxiv.org/abs/2503.19786): norms also after attention and FFN, RMS norm of each
query and key head, GeGLU, embeddings scaled by sqrt(dim), and five of six layers attend to a sliding
window only, with a rotary base of their own. GGUF's norm weights include the "+ 1". `forward` is the
oracle in plain numpy.
"""

import math
from collections.abc import Sequence

import numpy as np

from coterie.errors import ModelError
from coterie.models.header import ModelHeader
from coterie.models.llama import (
    Floats,
    Network,
    Product,
    Weights,
    attention,
    expect_tensors,
    feed_forward,
    linear_scaling,
    matrix_product,
    read_sizes,
    rms_norm,
    rotate,
    split_heads,
)
from coterie.models.part import own_layers, read_part
from coterie.models.spec import LayerSpec, ModelSpec, Rope

N_LAYERS_27B = 62  # the one size whose attention is scaled by dim / heads instead of the head's length


def read_spec(file: ModelHeader) -> ModelSpec:
    """The model in a GGUF file of architecture "gemma3"; ModelError if it makes no sense."""
    sizes = read_sizes(file, "gemma3")
    dim, head_dim, n_layers = sizes["dim"], sizes["head_dim"], sizes.pop("n_layers")
    if file.number("gemma3.final_logit_softcapping", 0.0, 1e6, 0.0):
        raise ModelError(f"{file.path.name}: capped logits are not supported; Gemma 3 has none")
    window = file.integer("gemma3.attention.sliding_window", 0, 1 << 24, 0)
    period = file.integer("gemma3.attention.sliding_window_pattern", 1, 1 << 10, 6)
    distant = Rope(
        base=file.number("gemma3.rope.freq_base", 1.0, 1e12, 10_000.0),
        dims=head_dim,
        scale=1 / linear_scaling(file, "gemma3"),
    )
    near = Rope(base=file.number("gemma3.rope.freq_base_swa", 1.0, 1e12, 10_000.0), dims=head_dim)
    part = read_part(file, n_layers)
    is_local = [window > 0 and i % period < period - 1 for i in range(n_layers)]
    spec = ModelSpec(
        architecture="gemma3",
        name=file.text("general.name", file.path.stem),
        norm_eps=file.number("gemma3.attention.layer_norm_rms_epsilon", 1e-12, 1.0),
        activation="gelu",
        interleaved_rope=False,
        attention_scale=(dim // sizes["n_heads"] if n_layers == N_LAYERS_27B else head_dim) ** -0.5,
        embedding_scale=float(np.float32(math.sqrt(dim))),
        qk_norm=True,
        post_norms=True,
        tied="output.weight" not in file.tensors,
        layers=own_layers(part, [LayerSpec(near, window) if local else LayerSpec(distant) for local in is_local]),
        sparse=False,
        part=part,
        **sizes,
    )
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    expect_tensors(file, spec, norms, head_norms=("attn_q_norm", "attn_k_norm"))
    return spec


def forward(
    spec: ModelSpec,
    weights: Weights,
    tokens: Sequence[int],
    network: Network = feed_forward,
    product: Product = matrix_product,
) -> Floats:
    """Logits float32[n, vocab] after each of n tokens; weights, network and product as of llama.forward."""

    def norm(x: Floats, name: str) -> Floats:
        return rms_norm(x, weights(name + ".weight"), spec.norm_eps)

    x = weights("token_embd.weight")[np.asarray(tokens)] * np.float32(spec.embedding_scale)
    for i, layer in enumerate(spec.layers):
        blk = f"blk.{i}."
        h = norm(x, blk + "attn_norm")
        q = norm(split_heads(product(weights, blk + "attn_q.weight", h), spec.head_dim), blk + "attn_q_norm")
        k = norm(split_heads(product(weights, blk + "attn_k.weight", h), spec.head_dim), blk + "attn_k_norm")
        v = split_heads(product(weights, blk + "attn_v.weight", h), spec.head_dim)
        q = rotate(q, layer.rope, spec.interleaved_rope)
        k = rotate(k, layer.rope, spec.interleaved_rope)
        mixed = attention(q, k, v, spec.attention_scale, layer.window)
        x = x + norm(product(weights, blk + "attn_output.weight", mixed), blk + "post_attention_norm")

        x = x + norm(network(spec, weights, i, norm(x, blk + "ffn_norm")), blk + "post_ffw_norm")

    x = norm(x, "output_norm")
    logits: Floats = x @ weights("token_embd.weight" if spec.tied else "output.weight").T
    return logits
