"""The Python API on tiny models, and the cache of compiled kernels beneath it."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import same_bits
from tiny_models import write_tiny

from coterie import LLM
from coterie.errors import CoterieError, ModelError, PlanError, UsageError

PROMPT = "In the beginning was the word"
GREEDY: dict[str, Any] = {"temperature": 0.0}
WILD: dict[str, Any] = {"temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llm")
    return {a: write_tiny(folder / f"{a}.gguf", a, formats="Q4_0", context=600) for a in ("llama", "gemma3")}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def llm(request: pytest.FixtureRequest, paths: dict[str, Path]) -> Iterator[LLM]:
    with LLM(paths[request.param], threads=2) as made:
        yield made


def test_generation_streams_what_its_tokens_say(llm: LLM) -> None:
    generation = llm.generate(PROMPT, 40, seed=1)
    pieces = list(generation)
    assert len(pieces) > 5
    assert "".join(pieces) == generation.text
    assert generation.prompt_tokens == llm.tokenize(PROMPT)
    assert generation.finish_reason in ("length", "stop")
    if generation.finish_reason == "length":
        assert len(generation.tokens) == 40
    data = b"".join(llm._model.tokenizer.token_bytes(token) for token in generation.tokens)
    assert generation.text == data.decode(errors="replace")


def test_greedy_tokens_are_the_best_of_the_logits(llm: LLM) -> None:
    generation = llm.generate(PROMPT, 12, **GREEDY)
    assert not generation.tokens  # nothing runs before it is asked for
    list(generation)
    logits = llm.logits(generation.prompt_tokens + generation.tokens)
    first = len(generation.prompt_tokens) - 1
    assert logits[first : first + len(generation.tokens)].argmax(-1).tolist() == generation.tokens


def test_equal_seeds_give_equal_tokens(llm: LLM) -> None:
    def tokens(**sampling: Any) -> list[int]:
        generation = llm.generate(PROMPT, 24, **WILD, **sampling)
        list(generation)
        return generation.tokens

    assert tokens(seed=7) == tokens(seed=7) != tokens(seed=8)
    free = llm.generate(PROMPT, 24, **WILD)
    list(free)
    assert tokens(seed=free.seed) == free.tokens  # a drawn seed is told


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate(PROMPT, 40, seed=3)
    text = "".join(whole)
    stop = text[len(text) // 2 :][:3]
    for stops in (stop, [stop], ["never\x00", stop]):
        stopped = llm.generate(PROMPT, 40, seed=3, stop=stops)
        assert "".join(stopped) == stopped.text == text[: text.index(stop)]
        assert stopped.finish_reason == "stop"
    with pytest.raises(UsageError, match="stop string is empty"):
        llm.generate(PROMPT, stop="")


def test_limits_of_length(llm: LLM) -> None:
    none = llm.generate(PROMPT, 0)
    assert (list(none), none.tokens, none.finish_reason) == ([], [], "length")
    one = llm.generate(PROMPT, 1, seed=1)
    list(one)
    assert len(one.tokens) == 1
    for wrong in (-2, -100):
        with pytest.raises(UsageError, match="max_tokens"):
            llm.generate(PROMPT, wrong)


def test_the_end_of_turn_ends_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = llm.generate(PROMPT, 10, **GREEDY)
    list(greedy)
    ended = llm.generate(PROMPT, 10, **GREEDY)
    monkeypatch.setattr(ended, "_end_ids", frozenset([greedy.tokens[4]]))
    list(ended)
    cut = greedy.tokens.index(greedy.tokens[4])
    assert (ended.tokens, ended.finish_reason) == (greedy.tokens[:cut], "stop")


def test_a_full_context_ends_it(paths: dict[str, Path]) -> None:
    with LLM(paths["llama"], threads=1, context=24) as llm:
        generation = llm.generate("the word", -1, seed=2)
        list(generation)
        assert generation.finish_reason == "context"
        # the last token was chosen, but has no place to be computed
        assert len(generation.prompt_tokens) + len(generation.tokens) == 24 + 1
        full = llm.generate("the word", 3, seed=2)
        list(full)
        assert full.finish_reason == "length"
        with pytest.raises(UsageError, match="the context 24"):
            llm.generate("the word " * 24)
        with pytest.raises(UsageError, match="do not fit the context"):
            llm.logits([5] * 25)


def test_a_generation_that_is_left_gives_its_memory_back(llm: LLM) -> None:
    cache = llm._engine.cache
    list(llm.generate(PROMPT, 2))
    free = len(cache._free), len(cache._tables)
    for _ in range(30):  # more than can live at once
        generation = llm.generate(PROMPT, 100, seed=1)
        next(generation)
        assert len(cache._tables) == free[1] - 1
        generation.close()
        generation.close()
        assert (len(cache._free), len(cache._tables)) == free
        assert list(generation) == []
    taken = cache.nbytes
    list(llm.generate(PROMPT, 2))
    assert cache.nbytes == taken  # blocks are used again


def test_generations_side_by_side_are_as_if_alone(llm: LLM) -> None:
    prompts = [PROMPT, "the quick brown fox", "there is nothing"]
    alone = [list(llm.generate(p, 15, seed=i)) for i, p in enumerate(prompts)]
    together = [llm.generate(p, 15, seed=i) for i, p in enumerate(prompts)]
    pieces: list[list[str]] = [[] for _ in prompts]
    for _ in range(16):
        for to, generation in zip(pieces, together, strict=True):
            to.extend([piece] if (piece := next(generation, None)) is not None else [])
    assert pieces == alone


def test_too_many_generations_at_once(paths: dict[str, Path]) -> None:
    with LLM(paths["llama"], threads=1) as llm:
        generations = [llm.generate(PROMPT, 5, seed=i) for i in range(20)]
        for generation in generations[:8]:
            next(generation)
        with pytest.raises(CoterieError, match=r"too many generations|is full"):
            list(map(next, generations[8:]))
        generations[0].close()
        assert list(llm.generate(PROMPT, 5, seed=0))


def test_two_models_in_one_process(paths: dict[str, Path]) -> None:
    def tokens(llm: LLM) -> list[int]:
        generation = llm.generate(PROMPT, 15, seed=4)
        list(generation)
        return generation.tokens

    alone = {}
    for name, path in paths.items():
        with LLM(path, threads=2) as llm:
            alone[name] = tokens(llm)
    with LLM(paths["llama"], threads=2) as one, LLM(paths["gemma3"], threads=1) as other, LLM(paths["llama"]) as third:
        pairs = [one.generate(PROMPT, 15, seed=4), other.generate(PROMPT, 15, seed=4)]
        for _ in range(15):
            for generation in pairs:
                next(generation, None)
        assert [pairs[0].tokens, pairs[1].tokens] == [alone["llama"], alone["gemma3"]]
        assert tokens(third) == alone["llama"]


def test_chat_fills_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "the word"}]
    if llm.template is None:
        with pytest.raises(UsageError, match="no chat template"):
            llm.chat(messages)
        return
    generation = llm.chat(messages, 5, seed=1)
    shown = llm.detokenize(generation.prompt_tokens)
    assert "user\nthe word" in shown
    assert generation.prompt_tokens[0] == 1  # <|im_start|>, as one token
    assert len(list(generation)) > 0


def test_logits(llm: LLM) -> None:
    tokens = llm.tokenize(PROMPT)
    logits = llm.logits(tokens)
    assert logits.shape == (len(tokens), 300)
    assert logits.dtype == np.float32
    assert same_bits(llm.logits(tokens), logits)
    assert same_bits(llm.logits(tokens[:3]), logits[:3])
    before = logits.copy()
    list(llm.generate(PROMPT, 3))
    assert same_bits(logits, before)  # it is the caller's own
    for wrong in ([300], [-1], [0, 1 << 40]):
        with pytest.raises(UsageError, match="does not exist"):
            llm.logits(wrong)
    with pytest.raises(UsageError, match="no tokens"):
        llm.logits([])


def test_timings_and_memory(llm: LLM) -> None:
    generation = llm.generate(PROMPT, 10, seed=1)
    list(generation)
    timings = generation.timings
    assert timings["prompt_tokens"] == len(llm.tokenize(PROMPT))
    assert timings["generated_tokens"] == len(generation.tokens)
    assert all(timings[name] > 0 for name in ("load_seconds", "prompt_seconds", "prompt_tokens_per_s"))
    memory = llm.memory()
    assert memory["peak_rss"] > memory["weights"] > 0
    assert 0 < memory["kv_taken"] <= memory["kv"]
    assert memory["total"] == llm.plan.as_dict()["total"] >= sum(llm.plan.regions.values())
    assert memory["ceiling"] == 0
    assert memory["overhead"] > 0
    assert llm.flash() is None


def test_bench_rows_have_llama_bench_s_names(llm: LLM) -> None:
    for n_prompt, n_gen in ((16, 0), (0, 4)):
        (row,) = llm.bench(n_prompt, n_gen, 2)
        assert (row["n_prompt"], row["n_gen"], row["n_threads"]) == (n_prompt, n_gen, 2)
        assert len(row["samples_ts"]) == len(row["samples_ns"]) == 2
        assert row["avg_ts"] == pytest.approx(np.mean(row["samples_ts"]))
        assert row["stddev_ts"] == pytest.approx(np.std(row["samples_ts"], ddof=1))
        assert row["model_size"] > 0
        assert row["model_n_params"] > 0
        assert {"model_filename", "model_type"} <= row.keys()


def test_wrong_options_are_usage_errors(llm: LLM, paths: dict[str, Path]) -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"temprature": 1}, "unknown sampling option"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
    ]
    for wrong, said in mistakes:
        with pytest.raises(UsageError, match=said):
            llm.generate(PROMPT, **wrong)
    outside: list[dict[str, Any]] = [{"threads": 0}, {"threads": 1000}, {"context": 0}, {"context": 601}]
    for options in outside:
        with pytest.raises(UsageError):
            LLM(paths["llama"], **options)
    for memory in (1, 1 << 20, "1MiB"):
        with pytest.raises(PlanError, match=r"raise --memory by \d+ MiB"):
            LLM(paths["llama"], memory=memory)
    for memory in ("0%", "101%", "half", "-1", ""):
        with pytest.raises(UsageError, match="--memory"):
            LLM(paths["llama"], memory=memory)


def test_a_closed_model_says_so(paths: dict[str, Path], tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    llm = LLM(paths["llama"], threads=2, trace=trace)
    generation = llm.generate(PROMPT, 50)
    next(generation)
    llm.close()
    written = trace.read_text()
    llm.close()
    assert trace.read_text() == written
    with pytest.raises(UsageError, match="closed"):
        next(generation)
    for use in (lambda: list(llm.generate(PROMPT)), lambda: llm.logits([1])):
        with pytest.raises(UsageError, match="closed"):
            use()
    llm.memory()


def test_a_file_that_is_no_model_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ModelError):
        LLM(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_leaving_an_iteration_early_gives_the_cache_back_at_once(paths: dict[str, Path]) -> None:
    with LLM(paths["llama"], context=256) as llm:
        for _ in range(3 * 9):
            for _piece in llm.generate("Once", 20, temperature=0):
                break


def test_an_llm_that_is_dropped_stops_its_lanes(paths: dict[str, Path]) -> None:
    before = threading.active_count()
    llm = LLM(paths["llama"], threads=3, context=64)
    list(llm.generate("Once", 2, temperature=0))
    assert threading.active_count() == before + 2
    del llm
    assert threading.active_count() == before


@pytest.mark.parametrize("wrong", [{"threads": 1.5}, {"threads": True}, {"context": "a"}])
def test_settings_that_are_no_numbers_are_refused(paths: dict[str, Path], wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="whole number"):
        LLM(paths["llama"], **wrong)


@pytest.mark.parametrize("memory", [-1, 0, 1.5, True, [1]])
def test_memory_that_is_no_amount_is_refused(paths: dict[str, Path], memory: Any) -> None:
    with pytest.raises(UsageError, match="give bytes, or text"):
        LLM(paths["llama"], memory=memory)


def test_tokens_that_are_no_whole_numbers_are_refused(paths: dict[str, Path]) -> None:
    with LLM(paths["llama"], context=64) as llm, pytest.raises(UsageError, match=r"token 1\.5"):
        llm.logits([1.5])  # type: ignore[list-item]


def test_a_trace_that_cannot_be_written_is_known_at_once(paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the trace"):
        LLM(paths["llama"], context=64, trace=tmp_path)
