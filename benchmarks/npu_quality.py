"""What the NPU unit's few bits cost a model: perplexity, and divergence from float weights, by the blocks' references.

    python benchmarks/npu_quality.py -m MODEL.gguf [--tokens 512] [--variants w8a8,w4a16,...] [--json FILE]

The oracle (numpy, float32) computes the text's tokens; then again with its dense blocks replaced by the references that
graphs are tested against (storage/npu_block.py). Norms, attention, embedding and logits stay float. Ranges come from
Coterie's own calibration text. KL(oracle || x), mean over positions, nats.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from quality import TEXT, log_softmax, oracle_weights

from coterie.models.llama import Floats, Weights
from coterie.models.load import ARCHITECTURES, Model, open_source, understand
from coterie.models.ranges import Ranges
from coterie.models.spec import ModelSpec
from coterie.storage.npu_block import Block, Form, Kind, Seen, make_block
from coterie.storage.npu_quantise import Quantised, Rounding, Scheme, eight_bits, fit_rounding, four_bits
from coterie.storage.npu_ranges import model_ranges

PARTS = {"attn_q": ("qkv", 0), "attn_k": ("qkv", 1), "attn_v": ("qkv", 2), "attn_output": ("out", 0)}
FOLDING = 0.5  # SmoothQuant's alpha


class Variant:
    """`network` and `product` for the oracle, which compute dense blocks as graphs of a scheme do.

    `hot`, `margin`: of fit_rounding; `share`: ranges hold this share of the values instead, without margin or hot
    channels; `plain`: weights as QNN's (int4, no outliers) or with one scale a tensor; `folded`: inputs are divided
    by SmoothQuant's factors, and weights multiplied (arXiv 2211.10438, equation 4).
    """

    def __init__(self, model: Model, weights: Weights, ranges: Ranges, scheme: Scheme, **options: Any) -> None:
        self._spec, self._weights, self._ranges, self._scheme = model.spec, weights, ranges, scheme
        self._options = options
        self.block = cache(self._block)
        self._last: tuple[int, Floats, Floats] | None = None

    def network(self, spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
        block, factors = self.block("ffn", layer)
        return block.reference(h / factors)

    def product(self, weights: Weights, name: str, x: Floats) -> Floats:
        _, number, role, _ = name.split(".")
        (kind, part), layer = PARTS[role], int(number)
        if kind == "out":
            block, factors = self.block("out", layer)
            return block.reference(x / factors)
        if self._last is None or self._last[0] != layer or self._last[1] is not x:
            block, factors = self.block("qkv", layer)
            self._last = layer, x, block.reference(x / factors)
        q, kv = self._spec.n_heads * self._spec.head_dim, self._spec.n_kv_heads * self._spec.head_dim
        return self._last[2][:, (0, q, q + kv)[part] : (q, q + kv, q + 2 * kv)[part]]

    def _block(self, kind: Kind, layer: int) -> tuple[Block, Floats]:
        roles = {"qkv": ("attn_q", "attn_k", "attn_v"), "out": ("attn_output",)}.get(
            kind, ("ffn_gate", "ffn_up", "ffn_down")
        )
        parts = [self._weights(f"blk.{layer}.{role}.weight") for role in roles]
        names = ("ffn", "hidden") if kind == "ffn" else (kind,)
        seen = [Seen(self._ranges.peaks[name][layer], self._ranges.squares[name][layer]) for name in names]
        factors = np.ones(parts[0].shape[1], np.float32)
        if self._options.get("folded"):
            outer = parts[:2] if kind == "ffn" else parts
            factors = folding(seen[0].peaks, outer)
            parts = [w * factors for w in outer] + parts[len(outer) :]
            seen[0] = Seen(seen[0].peaks / factors, seen[0].squares / factors**2)
        if kind == "ffn" and self._options.get("folded"):  # into Up's rows, which costs a graph nothing
            inner = folding(seen[1].peaks, parts[2:])
            parts[1:] = [parts[1] / inner[:, None], parts[2] * inner]
            seen[1] = Seen(seen[1].peaks / inner, seen[1].squares / inner**2)
        rows = parts[2].shape[0] if kind == "ffn" else sum(map(len, parts))
        activation = self._spec.activation if kind == "ffn" else None
        form = Form(kind, layer, 1, parts[0].shape[1], rows, self._scheme, activation)
        block = make_block(form, parts, seen)
        matrices = tuple(map(self._other, block.matrices, ([*parts[:2]], [parts[2]]) if kind == "ffn" else (parts,)))
        roundings = block.roundings
        if self._options and self._scheme != "w4a16":
            roundings = tuple(self._rounding(name, layer, each) for name, each in zip(names, seen, strict=True))
        return replace(block, matrices=matrices, roundings=roundings), factors

    def _other(self, made: Quantised, parts: list[Floats]) -> Quantised:
        if plain := self._options.get("plain"):
            whole = np.concatenate(parts)
            return four_bits(whole) if plain == "channel" else eight_bits(whole, per_tensor=True)
        return made

    def _rounding(self, name: str, layer: int, seen: Seen) -> Rounding:
        if share := self._options.get("share"):
            return fit_rounding(np.array([self._ranges.largest(name, layer, share)], np.float32), 0, 1)
        known = {key: value for key, value in self._options.items() if key in ("hot", "margin")}
        return fit_rounding(seen.peaks, **known)


def folding(peaks: Floats, weights: list[Floats]) -> Floats:
    """SmoothQuant's factors, by channel, with a geometric mean of 1."""
    largest = np.maximum(np.max([np.abs(w).max(axis=0) for w in weights], axis=0), 1e-5)
    factors = np.maximum(peaks, 1e-5) ** FOLDING / largest ** (1 - FOLDING)
    scaled: Floats = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
    return scaled


VARIANTS: dict[str, tuple[Scheme, dict[str, Any]]] = {
    "w8a8": ("w8a8", {}),
    "w8a8, largest seen": ("w8a8", {"hot": 0, "margin": 1.0}),
    "w8a8, 99.99 % of values": ("w8a8", {"share": 0.9999}),
    "w8a8, folded": ("w8a8", {"hot": 0, "margin": 1.0, "folded": True}),
    "w8a8, hot without margin": ("w8a8", {"margin": 1.0}),
    "w8a8, margin 2": ("w8a8", {"margin": 2.0}),
    "w8a8, one weight scale a tensor, largest seen": ("w8a8", {"hot": 0, "margin": 1.0, "plain": "tensor"}),
    "w4a16": ("w4a16", {}),
    "w4a8-outliers": ("w4a8-outliers", {}),
    "w4a8, one scale a row, largest seen": ("w4a8-outliers", {"hot": 0, "margin": 1.0, "plain": "channel"}),
}


def measure(path: Path, tokens: int, names: list[str]) -> dict[str, dict[str, float]]:
    """Figures by variant; "float" has the perplexity only."""
    model = understand(open_source(path))
    weights, forward = cache(oracle_weights(model)), ARCHITECTURES[model.spec.architecture].forward
    ranges = model_ranges(model, say=lambda line: print(line, file=sys.stderr))
    begin = model.tokenizer.encode("")[:1]
    used = model.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:tokens]
    used = used if used[: len(begin)] == begin else begin + used
    following = np.array(used[1:])
    picked = np.arange(len(following)), following
    reference = log_softmax(forward(model.spec, weights, used))[:-1]
    found = {"float": {"perplexity": float(np.exp(-reference[picked].mean()))}}
    for name in names:
        scheme, options = VARIANTS[name]
        variant = Variant(model, weights, ranges, scheme, **options)
        logits = forward(model.spec, weights, used, variant.network, variant.product)
        theirs = log_softmax(logits)[:-1]
        found[name] = {
            "perplexity": float(np.exp(-theirs[picked].mean())),
            "kl": float(np.einsum("ij,ij->i", np.exp(reference), reference - theirs).mean()),
            "same_top": float((reference.argmax(-1) == theirs.argmax(-1)).mean()),
        }
        row = found[name]
        print(f"{name:48} {row['perplexity']:9.3f} {row['kl']:8.4f} {row['same_top']:7.1%}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by semicolons")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    print(f"{'':48} perplex.  KL       same top")
    found = measure(arguments.model, arguments.tokens, arguments.variants.split(";"))
    print(f"{'float':48} {found['float']['perplexity']:9.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": arguments.model.name, "variants": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
