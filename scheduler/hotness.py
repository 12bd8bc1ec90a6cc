"""What is expected of a sparse model's neurons, by counted activations: which are hot, how many will be read.

PowerInfer-2 (section 5) labels neurons hot by batch size and bounds them by what flash can prefetch while attention is
computed. Here they are those that are live so often that a dense product would cost no more than rows of single
neurons, which reach about half of its bandwidth; units that compute densely get them.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

HOT = 0.5  # of the steps
HALVINGS = 40  # when the cache's memory of a neuron is looked for


@dataclass(frozen=True)
class Activity:
    """What a step of `batch` sequences is expected to use: neurons live, hot ones, and missing ones, which are read;
    bytes of the latter two; seconds that the reads take (None: the disk's rate is not known)."""

    batch: int
    live: float
    hot: int
    hot_bytes: int
    missing: float
    read_bytes: float
    read_seconds: float | None

    def line(self) -> str:
        """For people."""
        took = "" if self.read_seconds is None else f", {1e3 * self.read_seconds:.0f} ms"
        hot = f"{self.hot:,} hot ({self.hot_bytes / 1e6:.1f} MB)"
        read = f"{self.missing:,.0f} read ({self.read_bytes / 1e6:.1f} MB{took}) if steps are independent"
        return f"batch {self.batch}: {self.live:,.0f} neurons live a step, {hot}, {read}"


def hot_set(frequency: Floats, resident: Bools, allowed: int) -> npt.NDArray[np.int64]:
    """A layer's hot neurons, the most often live first: as many as may be with no more than `allowed` among them that
    are not resident."""
    order = np.argsort(-frequency, kind="stable")
    hot = order[frequency[order] >= HOT]
    fetched = np.cumsum(~resident[hot])
    ids: npt.NDArray[np.int64] = hot[fetched <= allowed]
    return ids


def allowed_fetches(bandwidth: float | None, attention_seconds: float | None, bundle: int) -> int:
    """How many neurons of `bundle` bytes flash reads in sequence while a layer's attention is computed; 0 if either
    speed is not known."""
    return int(bandwidth * attention_seconds / bundle) if bandwidth and attention_seconds else 0


def expected_misses(frequency: Floats, slots: int) -> float:
    """How many neurons a step finds missing from an LRU cache of `slots` neurons, where neuron i is live in a share
    frequency[i] of the steps, each step by itself (Che, Tung and Wang 2002: a neuron stays for a time that is the same
    for all). Texts stay with a topic, so there are fewer in truth."""
    used = frequency[frequency > 0]
    if used.size <= slots:
        return 0.0
    low, high = 0.0, slots / float(used.min()) + 1.0
    while np.sum(-np.expm1(-used * high)) < slots:
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if np.sum(-np.expm1(-used * middle)) < slots:
            low = middle
        else:
            high = middle
    return float(np.sum(used * np.exp(-used * high)))
