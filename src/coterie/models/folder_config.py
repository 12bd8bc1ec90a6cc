"""config.json of a Hugging Face folder as a GGUF's metadata."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ModelError
from coterie.models.json_object import entry, number

WHERE = "config.json"
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "BambooForCausalLM": "bamboo"}
ACTIVATIONS = {
    "silu": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "squared relu": "relu2",
    "squared_relu": "relu2",
    "drelu": "drelu",
}
SIZES = {  # GGUF's key behind the architecture: ours
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}


def config_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """Metadata as of a GGUF; their ranges are checked as a GGUF's are. Raises ModelError for what is not supported."""
    names = entry(config, "architectures", list, WHERE)
    if len(names) != 1 or not isinstance(names[0], str) or names[0] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{WHERE}: the architecture {repr(names)[:60]} is not supported; {known} are")
    a = ARCHITECTURES[names[0]]
    found: dict[str, Any] = {"general.architecture": a}
    found |= {f"{a}.{key}": entry(config, name, int, WHERE) for key, name in SIZES.items()}
    heads = found[f"{a}.attention.head_count"]
    found[f"{a}.attention.head_count_kv"] = entry(config, "num_key_value_heads", int, WHERE, heads)
    if config.get("head_dim") is not None:
        for key in ("attention.key_length", "attention.value_length"):
            found[f"{a}.{key}"] = entry(config, "head_dim", int, WHERE)
    positions = entry(config, "max_position_embeddings", int, WHERE)
    # Within its sliding window a model attends to everything, and further Coterie does not go with it.
    found[f"{a}.context_length"] = min(positions, entry(config, "sliding_window", int, WHERE, positions))
    found[f"{a}.attention.layer_norm_rms_epsilon"] = number(config, "rms_norm_eps", WHERE, 1e-6)
    found |= {f"{a}.rope.{key}": value for key, value in _rope(config).items()}
    activation = _activation(config, a)
    if activation != "silu":
        found[f"{a}.hidden_activation"] = activation
    return found


def _activation(config: dict[str, Any], architecture: str) -> str:
    named = entry(config, "hidden_act", str, WHERE, "silu")
    if named not in ACTIVATIONS:
        raise ModelError(f"{WHERE}: activation {named[:40]!r} is not supported; {', '.join(ACTIVATIONS)} are")
    if architecture == "bamboo" and ACTIVATIONS[named] == "relu":
        return "drelu"  # Bamboo's network, which config.json calls relu
    return ACTIVATIONS[named]


def _scaling(config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What config.json says of rotary positions, and the name of their scaling."""
    rope = entry(config, "rope_parameters", dict, WHERE, {}) or entry(config, "rope_scaling", dict, WHERE, {})
    kind = entry(rope, "rope_type", str, WHERE, entry(rope, "type", str, WHERE, "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"{WHERE}: rope scaling {kind[:40]!r} is not supported; linear and llama3 are")
    return rope, kind


def _base(config: dict[str, Any], rope: dict[str, Any]) -> float:
    return number(config, "rope_theta", WHERE, number(rope, "rope_theta", WHERE, 10_000.0))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    if number(config, "partial_rotary_factor", WHERE, 1.0) != 1:
        raise ModelError(f"{WHERE}: partial_rotary_factor is not supported")
    rope, kind = _scaling(config)
    base = {"freq_base": _base(config, rope)}
    if kind != "linear":
        return base
    return base | {"scaling.type": "linear", "scaling.factor": number(rope, "factor", WHERE)}


def rope_factors(config: dict[str, Any], head_dim: int) -> NDArray[np.float32] | None:
    """Llama 3's divisors of the rotary frequencies, float32[head_dim / 2]: long waves are stretched by `factor`, short
    ones not at all, those between by something between. None where there are none. Raises ModelError."""
    rope, kind = _scaling(config)
    if kind != "llama3":
        return None
    factor, low, high = (number(rope, key, WHERE) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = number(rope, "original_max_position_embeddings", WHERE)
    base = _base(config, rope)
    if not (factor > 0 and 0 < low < high and trained > 0 and base >= 1):
        raise ModelError(f"{WHERE}: the numbers of rope scaling llama3 make no sense")
    turns = trained * base ** (-2 * np.arange(head_dim // 2) / head_dim) / (2 * math.pi)  # within `trained`
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - kept) / factor + kept)).astype(np.float32)
