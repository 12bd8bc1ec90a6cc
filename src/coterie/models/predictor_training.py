"""Learning one layer's predictor from what was recorded of it.

A predictor says by a network with one hidden layer, score = fc2 relu(fc1 x), which neurons are worth computing: those
whose score is positive (Deja Vu, https://arxiv.org/abs/2310.17157, section 4.1; PowerInfer,
https://arxiv.org/abs/2312.12456, section 5.1). It begins as the best approximation of Gate's own outputs that its
width allows and is trained by Adam (https://arxiv.org/abs/1412.6980) on the logistic loss.

There are no biases in the files. What takes their place is the combination of hidden units that is nearest to 1 over
the text. Added to every row of fc2 it shifts all scores alike, and the shift that finds the wanted share of live
neurons is looked for with the rounded weights. The loss gives live and idle neurons their natural weights, so scores
are chances (log odds), and one shift of all of them is the best trade of recall against work.

All this is a few matrix products: numpy does them in the same BLAS that a framework would, which is a gigabyte more to
install.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.models.dequant import dequantise, quantise

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

BATCH = 128  # tokens of a step
EPOCHS = 40
PATIENCE = 4  # epochs without a better loss on what is held out, after which training ends
RATE, BETAS, TINY = 2e-3, (0.9, 0.999), 1e-8  # Adam's; the rate falls to 0 over the epochs
SHARPNESS = 4.0  # log odds of a Gate output of one deviation, to begin with
LEAST = 1e-3  # of the largest: smaller singular values, or coordinates of x, are taken for noise
RIDGE = 1e-4  # what large coefficients of the constant cost: they would be lost in rounding
FARTHEST, NEAREST = 32.0, 0.01  # shifts that are tried, and how finely


@dataclass(frozen=True)
class Training:
    """What is wanted: hidden units, the matrices' format, and which share of live neurons is to be found."""

    rank: int
    format: str
    recall: float
    seed: int


@dataclass(frozen=True)
class Recorded:
    """Inputs of a layer's network float32[n, dim], and which neurons add something bool[n, ffn_dim]."""

    x: Floats
    live: Bools


@dataclass(frozen=True)
class Predictor:
    """fc1 (rank rows, dim columns) and fc2 (ffn_dim rows, rank columns), uint8[rows, row bytes] each."""

    format: str
    first: Bytes
    second: Bytes

    def chosen(self, x: Floats) -> Bools:
        """Which neurons are computed, bool[n, ffn_dim], for x float32[n, dim]."""
        return scores(dequantise(self.first, self.format), dequantise(self.second, self.format), x) > 0


def scores(first: Floats, second: Floats, x: Floats) -> Floats:
    """float32[n, ffn_dim]."""
    return hidden(first, x) @ second.T


def hidden(first: Floats, x: Floats) -> Floats:
    """float32[n, rank]."""
    units: Floats = np.maximum(x @ first.T, 0)
    return units


def train_layer(
    gate: Floats, text: Recorded, held: Recorded, training: Training, rng: np.random.Generator
) -> Predictor:
    """A predictor for Gate float32[ffn_dim, dim], trained on `text`.

    `held` says when training ends, and how far scores are shifted.
    """
    size = np.sqrt(np.mean(np.square(text.x), axis=0))
    size = np.maximum(size, LEAST * size.max() + TINY)  # x in these units is alike in all coordinates, as Adam wants it
    near, far = Recorded(text.x / size, text.live), Recorded(held.x / size, held.live)
    first, second = begin(gate * size, near.x, training.rank, rng)
    first, second = _fit(first, second, near, far, rng)
    return _shifted(first / size, second, text.x, held, training)


def begin(gate: Floats, x: Floats, rank: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """fc1 and fc2 whose scores are Gate's outputs, projected onto the rank / 2 directions in which they vary most.

    Each direction takes two units, because a = relu(a) - relu(-a). Units that are left over begin at random, unused.
    """
    sample = x[rng.permutation(len(x))[: 2 * rank]]
    outputs = sample @ gate.T
    _, strength, directions = np.linalg.svd(outputs, full_matrices=False)
    pairs = min(rank // 2, int((strength > LEAST * strength[0]).sum()))
    directions, strength = directions[:pairs], strength[:pairs, None] / np.float32(len(sample) ** 0.5)
    basis = directions @ gate / np.maximum(strength, TINY)  # units of deviation 1
    spread = np.sqrt(np.mean(np.square(outputs), axis=0))[:, None]
    factors = SHARPNESS * (directions * strength).T / np.maximum(spread, TINY)
    left = rank - 2 * pairs
    others = rng.standard_normal((left, x.shape[1]), np.float32) / np.float32(x.shape[1] ** 0.5)
    unused = np.zeros((len(gate), left), np.float32)
    return np.concatenate([basis, -basis, others]), np.concatenate([factors, -factors, unused], axis=1)


def _fit(
    first: Floats, second: Floats, text: Recorded, held: Recorded, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """The two matrices, float32, as they were when the loss on what is held out was least."""
    optimisers = Adam(first), Adam(second)
    best, least, since = (first.copy(), second.copy()), loss_of(scores(first, second, held.x), held.live), 0
    for epoch in range(EPOCHS):
        order, rate = rng.permutation(len(text.x)), RATE * (1 - epoch / EPOCHS)
        for at in range(0, len(order), BATCH):
            batch = order[at : at + BATCH]
            changes = gradients(first, second, text.x[batch], text.live[batch])
            optimisers[0].step(first, changes[0], rate)
            optimisers[1].step(second, changes[1], rate)
        loss = loss_of(scores(first, second, held.x), held.live)
        since += 1
        if loss < least:
            best, least, since = (first.copy(), second.copy()), loss, 0
        if since == PATIENCE:
            break
    return best


def gradients(first: Floats, second: Floats, x: Floats, live: Bools) -> tuple[Floats, Floats]:
    """Those of a token's mean loss, all neurons together, for fc1 and fc2."""
    units = hidden(first, x)
    error: Floats = (_chance(units @ second.T) - live) / np.float32(len(x))
    back: Floats = error @ second
    back[units <= 0] = 0
    return back.T @ x, error.T @ units


def _chance(score: Floats) -> Floats:
    """1 / (1 + exp(-score)), without overflow."""
    chance: Floats = 0.5 + 0.5 * np.tanh(0.5 * score)
    return chance


def loss_of(score: Floats, live: Bools) -> float:
    """The mean logistic loss, nats a neuron and token."""
    return float(np.mean(np.maximum(score, 0) - score * live + np.log1p(np.exp(-np.abs(score))), dtype=np.float64))


class Adam:
    """Changes a matrix in place by its gradients."""

    def __init__(self, like: Floats) -> None:
        self.mean, self.square, self.steps = np.zeros_like(like), np.zeros_like(like), 0

    def step(self, weights: Floats, gradient: Floats, rate: float) -> None:
        self.steps += 1
        self.mean += (1 - BETAS[0]) * (gradient - self.mean)
        self.square += (1 - BETAS[1]) * (np.square(gradient) - self.square)
        scale = rate * (1 - BETAS[1] ** self.steps) ** 0.5 / (1 - BETAS[0] ** self.steps)
        weights -= scale * self.mean / (np.sqrt(self.square) + TINY)


def _shifted(first: Floats, second: Floats, x: Floats, held: Recorded, training: Training) -> Predictor:
    """The predictor, rounded, with the least shift that finds the wanted share of live neurons, or the largest."""
    rounded = quantise(first, training.format)
    first = dequantise(rounded, training.format)
    constant, units = _constant(hidden(first, x)), hidden(first, held.x)
    wanted = training.recall * int(held.live.sum())

    def shifted(shift: float) -> Bytes:
        return quantise(second + np.float32(shift) * constant, training.format)

    low, high = -FARTHEST, FARTHEST
    while high - low > NEAREST:
        middle = (low + high) / 2
        chosen = units @ dequantise(shifted(middle), training.format).T > 0
        enough = int((chosen & held.live).sum()) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return Predictor(training.format, rounded, shifted(high))


def _constant(units: Floats) -> Floats:
    """Coefficients float32[rank] by which hidden units float32[n, rank] add up to nearly 1 for every token."""
    products = units.T @ units
    products[np.diag_indices(len(products))] += RIDGE * np.trace(products) / len(products) + TINY
    return np.linalg.solve(products, units.sum(axis=0))
