"""Flash files: what is packed is what the GGUF holds, and a name stands for a whole file, whatever happens."""

import ctypes
import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny_models import write_tiny
from typer.testing import CliRunner, Result

from coterie.errors import CoterieError, ModelError, UsageError
from coterie.kernels.formats import FORMATS
from coterie.models.dequant import dequantise
from coterie.models.load import Model
from coterie.opening import open_model
from coterie.storage import flash_writer
from coterie.storage import runs as runs_module
from coterie.storage.checksum import checksum
from coterie.storage.flash_file import MAGIC, SECTIONS, FlashFile, FrontPage, damaged_extents, is_flash_file
from coterie.storage.flash_writer import pack_model, packed_copy, packed_path
from coterie.storage.pack import unpack
from coterie.storage.packer import half_split_rows
from coterie.storage.runs import PAGE, Run, cluster_layout, norm_places, projection_names

K_QUANTS = {"dim": 256, "ffn": 512, "head_dim": 64}
CASES: dict[str, dict[str, Any]] = {
    "Q4_0": {"formats": "Q4_0"},
    "Q4_0, longer": {"formats": "Q4_0", "rope_factors": True},
    "Q4_1": {"formats": "Q4_1", "tied": False},
    "Q5_0": {"formats": "Q5_0"},
    "Q8_0": {"formats": "Q8_0", "dim": 96, "ffn": 160, "vocab": 333},
    "Q4_K": {"formats": "Q4_K", **K_QUANTS},
    "Q5_K": {"formats": "Q5_K", **K_QUANTS},
    "Q6_K": {"formats": "Q6_K", **K_QUANTS},
    "F16, odd": {"formats": "F16", "dim": 72, "ffn": 100, "vocab": 301},
    "BF16": {"formats": "BF16"},
    "F32": {"formats": "F32"},
    "mixed": {"formats": {"attn_q": "Q5_0", "attn_k": "Q5_0", "attn_v": "F16", "ffn_gate": "Q4_1", "ffn_up": "Q8_0",
                          "ffn_down": "BF16", "token_embd": "Q8_0"}},
}  # fmt: skip


def silent(label: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(autouse=True)
def _small_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several extents a run, several blocks a file."""
    monkeypatch.setattr(runs_module, "SMALL", 3 * PAGE)
    monkeypatch.setattr(runs_module, "LOOKUP", 2 * PAGE)
    monkeypatch.setattr(flash_writer, "BLOCK", 4 * PAGE)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    opened = open_model(write_tiny(tmp_path / "m.gguf"))
    yield opened
    opened.close()


def sound(path: Path) -> bool:
    with FlashFile(path) as file:
        file.manifest()
        return not damaged_extents(file, silent)


# --- what is packed -------------------------------------------------------------------------------------------


def items_of(file: FlashFile, k: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Items uint8[items, item bytes] of run k, put together from its extents; checksums and padding compared."""
    run, first = file.runs[k], int(file.extents.first[k])
    content = np.fromfile(file.path, np.uint8)
    items = []
    for i in range(first, first + run.extents):
        extent = content[file.extents.offset[i] :][: file.extents.nbytes[i]]
        assert checksum(extent) == file.checksums[i]
        held = run.items_of(i - first) * run.item_bytes
        assert not extent[held:].any()
        items.append(extent[:held].reshape(-1, run.item_bytes))
    return np.concatenate(items)


def expected_rows(model: Model, run: Run, names: tuple[str, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The tensors' rows as floats, rotary pairs split, each tensor filled up to whole groups."""
    parts = []
    for name in names:
        rows = dequantise(model.source.read(name), model.source.tensors[name].format)
        if name.endswith(("attn_q.weight", "attn_k.weight")) and model.spec.interleaved_rope:
            dims, heads = model.spec.layers[run.layer].rope.dims, len(rows) // model.spec.head_dim
            rows = rows[half_split_rows(model.spec.head_dim, dims, heads)]
        parts += [rows, np.zeros((-len(rows) % 16, rows.shape[1]), np.float32)]
    return np.concatenate(parts)


def check_run(model: Model, file: FlashFile, k: int) -> None:
    run, items = file.runs[k], items_of(file, k)
    match run.kind:
        case "norms":
            values = items[0].view(np.float32)
            for name, (at, size) in norm_places(model.spec).items():
                np.testing.assert_array_equal(values[at : at + size], model.source.vector(name))
        case "ffn":
            layout = cluster_layout(file.tensors, file_spec := model.spec, run.layer)
            up, down = layout.gate_bytes, layout.down_offset
            for name, f, begin, end in (
                ("gate", layout.gate, 0, up),
                ("up", layout.up, up, up + layout.neurons // 16 * len_group(layout.up.name, layout.dim)),
                ("down", layout.down, down, down + layout.down_groups * layout.down.block),
            ):
                wanted = dequantise(model.source.read(f"blk.{run.layer}.ffn_{name}.weight"), f.name)
                part = np.ascontiguousarray(items[:, begin:end])
                if name == "down":
                    columns = [unpack(f.name, each.reshape(layout.down_groups, 1, -1)) for each in part]
                    got = np.concatenate(columns, axis=1)[: layout.dim, : file_spec.ffn_dim]
                else:
                    groups = part.reshape(run.items * layout.neurons // 16, -1, f.block)
                    got = unpack(f.name, groups)[: file_spec.ffn_dim, : layout.dim]
                np.testing.assert_array_equal(got, wanted)
        case _:
            names = {
                "embedding": ("token_embd.weight",),
                "output": ("output.weight",),
                "attention": (f"blk.{run.layer}.attn_output.weight",),
            }.get(run.kind) or projection_names(file.tensors, run.layer)[run.part]
            wanted = expected_rows(model, run, names)
            got = unpack(run.format, items.reshape(run.items, -1, FORMATS[run.format].block))
            np.testing.assert_array_equal(got[:, : wanted.shape[1]], wanted)


def len_group(name: str, columns: int) -> int:
    f = FORMATS[name]
    return f.group_bytes(-(-columns // f.columns) * f.columns)


@pytest.mark.parametrize(
    ("architecture", "case"),
    [(a, case) for a in ("llama", "gemma3") for case in CASES if (a, case) != ("gemma3", "Q4_0, longer")],
)
def test_packed_weights_are_the_gguf_s(architecture: str, case: str, tmp_path: Path) -> None:
    model = open_model(write_tiny(tmp_path / "m.gguf", architecture, **CASES[case]))
    pack_model(model, tmp_path / "m.coterie", silent)
    packed = open_model(tmp_path / "m.coterie")
    file = packed.file
    assert isinstance(file, FlashFile)
    assert packed.spec == model.spec
    assert file.metadata == model.file.metadata
    assert file.tensors == model.file.tensors
    assert max(run.extents for run in file.runs) > 1
    for k in range(len(file.runs)):
        check_run(model, file, k)
    assert sound(file.path)
    packed.close()
    model.close()


def test_the_file_is_laid_out_as_its_runs_say(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "m.coterie"
    pack_model(model, out, silent)
    with FlashFile(out) as file:
        assert file.size == out.stat().st_size
        assert file.size % PAGE == 0
        at = PAGE
        for run, first in zip(file.runs, file.extents.first[:-1], strict=True):
            for i in range(run.extents):
                assert (file.extents.offset[first + i], file.extents.nbytes[first + i]) == (at, run.extent_bytes(i))
                at += run.extent_bytes(i)
        assert at == file.front.extents_end
        rows = file.manifest().to_pylist()
        assert [row["checksum"] for row in rows] == file.checksums.tolist()
        assert [row["offset"] for row in rows] == file.extents.offset.tolist()
        assert {row["kind"] for row in rows} == {run.kind for run in file.runs}
        assert {row["layout"] for row in rows} == {"dense"}
        assert sum(row["items"] for row in rows) == sum(run.items for run in file.runs)
        clusters = [row for row in rows if row["kind"] == "ffn" and row["layer"] == 1]
        assert [row["cluster"] for row in clusters] == list(range(0, file.runs[-1].items, file.runs[-1].per))
        assert clusters[0]["format"] == "Q4_0/Q4_0/Q4_0"
        assert clusters[0]["rows"] == 32 * clusters[0]["items"]


def test_any_arrow_tool_opens_the_manifest(model: Model, tmp_path: Path) -> None:
    pack_model(model, tmp_path / "m.coterie", silent)
    with FlashFile(tmp_path / "m.coterie") as file:
        offset, size, _ = file.front.sections["manifest"]
        section = pa.py_buffer(file.path.read_bytes()).slice(offset, size)
        assert pa.ipc.open_file(section).read_all().equals(file.manifest())


def test_the_same_gguf_gives_the_same_bytes(model: Model, tmp_path: Path) -> None:
    contents = set()
    for name in ("a", "b"):
        pack_model(model, tmp_path / name, silent)
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1


def test_a_packed_model_cannot_be_packed(model: Model, tmp_path: Path) -> None:
    pack_model(model, tmp_path / "m.coterie", silent)
    packed = open_model(tmp_path / "m.coterie")
    with pytest.raises(UsageError, match="is a packed model"):
        pack_model(packed, tmp_path / "n.coterie", silent)
    packed.close()
    assert not (tmp_path / "n.coterie").exists()


def test_other_versions_are_named(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "m.coterie"
    pack_model(model, out, silent)
    with open(out, "r+b") as file:
        file.seek(len(MAGIC))
        file.write(b"\3")
    with pytest.raises(ModelError, match=r"packed format 3 is not this Coterie's 2; pack the model again"):
        FlashFile(out)
    pack_model(model, out, silent)  # takes its place
    assert sound(out)


def test_a_file_changed_in_use_is_noticed(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "m.coterie"
    pack_model(model, out, silent)
    with FlashFile(out) as file:
        out.rename(tmp_path / "elsewhere")
        file.check_unchanged()
        assert not damaged_extents(file, silent)  # the open file is still there
        os.truncate(tmp_path / "elsewhere", file.size - PAGE)
        with pytest.raises(ModelError, match="changed while it was in use"):
            file.check_unchanged()
        os.truncate(tmp_path / "elsewhere", 3 * PAGE + 100)
        with pytest.raises(ModelError, match=f"became shorter while it was read, at byte {3 * PAGE + 100}"):
            damaged_extents(file, silent)


def test_a_gguf_changed_while_it_is_packed_is_noticed(model: Model, tmp_path: Path) -> None:
    os.utime(model.file.path, ns=(1, 1))
    with pytest.raises(ModelError, match="changed while it was in use"):
        pack_model(model, tmp_path / "m.coterie", silent)
    assert os.listdir(tmp_path) == ["m.gguf"]


# --- the copy in the cache ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "packed"
    folder.mkdir()
    monkeypatch.setattr(flash_writer, "packed_dir", lambda: folder)
    return folder


def counting(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are packed from now on."""
    done: list[Path] = []
    pack = flash_writer._pack

    def noted(model: Model, out: Path, *rest: Any) -> None:
        done.append(out)
        pack(model, out, *rest)

    monkeypatch.setattr(flash_writer, "_pack", noted)
    return done


def test_the_copy_is_made_once(model: Model, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = counting(monkeypatch)
    out = packed_copy(model, silent)
    assert out == packed_path(model.source) == packed_copy(model, silent)
    assert packed == [out]
    assert sound(out)
    assert set(os.listdir(cache)) == {out.name, out.with_suffix(".source").name}
    with open(out, "r+b") as file:  # a copy that cannot be opened is made again
        file.write(b"COTERIE\0 of another version")
    assert packed_copy(model, silent) == out
    assert packed == [out, out]
    assert sound(out)
    os.utime(model.file.path, ns=(5, 5))
    changed = open_model(model.file.path)
    new = packed_copy(changed, silent)
    changed.close()
    assert new != out
    assert set(os.listdir(cache)) == {new.name, new.with_suffix(".source").name}  # the old one serves nobody


def test_copies_of_other_models_and_of_lost_ones_are_kept(model: Model, cache: Path, tmp_path: Path) -> None:
    copies: list[Path] = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        other = open_model(write_tiny(folder / "m.gguf", seed=len(copies) + 5))
        copies.append(packed_copy(other, silent))
        other.close()
    (tmp_path / "a" / "m.gguf").unlink()
    copies.append(packed_copy(model, silent))
    assert {path for path in cache.iterdir() if path.suffix == ".coterie"} == set(copies)


def test_two_packers_make_one_copy(model: Model, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, begun, go_on = counting(monkeypatch), threading.Event(), threading.Event()

    def first(label: str, done: int, total: int) -> None:
        begun.set()
        assert go_on.wait(60)

    def second(label: str, done: int, total: int) -> None:
        assert label.startswith("waiting for another pack of m-")
        go_on.set()

    made: list[Path] = []
    thread = threading.Thread(target=lambda: made.append(packed_copy(model, first)))
    thread.start()
    assert begun.wait(60)
    again = open_model(model.file.path)
    assert packed_copy(again, second) == packed_path(model.source)
    again.close()
    thread.join()
    assert made == packed == [packed_path(model.source)]
    assert [path for path in cache.iterdir() if path.suffix == ".coterie"] == made
    assert sound(made[0])


def test_what_killed_packs_left_in_the_cache_goes(model: Model, cache: Path) -> None:
    (cache / ".other.coterie.part").write_bytes(b"half")
    out = packed_copy(model, silent)
    assert set(os.listdir(cache)) == {out.name, out.with_suffix(".source").name}


# --- what goes wrong ------------------------------------------------------------------------------------------


@contextmanager
def refused_cleanly(model: Model, out: Path, *words: str, error: type[CoterieError] = UsageError) -> Iterator[None]:
    """Packing fails within, in one line, and leaves the folder as it was."""
    before = {path: path.stat().st_ino for path in out.parent.iterdir()}
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert {path: path.stat().st_ino for path in out.parent.iterdir()} == before


def test_a_disk_too_full_is_named_before_anything_is_written(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_writer, "ROOM", 1 << 60)
    monkeypatch.setattr(flash_writer._Writer, "write", None)
    with refused_cleanly(model, tmp_path / "m.coterie", "packing needs 1073741824", str(tmp_path), "are free"):
        pack_model(model, tmp_path / "m.coterie", silent)


@pytest.mark.parametrize("count", [0, 1, 5, 10])
@pytest.mark.parametrize("number", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("old", [False, True])
def test_a_write_that_fails(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, number: str, old: bool
) -> None:
    out = tmp_path / "m.coterie"
    if old:
        pack_model(model, out, silent)
    write, calls = os.pwrite, [0]

    def failing(fd: int, data: Any, at: int) -> int:
        calls[0] += 1
        if calls[0] > count:
            code = getattr(errno, number)
            raise OSError(code, os.strerror(code))
        return write(fd, data[: len(data) // 2 // PAGE * PAGE or len(data)], at)  # and short before

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", failing)
        with refused_cleanly(model, out, "cannot write", os.strerror(getattr(errno, number))):
            pack_model(model, out, silent)
    assert not old or sound(out)
    pack_model(model, out, silent)
    assert sound(out)


def test_a_limit_on_file_sizes(model: Model, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * PAGE, limits[1]))
    try:
        with refused_cleanly(model, tmp_path / "m.coterie", "cannot write", "File too large"):
            pack_model(model, tmp_path / "m.coterie", silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a file system: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up(model: Model, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = small_disk / "m.coterie"
    with refused_cleanly(model, out, "packing needs", "are free"):
        pack_model(model, out, silent)
    monkeypatch.setattr(flash_writer, "_check_room", lambda out, needed: None)  # as if another filled it meanwhile
    with refused_cleanly(model, out, "cannot write", "No space left on device", "make room"):
        pack_model(model, out, silent)


def test_a_folder_that_cannot_be_written(model: Model, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with refused_cleanly(model, small_disk / "m.coterie", "cannot write", "Read-only file system"):
        pack_model(model, small_disk / "m.coterie", silent)


def test_no_folder(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory"):
        pack_model(model, tmp_path / "none" / "m.coterie", silent)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_link(path: Path) -> None:
    path.symlink_to("/dev/null")


@pytest.mark.parametrize(
    "make", [Path.mkdir, Path.touch, make_fifo, make_link, lambda path: path.write_text("precious")]
)
def test_nothing_but_a_packed_model_is_replaced(make: Callable[[Path], Any], model: Model, tmp_path: Path) -> None:
    out = tmp_path / "m.coterie"
    make(out)
    with refused_cleanly(model, out, "is there and is no packed model"):
        pack_model(model, out, silent)
    with refused_cleanly(model, model.file.path, "is there and is no packed model"):
        pack_model(model, model.file.path, silent)


def test_an_interrupt_leaves_nothing(model: Model, tmp_path: Path) -> None:
    def interrupt(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_model(model, tmp_path / "m.coterie", interrupt)
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_weights_that_are_no_numbers_are_not_packed(model: Model, tmp_path: Path) -> None:
    tensor = model.file.tensors["blk.1.ffn_down.weight"]
    with open(model.file.path, "r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\0\x7e")
    damaged = open_model(model.file.path)
    with refused_cleanly(damaged, tmp_path / "m.coterie", "not a number", error=ModelError):
        pack_model(damaged, tmp_path / "m.coterie", silent)
    damaged.close()


# Packs in forked children that are killed before their n-th call into the system, n = 0, 1, 2, ... until one survives.
KILLED = """
import fcntl, json, os, signal, sys
from pathlib import Path
from coterie.opening import open_model
from coterie.storage import flash_writer, runs
from coterie.storage.flash_file import FlashFile, damaged_extents
from coterie.storage.flash_writer import pack_model

runs.SMALL, flash_writer.BLOCK = 3 * 4096, 4 * 4096
model, out, old = open_model(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True"
silent = lambda *_: None
pack_model(model, out, silent)
whole = out.read_bytes()

def killed_before(n):
    left = n
    def counted(function):
        def call(*arguments, **options):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*arguments, **options)
        return call
    for module, name in ((os, "open"), (fcntl, "flock"), (fcntl, "fcntl"), (os, "ftruncate"), (os, "pwrite"),
                         (os, "fsync"), (os, "rename"), (os, "close")):
        setattr(module, name, counted(getattr(module, name)))

seen, n, ended = [], 0, False
while not ended:
    if not old:
        out.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        killed_before(n)
        pack_model(model, out, silent)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    there = out.exists()
    seen.append([there, there and out.read_bytes() == whole, len(os.listdir(out.parent))])
    n += 1
pack_model(model, out, silent)
with FlashFile(out) as file:
    sound = not damaged_extents(file, silent)
print(json.dumps({"seen": seen, "sound": sound, "left": os.listdir(out.parent)}))
"""


@pytest.mark.parametrize("old", [False, True])
def test_killed_at_any_moment(old: bool, model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, "-c", KILLED, str(model.file.path), str(folder / "m.coterie"), str(old)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert len(said["seen"]) > 15
    for there, whole, files in said["seen"]:
        assert whole or not there
        assert there or not old
        assert files <= 1 + old  # the file, its temporary, or both
    assert any(files and not there for there, _, files in said["seen"]) or old  # one was left half-written
    assert said["sound"]
    assert said["left"] == ["m.coterie"]


# --- beside the page cache -------------------------------------------------------------------------------------


def cached_pages(path: Path) -> int:
    """Pages of a file in the page cache (cachestat, Linux 6.5)."""
    libc = ctypes.CDLL(None, use_errno=True)
    span, answer = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    fd = os.open(path, os.O_RDONLY)
    try:
        if libc.syscall(451, fd, span, answer, 0) < 0:
            pytest.skip(f"no cachestat here: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)
    return answer[0]


@pytest.mark.parametrize("direct", [True, False])
def test_packing_and_checking_leave_the_page_cache_alone(
    direct: bool, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        set_flags = fcntl.fcntl

        def refuse(fd: int, command: int, value: int = 0) -> int:
            if command == fcntl.F_SETFL and value & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return set_flags(fd, command, value)

        monkeypatch.setattr(fcntl, "fcntl", refuse)
    out = tmp_path / "m.coterie"
    pack_model(model, out, silent)
    assert cached_pages(out) <= 1
    with FlashFile(out) as file:
        pages = cached_pages(out)  # of the first page and the sections, read through the cache
        assert not damaged_extents(file, silent)
        assert cached_pages(out) <= pages < file.size // PAGE / 2


# --- commands -------------------------------------------------------------------------------------------------


def coterie(*arguments: str | Path) -> Result:
    from coterie import cli

    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_pack_verify_and_inspect(model: Model, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTERIE_CONFIG", str(tmp_path / "config.toml"))
    gguf, out = model.file.path, tmp_path / "m.coterie"
    assert coterie("pack", gguf, "-o", out).stdout == f"{out}\n"
    assert is_flash_file(out)
    assert not is_flash_file(gguf)
    kept = json.loads(coterie("pack", gguf, "--json").stdout)
    assert kept["path"] == str(packed_path(model.source))
    assert kept["bytes"] == out.stat().st_size

    with FlashFile(out) as file:
        extents, identity, place = file.checksums.size, file.identity, int(file.extents.offset[3])
    assert coterie("verify", out).stdout.startswith(f"{out}: sound, {extents} extents")
    assert json.loads(coterie("verify", out, "--json").stdout)["damaged_extents"] == []
    facts = json.loads(coterie("inspect", out, "--json").stdout)
    assert facts["packed"]["identity"] == identity
    assert facts["packed"]["kinds"]["ffn"]["runs"] == 2
    assert sum(kind["extents"] for kind in facts["packed"]["kinds"].values()) == extents
    assert facts["tensors"] == json.loads(coterie("inspect", gguf, "--json").stdout)["tensors"]
    assert f"identity {identity[:16]}" in coterie("inspect", out).stdout

    with open(out, "r+b") as packed:
        packed.seek(place + 100)
        packed.write(b"damage")
    result = coterie("verify", out, "--json")
    assert result.exit_code == ModelError.exit_code
    assert json.loads(result.stdout)["damaged_extents"] == [3]
    assert f"1 of {extents} extents are damaged, the first at byte {place}" in " ".join(result.stderr.split())
    assert coterie("verify", gguf).exit_code == ModelError.exit_code
    assert coterie("pack", out).exit_code == UsageError.exit_code


def test_first_pages_say_what_they_were_told() -> None:
    sections = {name: (PAGE * (i + 2), PAGE, bytes([i]) * 32) for i, name in enumerate(SECTIONS)}
    page = FrontPage(6 * PAGE, 7, 2 * PAGE, 5 * PAGE + 8, sections, b"s" * 32)
    assert FrontPage.decode(page.encode(), "x", 6 * PAGE) == page
