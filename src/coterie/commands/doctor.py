"""coterie doctor: what this machine offers, and what Coterie makes of it."""

import os
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import coterie
from coterie.commands import terminal, units
from coterie.commands.options import Json

PACKAGES = (
    *("numpy", "numba", "llvmlite", "pyarrow", "ray", "msgpack"),
    *("gguf", "tokenizers", "jinja2", "typer", "rich"),
)
USED_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "asimddp",
    "i8mm",
)


def doctor(as_json: Json = False) -> None:
    """Say what this machine offers: processor, memory, folders, packages, units."""
    with terminal.Progress() as progress:
        progress("looking at this machine")
        facts = {
            "cpu": _cpu(),
            "memory": _memory(),
            "sharing": _sharing(),
            "folders": _folders(),
            "packages": {
                "python": platform.python_version(),
                "coterie": coterie.__version__,
                **{name: _version(name) for name in PACKAGES},
            },
        }
        found = units.describe()
    if as_json:
        terminal.write_json(facts | found)
    else:
        facts["units"] = units.texts(found)
        terminal.write("\n".join(line for title, part in facts.items() for line in _lines(title, part)) + "\n")


def _cpu() -> dict[str, Any]:
    from coterie.errors import UnitError
    from coterie.kernels import target
    from coterie.startup import cpu_features, read_cpuinfo

    cpuinfo = read_cpuinfo()
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    features = cpu_features(cpuinfo)
    try:
        path = units.PATHS[target.path()]
    except UnitError as error:
        path = f"cannot run: {error}"
    return {
        "name": names[0] if names else platform.machine(),
        "architecture": platform.machine(),
        "features": [feature for feature in USED_FEATURES if feature in features],
        "path": path,
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "cgroup_cpu_max": _cgroup("cpu.max"),
    }


def _memory() -> dict[str, Any]:
    lines = [line.split() for line in (_read("/proc/meminfo") or "").splitlines()]
    sizes = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}
    folder = "/sys/kernel/mm/transparent_hugepage"
    return {
        "total_bytes": sizes.get("MemTotal"),
        "available_bytes": sizes.get("MemAvailable"),
        "cgroup_memory_max": _cgroup("memory.max"),
        "huge_pages": _chosen(_read(f"{folder}/enabled")),
        "huge_pages_shared": _chosen(_read(f"{folder}/shmem_enabled")),
    }


def _sharing() -> dict[str, Any]:
    """What processes that share an arena need of the kernel: the arena is a memfd, found through its owner's /proc."""
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    facts = {"dev_shm_bytes": shm and shm.total, "dev_shm_free_bytes": shm and shm.free}
    return facts | {name: _works(check) for name, check in SHARING.items()}


def _memfd() -> None:
    os.close(os.memfd_create("coterie-doctor"))


def _proc_fd() -> None:
    file = os.memfd_create("coterie-doctor")
    try:
        os.close(os.open(f"/proc/{os.getpid()}/fd/{file}", os.O_RDWR))
    finally:
        os.close(file)


def _pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


SHARING = {"memfd": _memfd, "proc_fd": _proc_fd, "pidfd": _pidfd}


def _works(check: Callable[[], None]) -> str:
    try:
        check()
    except OSError as error:
        return f"does not work: {error.strerror}"
    return "works"


def _folders() -> dict[str, Any]:
    from coterie.paths import kernels_dir, models_dir, packed_dir

    return {"models": _folder(models_dir), "kernels": _folder(kernels_dir), "packed": _folder(packed_dir)}


def _folder(find: Callable[[], Path]) -> dict[str, Any]:
    try:
        path = find()
        return {
            "path": str(path),
            "writable": os.access(path, os.W_OK),
            "free_bytes": shutil.disk_usage(path).free,
        }
    except OSError as error:
        return {"path": error.filename, "writable": False, "error": error.strerror}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _chosen(text: str | None) -> str | None:
    """The word in brackets of "always [madvise] never"."""
    return next((word.strip("[]") for word in (text or "").split() if word.startswith("[")), None)


def _cgroup(name: str) -> str | None:
    """A limit of this process's control group (version 2)."""
    groups = [line[3:] for line in (_read("/proc/self/cgroup") or "").splitlines() if line.startswith("0::")]
    return _read(f"/sys/fs/cgroup{groups[0]}/{name}") if groups else None


def _lines(title: str, part: dict[str, Any]) -> list[str]:
    lines = [title]
    for key, value in part.items():
        label = key.removesuffix("_bytes").replace("_", " ")
        if isinstance(value, dict):
            text = ", ".join(f"{name.removesuffix('_bytes')} {_text(name, each)}" for name, each in value.items())
        else:
            text = _text(key, value)
        lines.append(f"  {label:18} {text}")
    return lines


def _text(key: str, value: Any) -> str:
    if value is None:
        return "none"
    if key.endswith("_bytes"):
        return terminal.size_text(value)
    return " ".join(value) if isinstance(value, list) else str(value)
