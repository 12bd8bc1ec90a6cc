"""GGUF files: what is written is what is read, and what cannot be is refused in one line."""

import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from tiny_models import write_tiny

from coterie.errors import ModelError
from coterie.models.dequant import dequantise, finite
from coterie.models.gguf_file import GGUFFile
from coterie.models.header import BLOCKS


def gguf_bytes(metadata: bytes = b"", keys: int = 0, tensors: bytes = b"", count: int = 0, data: int = 0) -> bytes:
    """A file of these parts, the data section aligned to 32."""
    head = b"GGUF" + struct.pack("<IQQ", 3, count, keys) + metadata + tensors
    return head + bytes(-len(head) % 32) + bytes(data)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def opened(path: Path, content: bytes) -> GGUFFile:
    path.write_bytes(content)
    return GGUFFile(path)


@pytest.mark.parametrize("weight_format", sorted(BLOCKS))
def test_reads_what_the_gguf_package_reads(tmp_path: Path, weight_format: str) -> None:
    path = write_tiny(tmp_path / "m.gguf", formats=weight_format, dim=256, ffn=512, head_dim=64, tied=False)
    reader = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        assert set(file.tensors) == {tensor.name for tensor in reader.tensors}
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            raw = file.read(theirs.name)
            assert raw.tobytes() == theirs.data.tobytes()
            floats = dequantise(raw, ours.format)
            assert floats.shape == (ours.rows, ours.cols)
            assert finite(raw, ours.format)
            np.testing.assert_array_equal(floats.reshape(-1), dequantize(theirs.data, theirs.tensor_type).reshape(-1))
        for key, field in reader.fields.items():
            if not key.startswith("GGUF."):
                assert file.metadata[key] == field.contents()


def test_reads_rows_and_refuses_rows_that_are_not_there(tmp_path: Path) -> None:
    with GGUFFile(write_tiny(tmp_path / "m.gguf")) as file:
        whole = file.read("blk.0.ffn_up.weight")
        np.testing.assert_array_equal(file.read("blk.0.ffn_up.weight", 5, 17), whole[5:17])
        assert file.read("blk.0.ffn_up.weight", 7, 7).size == 0
        with pytest.raises(IndexError):
            file.read("blk.0.ffn_up.weight", 0, len(whole) + 1)
        with pytest.raises(ModelError, match="'foo' is missing"):
            file.read("foo")


def test_says_when_the_file_shrinks_under_it(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf")
    with GGUFFile(path) as file:
        os.truncate(path, file.tensors["blk.0.ffn_up.weight"].offset + 10)
        with pytest.raises(ModelError, match="became shorter"):
            file.read("blk.0.ffn_up.weight")


@pytest.mark.parametrize(
    ("first", "value", "weight_format"),
    [(0, 0x7C00, "Q4_0"), (2, 0x7E00, "Q4_1"), (0, 0xFC00, "Q8_0"), (2, 0x7C01, "Q4_K"),
     (208, 0x7C00, "Q6_K"), (6, 0x7C00, "F16"), (6, 0x7F80, "BF16"), (2, 0x7FC0, "F32")],
)  # fmt: skip
def test_sees_scales_that_are_not_numbers(first: int, value: int, weight_format: str) -> None:
    raw = np.zeros((2, 4 * BLOCKS[weight_format][1]), np.uint8)
    assert finite(raw, weight_format)
    raw[1, first : first + 2] = np.array([value], np.uint16).view(np.uint8)
    assert not finite(raw, weight_format)
    assert not np.isfinite(dequantise(raw, weight_format)).all()


def with_tensors(tensors: bytes, n: int = 1) -> bytes:
    return gguf_bytes(tensors=tensors, count=n, data=256)


F32 = 0
SCALAR = text("a") + struct.pack("<II", 4, 1)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "not a GGUF file"),
    "other magic": (b"GGML" + bytes(100), "not a GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "a giant number of tensors": (gguf_bytes(count=2**63), "claims 9223372036854775808 tensors"),
    "a giant number of keys": (gguf_bytes(keys=2**63), "metadata keys"),
    "a giant string": (gguf_bytes(struct.pack("<Q", 2**62) + b"abc" * 9, 1), "bytes in a string"),
    "a giant array": (gguf_bytes(text("a") + struct.pack("<IIQ", 9, 4, 2**60), 1), "elements in 'a'"),
    "a giant array of text": (gguf_bytes(text("a") + struct.pack("<IIQ", 9, 8, 2**60), 1), "elements in 'a'"),
    "strings past the end": (gguf_bytes(text("a") + struct.pack("<IIQQ", 9, 8, 1, 99), 1), "past the end"),
    "an array of arrays": (gguf_bytes(text("a") + struct.pack("<IIQ", 9, 9, 0), 1), "array of type 9"),
    "an unknown type": (gguf_bytes(text("a") + struct.pack("<II", 77, 1), 1), "unknown type 77"),
    "a key twice": (gguf_bytes(SCALAR + SCALAR, 2), "occurs twice"),
    "text that is not UTF-8": (gguf_bytes(text(b"\xff\xfe") + struct.pack("<II", 4, 1), 1), "not UTF-8"),
    "no dimensions": (with_tensors(tensor("t", (), F32, 0)), "0 dimensions"),
    "three dimensions": (with_tensors(tensor("t", (1, 1, 1), F32, 0)), "3 dimensions"),
    "a dimension of zero": (with_tensors(tensor("t", (0, 4), F32, 0)), "0"),
    "giant dimensions": (with_tensors(tensor("t", (2**63, 2**63), F32, 0)), "ends at byte"),
    "a split block": (with_tensors(tensor("t", (33, 1), 2, 0)), "Q4_0 blocks"),
    "an unknown format": (with_tensors(tensor("t", (256, 1), 10, 0)), "weight format 10"),
    "an unaligned tensor": (with_tensors(tensor("t", (4,), F32, 4)), "not aligned"),
    "a tensor past the end": (with_tensors(tensor("t", (4,), F32, 2**60)), "ends at byte"),
    "overlapping tensors": (
        with_tensors(tensor("t", (16,), F32, 0) + tensor("u", (4,), F32, 32), n=2), "overlaps",
    ),
    "a tensor twice": (
        with_tensors(tensor("t", (4,), F32, 0) + tensor("t", (4,), F32, 32), n=2), "twice",
    ),
    "an alignment of zero": (
        gguf_bytes(text("general.alignment") + struct.pack("<II", 4, 0), 1), "power of two",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_refuses(name: str, tmp_path: Path) -> None:
    content, reason = BROKEN[name]
    with pytest.raises(ModelError, match=reason) as caught:
        opened(tmp_path / "bad.gguf", content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.gguf", ".", "fifo", "nul\0byte"])
def test_refuses_what_is_no_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ModelError, match="cannot open the model"):
        GGUFFile(tmp_path / name)


@pytest.mark.parametrize("value", [None, "2", 2.5, True, 0, 9, [2]])
def test_whole_numbers_must_be_whole_and_in_range(value: Any, tmp_path: Path) -> None:
    with opened(tmp_path / "m.gguf", gguf_bytes()) as file:
        file.metadata["n"] = value
        with pytest.raises(ModelError, match=r"'n' is .* must be a whole number from 1 to 8"):
            file.integer("n", 1, 8)
        assert file.integer("other", 1, 8, 5) == 5


@pytest.mark.parametrize("value", [None, "2", float("nan"), float("inf"), True, -1.0])
def test_numbers_must_be_finite_and_in_range(value: Any, tmp_path: Path) -> None:
    with opened(tmp_path / "m.gguf", gguf_bytes()) as file:
        file.metadata["x"] = value
        with pytest.raises(ModelError, match="must be a number from 0 to 8"):
            file.number("x", 0, 8)
