"""How much memory this process may still take: what the kernel has, and what its cgroups allow (v1 or v2)."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMINFO, OWN, MOUNTS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/proc/mounts")
UNLIMITED = 1 << 60  # bytes: what cgroup v1 says where there is no limit is about 2^63
# The file with the limit and the one with what is used, and the fields of memory.stat that can be reclaimed.
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
V2 = "memory.max", "memory.current", ("inactive_file", "active_file")


def available_memory() -> int:
    """Bytes that can be had without swapping, as the kernel estimates it, and without passing a cgroup's limit."""
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return min([int(lines["MemAvailable"].split()[0]) * 1024, *_allowances()])


def _allowances() -> Iterator[int]:
    """Bytes that each of this process's cgroups, up to the root, still allows."""
    for folder, (limit_file, usage_file, reclaimable) in _cgroups():
        with suppress(OSError, ValueError):
            text = (folder / limit_file).read_text().strip()
            limit = UNLIMITED if text == "max" else int(text)
            if limit < UNLIMITED:
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                files = sum(int(stat.get(name, 0)) for name in reclaimable)
                yield max(0, limit - int((folder / usage_file).read_text()) + files)


def _cgroups() -> Iterator[tuple[Path, tuple[str, str, tuple[str, str]]]]:
    """The folders of this process's memory cgroups, from its own up, and their files' names."""
    with suppress(OSError, ValueError):
        own = dict(line.split(":", 2)[1:] for line in OWN.read_text().splitlines())
        for line in MOUNTS.read_text().splitlines():
            _, mount, kind, options, *_ = line.split()
            controller = next((c for c in own if "memory" in c.split(",")), None)
            if kind == "cgroup" and controller is not None and "memory" in options.split(","):
                files, path = V1, own[controller]
            elif kind == "cgroup2" and "" in own:
                files, path = V2, own[""]
            else:
                continue
            folder = Path(mount) / path.lstrip("/")
            while folder != Path(mount).parent:
                if folder.is_dir():  # in a container the mount may begin further down than the path says
                    yield folder, files
                folder = folder.parent
