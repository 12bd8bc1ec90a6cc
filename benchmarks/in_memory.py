"""Decode and prefill against llama.cpp, in alternation: rows 5 and 6 of the engine's bars.

    LLAMA_BENCH=.../llama-bench python benchmarks/in_memory.py MODEL.gguf ... [--pairs 5] [--reps 3] [--out FILE]

For each model one process of ours stays open; then the peer (llama-bench, repacked kernels on) and we run in turn,
`pairs` times, each with its own warm-up and `reps` repetitions. Quoted: medians, and the median of the ratios pair by
pair. For each pair a read loop over our packed weights, by the same lanes, runs right before and after decoding; the
share is decode's bytes/s over theirs. All runs are printed. Nothing else should run on the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from coterie import LLM
from coterie.fetch import resolve


def peer(
    binary: str, model: Path, tests: list[tuple[int, int]], reps: int, threads: int
) -> dict[tuple[int, int], float]:
    """llama-bench's tokens/s by (n_prompt, n_gen)."""
    prompts = ",".join(str(p) for p, _ in tests if p) or "0"
    gens = ",".join(str(n) for _, n in tests if n) or "0"
    command = [
        binary,
        "-m",
        str(model),
        "-p",
        prompts,
        "-n",
        gens,
        "-r",
        str(reps),
        "-t",
        str(threads),
        "-o",
        "json",
    ]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {(row["n_prompt"], row["n_gen"]): row["avg_ts"] for row in json.loads(said)}


def measure(binary: str, model: Path, pairs: int, reps: int, threads: int) -> list[dict[str, Any]]:
    """One row a test: medians, ratios, every run."""
    tests = [(256, 0), (0, 64)]
    theirs: dict[tuple[int, int], list[float]] = {test: [] for test in tests}
    ours: dict[tuple[int, int], list[float]] = {test: [] for test in tests}
    shares = []
    with LLM(model, threads=threads, context=512) as llm:
        engine = llm._engine
        for _ in range(pairs):
            for test, rate in peer(binary, model, tests, reps, threads).items():
                theirs[test].append(rate)
            ours[256, 0].append(llm.bench(256, 0, reps)[0]["avg_ts"])
            before = engine.read_bandwidth()
            ours[0, 64].append(llm.bench(0, 64, reps)[0]["avg_ts"])
            bandwidth = (before + engine.read_bandwidth()) / 2
            shares.append(ours[0, 64][-1] * llm.plan.bytes_per_token / bandwidth)
    rows = []
    for test in tests:
        ratios = [a / b for a, b in zip(ours[test], theirs[test], strict=True)]
        row = {
            "model": model.name,
            "test": f"pp{test[0]}" if test[0] else f"tg{test[1]}",
            "ours": statistics.median(ours[test]),
            "peer": statistics.median(theirs[test]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "ours_runs": ours[test],
            "peer_runs": theirs[test],
        }
        if not test[0]:
            row |= {"read_share": statistics.median(shares), "read_shares": shares}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: medians, and minimum to maximum in parentheses."""

    def spread(values: list[float], form: str) -> str:
        return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"

    lines = [
        "| model | test | ours, tokens/s | llama.cpp | ratio | of the read loop |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = spread(row["read_shares"], ".2f") if "read_shares" in row else ""
        lines.append(
            f"| {row['model']} | {row['test']} | {spread(row['ours_runs'], '.1f')} | {spread(row['peer_runs'], '.1f')} "
            f"| **{row['ratio']:.2f}** ({min(row['ratios']):.2f}-{max(row['ratios']):.2f}) | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=["smollm2"], help="names or paths (default: smollm2)")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the table and every run here (.json beside it)")
    arguments = parser.parse_args()
    binary = os.environ.get("LLAMA_BENCH")
    if not binary:
        sys.exit("set LLAMA_BENCH to a llama-bench binary (benchmarks/README.md says how to build one)")
    rows: list[dict[str, Any]] = []
    for model in map(resolve, arguments.models):
        rows += measure(binary, model, arguments.pairs, arguments.reps, arguments.threads)
        print(table(rows[-2:]), flush=True)
    if arguments.out:
        arguments.out.write_text(table(rows) + "\n")
        arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
