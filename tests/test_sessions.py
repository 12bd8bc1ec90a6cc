"""Sessions: whatever happens to the process, the answer is what it would have been."""

import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import FakeLLM, answer, coterie, refused, stand_in
from exact_models import CONTEXT, decoded, prefilled, some_tokens
from packed_models import pack, packed
from reference import same_bits
from sparse_models import LARGE, write_gated
from tiny_models import TEXT, write_tiny

from coterie import LLM
from coterie.answer import Generation
from coterie.errors import CoterieError, UsageError
from coterie.generation import Sampler
from coterie.models.gguf_file import GGUFFile
from coterie.sampling import SamplingOptions
from coterie.session import session_path
from coterie.storage.journal import Journal, kv_path, read_journal
from coterie.storage.kv_file import SEAL

PROMPT = TEXT * 4  # more than a block of the KV cache
WILD: dict[str, Any] = {"temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 11}
N = 300  # tokens of an answer: it ends a block

pytestmark = pytest.mark.usefixtures("many_extents", "own_home")


def write_missing(path: Path) -> Path:
    """A packed model whose predictors overlook every second neuron."""
    write_tiny(path, sparse=True, oracle=True, formats="Q4_0", activation="relu", context=CONTEXT, **LARGE)
    with GGUFFile(path) as file, path.open("r+b") as out:
        for name, tensor in file.tensors.items():
            if name.endswith("fc2.weight"):
                values = file.floats(name)
                values[::2] = 0
                out.seek(tensor.offset)
                out.write(values.tobytes())
    return pack(path)


KINDS = ["in memory", "streamed", "gemma3", "gate first", "predictors"]


def opened(folder: Path, kind: str) -> LLM:
    """A model of which no token ends an answer: they are as long as asked."""
    options: dict[str, Any] = {"threads": 2, "context": 1000}
    if kind == "in memory":
        path = write_tiny(folder / "m.gguf", formats="Q4_0", context=CONTEXT)
    elif kind == "gemma3":
        path = write_tiny(folder / "g.gguf", "gemma3", formats="Q8_0", context=CONTEXT)
    elif kind == "streamed":
        path = packed(folder, "llama Q8_0")
        options["memory"] = "60%"
    elif kind == "gate first":
        path = write_gated(folder / "gated.gguf")
    else:
        path = write_missing(folder / "predicted.gguf")
    llm = LLM(path, **options)
    llm._model.tokenizer.end_ids = frozenset()
    return llm


@pytest.fixture(scope="module", params=KINDS)
def llm(request: pytest.FixtureRequest, folder: Path, many_extents: None) -> Iterator[LLM]:
    with opened(folder, request.param) as made:
        yield made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with opened(tmp_path_factory.mktemp("tiny"), "in memory") as made:
        yield made


def took(generation: Generation, tokens: int | None = None) -> Generation:
    """So many tokens of it, and no more."""
    for _ in generation:
        if tokens is not None and len(generation.tokens) >= tokens:
            break
    if tokens is not None:
        generation.close()
    return generation


def same(one: Generation, other: Generation) -> bool:
    return (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)


# --- the same answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", [False, True])
def test_an_answer_that_was_left_goes_on_as_if_it_had_not(llm: LLM, kv: bool) -> None:
    whole = took(llm.generate(PROMPT, N, **WILD))
    assert len(whole.tokens) == N
    assert len(set(whole.tokens)) > 50
    for number, stops in enumerate(([1], [2, 3, 90], [200, 299])):
        name = f"s{number}"
        took(llm.generate(PROMPT, N, session=name, session_kv=kv, **WILD), stops[0])
        for stop in stops[1:]:
            resumed = took(llm.resume(name), stop)
            assert resumed.tokens == whole.tokens[: len(resumed.tokens)]
        last = llm.resume(name)
        assert "".join(last) == whole.text
        assert same(last, whole)
        assert last.prompt_tokens == whole.prompt_tokens
        assert last.timings["resumed_tokens"] >= stops[-1]
        assert kv_path(session_path(name)).exists() == kv
        if kv:
            blocks = (len(whole.prompt_tokens) + stops[-1] - 1) // 256
            assert last._read_tokens == len(whole.prompt_tokens) + last.timings["resumed_tokens"] - 256 * blocks


def test_predictors_would_give_another_answer_by_prefill(folder: Path) -> None:
    """Or the tests of them above could not fail."""
    with opened(folder, "predictors") as llm:
        assert llm.plan.numerics.startswith("lossy")
        tokens = some_tokens(20)
        assert not same_bits(prefilled(llm._engine, tokens), decoded(llm._engine, tokens))
        whole = took(llm.generate(PROMPT, N, **WILD))
        took(llm.generate(PROMPT, N, session="s", **WILD), 20)
        llm._engine.plan = replace(llm.plan, numerics="exact")
        generation = Generation(llm._engine, whole.request, 0)
        generation.keep(Journal.resume(session_path("s")))
        assert took(generation).tokens != whole.tokens


def test_a_finished_answer_is_told_again_and_nothing_is_computed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = took(llm.generate(PROMPT, 40, session="s", **WILD))
    before = session_path("s").read_bytes()
    monkeypatch.setattr(llm._engine, "prefill", None)
    for _ in range(2):
        assert same(took(llm.resume("s")), whole)
    assert session_path("s").read_bytes() == before


def test_a_journal_cut_anywhere_gives_the_same_answer(tiny: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """What a power failure leaves: any beginning of the file."""
    whole = took(tiny.generate("the word", 12, session="s", **WILD))
    path = session_path("s")
    data = path.read_bytes()
    Journal.create(path.with_name("t"), whole.request).close()
    for size in range(path.with_name("t").stat().st_size, len(data) + 1):
        path.write_bytes(data[:size])
        assert same(took(tiny.resume("s")), whole)
        assert path.read_bytes() == data
    assert "damaged bytes at its end were cut" in capsys.readouterr().err


def test_where_the_weights_are_does_not_matter(folder: Path) -> None:
    """Begun in memory, continued from flash."""
    source = packed(folder, "llama Q4_0").with_suffix(".gguf")
    with LLM(source, context=600, threads=1) as llm:
        whole = took(llm.generate(PROMPT, 100, **WILD))
        took(llm.generate(PROMPT, 100, session="s", session_kv=True, **WILD), 30)
    with LLM(source, context=700, threads=2, memory="60%") as llm:
        assert llm.plan.streamed_per_token
        assert same(took(llm.resume("s")), whole)


@pytest.mark.parametrize("limit", ["length", "context", "end"])
def test_it_ends_where_it_would_have_ended(folder: Path, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the process ended after the last token, and before that was said."""
    with opened(folder, "in memory") as llm:
        sampling, n = WILD, 25 if limit == "length" else -1
        prompt = PROMPT[:100] if limit == "length" else PROMPT * 2
        if limit == "end":
            llm._model.tokenizer.end_ids = frozenset(range(5))
        whole = took(llm.generate(prompt, n, **sampling))
        assert whole.finish_reason == ("stop" if limit == "end" else limit)
        first = llm.generate(prompt, n, session="s", **sampling)
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "end", lambda self, reason: self.close())
            took(first)
        assert read_journal(session_path("s")).finish_reason is None
        again = took(llm.resume("s"))
        assert same(again, whole)
        assert read_journal(session_path("s")).finish_reason == whole.finish_reason


def test_a_smaller_context_of_the_session_is_kept(folder: Path) -> None:
    path = write_tiny(folder / "c.gguf", formats="Q4_0", context=CONTEXT)
    with LLM(path, context=64) as llm:
        whole = took(llm.generate("the word", -1, **WILD))
        assert whole.finish_reason == "context"
        took(llm.generate("the word", -1, session="s", **WILD), 5)
    with LLM(path, context=128) as llm:
        assert same(took(llm.resume("s")), whole)


def test_a_stop_string_that_began_before_ends_it(tiny: LLM) -> None:
    text = took(tiny.generate(PROMPT, 60, **WILD)).text
    stop = next(text[at : at + 9] for at in range(len(text) // 2, len(text)) if "\ufffd" not in text[at : at + 9])
    whole = took(tiny.generate(PROMPT, 60, stop=[stop, "never\0"], **WILD))
    assert whole.finish_reason == "stop"
    assert whole.text == text[: text.index(stop)]
    held = 0
    for n in range(len(whole.tokens) - 9, len(whole.tokens) + 1):
        first = took(tiny.generate(PROMPT, 60, stop=[stop, "never\0"], session=f"s{n}", **WILD), n)
        shown = b"".join(map(tiny._model.tokenizer.token_bytes, first.tokens)).decode(errors="replace")
        held += first.text != shown  # some of the stop string's beginning is held back
        assert same(took(tiny.resume(f"s{n}")), whole)
    assert held


def test_skipping_is_drawing() -> None:
    logits = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    one, other = (Sampler(SamplingOptions(seed=3)) for _ in range(2))
    drawn = [one.pick(logits, []) for _ in range(40)]
    other.skip(30)
    assert [other.pick(logits, []) for _ in range(10)] == drawn[30:]
    assert len(set(drawn)) > 5


# --- the KV file -------------------------------------------------------------------------------------


@pytest.fixture
def kept(tiny: LLM) -> tuple[Path, Generation, int]:
    """A KV file of two blocks whose session was left, the whole answer, and the bytes of a record."""
    whole = took(tiny.generate(PROMPT, N, **WILD))
    took(tiny.generate(PROMPT, N, session="s", session_kv=True, **WILD), 250)
    path, size = kv_path(session_path("s")), SEAL + tiny._engine.cache.layout.block
    assert path.stat().st_size == 2 * size
    assert path.stat().st_mode & 0o777 == 0o600
    return path, whole, size


def test_a_damaged_kv_file_only_costs_time(tiny: LLM, kept: tuple[Path, Generation, int]) -> None:
    path, whole, size = kept
    sound, journal = path.read_bytes(), session_path("s").read_bytes()
    chance = random.Random(3)
    cases: list[tuple[bytes, int]] = [  # and how many blocks of it are good
        (sound, 2),
        (b"", 0),
        (sound[size:] + sound[:size], 0),
        (sound[:size] * 2, 1),
        (sound[:-1], 1),
        (sound[: size + SEAL], 1),
        (sound + bytes(3 * size), 2),
        (bytes(2 * size), 0),
    ]
    for _ in range(20):
        at, damaged = chance.randrange(2 * size), bytearray(sound)
        damaged[at] ^= 1 << chance.randrange(8)
        cases.append((bytes(damaged), at // size))
    for data, blocks in cases:
        path.write_bytes(data)
        session_path("s").write_bytes(journal)
        resumed = took(tiny.resume("s"))
        assert same(resumed, whole)
        assert resumed._read_tokens == len(whole.prompt_tokens) + resumed.timings["resumed_tokens"] - 256 * blocks
        assert path.read_bytes() == sound  # whole again


def test_blocks_of_something_else_are_not_used(tiny: LLM, kept: tuple[Path, Generation, int], folder: Path) -> None:
    path, *_ = kept
    foreign = path.read_bytes()
    other = write_tiny(folder / "o.gguf", formats="Q4_0", context=CONTEXT, seed=9)
    with LLM(other, context=1000) as llm:  # another model, the same ids
        alone = took(llm.generate(PROMPT, 5, **WILD))
        took(llm.generate(PROMPT, 5, session="o", session_kv=True, **WILD), 2)
        kv_path(session_path("o")).write_bytes(foreign)
        resumed = took(llm.resume("o"))
        assert same(resumed, alone)
        assert resumed._read_tokens == len(alone.prompt_tokens) + resumed.timings["resumed_tokens"]
    prompt = "x" + PROMPT[1:]  # the same model, other ids
    alone = took(tiny.generate(prompt, 5, **WILD))
    took(tiny.generate(prompt, 5, session="p", session_kv=True, **WILD), 2)
    kv_path(session_path("p")).write_bytes(foreign)
    assert same(took(tiny.resume("p")), alone)


def test_a_kv_file_that_cannot_be_written_is_done_without(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    whole = took(tiny.generate(PROMPT, N, **WILD))
    monkeypatch.setattr(os, "pwritev", full)
    assert same(took(tiny.generate(PROMPT, N, session="s", session_kv=True, **WILD)), whole)
    assert capsys.readouterr().err.count("No space left on device; going on without it\n") == 1
    session_path("t").with_name("t.journal.kv").mkdir()
    with pytest.raises(UsageError, match="cannot open"):
        tiny.generate(PROMPT, N, session="t", session_kv=True)


# --- what is refused ---------------------------------------------------------------------------------


def test_a_session_is_for_one_at_a_time_and_begun_once(tiny: LLM) -> None:
    first = tiny.generate(PROMPT, 10, session="s", **WILD)
    next(first)
    with pytest.raises(UsageError, match="in use by another process"):
        tiny.resume("s")
    with pytest.raises(UsageError, match="exists already: continue it with --resume"):
        tiny.generate(PROMPT, 10, session="s", **WILD)
    del first
    took(tiny.resume("s"))
    took(tiny.resume("s"))  # an ended one gives it back


def test_a_session_that_is_not_this_models(tiny: LLM, folder: Path) -> None:
    took(tiny.generate(PROMPT, 10, session="s", **WILD), 3)
    path = session_path("s")
    before = path.read_bytes()
    other = write_tiny(folder / "other.gguf", formats="Q4_0", context=CONTEXT, seed=1)
    with LLM(other, context=1000) as llm, pytest.raises(UsageError, match="a session of another model"):
        llm.resume("s")
    with LLM(tiny._path, context=999) as llm, pytest.raises(UsageError, match="context of 1000, here it is 999"):
        llm.resume("s")
    request = read_journal(path).request
    for changed, tokens, said in (
        ({"numerics": "exact, version 0"}, [], "numerics 'exact, version 0'"),
        ({}, [300], "token 300 does not exist"),
        ({"prompt": [2**31]}, [], "does not exist"),
        ({"sampling": {"seed": 1, "temprature": 1.0}}, [], "unknown sampling option"),
        ({"sampling": {"temperature": -1}}, [], "temperature is -1"),
        ({"stop": [""]}, [], "stop string is empty"),
    ):
        path.unlink()
        journal = Journal.create(path, replace(request, **changed))
        for token in tokens:
            journal.append(token)
        journal.close()
        for _ in range(2):  # and it is not left in use
            with pytest.raises(CoterieError, match=re.escape(said)):
                tiny.resume("s")
    path.write_bytes(before)
    took(tiny.resume("s"))


def test_refused_requests_leave_no_session(tiny: LLM) -> None:
    for wrong in ({"stop": ""}, {"temperature": -1}, {"max_tokens": -2}, {"nonsense": 1}):
        with pytest.raises(UsageError):
            tiny.generate(PROMPT, session="s", **wrong)
        assert not session_path("s").exists()


@pytest.mark.parametrize("name", ["", " ", "a b", "ä", "x" * 65, "a\n", "a\0"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match=r"^[^\n]*is no session: give up to 64"):
        session_path(name)


def test_where_sessions_lie(tmp_path: Path) -> None:
    assert session_path("a.b-C_1") == tmp_path / "home" / "sessions" / "a.b-C_1.journal"
    assert session_path("..").parent == tmp_path / "home" / "sessions"
    assert (tmp_path / "home" / "sessions").stat().st_mode & 0o777 == 0o700
    assert session_path("/x/y") == session_path(Path("/x/y")) == Path("/x/y")
    assert session_path("./y") == Path.cwd() / "y"


# --- the command line --------------------------------------------------------------------------------


@pytest.fixture
def model(folder: Path) -> str:
    return str(write_tiny(folder / "cli.gguf", formats="Q4_0", context=600))


def test_run_resume_and_sessions(model: str, tmp_path: Path) -> None:
    words = (model, "-p", "the word", "-n", "9", "--seed", "1", "--temp", "50", "--top-p", "1", "-c", "300")
    whole = answer(*words)
    for session in ("mine", str(tmp_path / "here")):
        assert answer(*words, "--session", session) == whole
        assert answer("--resume", session) == whole
    refused(coterie("run", *words, "--session", "mine"), "mine", "exists already", "--resume")
    said = coterie("run", "--resume", "mine", "--json")
    assert json.loads(said.stdout)["plan"]["context"] == 300
    assert "context from session" in said.stderr
    listed = json.loads(coterie("sessions", "--json").stdout)
    (changed,) = {session.pop("changed") for session in listed}
    assert changed == session_path("mine").stat().st_mtime
    entry = {"name": "mine", "model": model, "tokens": len(whole[0]), "finished": True, "state": whole[2]}
    assert listed == [entry]
    Path(tmp_path / "home" / "sessions" / "bad.journal").write_bytes(b"x")
    rows = coterie("sessions").stdout.splitlines()
    assert len(rows) == 2
    assert any("bad" in row and "damaged" in row for row in rows)
    for name in ("mine", "bad"):
        assert coterie("sessions", "--delete", name).exit_code == 0
    refused(coterie("sessions", "--delete", "mine"), "there is no session")
    result = coterie("sessions")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no sessions yet" in result.stderr


def test_a_note_says_what_was_cut(model: str) -> None:
    words = (model, "-p", "the word", "-n", "9", "--seed", "1")
    whole = answer(*words, "--session", "s")
    path = session_path("s")
    path.write_bytes(path.read_bytes()[:-3])
    result = coterie("run", "--resume", "s", "--json")
    assert json.loads(result.stdout)["tokens"] == whole[0]
    assert f"{len(whole[0])} tokens are kept" in result.stderr


def test_the_model_may_move_and_must_be_the_same(model: str, folder: Path) -> None:
    whole = answer(model, "-p", "the word", "-n", "5", "--seed", "1", "--session", "s")
    moved = Path(model).rename(folder / "moved.gguf")
    refused(coterie("run", "--resume", "s"), "which is not there; name it beside --resume")
    assert answer("--resume", "s", str(moved)) == answer("--resume", "s", "-m", str(moved)) == whole
    other = write_tiny(folder / "else.gguf", formats="Q4_0", context=600, seed=1)
    result = coterie("run", "--resume", "s", str(other))
    assert result.exit_code == UsageError.exit_code
    assert "a session of another model" in result.stderr.splitlines()[-1]
    assert result.stdout == ""


@pytest.mark.parametrize(
    "more",
    [
        *("-p x", "-f x", "--system x", "--raw", "-n 3", "-c 99", "--temp 0", "--top-k 1", "--top-p 1", "--min-p 0"),
        *("--repeat-penalty 1", "--repeat-last-n 0", "--seed 1", "--stop x", "--session t", "--session-kv"),
    ],
)
def test_a_session_s_request_cannot_be_changed(more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    refused(coterie("run", "--resume", "s", *more.split()), more.split()[0], "--resume")


def test_defaults_of_the_configuration_do_not_touch_a_session(model: str, tmp_path: Path) -> None:
    whole = answer(model, "-p", "the word", "-n", "9", "--seed", "1", "-c", "300", "--session", "s")
    (tmp_path / "config.toml").write_text("[run]\nctx-size = 64\ntemp = 0\nn-predict = 1\n")
    assert answer("--resume", "s") == whole


def test_sessions_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: type[FakeLLM] = stand_in(monkeypatch, "x")
    coterie("run", "m", "-p", "Hi", "--session", "s", "--session-kv")
    (asked,) = engine.last.asked
    assert (asked[2]["session"], asked[2]["session_kv"]) == ("s", True)
    for wrong in (["--session-kv"], ["--session", "a b"], ["--session", ""]):
        refused(coterie("run", "m", "-p", "Hi", *wrong), "session")
    refused(coterie("run", "--resume", "nothing"), "there is no session", "coterie sessions")
    refused(coterie("run", "--resume", "a b"), "is no session")
    refused(coterie("sessions", "--delete", "a b"), "is no session")
