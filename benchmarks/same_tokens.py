"""Row 1: the same logits and tokens, bit for bit, whatever share of the weights is in memory.

    python benchmarks/same_tokens.py MODEL.gguf PACKED [--shares 100,75,50,25,10] [--tokens 256] [--host ray]

The GGUF runs in memory as a whole, on threads; the packed model runs at each share, with one lane and with two, on
`host`; on Ray the GGUF as well. A prompt of 64 tokens is read in one chunk, then the most probable token is taken, over
and over; the digest is of all logits.
"""

import argparse
import hashlib
import time
from pathlib import Path

import numpy as np

from coterie.engine import Engine
from coterie.errors import PlanError
from coterie.hosts import open_host
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes
from coterie.sizes import Memory, Share

TEXT = Path(__file__).parent / "text" / "english.txt"
PROMPT = 64


def answer(
    path: Path, lanes: int, memory: Memory | None, tokens: int, host: str = "threads"
) -> tuple[str, list[int], str]:
    """Digest of all logits, the ids, and what it took."""
    model = open_model(path)
    prompt = model.tokenizer.encode(TEXT.read_text()[:2000])[:PROMPT]
    wishes = Wishes(threads=lanes, context=PROMPT + tokens, memory=memory, host=host)
    engine = Engine(model, wishes, host=open_host(host, None, None))
    digest, ids, sequence = hashlib.sha256(), list[int](), engine.sequence()
    try:
        logits = engine.prefill(sequence, prompt)[0]
        start = time.perf_counter()
        for _ in range(tokens):
            digest.update(logits.tobytes())
            ids.append(int(np.argmax(logits)))
            logits = engine.decode([sequence], ids[-1:])[0]
        rate = tokens / (time.perf_counter() - start)
        streamed = engine.plan.streamed_per_token / 1e6
        return digest.hexdigest()[:16], ids, f"{streamed:.0f} MB streamed a token, {rate:.1f} tokens/s"
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--shares", default="100,75,50,25,10")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--host", default="threads")
    arguments = parser.parse_args()
    expected, ids, took = answer(arguments.model, 2, None, arguments.tokens)
    print(f"{arguments.model.name} in memory: {expected}, {took}", flush=True)
    same = True
    if arguments.host != "threads":
        digest, got, took = answer(arguments.model, 2, None, arguments.tokens, arguments.host)
        same = (digest, got) == (expected, ids)
        print(f"{arguments.host}, in memory: {'the same' if same else 'DIFFERENT'}, {took}", flush=True)
    for share in map(float, arguments.shares.split(",")):
        for lanes in (1, 2):
            try:
                digest, got, took = answer(
                    arguments.packed, lanes, Share(share / 100), arguments.tokens, arguments.host
                )
            except PlanError as error:
                print(f"{share:g} %, {lanes} lanes: {error}", flush=True)
                continue
            same = same and (digest, got) == (expected, ids)
            verdict = "the same" if (digest, got) == (expected, ids) else "DIFFERENT"
            print(f"{share:g} %, {lanes} lanes: {verdict}, {took}", flush=True)
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
