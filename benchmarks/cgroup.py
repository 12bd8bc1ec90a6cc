"""A command in a memory cgroup (version 1 or 2), the page cache dropped and the disk's read-ahead set: what it read
and what memory it took. Linux; all of it needs root.

    python benchmarks/cgroup.py hold FILE BYTES [CGROUP]   locks the file's first bytes in memory until stdin ends
"""

import contextlib
import ctypes
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

POLL = 0.02  # seconds between two looks at a running command


def _own_cgroup() -> tuple[Path, bool]:
    """Folder of the memory cgroup that this process is in, and whether it is of version 1; raises OSError."""
    entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = {name: path for _, names, path in entries for name in names.split(",")}
    mounts = [line.split()[1:4] for line in Path("/proc/mounts").read_text().splitlines()]
    for version, name in ((1, "memory"), (2, "")):
        for at, kind, options in mounts:
            if name in own and (kind, version) in (("cgroup", 1), ("cgroup2", 2)):
                if version == 1 and "memory" not in options.split(","):
                    continue
                folder = Path(at) / own[name].lstrip("/")
                return (folder if folder.is_dir() else Path(at)), version == 1
    raise OSError("no memory cgroup is mounted")


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """The folder of a new cgroup of at most `limit` bytes, page cache included, without swap; raises OSError."""
    own, first_version = _own_cgroup()
    name = f"coterie-bench-{os.getpid()}-{time.monotonic_ns()}"
    if first_version:
        folder, limits = own / name, ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    else:
        # Version 2 gives no controller to the children of a cgroup that has processes: ours becomes its neighbour.
        parent = own if not (own / "cgroup.type").exists() else own.parent
        if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
            (parent / "cgroup.subtree_control").write_text("+memory")
        folder, limits = parent / name, ("memory.max", "memory.swap.max")
    folder.mkdir()
    try:
        (folder / limits[0]).write_text(str(limit))
        with contextlib.suppress(OSError):  # a kernel that does not count swap
            (folder / limits[1]).write_text(str(limit) if first_version else "0")
        yield folder
    finally:
        for _ in range(100):  # the kernel may still be burying the last process
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.05)


@contextlib.contextmanager
def read_ahead(path: Path, kib: int) -> Iterator[None]:
    """The read-ahead of the disk under `path`, put back at the end; raises OSError."""
    device = os.stat(path).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    setting = (block if (block / "queue").is_dir() else block.parent) / "queue" / "read_ahead_kb"
    before = setting.read_text()
    setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(before)


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def why_not(path: Path) -> str | None:
    """The reason why a command cannot be limited here, None where it can."""
    try:
        drop_page_cache()
        with memory_cgroup(1 << 30), read_ahead(path, 128):
            return None
    except OSError as error:
        return f"memory cgroups, read-ahead and dropping the page cache need root: {error}"


@dataclass
class Run:
    """What a command did; amounts in bytes."""

    status: int  # below 0: the number of the signal that ended it
    output: str
    error: str  # why it failed: the last line of its stderr or what ended it; "" where it did not
    seconds: float
    read: int  # from the disk
    marked: int  # of it before `mark` appeared
    written: int
    resident: int  # peak, mapped files included
    anonymous: int  # peak


def _number(pattern: str, file: str) -> int:
    """The number that `pattern` captures in a file of /proc, 0 where there is none."""
    with contextlib.suppress(OSError):
        if found := re.search(pattern, Path(file).read_text()):
            return int(found[1])
    return 0


def run(
    command: Sequence[str | Path],
    cgroup: Path | None = None,
    mark: str = "",
    timeout: float = 600,
    environment: dict[str, str] | None = None,
) -> Run:
    """Runs a command in a cgroup of memory_cgroup(); `mark` is what its stderr says when its work begins."""
    words = [str(word) for word in command]
    if cgroup:
        words = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup / "cgroup.procs"), *words]
    start = time.monotonic()
    anonymous, marked, end = 0, 0, ""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=os.environ | (environment or {})
        )
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                anonymous = max(anonymous, _number(r"RssAnon:\s+(\d+)", f"/proc/{process.pid}/status") << 10)
                if mark and not marked and mark.encode() in os.pread(errors.fileno(), 1 << 20, 0):
                    marked = _number(r"\nread_bytes: (\d+)", f"/proc/{process.pid}/io")
                if time.monotonic() - start > timeout and not end:
                    end = f"took more than {timeout:.0f} s"
                    process.kill()
                time.sleep(POLL)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        said, complaint = (os.pread(file.fileno(), 1 << 24, 0).decode(errors="replace") for file in (output, errors))
    if process.returncode and not end:
        killed = "killed: out of memory" if process.returncode == -9 else f"status {process.returncode}"
        end = killed if process.returncode < 0 else (complaint.strip().splitlines() or [killed])[-1]
    return Run(
        status=process.returncode,
        output=said,
        error=end,
        seconds=time.monotonic() - start,
        read=usage.ru_inblock * 512,
        marked=marked,
        written=usage.ru_oublock * 512,
        resident=usage.ru_maxrss << 10,
        anonymous=anonymous,
    )


def peak(cgroup: Path) -> int:
    """The most memory that a cgroup had, page cache included; 0 where the kernel does not say."""
    return max(_number(r"(\d+)", str(cgroup / name)) for name in ("memory.max_usage_in_bytes", "memory.peak"))


@contextlib.contextmanager
def held(path: Path, nbytes: int, cgroup: Path) -> Iterator[None]:
    """Another process of the cgroup keeps the file's first bytes locked in memory; raises OSError."""
    command = [sys.executable, __file__, "hold", str(path), str(nbytes), str(cgroup / "cgroup.procs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        try:
            if not select.select([process.stdout], [], [], 120)[0] or process.stdout.readline() != "locked\n":
                raise OSError(f"could not lock {nbytes} bytes of {path.name} in memory")
            yield
        finally:
            process.stdin.close()  # it unlocks them and ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def hold(path: str, nbytes: str, procs: str | None = None) -> None:
    mapped: Any = np.memmap(path, np.uint8, "r", shape=int(nbytes))
    if procs:  # not before: what importing took is to be no part of the cgroup
        Path(procs).write_text(str(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size)):
        sys.exit(os.strerror(ctypes.get_errno()))
    print("locked", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] != "hold":
        sys.exit(__doc__)
    hold(*sys.argv[2:])
