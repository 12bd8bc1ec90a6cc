"""What the rest of Coterie needs to know of a model, whatever file it came from."""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "relu", "relu2", "drelu"]  # of Gate; drelu: of Gate and of Up


@dataclass(frozen=True)
class Rope:
    """One rotary embedding.

    Angle of pair `i` at position `p`: `p * scale * base ** (-2 i / dims) / factors[i]`.
    """

    base: float
    dims: int  # how many of a head's dimensions rotate (the first ones)
    scale: float = 1.0  # 1 / linear scaling factor
    factors: tuple[float, ...] = ()  # Llama 3's per-pair divisors; empty: all 1


@dataclass(frozen=True)
class LayerSpec:
    """What differs from layer to layer."""

    rope: Rope
    window: int = 0  # attend to the last `window` positions (this one included); 0: to all


@dataclass(frozen=True)
class Part:
    """Consecutive layers of a model, `first` to `last` (excluded) of `layers`, cut out for a process of their own.
    `model`: the identity of the model they are of (models/part.py)."""

    first: int
    last: int
    layers: int
    model: str

    def __str__(self) -> str:
        return f"layers {self.first} to {self.last - 1} of {self.layers}"


@dataclass(frozen=True)
class ModelSpec:
    """Shape and arithmetic of a dense decoder-only transformer, or of a part of one: `layers` are then those it has.

    Tensor names are GGUF's. `interleaved_rope` says that rotary pairs are (2i, 2i+1), as GGUF
    stores llama's heads; otherwise they are (i, i + dims/2).
    """

    architecture: str
    name: str
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab: int
    context: int  # positions the model was trained for
    norm_eps: float
    activation: Activation
    interleaved_rope: bool
    attention_scale: float  # multiplies q . k
    embedding_scale: float  # multiplies the embedding row
    qk_norm: bool  # RMS norm of each query and key head before rope
    post_norms: bool  # RMS norm of attention's and FFN's output before the residual addition
    tied: bool  # logits come from token_embd.weight
    layers: tuple[LayerSpec, ...]
    sparse: bool = False  # Down lies by neurons (`ffn_down_t`), and only live neurons are computed in decode
    predictor: int = 0  # hidden units of the predictors (`fc1`, `fc2`) that say which are live; 0: Gate itself says it
    part: Part | None = None  # what part of a model this is; None: all of it

    @property
    def qkv_rows(self) -> int:
        """Rows of a layer's queries, keys and values together."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    @property
    def has_embedding(self) -> bool:
        """Whether token ids come in; else hidden states, float32[rows][dim]."""
        return self.part is None or self.part.first == 0

    @property
    def has_head(self) -> bool:
        """Whether logits go out; else hidden states."""
        return self.part is None or self.part.last == self.part.layers
