"""What a layer cut costs: a token's time and bytes over a link between two processes, against one process.

    python benchmarks/link.py MODEL.gguf [--cut K] [--pairs 5] [--tokens 64] [--threads 2]

Both stay open: the whole model in this process, and the same one cut, its first K layers in a Ray actor. They decode in
turn, pair by pair. Quoted: medians over pairs of a token's time, of the difference, and of the link's own account: time
on the way (from question to answer, less what the part computed for) and bytes of all frames; then a prompt of 256
tokens the same way; last, how long a frame that asks for nothing takes there and back.
"""

import argparse
import statistics
import time

from coterie import LLM
from coterie.actors.link import Chain, new_number

PROMPT = 256  # tokens


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def milliseconds(llm: LLM, n_prompt: int, n_gen: int) -> float:
    """Of a token."""
    (row,) = llm.bench(n_prompt, n_gen, 1)
    return float(1e3 / row["avg_ts"])


def compare(whole: LLM, cut: LLM, pairs: int, n_prompt: int, n_gen: int) -> None:
    alone, together, added, nbytes = list[float](), list[float](), list[float](), 0.0
    for _ in range(pairs):
        alone.append(milliseconds(whole, n_prompt, n_gen))
        together.append(milliseconds(cut, n_prompt, n_gen))
        assert cut.front is not None
        cost = cut.front.report()["prefill" if n_prompt else "decode"]
        added.append(cost["added_ms"])
        nbytes = cost["bytes"]
    print(f"{'prompt of ' + str(n_prompt) if n_prompt else 'decode'}, ms a token, median (range) of {pairs} pairs:")
    print(f"  one process    {spread(alone)}")
    print(f"  two processes  {spread(together)}")
    print(f"  difference     {spread([b - a for a, b in zip(alone, together, strict=True)])}")
    print(f"  on the way     {spread(added)}, {nbytes:.0f} bytes a token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--cut", type=int, default=15)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    settings = {"threads": arguments.threads, "context": 2 * PROMPT}
    with LLM(arguments.model, **settings) as whole, LLM(arguments.model, cut=arguments.cut, **settings) as cut:
        compare(whole, cut, arguments.pairs, 0, arguments.tokens)
        compare(whole, cut, arguments.pairs, PROMPT, 0)
        assert isinstance(cut.front, Chain)
        times = []
        for _ in range(500):
            start = time.perf_counter()
            cut.front.links[0].close(new_number())
            times.append(1e3 * (time.perf_counter() - start))
        print(f"an empty frame there and back: {statistics.median(times):.3f} ms")


if __name__ == "__main__":
    main()
