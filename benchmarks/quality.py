"""Is it the same model? Logits of ours and of llama.cpp against an oracle: row 2 of the engine's bars.

    LLAMA_BUILD=.../build python benchmarks/quality.py -m MODEL [--windows 2560,512,512,512,512] [--json FILE]

The oracle is the plain numpy forward pass of models/ in float32, without a cache, over the file's weights
dequantised: it shares the file's rounding with both, and has none of its own. Windows are consecutive pieces of
benchmarks/text/english.txt, each begun as the model wants it and computed from an empty context. Scored is every
position whose next token is known. Divergences are per position, in nats and float64: KL(P || Q) = sum P log(P / Q)
over the vocabulary. KL(oracle || x) is the usual one; KL(x || oracle) is the one the bar names.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.engine import Engine
from coterie.models.load import ARCHITECTURES, Model
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

TEXT = Path(__file__).parent / "text" / "english.txt"
ROWS = 64  # positions at a time: with 262,144 tokens a slice of logits is 64 MiB, of float64 128 MiB
LONG = 2048  # positions from here on are also reported by themselves
KL_BAR, TOP_BAR, PERPLEXITY_BAR = 1.2, 0.97, 0.005


def oracle_weights(model: Model) -> Callable[[str], Floats]:
    """Weights by name, dequantised once."""
    kept: dict[str, Floats] = {}

    def weights(name: str) -> Floats:
        if name not in kept:
            kept[name] = model.source.floats(name)
        return kept[name]

    return weights


def our_logits(engine: Engine, tokens: list[int]) -> Iterator[Floats]:
    """Logits of ours, ROWS positions at a time."""
    sequence = engine.sequence()
    try:
        for first in range(0, len(tokens), ROWS):
            piece = tokens[first : first + ROWS]
            yield engine.prefill(sequence, piece, range(len(piece)))
    finally:
        sequence.close()


def peer_logits(build: Path, model: Path, vocab: int, tokens: list[int], options: list[str]) -> Iterator[Floats]:
    """llama.cpp's logits, ROWS positions at a time; raises RuntimeError where it fails."""
    command = [str(build / "bin" / "peer_logits"), str(model), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(np.array(tokens, np.int32).tobytes())
        process.stdin.close()
        for first in range(0, len(tokens), ROWS):
            rows = min(ROWS, len(tokens) - first)
            data = process.stdout.read(4 * rows * vocab)
            if len(data) != 4 * rows * vocab:
                raise RuntimeError(f"{command[0]} ended early, with status {process.wait()}")
            yield np.frombuffer(data, np.float32).reshape(rows, vocab)


def log_softmax(logits: Floats) -> Doubles:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def compare(oracle: Floats, others: dict[str, Iterator[Floats]], tokens: list[int]) -> dict[str, Doubles]:
    """Per scored position, under "name measure": loss in nats; of the others also both divergences from the oracle
    and whether the top token is the oracle's."""
    found: dict[str, list[Doubles]] = {}

    def note(name: str, values: Doubles) -> None:
        found.setdefault(name, []).append(values)

    for first in range(0, len(tokens), ROWS):
        following = np.array(tokens[first + 1 : first + ROWS + 1])
        scored = len(following)
        if not scored:
            break
        picked = (np.arange(scored), following)
        reference = log_softmax(oracle[first : first + scored])
        chances = np.exp(reference)
        note("oracle loss", -reference[picked])
        for name, pieces in others.items():
            theirs = log_softmax(next(pieces)[:scored])
            gap = reference - theirs
            note(f"{name} loss", -theirs[picked])
            note(f"{name} kl from oracle", np.einsum("ij,ij->i", chances, gap))
            note(f"{name} kl to oracle", -np.einsum("ij,ij->i", np.exp(theirs), gap))
            note(f"{name} same top", (reference.argmax(-1) == theirs.argmax(-1)).astype(np.float64))
    return {name: np.concatenate(values) for name, values in found.items()}


def summary(found: dict[str, Doubles], where: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Figures over the positions in the mask `where`."""
    result: dict[str, Any] = {"positions": int(where.sum())}
    for name in ("oracle", "ours", "peer"):
        row = {"perplexity": float(np.exp(found[f"{name} loss"][where].mean()))}
        if name != "oracle":
            for key, label in (("kl from oracle", "kl_oracle_x"), ("kl to oracle", "kl_x_oracle")):
                values = found[f"{name} {key}"][where]
                row[label] = float(values.mean())
                row[f"{label}_stderr"] = float(values.std() / np.sqrt(values.size))
                row[f"{label}_median"], row[f"{label}_p99"] = np.percentile(values, [50, 99]).tolist()
            row["same_top"] = float(found[f"{name} same top"][where].mean())
        result[name] = row
    ours, peer = result["ours"], result["peer"]
    result["kl_x_oracle_ratio"] = ours["kl_x_oracle"] / peer["kl_x_oracle"]
    result["kl_oracle_x_ratio"] = ours["kl_oracle_x"] / peer["kl_oracle_x"]
    result["perplexity_difference"] = ours["perplexity"] / peer["perplexity"] - 1
    return result


def table(title: str, figures: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{title}, {figures['positions']} positions",
        "",
        "| | KL(x ‖ oracle): mean ± s.e. | median | 99 % | KL(oracle ‖ x): mean ± s.e. | median | 99 % "
        "| same top | perplexity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("ours", "peer"):
        row = figures[name]
        divergences = [
            f"{row[kl]:.6f} ± {row[kl + '_stderr']:.6f} | {row[kl + '_median']:.6f} | {row[kl + '_p99']:.6f}"
            for kl in ("kl_x_oracle", "kl_oracle_x")
        ]
        lines.append(f"| {name} | {' | '.join(divergences)} | {row['same_top']:.2%} | {row['perplexity']:.4f} |")
    lines.append(f"| oracle | 0 | | | 0 | | | | {figures['oracle']['perplexity']:.4f} |")
    checks = (
        (f"ratio of KL(x ‖ oracle) {figures['kl_x_oracle_ratio']:.3f}", figures["kl_x_oracle_ratio"] <= KL_BAR),
        (f"of KL(oracle ‖ x) {figures['kl_oracle_x_ratio']:.3f}", figures["kl_oracle_x_ratio"] <= KL_BAR),
        (f"same top {figures['ours']['same_top']:.2%}", figures["ours"]["same_top"] >= TOP_BAR),
        (
            f"perplexity {figures['perplexity_difference']:+.3%} of the peer's",
            abs(figures["perplexity_difference"]) <= PERPLEXITY_BAR,
        ),
    )
    lines += ["", "; ".join(f"{said}: {'met' if met else 'MISSED'}" for said, met in checks), ""]
    return "\n".join(lines)


def measure(build: Path, path: Path, sizes: list[int], threads: int, peer_options: list[str]) -> dict[str, Any]:
    """Figures over all windows, and over the positions from LONG on where there are any."""
    found: dict[str, list[Doubles]] = {"position": []}
    model = open_model(path)
    engine = Engine(model, Wishes(threads=threads, context=max(sizes)))
    try:
        begin = model.tokenizer.encode("")[:1]  # BOS, where the model wants one
        text = model.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[len(begin) :]
        used = [size - len(begin) for size in sizes]
        if sum(used) > len(text):
            sys.exit(f"{TEXT.name} has {len(text)} tokens, the windows take {sum(used)}; ask for fewer")
        weights, forward = oracle_weights(model), ARCHITECTURES[model.spec.architecture].forward
        for number, size in enumerate(used):
            first = sum(used[:number])
            tokens = begin + text[first : first + size]
            oracle = forward(model.spec, weights, tokens)
            peer = peer_logits(build, path, model.spec.vocab, tokens, [str(threads), *peer_options])
            others = {"ours": our_logits(engine, tokens), "peer": peer}
            for name, values in compare(oracle, others, tokens).items():
                found.setdefault(name, []).append(values)
            found["position"].append(np.arange(len(tokens) - 1, dtype=np.float64))
            print(f"window {number + 1} of {len(sizes)}: {len(tokens)} tokens", file=sys.stderr, flush=True)
    finally:
        engine.close()
    everything = {name: np.concatenate(values) for name, values in found.items()}
    position = everything.pop("position")
    result = {"model": path.name, "windows": sizes, "all": summary(everything, position >= 0)}
    if (late := position >= LONG).any():
        result["late"] = summary(everything, late)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--windows", default="2560,512,512,512,512", help="tokens of each, BOS included")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-flash", action="store_true", help="the peer's attention without its flash kernel")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    build = Path(os.environ.get("LLAMA_BUILD", ""))
    if not (build / "bin" / "peer_logits").is_file():
        sys.exit("set LLAMA_BUILD to llama.cpp's build folder with bin/peer_logits (see benchmarks/README.md)")
    sizes = [int(size) for size in arguments.windows.split(",")]
    options = ["no-flash"] if arguments.no_flash else []
    result = measure(build, arguments.model, sizes, arguments.threads, options)
    print(table(result["model"], result["all"]))
    if "late" in result:
        print(table(f"{result['model']}, from position {LONG:,} on", result["late"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
