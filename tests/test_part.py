"""Parts of a model: the layers and tensors they have, and that together they give the uncut model's bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cut_models import cut, linked, packed_part, part_engine, part_model
from exact_models import CASES, CONTEXT, decoded, opened, prefilled, some_tokens
from packed_models import small_extents
from reference import same_bits
from sparse_models import LARGE
from tiny_models import write_tiny

from coterie import LLM
from coterie.errors import CoterieError, ModelError, UsageError
from coterie.models.header import OpenModel
from coterie.models.load import Model, read_spec
from coterie.models.part import FIRST, LAST, MODEL, VOCAB, model_identity, part_of
from coterie.opening import open_model, open_to_run
from coterie.part_engine import PartEngine
from coterie.paths import models_dir
from coterie.scheduler.plan import Wishes
from coterie.scheduler.residency import pin_order
from coterie.sizes import Share
from coterie.stepping import Yield
from coterie.storage.kv import Sequence as KVSequence

LAYERS = 7  # of gemma3 the sixth has no window
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama", "formats": "Q4_0", "layers": LAYERS},
    "gemma3": {"architecture": "gemma3", "formats": "Q4_0", "layers": LAYERS, "window": 9},
    "untied, mixed": CASES["floats and integers"] | {"layers": 3},
    "untied gemma3, mixed": CASES["integers and floats"] | {"layers": 3},
    "odd sizes": CASES["odd sizes"] | {"layers": 3},
    "single neurons": {"formats": "Q4_0", "activation": "relu", "sparse": True, "layers": 3},
}
N = 30
STREAMED = 12  # layers


def write(folder: Path, name: str, **more: Any) -> Path:
    return write_tiny(folder / "m.gguf", context=CONTEXT, seed=3, **(MODELS[name] | more))


def packed_parts(folder: Path, name: str) -> tuple[Path, list[Model]]:
    """A model large enough to be streamed, and its two parts, packed."""
    path = write(folder, name, **((LARGE if name == "single neurons" else {}) | {"layers": STREAMED}))
    return path, [open_model(packed_part(path, first, last)) for first, last in ((0, 5), (5, STREAMED))]


def whole(path: Path, tokens: list[int]) -> Any:
    with opened(path, 2) as engine:
        return prefilled(engine, tokens)


# --- the same bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_cut_gives_the_bits_of_the_uncut_model(name: str, tmp_path: Path) -> None:
    path, tokens = write(tmp_path, name), some_tokens(N)
    expected = whole(path, tokens)
    for at in range(1, MODELS[name]["layers"]):
        with cut(path, at, threads=1 + at % 2) as engine:
            assert engine.spec.layers == open_model(path).spec.layers[at:]
            assert same_bits(prefilled(engine, tokens), expected)
            assert same_bits(prefilled(engine, tokens, (1, 7, 13)), expected)
            assert same_bits(decoded(engine, tokens), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_three_parts_and_more(name: str, tmp_path: Path) -> None:
    path, tokens = write(tmp_path, name), some_tokens(N)
    expected = whole(path, tokens)
    for cuts in ((1, 2), (2, 6), (1, 2, 3, 4, 5, 6)):
        with cut(path, *cuts) as engine:
            assert same_bits(prefilled(engine, tokens, (11,)), expected)
            assert same_bits(decoded(engine, tokens[:9]), expected[:9])


@pytest.mark.parametrize("name", ["llama", "gemma3", "single neurons"])
def test_batches_of_different_sequences(name: str, tmp_path: Path) -> None:
    path, lengths = write(tmp_path, name), [1, 3, 8, 15, 16, 17, 22, 29]
    texts = [some_tokens(length + 2, seed=i) for i, length in enumerate(lengths)]
    with opened(path) as engine:
        expected = [prefilled(engine, text)[-2:] for text in texts]
    with cut(path, 2, threads=2) as engine:
        sequences = [engine.sequence() for _ in texts]
        for text, sequence in zip(texts, sequences, strict=True):
            engine.prefill(sequence, text[:-2])
        for step, chosen in enumerate((list(range(8)), [6, 0, 3])):
            got = engine.decode([sequences[i] for i in chosen], [texts[i][step - 2] for i in chosen])
            for row, i in enumerate(chosen):
                assert same_bits(got[row], expected[i][step])


def test_a_sequence_goes_back_and_takes_another_way(tmp_path: Path) -> None:
    path, one, other = write(tmp_path, "gemma3"), some_tokens(N, 1), some_tokens(N, 2)
    other[:12] = one[:12]
    expected = whole(path, other)
    with cut(path, 3, threads=2) as engine:
        sequence = engine.sequence()
        engine.prefill(sequence, one)
        sequence.length = 12
        assert same_bits(engine.prefill(sequence, other[12:20], range(8)), expected[12:20])
        for position in (20, 21, 21, 22):  # one of them again
            sequence.length = position
            assert same_bits(engine.decode([sequence], [other[position]])[0], expected[position])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_step_that_is_cut_short_begins_with_its_inputs_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a finished try has left in the residual streams is no input of the next one."""
    path, tokens = write(tmp_path, name), some_tokens(N)
    expected = whole(path, tokens)
    with cut(path, 3, 5) as engine:
        yielded = set[str]()
        real = engine.unit.run

        def run(program: str, *arguments: Any, **more: Any) -> None:
            real(program, *arguments, **more)
            if program != "head" and program not in yielded:
                yielded.add(program)
                raise Yield

        monkeypatch.setattr(engine.unit, "run", run)
        assert same_bits(prefilled(engine, tokens), expected)
        assert same_bits(decoded(engine, tokens[:5]), expected[:5])
        assert yielded == {"prefill", "decode"}


def test_an_interrupted_step_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokens = write(tmp_path, "llama"), some_tokens(N)
    expected = whole(path, tokens)
    with cut(path, 3, threads=2) as engine:
        sequence, real = engine.sequence(), engine.unit._begin

        def begin(*arguments: int) -> int:
            patch.undo()
            real(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine.unit, "_begin", begin)
            with pytest.raises(KeyboardInterrupt):
                engine.prefill(sequence, tokens)
        assert sequence.length == 0
        assert same_bits(engine.prefill(sequence, tokens, range(N)), expected)


# --- packed and streamed -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.6, 0.0001])
@pytest.mark.parametrize("name", ["llama", "gemma3", "untied, mixed", "single neurons"])
def test_packed_parts_are_streamed_with_the_same_bits(name: str, share: float, tmp_path: Path) -> None:
    tokens = some_tokens(N)
    with small_extents():
        path, models = packed_parts(tmp_path, name)
        expected = whole(path, tokens)
        with linked(models, threads=2, memory=Share(share)) as engine:
            assert share > 0.5 or engine.plan.streamed_per_token + engine.plan.slots > 0
            assert same_bits(prefilled(engine, tokens, (9,)), expected)
            assert same_bits(decoded(engine, tokens[:8]), expected[:8])


def test_the_embedding_of_a_front_part_is_looked_up_before_it_is_pinned(tmp_path: Path) -> None:
    with small_extents():
        _, (front, back) = packed_parts(tmp_path, "llama")
        back.close()
        with part_engine(front, memory=Share(0.0001)) as engine:
            lookup = engine.runs[1]
            assert lookup.kind == "lookup"
            assert pin_order(engine.runs)[-lookup.extents :].tolist() == list(range(1, 1 + lookup.extents))
            assert not engine.layout.weights.stays(1)
            assert engine.layout.lookups is not None


def test_a_ceiling_that_changes_while_the_front_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = some_tokens(N)
    with small_extents():
        path, models = packed_parts(tmp_path, "llama")
        expected = whole(path, tokens)
        with linked(models, memory=Share(0.9)) as engine:
            assert engine.front is not None
            real, shares = engine.front.hidden, iter([0.75, 0.95] * N)

            def hidden(*arguments: Any) -> Any:
                engine.set_ceiling(Share(next(shares)))
                return real(*arguments)

            monkeypatch.setattr(engine.front, "hidden", hidden)
            assert same_bits(prefilled(engine, tokens, (9,)), expected)
            assert same_bits(decoded(engine, tokens[:6]), expected[:6])


# --- what a part is ----------------------------------------------------------------------------------


def test_a_part_has_only_the_tensors_of_its_layers(tmp_path: Path) -> None:
    path = write(tmp_path, "llama")
    tensors = open_model(path).file.tensors
    layer = {name.split(".", 2)[2] for name in tensors if name.startswith("blk.0.")}
    for first, last, more in (
        (0, 3, {"token_embd.weight"}),
        (3, 5, set()),
        (5, 7, {"output_norm.weight", "output.weight"}),
    ):
        part = part_model(path, first, last)
        named = {f"blk.{i}.{name}" for i in range(last - first) for name in layer}
        assert part.file.tensors.keys() == named | more
        for old, new in ((f"blk.{first}.ffn_up.weight", "blk.0.ffn_up.weight"), ("token_embd.weight", "output.weight")):
            if new in part.file.tensors:
                assert np.array_equal(part.source.read(new), open_model(path).source.read(old))
        assert part.spec.vocab == 300
        assert str(part.spec.part) == f"layers {first} to {last - 1} of 7"


def test_a_model_is_known_by_its_weights_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    one, copy = write(tmp_path / "a", "llama"), write(tmp_path / "b", "llama")
    other = write_tiny(tmp_path / "c" / "m.gguf", context=CONTEXT, seed=4, **MODELS["llama"])
    identities = [model_identity(open_model(path).source) for path in (one, copy, other)]
    assert identities[0] == identities[1] != identities[2]
    keys = {part_model(one, first, last).source.key() for first, last in ((0, 3), (3, 7), (0, 4), (4, 7))}
    assert len(keys | {open_model(one).source.key()}) == 5


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (0, 8), (3, 3), (5, 2)])
def test_layers_that_are_not_there(first: int, last: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has layers 0 to 6"):
        part_model(write(tmp_path, "llama"), first, last)


def test_a_part_is_not_cut_again(tmp_path: Path) -> None:
    part = part_model(write(tmp_path, "llama"), 0, 4)
    with pytest.raises(UsageError, match="cut the whole model"):
        part_of(part.source, part.spec, 0, 2)


@pytest.mark.parametrize(
    "wrong",
    [{FIRST: 3, LAST: 3}, {FIRST: -1}, {LAST: 8}, {FIRST: "0"}, {LAST: 2.0}, {MODEL: 3}, {VOCAB: 0}, {VOCAB: 299}],
)
def test_metadata_that_name_no_part_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    part = part_model(write(tmp_path, "llama"), 0, 4)
    part.file.metadata |= wrong
    with pytest.raises(ModelError):
        read_spec(part.file)


def test_a_part_alone_answers_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "llama")
    for first, last in ((0, 3), (3, 7)):
        packed = packed_part(path, first, last)
        with pytest.raises(UsageError, match=f"is only layers {first} to {last - 1} of 7"):
            LLM(packed)
        with part_engine(open_model(packed)) as engine:
            with pytest.raises(UsageError, match="alone it answers nothing"):
                engine.prefill(engine.sequence(), [1])
            with pytest.raises(UsageError, match="alone it answers nothing"):
                engine.decode([engine.sequence()], [1])


def test_rows_that_make_no_step(tmp_path: Path) -> None:
    with part_engine(part_model(write(tmp_path, "llama"), 0, 3)) as engine:
        one, other = engine.sequence(), engine.sequence()
        wrong: list[tuple[Any, list[KVSequence], list[int]]] = [
            ("prefill", [one], []),
            ("prefill", [one, other], [1, 2]),
            ("prefill", [one], [1] * (engine.plan.chunk + 1)),
            ("decode", [one], [1, 2]),
            ("decode", [one, other], [1]),
            ("decode", [], []),
            ("decode", [one], [300]),
        ]
        for phase, sequences, ids in wrong:
            with pytest.raises(CoterieError):
                engine.hidden(phase, sequences, ids)
        assert one.length == other.length == 0


def test_a_packed_part_is_opened_as_the_part_that_it_is(tmp_path: Path) -> None:
    path = packed_part(write(tmp_path, "llama"), 0, 3)

    def opening(layers: tuple[int, int | None]) -> OpenModel:
        return open_to_run(path, Wishes(), lambda label, done, total: None, layers=layers).file

    opening((0, 3)).close()
    with pytest.raises(UsageError, match="is a packed model"):
        opening((0, 2))


def test_a_closed_part_says_so(tmp_path: Path) -> None:
    with part_engine(part_model(write(tmp_path, "llama"), 0, 3)) as engine:
        sequence = engine.sequence()
        engine.close()
        with pytest.raises(UsageError, match="closed"):
            engine.hidden("decode", [sequence], [1])


@pytest.mark.skipif(not (models_dir() / "SmolLM2-135M-Instruct.Q4_1.gguf").exists(), reason="make demo fetches it")
def test_a_real_model_cut_in_the_middle(tmp_path: Path) -> None:
    path = models_dir() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokens = [int(t) for t in np.random.default_rng(1).integers(0, 49152, 24)]
    with opened(path, 2) as engine:
        expected = prefilled(engine, tokens)
    with cut(path, 15, threads=2) as cut_engine:
        assert isinstance(cut_engine, PartEngine)
        assert same_bits(prefilled(cut_engine, tokens, (10,)), expected)
        assert same_bits(decoded(cut_engine, tokens[:6]), expected[:6])
