"""Ten thousand and more damaged models: each works, or is refused in one line and in little memory."""

import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import damaged_bytes, little_memory_and_no_hang, survives
from tiny_models import write_tiny

from coterie.models.dequant import finite
from coterie.models.gguf_file import GGUFFile
from coterie.models.load import ARCHITECTURES
from coterie.models.template import ChatTemplate
from coterie.models.tokenizer import Tokenizer
from coterie.opening import open_model

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TEXT = "the word 42, abctabctttaaa naïve 中\n\n  <|im_end|>"


@pytest.fixture(autouse=True)
def _little_memory_and_no_hang() -> Iterator[None]:
    # What is loaded on first use must not count.
    Tokenizer.from_metadata(
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}
    )
    with little_memory_and_no_hang():
        yield


def load_and_use(path: Path) -> None:
    model = open_model(path)
    try:
        use_tokenizer(model.tokenizer)
        if model.template is not None:
            model.template.render(TALK)
        for name, tensor in model.file.tensors.items():
            finite(model.source.read(name, 0, 1), tensor.format)
    finally:
        model.close()


def use_metadata(metadata: dict[str, Any]) -> None:
    use_tokenizer(Tokenizer.from_metadata(metadata))


def use_template(source: str) -> None:
    ChatTemplate(source, "<s>", "</s>").render(TALK)


def use_tokenizer(tokenizer: Tokenizer) -> None:
    for parse_special in (False, True):
        ids = tokenizer.encode(TEXT, parse_special=parse_special)
        assert all(0 <= id < tokenizer.vocab_size for id in ids)
        tokenizer.decode(ids)
    for id in (*tokenizer.end_ids, tokenizer.bos, tokenizer.eos, tokenizer.vocab_size - 1):
        assert id is None or isinstance(tokenizer.token_bytes(id), bytes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_damaged_files(architecture: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", architecture, layers=1, vocab=280, dim=32, heads=2, head_dim=16, ffn=32)
    content = path.read_bytes()
    with GGUFFile(path) as file:
        header = min(tensor.offset for tensor in file.tensors.values())
        settings = {content.find(key.encode()) for key in file.metadata if not key.startswith("tokenizer")}
    chance = random.Random(f"files {architecture}")
    alive = 0
    for _ in range(4000):
        # Vocabularies are most of a header: aim at the rest as often.
        near = chance.choice((header, chance.choice(sorted(settings)) + 80, 120))
        path.write_bytes(damaged_bytes(chance, content, near))
        alive += survives(load_and_use, path)
    assert 0 < alive < 4000


ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, 0.0, -1.5, 1e308, float("nan"), float("inf"), "",
    "x", "▁", "\0",
    "llama", "gpt2", "default", "smollm", "a" * 300, [], [None], [0], ["a"], [["a"]], {},
)  # fmt: skip


def damaged_metadata(chance: random.Random, metadata: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A few values of another type or size, arrays shortened, shuffled, doubled, or odd in single places."""
    damaged = dict(metadata)
    keys = [key for key in metadata if key.startswith(prefix)]
    for _ in range(chance.choice((1, 1, 2, 4))):
        key = chance.choice(keys)
        value = damaged.get(key)
        if isinstance(value, list) and value and chance.random() < 0.9:
            value = value.copy()
            first, second = chance.randrange(len(value)), chance.randrange(len(value))
            match chance.randrange(8):
                case 0:
                    value[first] = chance.choice(ODD)
                case 1:
                    value[first] = value[second]
                case 2:
                    chance.shuffle(value)
                case 3:
                    del value[first:]
                case 4:
                    value += value[second:]
                case 5:
                    value.reverse()
                case 6 if isinstance(value[first], str):
                    value[first] = "".join(chance.choices(f"{value[first]} ▁Ġ<0x4>\n", k=chance.randrange(9)))
                case _:
                    value = [chance.choice(value) for _ in value]
            damaged[key] = value
        elif chance.random() < 0.2:
            damaged.pop(key, None)
        else:
            damaged[key] = chance.choice(ODD)
    return damaged


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_damaged_tokenizers(architecture: str, tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf", architecture, vocab=290)) as file:
        metadata = file.metadata
    chance = random.Random(f"tokenizers {architecture}")
    alive = 0
    for _ in range(2500):
        damaged = damaged_metadata(chance, metadata, "tokenizer.ggml.")
        alive += survives(use_metadata, damaged)
    assert 0 < alive < 2500


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_damaged_shapes(architecture: str, tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf", architecture)) as file:
        metadata = file.metadata
        chance = random.Random(f"shapes {architecture}")
        alive = 0
        for _ in range(1500):
            file.metadata = damaged_metadata(chance, metadata, f"{architecture}.")
            alive += survives(ARCHITECTURES[architecture].read_spec, file)
        assert 0 < alive < 1500


def test_cyclic_and_garbage_merges(tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf")) as file:
        metadata = file.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    chance = random.Random("merges")
    alive = 0
    for _ in range(500):
        tokens[-10:] = ["".join(chance.choices("abct", k=chance.randrange(1, 5))) for _ in range(10)]
        known = {*tokens}
        pairs = [(a, b) for a in tokens[-10:] + list("abct") for b in tokens[-10:] + list("abct") if a + b in known]
        merges = [" ".join(pair) for pair in pairs]
        chance.shuffle(merges)
        if chance.random() < 0.3:
            merges.append("".join(chance.choices("abct \n", k=4)))
        damaged = metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
        alive += survives(use_metadata, damaged)
    assert 0 < alive < 500


FRAGMENTS = (
    "{{ ", " }}", "{% ", " %}", "{%- ", " -%}", "{# ", " #}", "messages", "message", "['content']", ".role",
    "[0]", "[1:]", "for message in messages", "for i in range(9999)", "endfor", "if loop.last", "else",
    "endif", "set x = ", "set a.x = ", "set x", "endset", "namespace(x='a')", "a", "x", "a.x", " + ", " * ",
    " ** ", " ~ ", " % ", " == ", " in ", " | ", "tojson", "join", "list", "replace('a', 'aa')", "string",
    "map('upper')", "selectattr('role')", "length", "first", "9999", "10**9", "'abc'", "[x, x]", "{'k': x}",
    "(", ")", "[", "]", ",", "macro m(x)", "endmacro", "m(x)", "call m(1)", "endcall", "filter upper",
    "endfilter", "raise_exception('no')", "strftime_now('%Y')", "range(5000)", "break", "continue",
    "text\n", "is defined", "is string", "not ", "none", "generation", "endgeneration", "recursive",
    "loop(x)", "caller()", "'''", "\\",
)  # fmt: skip
SEEDS = (
    "{% set a = namespace(x='a') %}{% for i in range(50) %}{% set a.x = a.x + 'b' %}{% endfor %}{{ a.x }}",
    "{% for i in range(900) %}{% for message in messages %}{{ message.role ~ i }}{% endfor %}{% endfor %}",
    "{% macro m(x) %}{{ x | tojson }}{% endmacro %}{% for message in messages %}{{ m(message) }}{% endfor %}",
    "{% set x = messages | map(attribute='role') | list %}{{ (x * 3) | join(', ') | replace('a', 'aa') }}",
)  # fmt: skip


def damaged_template(chance: random.Random) -> str:
    """Fragments in a row, or a template with fragments put in, doubled or taken out."""
    if chance.random() < 0.3:
        return "".join(chance.choices(FRAGMENTS, k=chance.randrange(1, 30)))
    source = chance.choice(SEEDS)
    for _ in range(chance.randrange(1, 4)):
        first, last = sorted(chance.randrange(len(source) + 1) for _ in range(2))
        piece = chance.choice((chance.choice(FRAGMENTS), source[first:last], ""))
        end = first + chance.choice((0, len(piece), 1))
        source = source[:first] + piece + source[end:]
    return source


def test_damaged_templates() -> None:
    chance = random.Random("templates")
    alive = 0
    for _ in range(3000):
        source = damaged_template(chance)
        alive += survives(use_template, source)
    assert 0 < alive < 3000


def test_scales_that_are_no_numbers_are_seen_and_do_no_harm(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", formats="Q8_0")
    with GGUFFile(path) as file:
        tensor = file.tensors["blk.0.ffn_up.weight"]
    with open(path, "r+b") as damaged:
        damaged.seek(tensor.offset)
        damaged.write(struct.pack("<H", 0x7E00))
    load_and_use(path)
    with GGUFFile(path) as file:
        assert not finite(file.read(tensor.name), tensor.format)
