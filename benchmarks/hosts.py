"""What the Ray host costs: decode and prefill on Ray over the thread host, in alternation, and the same bits.

    python benchmarks/hosts.py MODEL [--memory 50%] [--pairs 7] [--tokens 128] [--prompt 512] [--json OUT]

Three engines live side by side and take turns: units as Ray actors; threads with pages as shared memory has them here
(4 KiB where the kernel grants no huge ones); threads as they are by default. The first token is not timed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from coterie.actors.host import Host, ThreadHost
from coterie.actors.ray_host import RayHost
from coterie.actors.ray_session import open_session
from coterie.engine import Engine
from coterie.fetch import resolve
from coterie.opening import open_to_run
from coterie.scheduler.plan import Wishes
from coterie.sizes import parse_memory
from coterie.storage import arena, mapping


class SmallPages(mapping.PrivateMapping):
    """Memory of threads as a memfd's is without huge pages."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.use_small_pages(0, size)


def opened(args: argparse.Namespace, host: Host | None = None) -> Engine:
    memory = None if args.memory is None else parse_memory(args.memory)
    wishes = Wishes(
        threads=args.threads, context=args.prompt + args.tokens + 8, memory=memory, host="ray" if host else "threads"
    )
    return Engine(open_to_run(resolve(args.model, None), wishes, lambda *told: None), wishes, host=host or ThreadHost())


def run(engine: Engine, prompt: list[int], tokens: int) -> tuple[float, float, bytes]:
    """Prefill and decode in tokens/s, and the last logits."""
    sequence = engine.sequence()
    begun = time.perf_counter()
    engine.prefill(sequence, prompt)
    filled = time.perf_counter()
    engine.decode([sequence], [1])
    started = time.perf_counter()
    for token in range(tokens):
        logits = engine.decode([sequence], [token + 2])
    done = time.perf_counter()
    sequence.close()
    return len(prompt) / (filled - begun), tokens / (done - started), logits.tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    begun = time.perf_counter()
    session = open_session(None)
    started = time.perf_counter() - begun
    engines = {"ray": opened(args, RayHost(session))}
    ready = time.perf_counter() - begun
    with mock.patch.object(arena, "PrivateMapping", SmallPages):
        engines["threads, small pages"] = opened(args)
    engines["threads"] = opened(args)
    vocab = engines["ray"].spec.vocab
    prompt = np.random.default_rng(0).integers(0, vocab, args.prompt).tolist()
    rounds: list[dict[str, Any]] = []
    for number in range(args.pairs + 1):
        found = {name: run(engine, prompt, args.tokens) for name, engine in engines.items()}
        assert len({last for _, _, last in found.values()}) == 1, "hosts differ"
        if number:  # the first is a warm-up
            rounds.append({name: {"prefill": pp, "decode": tg} for name, (pp, tg, _) in found.items()})
            print({name: {kind: round(rate, 1) for kind, rate in each.items()} for name, each in rounds[-1].items()})
    print(f"Ray in {started:.2f} s, ready in {ready:.2f} s; its own memory {session.memory()}")
    for other in ("threads, small pages", "threads"):
        for kind in ("decode", "prefill"):
            ratios = [each["ray"][kind] / each[other][kind] for each in rounds]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"{kind} on ray over {other}: {statistics.median(ratios):.3f} ({spread})")
    if args.json:
        args.json.write_text(json.dumps({"rounds": rounds, "ready": ready, "memory": session.memory()}))
    for engine in reversed(engines.values()):
        engine.close()


if __name__ == "__main__":
    main()
