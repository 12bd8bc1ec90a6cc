"""A few thousand damaged packed models: each is refused in one line and in little memory, or does no harm.

Whoever damages a file on purpose gives it the right SHA-256s, so most of these have them.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from damage import GIANTS, damaged_bytes, little_memory_and_no_hang, survives
from tiny_models import write_tiny

from coterie.errors import ModelError
from coterie.opening import open_model
from coterie.storage import runs as runs_module
from coterie.storage.flash_file import SECTIONS, FlashFile, FrontPage, damaged_extents, encode_manifest, manifest_table
from coterie.storage.flash_writer import pack_model
from coterie.storage.runs import PAGE

ROUNDS = 700  # files damaged in each way


@dataclass
class Parts:
    """A packed model taken apart."""

    front: FrontPage
    extents: bytes
    sections: dict[str, bytes]

    @classmethod
    def of(cls, content: bytes) -> "Parts":
        front = FrontPage.decode(content[:PAGE], "good", len(content))
        sections = {name: content[at : at + size] for name, (at, size, _) in front.sections.items()}
        return cls(front, content[PAGE : front.extents_end], sections)

    def assemble(self) -> bytes:
        """A file that fits together, whatever the parts hold."""
        body = self.extents + bytes(-len(self.extents) % PAGE)
        end = PAGE + len(body)
        first, places = end, {}
        checksums = self.front.checksums - self.front.sections["manifest"][0]
        for name in SECTIONS:
            data = self.sections[name]
            places[name] = (PAGE + len(body), len(data), hashlib.sha256(data).digest())
            body += data + bytes(-len(data) % PAGE)
        front = replace(
            self.front,
            size=PAGE + len(body),
            extents_end=first,
            checksums=places["manifest"][0] + checksums,
            sections=places,
        )
        return front.encode() + body


def sealed(page: bytes) -> bytes:
    """A first page of any bytes with the digest that belongs to them."""
    body = page[: PAGE - 32].ljust(PAGE - 32, b"\0")
    return body + hashlib.sha256(body).digest()


def open_and_check(path: Path) -> None:
    model = open_model(path)
    try:
        assert isinstance(model.file, FlashFile)
        model.file.manifest()
        damaged_extents(model.file, lambda *_: None)
    finally:
        model.close()


@pytest.fixture(params=["llama", "gemma3", "sparse"])
def good(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    """The bytes of a sound packed model of several extents a run."""
    monkeypatch.setattr(runs_module, "SMALL", 2 * PAGE)
    path, factors, sparse = tmp_path / "m.gguf", request.param == "llama", request.param == "sparse"
    if sparse:
        write_tiny(path, "bamboo", layers=1, vocab=280, sparse=True, oracle=True)
    else:
        write_tiny(path, request.param, layers=1, vocab=280, rope_factors=factors)
    model = open_model(path)
    pack_model(model, tmp_path / "m.coterie", lambda *_: None)
    model.close()
    open_and_check(tmp_path / "m.coterie")  # what is loaded on first use must not count
    with little_memory_and_no_hang():
        yield (tmp_path / "m.coterie").read_bytes()


def test_damaged_first_pages(good: bytes, tmp_path: Path) -> None:
    chance, path = random.Random("pages"), tmp_path / "bad.coterie"
    for _ in range(ROUNDS):
        at, bit = chance.randrange(PAGE), 1 << chance.randrange(8)
        path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        assert not survives(open_and_check, path)


def test_first_pages_that_lie(good: bytes, tmp_path: Path) -> None:
    chance, path, used = random.Random("lies"), tmp_path / "bad.coterie", 280
    alive = 0
    for _ in range(ROUNDS):
        page = bytearray(good[:PAGE])
        for _ in range(chance.choice((1, 1, 2, 3))):
            at = chance.choice((chance.randrange(used), chance.randrange(0, used, 8)))
            size = chance.choice((1, 4, 8))
            near = int.from_bytes(page[at : at + size], "little") + chance.choice((-PAGE, -8, -1, 1, 8, PAGE))
            page[at : at + size] = (chance.choice((*GIANTS, near)) % 256**size).to_bytes(size, "little")
        path.write_bytes(sealed(bytes(page)) + good[PAGE:])
        alive += survives(open_and_check, path)
    assert alive < ROUNDS / 2  # the source's key may be anything


@pytest.mark.parametrize("section", SECTIONS)
def test_damaged_sections(good: bytes, section: str, tmp_path: Path) -> None:
    chance, path, parts = random.Random(section), tmp_path / "bad.coterie", Parts.of(good)
    sound = parts.sections[section]
    if not sound:
        pytest.skip(f"this model has no {section}")
    assert parts.assemble() == good
    alive = 0
    for _ in range(ROUNDS):
        near = chance.choice((len(sound), 400))  # a vocabulary is most of a header
        parts.sections[section] = damaged_bytes(chance, sound, near)
        path.write_bytes(parts.assemble())
        alive += survives(open_and_check, path)
    assert alive < ROUNDS


def test_files_cut_or_grown(good: bytes, tmp_path: Path) -> None:
    chance, path = random.Random("cuts"), tmp_path / "bad.coterie"
    for _ in range(ROUNDS):
        size = chance.choice((chance.randrange(len(good)), chance.randrange(0, len(good), PAGE)))
        path.write_bytes(good[:size] if chance.random() < 0.9 else good + good[:size] + b"\0")
        assert not survives(open_model, path)


def test_parts_in_each_other_s_place(good: bytes, tmp_path: Path) -> None:
    chance, path = random.Random("swaps"), tmp_path / "bad.coterie"
    for _ in range(ROUNDS):
        parts = Parts.of(good)
        names = list(SECTIONS)
        chance.shuffle(names)
        sections = {name: parts.sections[other] for name, other in zip(SECTIONS, names, strict=True)}
        if sections == parts.sections:
            parts.extents = parts.extents[PAGE:] + parts.extents[:PAGE] * chance.randrange(2)
        parts.sections = sections
        path.write_bytes(parts.assemble())
        if survives(open_model, path):  # only extents were moved
            with FlashFile(path) as file:
                assert damaged_extents(file, lambda *_: None)


def test_damaged_extents_are_found(good: bytes, tmp_path: Path) -> None:
    chance, path = random.Random("extents"), tmp_path / "bad.coterie"
    path.write_bytes(good)
    with FlashFile(path) as file:
        ends = file.extents.offset + file.extents.nbytes
        for _ in range(ROUNDS):
            at = chance.randrange(PAGE, int(ends[-1]))
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << chance.randrange(8)]) + good[at + 1 :])
            assert damaged_extents(file, lambda *_: None) == [int(np.searchsorted(ends, at, side="right"))]


def manifest_of(table: pa.Table, **options: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    manifest: bytes = sink.getvalue().to_pybytes()
    return manifest


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_manifests_are_refused_unread(good: bytes, codec: str, tmp_path: Path) -> None:
    """They could be small and endless."""
    parts, path = Parts.of(good), tmp_path / "bad.coterie"
    zeros = np.zeros(1 << 19, np.int64)
    for table in (
        pa.table({"checksum": zeros}),
        pa.table({"kind": pa.DictionaryArray.from_arrays(np.zeros(1, np.int32), ["x" * (1 << 16)])}),
    ):
        parts.sections["manifest"] = manifest_of(table, compression=codec).ljust(1 << 16, b"\0")
        path.write_bytes(parts.assemble())
        with FlashFile(path) as file, pytest.raises(ModelError, match="its manifest is compressed"):
            file.manifest()


def test_manifests_that_contradict_the_header_are_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.coterie"
    path.write_bytes(good)
    with FlashFile(path) as file:
        table = manifest_table(file.runs, file.extents, file.checksums)
    wrong = {
        "offset": pa.array(table["offset"].to_numpy() + PAGE),
        "layer": pa.array(table["layer"].to_numpy() + 1),
        "checksum": pa.array(table["checksum"].to_numpy() + np.uint64(1)),
        "layout": pa.DictionaryArray.from_arrays(np.zeros(table.num_rows, np.int32), ["neuron-major"]),
        "hotness": pa.array(np.ones(table.num_rows, np.float32)),
    }
    for name, column in wrong.items():
        parts = Parts.of(good)
        other = table.set_column(table.schema.get_field_index(name), name, column)
        manifest, checksums = encode_manifest(other)
        parts.sections["manifest"] = manifest
        parts.front = replace(parts.front, checksums=parts.front.sections["manifest"][0] + checksums)
        path.write_bytes(parts.assemble())
        with FlashFile(path) as file:
            if name == "checksum":  # the table is consistent, but the extents are not what it says
                file.manifest()
                assert len(damaged_extents(file, lambda *_: None)) == table.num_rows
            else:
                with pytest.raises(ModelError, match="its manifest contradicts its header"):
                    file.manifest()
