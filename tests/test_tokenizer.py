"""Tokenizers: byte-level BPE and SentencePiece as llama.cpp has them, and damaged vocabularies refused."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny_models import BYTE, CONTROL, NORMAL, UNKNOWN, write_tiny

from coterie import fetch
from coterie.errors import ModelError, UsageError
from coterie.models.gguf_file import GGUFFile
from coterie.models.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "data" / "smollm2_tokens.json"  # by llama.cpp's llama-tokenize
KINDS = ("llama", "gemma3")
SAMPLES = [
    "", " ", "the word", "  two  spaces\n\nand lines\n", "naïve 中文 😀 e\u0301", "\x00\x1f\x7f",
    "<|im_end|><eos>", "▁",
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def metadata(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with GGUFFile(write_tiny(tmp_path_factory.mktemp("m") / "m.gguf", request.param)) as file:
        return file.metadata


def test_text_survives_the_way_to_tokens_and_back(metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata(metadata)
    spaced = [sample.replace("▁", "_") for sample in SAMPLES]  # SentencePiece cannot tell U+2581 from a space
    for text in spaced:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert all(0 <= id < tokenizer.vocab_size for id in ids)


def test_begin_of_text_is_added_as_told_or_as_the_model_says(metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata(metadata)
    bare = tokenizer.encode("the", add_bos=False)
    assert tokenizer.encode("the", add_bos=True) == [tokenizer.bos, *bare]
    says = metadata["tokenizer.ggml.add_bos_token"]
    assert tokenizer.encode("the") == ([tokenizer.bos, *bare] if says else bare)
    with_end = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.add_eos_token": True})
    assert with_end.encode("the")[-1] == tokenizer.eos


def test_control_tokens_are_text_unless_asked_for(metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.eos is not None
    name = tokenizer.token_text(tokenizer.eos)
    parsed = tokenizer.encode(f"a{name}b", add_bos=False, parse_special=True)
    assert parsed[1] == tokenizer.eos
    assert tokenizer.decode(parsed) == "ab"
    plain = tokenizer.encode(f"a{name}b", add_bos=False)
    assert tokenizer.eos not in plain
    assert tokenizer.decode(plain) == f"a{name}b"
    assert tokenizer.token_bytes(tokenizer.eos) == b""
    assert tokenizer.eos in tokenizer.end_ids


def test_user_defined_tokens_are_always_cut_out(tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf", "gemma3")) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    texts = [tokenizer.token_text(id) for id in tokenizer.encode("a  b\n\nc", add_bos=False)]
    assert texts == ["a", "  ", "b", "\n\n", "c"]


def test_bytes_that_are_no_text_do_not_stop_decoding(metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata(metadata)
    half = tokenizer.encode("é", add_bos=False)[:1]
    assert tokenizer.decode(half) == "\N{REPLACEMENT CHARACTER}"


def test_ids_and_texts_that_cannot_be_are_refused(metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata(metadata)
    for id in (-1, tokenizer.vocab_size):
        with pytest.raises(UsageError, match="not in the vocabulary"):
            tokenizer.decode([id])
    with pytest.raises(UsageError, match="not Unicode at character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(UsageError, match="give at most"):
        tokenizer.encode("a" * (2**23 + 1))


def sentencepiece(pieces: dict[str, float], **more: Any) -> dict[str, Any]:
    """Metadata of a vocabulary: <unk>, <s>, </s>, all bytes, and these pieces with their scores."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + list(pieces)
    values: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + list(pieces.values()),
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def merged_by_llama_cpp(pieces: dict[str, float], text: str) -> list[str]:
    """SentencePiece's rule: as long as neighbours can be joined, those of the best score, leftmost first."""
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = enumerate(pairwise(symbols))
        joins = [(pieces[a + b], -i) for i, (a, b) in pairs if a + b in pieces]
        if not joins:
            return symbols
        i = -max(joins)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def test_sentencepiece_merges_by_score() -> None:
    random_ = random.Random(5)
    for _ in range(60):
        letters = "ab▁é"[: random_.randint(2, 4)]
        pieces: dict[str, float] = dict.fromkeys(letters, 0.0)
        for _ in range(random_.randint(1, 14)):
            left, right = random_.choices(list(pieces), k=2)
            if len(left + right) < 7:
                pieces.setdefault(left + right, -random_.random())
        tokenizer = Tokenizer.from_metadata(sentencepiece(pieces, add_space_prefix=False))
        for length in (1, 2, 5, 12, 40):
            text = "".join(random_.choices(letters, k=length)).replace("▁", " ")
            texts = [tokenizer.token_text(id) for id in tokenizer.encode(text, add_bos=False)]
            assert texts == merged_by_llama_cpp(pieces, text)


def test_sentencepiece_puts_a_space_before_text() -> None:
    pieces = {"▁": -3.0, "a": -4.0, "▁a": -1.0}
    tokenizer = Tokenizer.from_metadata(sentencepiece(pieces))
    texts = [tokenizer.token_text(id) for id in tokenizer.encode("a</s>a a", parse_special=True)]
    assert texts == ["<s>", "▁a", "</s>", "▁a", "▁a"]
    assert tokenizer.decode(tokenizer.encode("a a")) == "a a"


def test_byte_level_words_end_where_the_pattern_says(tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf", vocab=400)) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
        llama3 = Tokenizer.from_metadata(file.metadata | {"tokenizer.ggml.pre": "llama-bpe"})
    assert len(tokenizer.encode("the the")) < 7
    assert [tokenizer.decode([id]) for id in tokenizer.encode("12")] == ["1", "2"]
    assert llama3.decode(llama3.encode("the 123456")) == "the 123456"


BPE_DAMAGE: dict[str, Any] = {
    "model": [None, "bert", 3], "pre": ["nonsense", 5, ["smollm"]],
    "tokens": [None, [], "abc", [1, 2], ["a", 5]],
    "token_type": [[1], [1.5] * 300, "x"], "bos_token_id": [-1, 300, "1", 1.0, True],
    "eos_token_id": [2**63],
    "merges": [None, ["a"], [""], [" "], ["a b c"], ["zz yy"], [5], ["h e", "he zzz"]],
    "add_bos_token": [1, "true"],
}  # fmt: skip
SENTENCEPIECE_DAMAGE: dict[str, Any] = {
    "scores": [None, [1.0], ["a"] * 300, [float("nan")] * 300, [float("-inf")] * 300, [1] * 300],
    "unknown_token_id": [300], "add_space_prefix": [0], "tokens": [["a" * 600] * 300],
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [("llama", key, value) for key, values in BPE_DAMAGE.items() for value in values]
    + [("gemma3", key, value) for key, values in SENTENCEPIECE_DAMAGE.items() for value in values],
)
def test_refuses_damaged_vocabularies(architecture: str, key: str, value: Any, tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf", architecture)) as file:
        metadata = file.metadata
    metadata[f"tokenizer.ggml.{key}"] = value
    if value is None:
        del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_metadata(metadata)
    assert "\n" not in str(caught.value)


def test_repeated_and_cyclic_merges_do_no_harm(tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf")) as file:
        metadata = file.metadata
    right = Tokenizer.from_metadata(metadata).encode("the word")
    metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"] * 3
    assert Tokenizer.from_metadata(metadata).encode("the word") == right


def test_smollm2_as_llama_cpp_does_it() -> None:
    if "smollm2" not in {model.name for model in fetch.list_models()}:
        pytest.skip("SmolLM2 has not been pulled")
    with GGUFFile(fetch.resolve("smollm2")) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    for case in json.loads(GOLDEN.read_text()):
        assert tokenizer.encode(case["text"], parse_special=case["parse_special"]) == case["ids"]
    assert {tokenizer.token_text(id) for id in tokenizer.end_ids} == {"<|im_end|>", "<|endoftext|>"}
