"""Dense models made into sparse ones, and Hugging Face folders: the same numbers as of files written by hand."""

import json
import os
import random
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from command_line import coterie, refused
from damage import GIANTS, damaged_bytes, little_memory_and_no_hang, survives
from exact_models import CONTEXT, decoded, prefilled, some_tokens
from folder_models import byte_level, coded, sentencepiece, write_both, write_gguf
from gguf.quants import dequantize
from numpy.typing import NDArray
from reference import nmse, same_bits
from tiny_models import write_tiny

from coterie.engine import Engine
from coterie.errors import CoterieError, ModelError, UsageError
from coterie.models.folder_config import rope_factors
from coterie.models.folder_tokenizer import TokenizerFiles, tokenizer_metadata
from coterie.models.gguf_file import GGUFFile
from coterie.models.load import open_source, read_spec, understand
from coterie.models.safetensors_folder import SafetensorsFolder
from coterie.models.source import WeightSource
from coterie.models.tokenizer import LLAMA3, Tokenizer
from coterie.models.transposed import ByNeurons, by_neurons
from coterie.opening import open_by_neurons, open_file, open_model
from coterie.scheduler.plan import Wishes
from coterie.storage.flash_file import FlashFile
from coterie.storage.flash_writer import pack_model, packed_path

N = 16  # tokens
WIDE: dict[str, Any] = {"dim": 256, "ffn": 256, "head_dim": 64}
SAMPLES = [
    "the word 42, 1234567", "  two  spaces\n\nand\tlines \n", "naïve 中文 😀 e\u0301", "", " ",
    "def main(argv): there's",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache for packed copies alone, so that compiled kernels are still found."""
    home = tmp_path_factory.mktemp("packed")
    monkeypatch.setattr("coterie.storage.flash_writer.packed_dir", lambda: home)
    monkeypatch.setenv("COTERIE_CONFIG", str(home / "config.toml"))


def logits(path: Path, **wishes: Any) -> NDArray[np.float32]:
    """float32[2, N, vocab]: of a prompt, and token by token."""
    engine = Engine(open_model(path), Wishes(threads=2, context=CONTEXT, **wishes))
    try:
        tokens = some_tokens(N)
        return np.stack([prefilled(engine, tokens), decoded(engine, tokens)])
    finally:
        engine.close()


def converted(path: Path, **options: Any) -> ByNeurons:
    source = open_source(path)
    return by_neurons(source, read_spec(source), **options)


def packed(source: WeightSource, out: Path) -> Path:
    understood = understand(source)
    pack_model(understood, out, lambda label, done, total: None)
    understood.close()
    return out


def checksums(path: Path) -> list[int]:
    """Of a packed file's extents."""
    with FlashFile(path) as file:
        found: list[int] = file.checksums.tolist()
        return found


def random_order(layers: int, neurons: int, seed: int = 3) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(neurons) for _ in range(layers)])


# --- by neurons ----------------------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {  # the dense file, and what is coded anew
    "Q4_0": ({"formats": "Q4_0", "activation": "relu", "ffn": 160}, {"ffn_down": "Q4_0"}),
    "Q8_0, drelu": ({"formats": "Q8_0", "activation": "drelu"}, {"ffn_down": "Q8_0"}),
    "Q5_0": ({"formats": "Q5_0", "activation": "relu"}, {"ffn_down": "Q8_0"}),
    "F16, relu2, odd": ({"formats": "F16", "activation": "relu2", "dim": 72, "ffn": 100}, {"ffn_down": "F16"}),
    "bamboo": ({"formats": "Q4_1", "architecture": "bamboo"}, {"ffn_down": "Q4_0"}),
    "K-quants": (
        {"formats": {"ffn_gate": "Q4_K", "ffn_up": "Q6_K", "ffn_down": "Q5_K"}, "activation": "relu", **WIDE},
        {"ffn_gate": "Q4_0", "ffn_up": "Q8_0", "ffn_down": "Q8_0"},
    ),
    "rows that are no blocks": (
        {"formats": {"ffn_gate": "F16", "ffn_up": "F16", "ffn_down": "Q4_0"}, "activation": "relu", "dim": 72},
        {"ffn_down": "F16"},
    ),
}
COMPUTED = ("Q4_0", "F16, relu2, odd", "K-quants")  # compiling kernels for all would take minutes


def by_hand(dense: Path, out: Path, anew: dict[str, str]) -> Path:
    """The GGUF that a conversion should come to."""
    with GGUFFile(dense) as file:
        tensors: dict[str, tuple[str, NDArray[Any]]] = {}
        for name, tensor in file.tensors.items():
            role, raw, kind = name.split(".")[-2], file.read(name), tensor.format
            if role in anew:
                values = dequantize(raw, gguf.GGMLQuantizationType[kind])
                kind = anew[role]
                raw = coded(np.ascontiguousarray(values.T if role == "ffn_down" else values), kind)
            tensors[name.replace("ffn_down", "ffn_down_t")] = kind, raw
        return write_gguf(out, file.metadata, tensors)


@pytest.mark.parametrize("name", CASES)
def test_conversion_is_the_file_written_by_hand(name: str, tmp_path: Path) -> None:
    sizes, anew = CASES[name]
    dense = write_tiny(tmp_path / "m.gguf", context=CONTEXT, **sizes)
    hand = by_hand(dense, tmp_path / "hand.gguf", anew)
    with converted(dense) as model, GGUFFile(hand) as expected:
        assert model.tensors.keys() == expected.tensors.keys()
        for each, tensor in expected.tensors.items():
            assert np.array_equal(model.read(each), expected.read(each)), each
            assert np.array_equal(model.read(each, 1, tensor.rows), expected.read(each, 1)), each
        assert len(model.changes) == len(anew)
        assert all(0 <= error < 0.1 for error in model.errors.values())
        assert model.errors.keys() == {0, 1}
    out = packed(converted(dense), tmp_path / "m.coterie")
    assert checksums(out) == checksums(packed(GGUFFile(hand), tmp_path / "hand.coterie"))
    if name in COMPUTED:
        expected_logits = logits(hand)
        assert same_bits(logits(out), expected_logits)
        assert nmse(expected_logits, logits(dense)) < 2e-2  # Down's new quanta


def test_down_is_made_once_for_all_its_extents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = write_tiny(tmp_path / "m.gguf", formats="Q4_0", activation="relu")
    asked: list[str] = []
    floats = GGUFFile.floats

    def noted(self: GGUFFile, name: str) -> Any:
        asked.append(name)
        return floats(self, name)

    monkeypatch.setattr(GGUFFile, "floats", noted)
    with converted(dense, order=random_order(2, 96)) as model:
        for layer in (0, 1):
            for first in range(0, 96, 8):
                model.read(f"blk.{layer}.ffn_down_t.weight", first, first + 8)[:] = 0  # a copy: nobody else sees it
        assert model.read("blk.1.ffn_down_t.weight").any()
    assert asked == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]


def test_the_error_is_downs(tmp_path: Path) -> None:
    dense = write_tiny(tmp_path / "m.gguf", formats="Q4_0", activation="relu")
    with converted(dense) as model:
        old, new = model.base.floats("blk.1.ffn_down.weight"), model.floats("blk.1.ffn_down_t.weight")
        assert model.errors == {1: pytest.approx(np.linalg.norm(new.T - old) / np.linalg.norm(old), rel=1e-5)}
        assert model.errors[1] > 0.01
    with converted(dense, format="F32") as model:
        model.read("blk.0.ffn_down_t.weight")
        assert model.errors == {0: 0.0}


def test_an_order_moves_rows_and_changes_only_roundings(tmp_path: Path) -> None:
    dense = write_tiny(tmp_path / "m.gguf", formats="Q4_0", activation="relu", context=CONTEXT, ffn=160)
    order = random_order(2, 160)
    with converted(dense) as plain, converted(dense, order=order) as model:
        for layer in (0, 1):
            for part in ("ffn_gate", "ffn_up", "ffn_down_t"):
                name = f"blk.{layer}.{part}.weight"
                assert np.array_equal(model.read(name), plain.read(name)[order[layer]])
                assert np.array_equal(model.read(name, 5, 9), plain.read(name)[order[layer, 5:9]])
    files = (
        packed(converted(dense), tmp_path / "a.coterie"),
        packed(converted(dense, order=order), tmp_path / "b.coterie"),
    )
    results, uses = [], []
    for path in files:
        engine = Engine(open_model(path), Wishes(threads=2, context=CONTEXT, counting=True))
        results.append(decoded(engine, some_tokens(N)))
        assert engine.layout.shared.uses is not None
        uses.append(engine.arena.numpy(engine.layout.shared.uses)[:, :160].copy())
        engine.close()
    assert not same_bits(*results)
    assert nmse(*results) < 1e-6
    assert uses[0].any()
    assert np.array_equal(uses[1][0], uses[0][0][order[0]])  # the first layer's live neurons are the same ones


def test_a_model_by_neurons_is_only_ordered(tmp_path: Path) -> None:
    sparse = write_tiny(tmp_path / "m.gguf", formats="Q4_0", activation="drelu", sparse=True, oracle=True)
    order = random_order(2, 96)
    with GGUFFile(sparse) as plain, converted(sparse, order=order) as model:
        assert {name: each.format for name, each in model.tensors.items()} == {
            name: each.format for name, each in plain.tensors.items()
        }
        moved = 0
        for name in plain.tensors:
            rows = plain.read(name)
            if name.split(".")[-2] in ("ffn_gate", "ffn_up", "ffn_down_t", "fc2"):
                rows, moved = rows[order[int(name.split(".")[1])]], moved + 1
            assert np.array_equal(model.read(name), rows), name
        assert moved == 8
        assert not model.changes


def test_an_activation_can_be_named(tmp_path: Path) -> None:
    dense = write_tiny(tmp_path / "m.gguf", formats="Q4_0")
    model = open_by_neurons(dense, "relu2", "Q8_0")
    assert model.spec.activation == "relu2"
    assert model.file.tensors["blk.0.ffn_down_t.weight"].format == "Q8_0"
    model.close()


def test_keys_tell_conversions_apart(tmp_path: Path) -> None:
    dense = write_tiny(tmp_path / "m.gguf", formats="Q4_0", activation="relu")
    options: list[dict[str, Any]] = [
        {},
        {"activation": "relu2"},
        {"format": "Q8_0"},
        {"order": random_order(2, 96)},
        {"order": random_order(2, 96, seed=4)},
    ]
    models = [converted(dense, **each) for each in options]
    assert len({model.key() for model in models} | {models[0].base.key()}) == 6
    assert {model.origin() for model in models} == {models[0].base.key()}
    again = converted(dense)
    assert again.key() == models[0].key()
    for model in (*models, again):
        model.close()


@pytest.mark.parametrize(
    ("sizes", "options", "error", "words"),
    [
        ({}, {}, UsageError, "with silu neurons are never idle"),
        ({"architecture": "gemma3"}, {"activation": "relu"}, UsageError, "with gelu neurons are never idle"),
        ({"activation": "relu"}, {"activation": "silu"}, UsageError, "'silu' leaves no neuron idle"),
        ({"activation": "relu"}, {"format": "Q6_K"}, UsageError, "'Q6_K'; choose one of Q4_0"),
        ({"activation": "relu", "dim": 72, "formats": "F16"}, {"format": "Q4_0"}, ModelError, "choose the format F16"),
        ({"activation": "relu", "sparse": True}, {"format": "Q4_0"}, UsageError, "by neurons already"),
        ({"activation": "relu"}, {"order": random_order(1, 96)}, UsageError, r"int64\[1, 96\], but must be"),
        ({"activation": "relu"}, {"order": random_order(2, 96).astype(np.int32)}, UsageError, "int32"),
        ({"activation": "relu"}, {"order": np.zeros((2, 96), np.int64)}, UsageError, "layer 0 is no permutation"),
    ],
)
def test_conversions_that_make_no_sense(
    sizes: dict[str, Any], options: dict[str, Any], error: type[CoterieError], words: str, tmp_path: Path
) -> None:
    source = GGUFFile(write_tiny(tmp_path / "m.gguf", **({"formats": "Q4_0"} | sizes)))
    with source, pytest.raises(error, match=words):
        by_neurons(source, read_spec(source), **options)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    dense = write_tiny(tmp_path / "m.gguf", formats="F32", activation="relu")
    with GGUFFile(dense) as file:
        at = file.tensors["blk.1.ffn_down.weight"].offset
    with open(dense, "r+b") as damaged:
        damaged.seek(at)
        damaged.write(b"\0\0\xc0\x7f")
    for format in ("Q4_0", "Q8_0", "F16", "F32"):
        with pytest.raises(ModelError, match=r"'blk\.1\.ffn_down_t\.weight' holds a weight that is not a number"):
            packed(converted(dense, format=format), tmp_path / "m.coterie")


# --- folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("F32", {"shards": 3}),
        ("BF16", {"kind": "Q8_0", "tied": False, "activation": "relu", "config": {"tie_word_embeddings": False}}),
        ("F16", {"kind": "F16", "architecture": "bamboo", "shards": 2}),
        ("F16", {"dim": 72, "ffn": 128}),  # Q4_0, but F16 where rows have 72 columns
    ],
)
def test_a_folder_is_the_gguf_with_its_weights(dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder, path = write_both(tmp_path, dtype, context=CONTEXT, **options)
    with SafetensorsFolder(folder, options.get("kind", "Q4_0")) as model, GGUFFile(path) as expected:
        ours, theirs = read_spec(model), read_spec(expected)
        assert {**vars(ours), "name": ""} == {**vars(theirs), "name": ""}
        assert model.tensors.keys() == expected.tensors.keys()
        for name, tensor in expected.tensors.items():
            assert model.tensors[name].format == tensor.format
            assert np.array_equal(model.read(name), expected.read(name)), name
            some = sorted({0, 1, tensor.rows // 3, tensor.rows // 2, tensor.rows})
            for first, last in pairwise(some):
                assert np.array_equal(model.read(name, first, last), expected.read(name, first, last)), name
    out = packed(SafetensorsFolder(folder, options.get("kind", "Q4_0")), tmp_path / "m.coterie")
    assert checksums(out) == checksums(packed(GGUFFile(path), tmp_path / "gguf.coterie"))
    if dtype == "F32":
        assert same_bits(logits(folder), logits(path))


def test_large_matrices_are_coded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, path = write_both(tmp_path, "F32")
    monkeypatch.setattr("coterie.models.safetensors_folder.CHUNK", 64 * 7)
    with SafetensorsFolder(folder) as model, GGUFFile(path) as expected:
        for name in expected.tensors:
            assert np.array_equal(model.read(name), expected.read(name)), name


def test_a_folder_by_neurons_is_coded_once(tmp_path: Path) -> None:
    """Down is transposed before it loses anything."""
    folder, _ = write_both(tmp_path, "BF16", activation="relu")
    with converted(folder) as model, GGUFFile(tmp_path / "f32.gguf") as f32:
        values = (f32.floats("blk.1.ffn_down.weight").view(np.uint32) & 0xFFFF0000).view(np.float32)
        expected = coded(np.ascontiguousarray(values.T), "Q4_0")
        assert np.array_equal(model.read("blk.1.ffn_down_t.weight"), expected)
        assert model.changes == ("Down, transposed, BF16 to Q4_0 in 2 layers",)


LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def converters_factors(rope: dict[str, float], base: float, dim: int) -> list[float]:
    """As llama.cpp's convert_hf_to_gguf computes them."""
    old, factors = rope["original_max_position_embeddings"], []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * base ** (i / dim)
        if wavelength < old / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > old / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return factors


def test_rope_scaling(tmp_path: Path) -> None:
    config: dict[str, Any] = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}}
    found = rope_factors(config, 128)
    assert found is not None
    assert found == pytest.approx(converters_factors(LLAMA3_ROPE, 5e5, 128), rel=1e-6)
    assert len(set(found.tolist())) > 5
    folder, _ = write_both(tmp_path, "F16", config=config)
    with SafetensorsFolder(folder) as model:
        rope = read_spec(model).layers[0].rope
        assert rope.base == 5e5
        assert rope.factors == pytest.approx(converters_factors(LLAMA3_ROPE, 5e5, 16), rel=1e-6)
        out = packed(model, tmp_path / "m.coterie")
    with FlashFile(out) as file:
        assert read_spec(file).layers[0].rope == rope


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope", 0.25),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "rope_theta": None}, "base", 777.0),
        ({"sliding_window": 128}, "context", 128),
        ({"num_key_value_heads": 2, "hidden_act": "squared relu"}, "activation", "relu2"),
    ],
)
def test_what_config_json_says(config: dict[str, Any], key: str, value: Any, tmp_path: Path) -> None:
    folder, _ = write_both(tmp_path, "F16", config=config)
    with SafetensorsFolder(folder) as model:
        spec = read_spec(model)
        rope = spec.layers[0].rope
        assert {"rope": rope.scale, "base": rope.base, **vars(spec)}[key] == value


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"architectures": None}, "'architectures' is missing"),
        ({"hidden_act": "fatrelu"}, "'fatrelu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE, "factor": 0}}, "make no sense"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": "64"}, "'hidden_size' is '64', but must be a whole number"),
        ({"hidden_size": 128}, "128"),
        ({"rms_norm_eps": 10**400}, "'rms_norm_eps' is 1000"),
        ({"num_hidden_layers": 3}, "blk.2"),
        ({"num_hidden_layers": 1}, "has no place"),
        ({"num_attention_heads": 8}, "attn_q"),
        ({"num_attention_heads": 0}, "'llama.attention.head_count' is '0'"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder, _ = write_both(tmp_path, "F16", config=config)
    with pytest.raises(ModelError) as caught:
        open_model(folder)
    assert words in str(caught.value)


# --- tokenizers ----------------------------------------------------------------------------------------------


def made(tokenizer: dict[str, Any], size: int, settings: Mapping[str, Any] = {}, **more: Any) -> dict[str, Any]:
    return tokenizer_metadata(
        TokenizerFiles(tokenizer, dict(settings), more.get("config", {}), more.get("generation", {})), size
    )


def test_byte_level_tokenizers_agree(tmp_path: Path) -> None:
    folder, path = write_both(tmp_path, "F16")
    ours, theirs = open_model(folder), open_model(path)
    reference = byte_level(theirs.file.metadata)
    for text in SAMPLES:
        ids = ours.tokenizer.encode(text)
        assert ids == theirs.tokenizer.encode(text) == reference.encode(text).ids
        assert ours.tokenizer.decode(ids) == text
    a, b = ours.tokenizer, theirs.tokenizer
    assert (a.bos, a.eos, a.end_ids, a.vocab_size) == (b.bos, b.eos, b.end_ids, b.vocab_size)
    assert ours.template is not None
    assert theirs.template is not None
    talk = [{"role": "user", "content": "hi"}]
    assert ours.template.render(talk) == theirs.template.render(talk)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    other = open_model(folder)
    assert other.template is not None
    assert other.template.render(talk) == "hi!"
    for model in (ours, theirs, other):
        model.close()


@pytest.mark.parametrize("metaspace", [False, True])
def test_sentencepiece_tokenizers_agree(metaspace: bool) -> None:
    letters = ["▁", *"etaoinshrdlucmfwypvbgkjqx", *".,;:()'"]
    merges = [
        ("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("e", "r"), ("▁", "w"), ("▁w", "o"), ("r", "d"),
        ("▁", "▁"), ("▁wo", "rd"), ("t", "he"), ("in", "g"), ("m", "a"), ("ma", "in"),
    ]  # fmt: skip
    reference = sentencepiece([*letters, *("".join(pair) for pair in merges)], merges, metaspace=metaspace)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    size = reference.get_vocab_size()
    tokenizer = Tokenizer.from_metadata(made(json.loads(reference.to_str()), size + 5, settings))
    assert tokenizer.vocab_size == size + 5
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    for text in SAMPLES:
        # llama.cpp puts a space before everything but nothing; the package also there, or never two (Metaspace).
        if text.strip() and not (metaspace and text.startswith(" ")):
            ids = tokenizer.encode(text)
            assert ids == [1, *reference.encode(text).ids]
            assert tokenizer.decode(ids) == text


def test_sentencepiece_merges_in_the_order_of_tokenizer_json() -> None:
    chance = random.Random(7)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    for _ in range(40):
        pieces, merges = ["▁", "a", "b", "c"], list[tuple[str, str]]()
        for _ in range(chance.randrange(2, 12)):
            piece = "".join(chance.choices(pieces, k=2))
            if piece not in pieces:
                pieces.append(piece)
                cuts = ((piece[:i], piece[i:]) for i in range(len(piece) - 1, 0, -1))
                merges += [pair for pair in cuts if pair[0] in pieces and pair[1] in pieces]
        reference = sentencepiece(pieces, merges, metaspace=False)
        tokenizer = Tokenizer.from_metadata(made(json.loads(reference.to_str()), reference.get_vocab_size(), settings))
        for _ in range(20):
            text = "".join(chance.choices("abc ", k=12))
            assert tokenizer.encode(text) == reference.encode(text).ids, (text, merges)


def small() -> dict[str, Any]:
    """A byte-level vocabulary of three tokens."""
    return {
        "added_tokens": [{"id": 2, "content": "<end>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": ["a a"]},
    }


def test_what_tokenizer_files_say() -> None:
    found = made(small(), 4)
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.tokens"] == ["a", "aa", "<end>", "[PAD3]"]
    assert found["tokenizer.ggml.token_type"] == [1, 1, 3, 5]
    assert found["tokenizer.ggml.add_bos_token"] is False
    llama3 = small() | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]}}  # fmt: skip
    llama3["model"] |= {"ignore_merges": True}
    llama3["post_processor"] = {"type": "Sequence", "processors": [
        {"type": "ByteLevel"},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<end>"}}, {"Sequence": {"id": "A"}}]},
    ]}  # fmt: skip
    found = made(llama3, 3, {"bos_token": {"content": "<end>"}}, generation={"eos_token_id": [1, 0]})
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert Tokenizer.from_metadata(found).end_ids == {0, 1}
    beyond = small() | {"added_tokens": [{"id": 9, "content": "<pad>", "special": True}]}
    assert made(beyond, 2)["tokenizer.ggml.tokens"] == ["a", "aa"]  # no embedding, and nobody gives it


@pytest.mark.parametrize("ends", [[1, None], "1", [[]], True])
def test_ends_that_are_no_numbers(ends: Any) -> None:
    with pytest.raises(ModelError, match="'eos_token_id' is"):
        made(small(), 3, config={"eos_token_id": ends})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"type": "Unigram"}}, "'Unigram' is not supported"),
        ({"model": {"type": "BPE", "vocab": {"a": 7}, "merges": []}}, "'a' is number 7 of 3"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}}, "is not of two tokens"),
        ({"added_tokens": [{"id": 1, "content": ["x"]}]}, "'content'"),
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": None}, "not supported"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated"}, {"type": "ByteLevel"},
            ]}},
            "cuts by \"x+ and '",
        ),
    ],
)  # fmt: skip
def test_tokenizers_that_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as caught:
        made(small() | change, 3)
    assert words in str(caught.value)


# --- bad folders ---------------------------------------------------------------------------------------------


def load_and_use(folder: Path) -> None:
    model = open_model(folder)
    try:
        model.tokenizer.decode(model.tokenizer.encode(SAMPLES[0]))
        for name, tensor in model.file.tensors.items():
            model.source.read(name, tensor.rows // 2, tensor.rows // 2 + 1)
        model.source.header_bytes()
        model.source.key()
    finally:
        model.close()


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**31, 2**63, 2**64, 10**400, -1.5, 1e300, "", "x", "\ud800", "../m", "/etc/passwd", "a\0b",
    [], [None], ["a"], {}, {"type": "x"}, [[[]]],
)  # fmt: skip


def damaged_json(chance: random.Random, value: Any) -> Any:
    """A value somewhere within, made odd, or left out, or put elsewhere."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {name: each for name, each in value.items() if name != key}
        if chance.random() < 0.1:
            return value | {chance.choice(["x", "\udcff", *value]): value[key]}
        return value | {key: damaged_json(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.8:
        i = chance.randrange(len(value))
        return [*value[:i], damaged_json(chance, value[i]), *value[i + 1 :]]
    return chance.choice(ODD)


def damaged_header(chance: random.Random, data: bytes) -> bytes:
    """A safetensors file with an odd header, or with damaged bytes in it."""
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.5:
        return damaged_bytes(chance, data, length + 8)
    header = json.loads(data[8 : 8 + length])
    name = chance.choice([name for name in header if name != "__metadata__"])
    if chance.random() < 0.5:
        header[name] = damaged_json(chance, header[name])
    else:
        header[name]["data_offsets"][chance.randrange(2)] += chance.choice((1, -1, 64, -64, *GIANTS))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_damaged_folders(tmp_path: Path) -> None:
    folder, _ = write_both(tmp_path, "BF16", shards=2, layers=1, dim=32, ffn=32, vocab=280)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0], "bos_token_id": 1}')
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    load_and_use(folder)  # what is loaded on first use must not count
    chance, alive = random.Random("folders"), 0
    with little_memory_and_no_hang():
        for _ in range(400):
            path = chance.choice(list(files))
            if path.suffix == ".safetensors":
                damaged = damaged_header(chance, files[path])
            elif chance.random() < 0.4:
                damaged = damaged_bytes(chance, files[path], len(files[path]))
            else:
                damaged = json.dumps(damaged_json(chance, json.loads(files[path]))).encode()
            path.write_bytes(damaged)
            alive += survives(load_and_use, folder)
            path.write_bytes(files[path])
    assert 40 < alive < 300
    load_and_use(folder)


def claim(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def lead_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')


def vector(begin: int, end: int, **more: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [begin, end]} | more


WEIGHTS = "model.safetensors"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "out of the folder": (lead_out, "is no safetensors file of this folder"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "there is no safetensors file"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot open the model"),
    "a folder as a file": (lambda folder: (folder / "generation_config.json").mkdir(), "is not a regular file"),
    "deep": (lambda folder: (folder / "config.json").write_bytes(b"[" * 100_000), "no sound JSON"),
    "no object": (lambda folder: (folder / "config.json").write_bytes(b"[]"), "holds no JSON object"),
    "NaN": (lambda folder: (folder / "config.json").write_bytes(b'{"rope_theta": NaN}'), "NaN is no number"),
    "half a character": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"chat_template": "\\ud800"}'),
        "'tokenizer.chat_template' hold text that is not Unicode",
    ),
    "too large": (lambda folder: os.truncate(folder / "config.json", 1 << 30), "larger than 1 MiB"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "became shorter"),
    "a giant header": (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"), "which cannot be"),
    "outside": (lambda folder: claim(folder / WEIGHTS, {"a": vector(0, 16)}, bytes(15)), "not where it should be"),
    "overlapping": (
        lambda folder: claim(folder / WEIGHTS, {"a": vector(0, 16), "b": vector(12, 28)}, bytes(28)),
        "'b' overlaps 'a'",
    ),
    "of a strange type": (
        lambda folder: claim(folder / WEIGHTS, {"a": vector(0, 4, dtype="F8_E4M3")}, bytes(4)),
        "'F8_E4M3'",
    ),
    "of no place": (lambda folder: claim(folder / WEIGHTS, {"a": vector(0, 16)}, bytes(16)), "has no place"),
    "twice": (lambda folder: (folder / "x.safetensors").write_bytes((folder / WEIGHTS).read_bytes()), "is in"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(name: str, tmp_path: Path) -> None:
    folder, _ = write_both(tmp_path, "F16")
    damage, words = BAD[name]
    damage(folder)
    with little_memory_and_no_hang(), pytest.raises(ModelError) as caught:
        open_model(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_change_while_they_are_read(tmp_path: Path) -> None:
    folder, _ = write_both(tmp_path, "F32")
    model = open_model(folder)
    os.truncate(folder / WEIGHTS, 5000)
    with pytest.raises(ModelError, match="became shorter while tensor"):
        pack_model(model, tmp_path / "m.coterie", lambda label, done, total: None)
    model.close()


def test_a_folder_with_weights_that_are_no_numbers(tmp_path: Path) -> None:
    folder, _ = write_both(tmp_path, "F32")
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-4:] = b"\0\0\x80\x7f"
    (folder / WEIGHTS).write_bytes(data)
    model = open_model(folder)
    with pytest.raises(ModelError, match="not a number"):
        pack_model(model, tmp_path / "m.coterie", lambda label, done, total: None)
    model.close()


# --- commands ------------------------------------------------------------------------------------------------


def test_pack_sparse(tmp_path: Path) -> None:
    dense, out = write_tiny(tmp_path / "m.gguf", formats="Q4_0"), tmp_path / "m.coterie"
    refused(coterie("pack", "--sparse", str(dense)), "with silu neurons are never idle")
    refused(coterie("pack", "--activation", "relu", str(dense)), "--activation goes with --sparse")
    refused(coterie("pack", "--format", "Q8_0", str(dense)), "a GGUF keeps its formats")
    result = coterie("pack", "--sparse", "--activation", "relu", "--format", "Q8_0", str(dense), "-o", str(out))
    assert result.stdout == f"{out}\n"
    assert "Down, transposed, Q4_0 to Q8_0 in 2 layers\nDown lost by it: mean relative error 0." in result.stderr
    with open_file(out) as file:
        assert read_spec(file).sparse
        assert read_spec(file).activation == "relu"
    refused(coterie("pack", "--sparse", str(out)), "is a packed model")


def test_pack_a_folder(tmp_path: Path) -> None:
    folder, _ = write_both(tmp_path, "BF16", activation="relu")
    facts = json.loads(coterie("pack", str(folder), "--json").stdout)
    assert facts["numerics"] == ["BF16 to Q4_0: 15 tensors", "BF16 to F32: 5 tensors"]
    with SafetensorsFolder(folder) as model:
        assert facts["path"] == str(packed_path(model))
    facts = json.loads(coterie("pack", str(folder), "--sparse", "--format", "F16", "--json").stdout)
    assert facts["numerics"][:3] == [
        "BF16 to F16: 13 tensors",
        "BF16 to F32: 5 tensors",
        "Down, transposed, BF16 to F16 in 2 layers",
    ]
    facts = json.loads(coterie("inspect", str(folder), "--json").stdout)
    assert facts["size"] == (folder / WEIGHTS).stat().st_size
    refused(coterie("pack", str(tmp_path)), "nor a folder with config.json")


def test_copies_stay_as_long_as_what_they_are_of(tmp_path: Path) -> None:
    """Those of conversions and of folders in other formats, too."""
    dense = write_tiny(tmp_path / "m.gguf", formats="Q4_0", activation="relu")
    folder, _ = write_both(tmp_path, "F16", activation="relu")
    commands = (
        [str(dense)],
        [str(dense), "--sparse"],
        [str(dense), "--sparse", "--format", "Q8_0"],
        [str(folder)],
        [str(folder), "--format", "Q8_0"],
        [str(folder), "--sparse"],
    )
    copies = [Path(coterie("pack", *arguments).stdout.strip()) for arguments in commands]
    assert len(set(copies)) == 6
    assert all(path.exists() for path in copies)
    os.utime(folder / WEIGHTS, ns=(5, 5))
    other = write_tiny(tmp_path / "other.gguf", formats="Q4_0")
    coterie("pack", str(other))
    assert [path.exists() for path in copies] == [True] * 3 + [False] * 3
