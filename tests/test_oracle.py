"""The oracle and the shapes it reads: against plain loops, and for what must not matter."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny

from coterie import fetch
from coterie.errors import ModelError
from coterie.models import gemma3, llama
from coterie.models.gguf_file import GGUFFile
from coterie.models.llama import Floats
from coterie.models.load import ARCHITECTURES, Model
from coterie.models.spec import ModelSpec, Rope
from coterie.opening import open_model

FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32")


def logits_of(model: Model, tokens: list[int]) -> Floats:
    logits: Floats = ARCHITECTURES[model.spec.architecture].forward(model.spec, model.source.floats, tokens)
    return logits


def slow_forward(spec: ModelSpec, weights: Callable[[str], Floats], tokens: list[int]) -> list[list[float]]:
    """Both architectures once more, one number after the other in double precision."""

    def dot(x: list[float], y: list[float]) -> float:
        return math.fsum(a * b for a, b in zip(x, y, strict=True))

    def matvec(name: str, x: list[float]) -> list[float]:
        return [dot(row, x) for row in weights(name).tolist()]

    def add(x: list[float], change: list[float], norm_name: str) -> list[float]:
        if spec.post_norms:
            change = norm(change, norm_name)
        return [a + b for a, b in zip(x, change, strict=True)]

    def norm(x: list[float], name: str) -> list[float]:
        root = math.sqrt(math.fsum(v * v for v in x) / len(x) + spec.norm_eps)
        return [v / root * float(w) for v, w in zip(x, weights(name), strict=True)]

    def heads(x: list[float], norm_name: str, rope: Rope | None, position: int) -> list[list[float]]:
        cut = [x[i : i + spec.head_dim] for i in range(0, len(x), spec.head_dim)]
        if rope is None:
            return cut
        if spec.qk_norm:
            cut = [norm(head, norm_name) for head in cut]
        for head in cut:
            for i in range(rope.dims // 2):
                angle = position * rope.scale * rope.base ** (-2 * i / rope.dims)
                angle /= rope.factors[i] if rope.factors else 1
                a, b = (2 * i, 2 * i + 1) if spec.interleaved_rope else (i, i + rope.dims // 2)
                x_a, x_b = head[a], head[b]
                head[a] = x_a * math.cos(angle) - x_b * math.sin(angle)
                head[b] = x_a * math.sin(angle) + x_b * math.cos(angle)
        return cut

    def activation(x: float) -> float:
        if spec.activation == "silu":
            return x / (1 + math.exp(-x))
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    keys: list[list[list[list[float]]]] = [[] for _ in spec.layers]
    values: list[list[list[list[float]]]] = [[] for _ in spec.layers]
    logits = []
    for position, token in enumerate(tokens):
        x = [float(v) * spec.embedding_scale for v in weights("token_embd.weight")[token]]
        for i, layer in enumerate(spec.layers):
            blk = f"blk.{i}."
            h = norm(x, blk + "attn_norm.weight")
            queries = heads(matvec(blk + "attn_q.weight", h), blk + "attn_q_norm.weight", layer.rope, position)
            key_row = matvec(blk + "attn_k.weight", h)
            keys[i].append(heads(key_row, blk + "attn_k_norm.weight", layer.rope, position))
            values[i].append(heads(matvec(blk + "attn_v.weight", h), "", None, position))
            first = max(0, position - layer.window + 1) if layer.window else 0
            mixed: list[float] = []
            for n, query in enumerate(queries):
                kv = n // (spec.n_heads // spec.n_kv_heads)
                scores = [spec.attention_scale * dot(query, key[kv]) for key in keys[i][first:]]
                chances = [math.exp(score - max(scores)) for score in scores]
                columns = zip(*(value[kv] for value in values[i][first:]), strict=True)
                mixed += [dot(chances, list(column)) / sum(chances) for column in columns]
            out = matvec(blk + "attn_output.weight", mixed)
            x = add(x, out, blk + "post_attention_norm.weight")
            h = norm(x, blk + "ffn_norm.weight")
            gate, up = matvec(blk + "ffn_gate.weight", h), matvec(blk + "ffn_up.weight", h)
            out = matvec(blk + "ffn_down.weight", [activation(g) * u for g, u in zip(gate, up, strict=True)])
            x = add(x, out, blk + "post_ffw_norm.weight")
        output = "token_embd.weight" if spec.tied else "output.weight"
        logits.append(matvec(output, norm(x, "output_norm.weight")))
    return logits


CASES: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama"},
    "llama, untied, rope factors": {"architecture": "llama", "tied": False, "rope_factors": True, "seed": 1},
    "llama, one key head": {"architecture": "llama", "kv_heads": 1, "seed": 2},
    "gemma3, local and global": {"architecture": "gemma3", "layers": 7, "window": 3, "seed": 3},
    "gemma3, untied": {"architecture": "gemma3", "kv_heads": 1, "tied": False, "seed": 4},
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_one_number_after_the_other(name: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", dim=32, heads=4, head_dim=8, ffn=64, formats="Q8_0", **CASES[name])
    model = open_model(path)
    tokens = [5, 200, 17, 17, 250, 99, 3]
    expected = np.array(slow_forward(model.spec, model.source.floats, tokens))
    np.testing.assert_allclose(logits_of(model, tokens), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    model.close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_format_gives_finite_logits_of_sensible_size(
    architecture: str, weight_format: str, tmp_path: Path
) -> None:
    model = open_model(
        write_tiny(tmp_path / "m.gguf", architecture, formats=weight_format, dim=256, ffn=512, head_dim=64)
    )
    logits = logits_of(model, [1, 2, 3])
    assert logits.shape == (3, model.spec.vocab)
    assert logits.dtype == np.float32
    assert 0.1 < logits.std() < 100
    model.close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_later_tokens_do_not_change_earlier_logits(architecture: str, tmp_path: Path) -> None:
    model = open_model(write_tiny(tmp_path / "m.gguf", architecture, formats="F32", layers=6))
    tokens = np.random.default_rng(0).integers(0, 300, 2 * llama.QUERY_BLOCK + 7).tolist()
    whole = logits_of(model, tokens)
    np.testing.assert_allclose(logits_of(model, tokens[:40]), whole[:40], atol=1e-4)
    assert np.isfinite(whole).all()
    model.close()


def test_a_window_hides_what_is_outside_it(tmp_path: Path) -> None:
    model = open_model(write_tiny(tmp_path / "m.gguf", "gemma3", formats="F32", layers=1, window=8))
    tokens = list(range(20, 40))
    changed = [99, *tokens[1:]]
    before, after = logits_of(model, tokens), logits_of(model, changed)
    seen = np.abs(before - after).max(axis=1) > 1e-6
    assert seen[:8].all()
    assert not seen[8:].any()
    model.close()


def test_rotation_depends_on_distance_only() -> None:
    x = np.random.default_rng(0).standard_normal((1, 1, 16)).astype(np.float32)
    for interleaved in (True, False):
        turned = llama.rotate(np.repeat(x, 50, axis=1), Rope(base=100.0, dims=16, scale=0.5), interleaved)[0]
        products = turned @ turned.T
        np.testing.assert_allclose(products[0, :40], products[10, 10:50], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(turned[0], x[0, 0])
    partly = llama.rotate(np.repeat(x, 5, axis=1), Rope(base=100.0, dims=8), True)
    np.testing.assert_array_equal(partly[0, :, 8:], np.repeat(x[0, :, 8:], 5, axis=0))


def test_gemma3_spec_follows_llama_cpp(tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf", "gemma3", layers=13, window=16)) as file:
        file.metadata |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
        spec = gemma3.read_spec(file)
        assert [layer.window for layer in spec.layers] == ([16] * 5 + [0]) * 2 + [16]
        assert spec.layers[0].rope == Rope(base=10_000.0, dims=16)
        assert spec.layers[5].rope == Rope(base=1e6, dims=16, scale=0.125)
        assert spec.embedding_scale == 8.0
        assert spec.attention_scale == 0.25


def test_llama_spec_reads_scaling_and_factors(tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf", rope_factors=True)) as file:
        file.metadata |= {"llama.rope.scaling.factor": 4.0, "llama.rope.freq_base": 5e5}
        rope = llama.read_spec(file).layers[0].rope
        assert (rope.base, rope.dims, rope.scale) == (5e5, 16, 0.25)
        assert rope.factors[0] == 1.0
        assert len(rope.factors) == 8


DAMAGE: list[tuple[str, Any, str]] = [
    ("llama.embedding_length", 65, "'token_embd.weight' is 300 x 64, but the metadata call for 300 x 65"),
    ("llama.embedding_length", 0, "whole number"),
    ("llama.embedding_length", "64", "whole number"),
    ("llama.attention.head_count", 0, "whole number"),
    ("llama.attention.head_count", 3, "must divide evenly"),
    ("llama.attention.head_count_kv", 5, "whole number from 1 to 4"),
    ("llama.attention.head_count_kv", [2, 2], "whole number"),
    ("llama.attention.key_length", 15, "even length"),
    ("llama.attention.value_length", 8, "even length"),
    ("llama.rope.dimension_count", 15, "must be even"),
    ("llama.rope.dimension_count", 32, "whole number from 2 to 16"),
    ("llama.rope.freq_base", float("nan"), "must be a number"),
    ("llama.rope.freq_base", 0.0, "must be a number"),
    ("llama.rope.scaling.type", "yarn", "rope scaling 'yarn'"),
    ("llama.rope.scaling.factor", float("inf"), "must be a number"),
    ("llama.attention.layer_norm_rms_epsilon", float("nan"), "must be a number"),
    ("llama.attention.layer_norm_rms_epsilon", None, "missing"),
    ("llama.block_count", 3, "'blk.2.attn_q.weight' is missing"),
    ("llama.block_count", 1, "has no place"),
    ("llama.block_count", 2**40, "whole number"),
    ("llama.feed_forward_length", 95, "'blk.0.ffn_gate.weight' is 96 x 64"),
    ("llama.context_length", 0, "whole number"),
    ("llama.expert_count", 8, "mixtures of experts"),
    ("general.name", 7, "must be a string"),
]


@pytest.mark.parametrize(("key", "value", "reason"), DAMAGE)
def test_refuses_metadata_that_make_no_sense(key: str, value: Any, reason: str, tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf")) as file:
        file.metadata[key] = value
        with pytest.raises(ModelError, match=reason) as caught:
            llama.read_spec(file)
        assert "\n" not in str(caught.value)


def test_smollm2_knows_the_capital_of_france() -> None:
    if "smollm2" not in {model.name for model in fetch.list_models()}:
        pytest.skip("SmolLM2 has not been pulled")
    model = open_model(fetch.resolve("smollm2"))
    assert model.template is not None
    prompt = model.template.render([{"role": "user", "content": "What is the capital of France?"}])
    tokens = model.tokenizer.encode(prompt, parse_special=True)
    answer = model.tokenizer.encode("The capital of France is Paris.")
    logits = logits_of(model, tokens + answer)
    assert logits[len(tokens) - 1 :].argmax(axis=1).tolist() == [*answer, model.tokenizer.eos]
    model.close()
