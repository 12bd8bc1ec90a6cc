"""Larger than memory: whatever share of the weights is resident, logits are the same bits (design section 1)."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_models import CASES, CONTEXT, Floats, decoded, opened, prefilled, some_tokens
from packed_models import packed, smallest, streaming, write_model
from reference import same_bits

from coterie.engine import Engine
from coterie.errors import PlanError, UsageError
from coterie.opening import open_model
from coterie.scheduler import planner
from coterie.scheduler.plan import Wishes
from coterie.scheduler.profile import FlashChoice
from coterie.scheduler.residency import choose, least_budget, pin_order, region_bytes, spread
from coterie.sizes import Share
from coterie.storage import runs as runs_module
from coterie.storage.arena import Ledger
from coterie.storage.runs import Extents, lay_out_runs
from coterie.storage.weights import Residency, lay_out
from coterie.stream import Stream

N = 24
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)


pytestmark = pytest.mark.usefixtures("many_extents")


def batched(engine: Engine, tokens: list[int]) -> Floats:
    """Logits of two sequences with the same tokens, decoded together; the second's are returned."""
    sequences = [engine.sequence() for _ in range(2)]
    logits = [engine.decode(sequences, [token, token])[1].copy() for token in tokens]
    for sequence in sequences:
        sequence.close()
    return np.stack(logits)


# --- the same bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_streamed_logits_are_the_same_bits(name: str, folder: Path) -> None:
    tokens = some_tokens(N)
    path = packed(folder, name)
    with opened(folder / f"{name}.gguf") as engine:
        expected = prefilled(engine, tokens)
    streamed = set()
    for share, threads in zip(SHARES, (1, 2, 1, 2, 3), strict=True):
        with streaming(path, share, threads) as engine:
            assert same_bits(prefilled(engine, tokens, [7, 1]), expected), (share, threads)
            assert same_bits(decoded(engine, tokens), expected), (share, threads)
            assert same_bits(batched(engine, tokens), expected), (share, threads)
            report = engine.flash_report()
            assert report is not None
            assert (engine.plan.streamed_per_token > 0) == (share < 1)
            streamed.add(engine.plan.streamed_per_token)
    assert len(streamed) > 1


def test_each_token_is_looked_up_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's rows that want logits are not looked up again for the output's matrix."""
    looked_up, original = list[int](), Stream.look_up

    def counting(self: Stream, ids: Any, *rest: Any) -> Any:
        looked_up.extend(ids.tolist())
        return original(self, ids, *rest)

    monkeypatch.setattr(Stream, "look_up", counting)
    tokens = some_tokens(N)
    with streaming(packed(folder, next(iter(CASES))), 0.1, 1) as engine:
        assert engine.layout.lookups is not None
        prefilled(engine, tokens)
    assert looked_up == tokens


@pytest.mark.parametrize("engine_name", ["io_uring", "preadv"])
def test_both_engines_read_the_same(engine_name: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = some_tokens(N)
    with streaming(llama, None) as engine:
        expected = decoded(engine, tokens)
    measured = FlashChoice(1 << 20, 8, None, "profile", engine_name)
    monkeypatch.setattr(planner, "flash_choice", lambda profile, path: measured)
    with streaming(llama, 0.3) as engine:
        assert engine.plan.flash is not None
        if engine_name == "io_uring" and engine.plan.flash.engine != engine_name:
            pytest.skip("there is no io_uring here")
        assert engine.plan.flash.engine == engine_name
        assert same_bits(decoded(engine, tokens), expected)


def test_every_streamed_byte_is_read_once_a_token(llama: Path) -> None:
    with streaming(llama, 0.3) as engine:
        decoded(engine, some_tokens(4))
        engine.count_anew()
        decoded(engine, some_tokens(20))
        report = engine.flash_report()
    assert report is not None
    planned = report["streamed_bytes_per_token"]
    assert planned == engine.plan.streamed_per_token > 0
    assert report["read_bytes_per_token"] == pytest.approx(planned, rel=0.1)  # what was read ahead at either end
    assert 0 <= report["stall_share"] <= 1
    assert report["hit_rate"] == pytest.approx(1 - planned / engine.plan.bytes_per_token)


def test_serving_writes_nothing_and_leaves_the_page_cache_alone(llama: Path) -> None:
    before = os.stat(llama)
    with streaming(llama, 0.3) as engine:
        written = _written()
        decoded(engine, some_tokens(N))
        assert _written() == written
    after = os.stat(llama)
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)


def _written() -> int:
    with open("/proc/self/io") as file:
        return int(dict(line.split(":") for line in file)["write_bytes"])


# --- residency ---------------------------------------------------------------------------------------


def test_layers_are_spread() -> None:
    assert spread(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    for n in (1, 2, 3, 5, 30):
        assert sorted(spread(n)) == list(range(n))


@pytest.mark.parametrize("name", ["llama Q4_0", "integers and floats", "gemma3 270M as Q4_K_M"])
def test_a_larger_budget_pins_more_at_the_same_addresses(name: str, folder: Path) -> None:
    model = open_model(write_model(folder, name))
    runs = lay_out_runs(model.file.tensors, model.spec)
    extents = Extents.of(runs)
    order = pin_order(runs)
    assert sorted(order.tolist()) == list(range(int(extents.first[-1])))
    assert order[0] == 0
    smaller: tuple[Any, Any] | None = None
    every = int(extents.nbytes.sum())
    for budget in range(least_budget(runs), every + (4 << 20), max(4096, every // 37 // 4096 * 4096)):
        chosen = choose(runs, budget)
        np.testing.assert_array_equal(chosen.pinned, order[: chosen.pinned.size])
        weights = lay_out(model.file.tensors, model.spec, runs, chosen, Ledger())
        assert region_bytes(weights.pinned.nbytes) + region_bytes(weights.staging.nbytes) <= budget
        where = weights.where[chosen.pinned]
        if smaller is not None:
            n = smaller[0].size
            assert n <= where.size
            np.testing.assert_array_equal(where[:n], smaller[1])
        smaller = chosen.pinned, where
        _check_tape(weights, chosen)
    assert chosen.pinned.size == order.size
    model.close()


def _check_tape(weights: Any, residency: Residency) -> None:
    """Every used extent is pinned or on the tape, once; what one instruction needs at once fits the ring."""
    used = {i for i, run in enumerate(weights.runs) if run.kind not in ("norms", "embedding")}
    if weights.output.run.kind == "embedding":
        used.add(1)
    wanted = {n for n in range(weights.where.size) if int(weights.extents.run[n]) in used}
    assert set(weights.tape.tolist()) == wanted - set(residency.pinned.tolist())
    assert weights.tape.size == len(set(weights.tape.tolist()))
    groups = [(s.position, s.position + s.count) for m in _matrices(weights) for s in m.slices if s.position >= 0]
    groups += [(s.position, s.end) for layer in weights.layers for s in layer.ffn.spans if s.position >= 0]
    for first, last in groups:
        places = [(int(weights.where[n]), int(weights.extents.nbytes[n])) for n in weights.tape[first:last]]
        pages = [page for at, size in places for page in range(at, at + size, 4096)]
        assert len(pages) == len(set(pages)) <= weights.staging.nbytes // 4096
        assert min(pages) >= weights.staging.offset
        assert max(pages) + 4096 <= weights.staging.offset + weights.staging.nbytes


def _matrices(weights: Any) -> list[Any]:
    layers = [m for layer in weights.layers for m in (*layer.projections, layer.output)]
    return [*layers, weights.output]


def test_a_ceiling_is_kept_by_the_arena(llama: Path) -> None:
    model = open_model(llama)
    plan = Engine(model, Wishes(threads=2, context=256, memory=16 << 20)).plan
    assert plan.total <= 16 << 20
    with pytest.raises(PlanError, match="raise --memory by"):
        Engine(open_model(llama), Wishes(threads=2, memory=1 << 20))
    for ceiling in (10 << 20, 12 << 20, 16 << 20):
        engine = Engine(open_model(llama), Wishes(threads=2, memory=ceiling))
        assert engine.plan.total <= ceiling
        decoded(engine, some_tokens(4))
        engine.close()


def test_a_ceiling_above_what_can_be_had_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with streaming(llama, 0.5) as engine:
        monkeypatch.setattr("coterie.room.available_memory", lambda: 1 << 10)
        with pytest.raises(PlanError, match="can be had; lower --memory"):
            Engine(open_model(llama), Wishes(threads=2, context=64, memory=64 << 20))
        engine.set_memory(Share(0.5))  # what it has, it may keep


def test_a_model_that_is_not_packed_cannot_be_given_another_ceiling(folder: Path) -> None:
    with opened(write_model(folder, "llama Q4_1")) as engine:
        for enough in (engine.plan.total, 1 << 40, Share(1.0), "auto"):
            engine.set_memory(enough)
        for less in (engine.plan.total - 1, Share(0.99)):
            with pytest.raises(UsageError, match="coterie pack"):
                engine.set_memory(less)


def test_a_new_ceiling_ends_what_auto_does_and_auto_begins_it(llama: Path) -> None:
    def following() -> bool:
        return any(thread.name == "coterie-auto" for thread in threading.enumerate())

    engine = Engine(open_model(llama), Wishes(threads=2, context=CONTEXT, memory="auto"))
    assert following()
    engine.set_memory(Share(0.5))
    assert not following()
    engine.set_memory("auto")
    engine.set_memory("auto")
    assert following()
    engine.close()
    assert not following()


# --- changes of the ceiling --------------------------------------------------------------------------


def test_the_ceiling_changes_between_tokens(llama: Path) -> None:
    tokens, rng = some_tokens(60), np.random.default_rng(0)
    with streaming(llama, None) as engine:
        expected = decoded(engine, tokens)
    with streaming(llama, 0.5) as engine:
        sequence = engine.sequence()
        streamed = set()
        least = smallest(engine.model).part
        for i, token in enumerate(tokens):
            engine.set_memory(Share(float(rng.uniform(least, 1))))
            assert same_bits(engine.decode([sequence], [token])[0], expected[i])
            streamed.add(engine.plan.streamed_per_token)
        assert len(streamed) > 3
        with pytest.raises(PlanError):
            engine.set_memory(1 << 20)
        sequence.close()


def test_the_ceiling_changes_from_another_thread(llama: Path) -> None:
    tokens = some_tokens(200)
    with streaming(llama, None) as engine:
        expected = decoded(engine, tokens)
    with streaming(llama, 0.5) as engine:
        done = threading.Event()

        def change() -> None:
            rng, least = np.random.default_rng(1), smallest(engine.model).part
            while not done.is_set():
                engine.set_memory(Share(float(rng.uniform(least, 1))))

        thread = threading.Thread(target=change)
        thread.start()
        try:
            assert same_bits(decoded(engine, tokens), expected)
            assert same_bits(prefilled(engine, tokens, [3, 50]), expected)
        finally:
            done.set()
            thread.join()


@pytest.mark.parametrize("per", [1, 3, 64, 100, 1000])
def test_the_least_budget_is_enough(per: int) -> None:
    """Also where the ring is so large that it is made of huge pages."""
    runs = (
        runs_module.Run("norms", -1, 0, "F32", 1, 5000, 1, 4096),
        runs_module.Run("embedding", -1, 0, "Q8_0", 900, 5000, 1, 12288),
        *(runs_module.Run("ffn", i, 0, "Q4_0", 3000, 4500, per, 10_000_000) for i in range(4)),
    )
    assert choose(runs, least_budget(runs)).pinned.size >= 1
    with pytest.raises(PlanError, match="need at least"):
        choose(runs, least_budget(runs) - 1)
