"""Predictors of which neurons are live: what they learn from is recorded, and the model made that has them.

The float oracle runs over a text, layer by layer for the whole text, so that a layer's weights are read and
dequantised once and only they are in memory as floats. What is held out of the text, its last tenth, goes through
each layer twice: as it is, and by those neurons only that the new predictor chooses.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ModelError, UsageError
from coterie.models import llama
from coterie.models.llama import Floats, Weights
from coterie.models.predictor_training import Predictor, Recorded, Training, train_layer
from coterie.models.source import Bytes, DerivedModel, Made, WeightSource
from coterie.models.spec import ModelSpec
from coterie.models.tokenizer import chunks_of

CHUNK = 256  # tokens that see each other
HELD = 10  # one chunk in so many is not trained on
UNITS = 32  # hidden units come in blocks of so many: a block of the quantised formats
FORMATS = ("Q8_0", "Q4_0", "F16")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Figures:
    """Counts over tokens and neurons: all of them, live ones, those that were chosen, and live ones among those."""

    all: int
    live: int
    chosen: int
    found: int

    @property
    def recall(self) -> float:
        """The share of live neurons that the predictor finds; the others are missing in the result."""
        return self.found / self.live if self.live else 1.0

    @property
    def skipped(self) -> float:
        """The share of all neurons that is not computed."""
        return 1 - self.chosen / self.all

    @property
    def live_share(self) -> float:
        return self.live / self.all

    @staticmethod
    def of(chosen: NDArray[np.bool_], live: NDArray[np.bool_]) -> "Figures":
        return Figures(live.size, int(live.sum()), int(chosen.sum()), int((chosen & live).sum()))

    @staticmethod
    def total(parts: "list[Figures]") -> "Figures":
        return Figures(*(sum(getattr(part, name) for part in parts) for name in ("all", "live", "chosen", "found")))


@dataclass(frozen=True)
class Trained:
    """Predictors of all layers, with figures on what is held out: `exact` and `lossy` are its hidden states, float32
    [CHUNK, dim] a chunk, after the last layer, with all neurons and with those that the predictors chose."""

    predictors: list[Predictor]
    figures: list[Figures]
    exact: list[Floats]
    lossy: list[Floats]


def default_rank(spec: ModelSpec) -> int:
    """An eighth of the width: for shapes of 7B models 5 % of the network's weights. PowerInfer's predictors have 6 % of
    the model's, more where more neurons are live (section 5.1), which is for the figures to say."""
    return max(UNITS, spec.dim // 8 // UNITS * UNITS)


def check_trainable(spec: ModelSpec, training: Training) -> None:
    """Raise UsageError where predictors cannot be trained so."""
    if training.format not in FORMATS:
        raise UsageError(f"predictors in {training.format[:20]!r} are not supported; there are {', '.join(FORMATS)}")
    if training.rank % UNITS or not UNITS <= training.rank <= spec.dim:
        raise UsageError(
            f"rank {training.rank}: give a multiple of {UNITS} up to the model's width, {spec.dim}, "
            "beyond which Gate itself costs less"
        )
    if spec.dim % UNITS and training.format != "F16":
        raise UsageError(f"rows of {spec.dim} are no {training.format} blocks; give --format F16")
    if not 0 < training.recall <= 1:
        raise UsageError(f"recall {training.recall}: give a share above 0, up to 1")


def cut(tokens: list[int], begin: list[int]) -> list[list[int]]:
    """A text's chunks, each begun with `begin` (BOS, or nothing); UsageError for a text that has not two of them."""
    chunks = chunks_of(tokens, begin, CHUNK)
    if len(chunks) < 2:
        raise UsageError(
            f"there are {len(tokens)} tokens, training needs {2 * CHUNK} at least; give more text, or a larger --tokens"
        )
    return chunks


def held_out(chunks: int) -> int:
    """How many chunks, the last ones, are not trained on."""
    return max(1, chunks // HELD)


def train(
    source: WeightSource, spec: ModelSpec, chunks: list[list[int]], training: Training, progress: Progress
) -> Trained:
    """Train a predictor for every layer of a sparse model on chunks of a text.

    In memory are a layer as floats, up to four times float32[tokens, dim] and twice bool[tokens, ffn_dim]. Raises
    ModelError where weights are no numbers, or make some that are none.
    """
    held, layers = held_out(len(chunks)), len(spec.layers)
    states = _embedded(source, chunks)
    lossy, predictors, figures = states[-held:], list[Predictor](), list[Figures]()
    for i in range(layers):
        progress(f"recording layer {i + 1} of {layers}", 0, 0)
        weights: Weights = cache(source.floats)
        states, text, kept = _recorded(source, spec, weights, i, states, held)
        progress(f"training layer {i + 1} of {layers}", 0, 0)
        rng = np.random.default_rng([training.seed, i])
        predictor = train_layer(weights(f"blk.{i}.ffn_gate.weight"), text, kept, training, rng)
        figures.append(Figures.of(predictor.chosen(kept.x), kept.live))
        predictors.append(predictor)
        lossy = [llama.block(spec, weights, i, x, _leaving_out(predictor)) for x in lossy]
        source.forget()
    return Trained(predictors, figures, states[-held:], lossy)


def _embedded(source: WeightSource, chunks: list[list[int]]) -> list[Floats]:
    embedding = source.floats("token_embd.weight")
    return [embedding[chunk] for chunk in chunks]


def _recorded(
    source: WeightSource, spec: ModelSpec, weights: Weights, i: int, states: list[Floats], held: int
) -> tuple[list[Floats], Recorded, Recorded]:
    """The states after layer `i`, and what was seen in its network: of the text, and of what is held out.

    Live is a neuron that adds something: its activation is not 0, so that with dReLU Gate and Up are both positive.
    """
    inputs, live = list[Floats](), list[NDArray[np.bool_]]()

    def look(spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
        hidden = llama.activated(spec.activation, *llama.gate_and_up(weights, layer, h))
        inputs.append(h)
        live.append(hidden != 0)
        return llama.down(spec, weights, layer, hidden)

    with np.errstate(over="ignore", invalid="ignore"):
        after = [llama.block(spec, weights, i, x, look) for x in states]
    if not all(np.isfinite(x).all() for x in after):
        raise ModelError(f"{source.path.name}: what layer {i} computes is not a number; the file is damaged")
    text = Recorded(np.concatenate(inputs[:-held]), np.concatenate(live[:-held]))
    return after, text, Recorded(np.concatenate(inputs[-held:]), np.concatenate(live[-held:]))


def _leaving_out(predictor: Predictor) -> llama.Network:
    """A feed-forward network of those neurons only that a predictor chooses."""

    def network(spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
        hidden = llama.activated(spec.activation, *llama.gate_and_up(weights, layer, h))
        return llama.down(spec, weights, layer, hidden * predictor.chosen(h))

    return network


def logits(source: WeightSource, spec: ModelSpec, states: list[Floats]) -> Iterator[Floats]:
    """Logits float32[CHUNK, vocab] of chunks' hidden states after the last layer."""
    weights = cache(source.floats)
    return (llama.logits(spec, weights, x) for x in states)


def with_predictors(source: WeightSource, spec: ModelSpec, predictors: list[Predictor]) -> DerivedModel:
    """The model with these predictors, in place of any that it has."""
    made, digest = dict[str, Made](), hashlib.sha256()
    for i, predictor in enumerate(predictors):
        rank = len(predictor.first)
        shapes = {"fc1": (predictor.first, (rank, spec.dim)), "fc2": (predictor.second, (spec.ffn_dim, rank))}
        for name, (raw, shape) in shapes.items():
            digest.update(raw.tobytes())
            made[f"blk.{i}.{name}.weight"] = Made(predictor.format, shape, _rows_of(raw))
    return DerivedModel(source, made, salt=f"predictors {digest.hexdigest()}")


def _rows_of(raw: Bytes) -> Callable[[range], Bytes]:
    return lambda rows: raw[rows.start : rows.stop].copy()
