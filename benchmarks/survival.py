"""Do generations outlive their units? Actors of the Ray host are killed, or stopped and woken up again, at random.

    python benchmarks/survival.py MODEL [--memory 50%] [--moments 20] [--seed 0] [--json OUT]

Each unit, by SIGKILL and by SIGSTOP (SIGCONT five seconds later), at random moments of prefill and of decode.
A trial is good if the same ids and logits come out, and units were replaced within ten seconds of being found lost.
"""

import argparse
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from coterie.actors.host import Actor
from coterie.actors.ray_host import RayActor, RayHost
from coterie.actors.ray_session import open_session
from coterie.engine import Engine
from coterie.fetch import resolve
from coterie.opening import open_to_run
from coterie.scheduler.plan import Wishes
from coterie.sizes import parse_memory

PROMPT, TOKENS = 1024, 64
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
WAKES = 5.0  # seconds after which a stopped process is woken up
ALLOWED = 10.0  # seconds to go on in, once the loss is known


def actor_of(engine: Engine, unit: str) -> Actor:
    if unit == "cpu":
        return engine.unit.actor
    assert engine.stream is not None
    return engine.stream.unit.actor


def hurt(actor: Actor, after: float, number: signal.Signals) -> threading.Thread:
    """Have a process killed, or stopped for a while, some seconds from now."""
    assert isinstance(actor, RayActor)
    pidfd = os.dup(actor._pidfd)  # the process, whatever becomes of its id

    def act() -> None:
        time.sleep(after)
        signal.pidfd_send_signal(pidfd, number)
        if number == signal.SIGSTOP:
            time.sleep(WAKES)
            with suppress(ProcessLookupError):  # it was fenced
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        os.close(pidfd)

    thread = threading.Thread(target=act)
    thread.start()
    return thread


class Work:
    """A prompt and an answer by the most probable tokens, phase by phase."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prompt = np.random.default_rng(0).integers(0, engine.spec.vocab, PROMPT).tolist()

    def prefill(self) -> bytes:
        sequence = self.engine.sequence()
        try:
            return self.engine.prefill(sequence, self.prompt).tobytes()
        finally:
            sequence.close()

    def decode(self) -> bytes:
        sequence, ids, last = self.engine.sequence(), list[int](), b""
        try:
            logits = self.engine.prefill(sequence, self.prompt[:16])
            for _ in range(TOKENS):
                ids.append(int(logits[0].argmax()))
                logits = self.engine.decode([sequence], ids[-1:]).copy()
                last = logits.tobytes()
            return repr(ids).encode() + last
        finally:
            sequence.close()


def timed(action: Callable[[], bytes]) -> tuple[bytes, float]:
    begun = time.perf_counter()
    return action(), time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--memory", default="50%")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    wishes = Wishes(threads=2, context=PROMPT + TOKENS, memory=parse_memory(args.memory), host="ray")
    model = open_to_run(resolve(args.model, None), wishes, lambda *told: None)
    engine = Engine(model, wishes, host=RayHost(open_session(None)))
    work, losses = Work(engine), engine.supervisor.losses
    units = ("cpu", "flash") if engine.stream else ("cpu",)
    trials: list[dict[str, Any]] = []
    for phase in ("prefill", "decode"):
        action = getattr(work, phase)
        action()
        expected, usual = timed(action)
        for unit in units:
            for number in SIGNALS:
                while sum(t["phase"] == phase and t["unit"] == unit and t["signal"] == number.name for t in trials) < (
                    args.moments
                ):
                    known = len(losses)
                    thread = hurt(actor_of(engine, unit), chance.random() * usual * 0.9, number)
                    got, took = timed(action)
                    thread.join()
                    if len(losses) == known:
                        got = action()  # it came when all was done: the next run finds it
                    found = losses[known:]
                    good = got == expected and all(loss.seconds < ALLOWED for loss in found)
                    trials.append(
                        {"phase": phase, "unit": unit, "signal": number.name, "good": good, "seconds": took - usual}
                        | {"replaced": [loss.seconds for loss in found], "reasons": [loss.reason for loss in found]}
                    )
                here = [t for t in trials if (t["phase"], t["unit"], t["signal"]) == (phase, unit, number.name)]
                lost = [t for t in here if t["replaced"]]
                longest = max((max(t["replaced"]) for t in lost), default=0.0)
                print(
                    f"{phase:8}{unit:6}{number.name:8} {sum(t['good'] for t in here)} of {len(here)} go on; "
                    f"{len(lost)} lost and replaced, in {longest:.2f} s at most; "
                    f"a run takes {np.median([t['seconds'] for t in lost] or [0]):.2f} s longer",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(trials))
    engine.close()


if __name__ == "__main__":
    main()
