"""Compiled graphs on disk, so that a second start builds none (llm.npu, ASPLOS 2025, section 3.2: building and
optimising takes seconds, which no request should wait for).

A file is a runtime's bytes and behind them a checksum of these and of the key; its name is the key, a hash of all that
decides what is computed and by what: weights, scales, form, runtime, version, device, processor. A file that is
damaged, or that the runtime refuses, is built anew. Files are mapped, not read: constants that a runtime needs only
while it loads cost no memory of ours afterwards.
"""

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from hashlib import sha256
from pathlib import Path

import numpy as np

from coterie.actors.npu_graphs import Bytes, Graph, Runtime
from coterie.errors import UnitError
from coterie.kernels import target
from coterie.paths import cache_dir, replace_file
from coterie.storage.npu_block import Block, Form

VERSION = 3  # of how blocks become graphs: another one makes all files stale
SUFFIX = ".graph"
DIGEST = 32  # bytes of a checksum
LIMIT = 16 << 30  # bytes of all files
FILES = 4096


class GraphCache:
    """The graphs of a runtime, in a folder. `limit` bytes and `files` files are kept, those used last, and all that
    this cache has opened. `builds` and `loads` count what was compiled here, and what came from disk; `nbytes` are the
    graphs' own bytes."""

    def __init__(self, runtime: Runtime, folder: Path | None = None, limit: int = LIMIT, files: int = FILES) -> None:
        self.runtime, self.folder = runtime, folder or cache_dir() / "graphs"
        self.builds = self.loads = self.nbytes = 0
        self._limit, self._files = limit, files
        self._opened: set[Path] = set()
        self._maps: list[mmap.mmap] = []

    def graph(self, block: Block) -> Graph:
        """The block's graph. Raises UnitError where it cannot be built."""
        return self.open(block.form, block.digest(), lambda: block)

    def open(self, form: Form, weights: bytes, make: Callable[[], Block]) -> Graph:
        """The graph of this form. `weights`: bytes that change when weights, ranges or their quantisation do; `make`
        is called only where no graph is kept, so that no weights are read otherwise."""
        path = self.path(form, weights)
        graph = self._load(path, form)
        if graph is not None:
            self.loads += 1
            return graph
        blob = self.runtime.compile(make())
        self.builds += 1
        with suppress(OSError):  # a full disk costs the next start its time, not this one its graph
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(path, blob + _checksum(path, np.frombuffer(blob, np.uint8)))
            self._prune(path)
            graph = self._load(path, form)
        if graph is None:
            graph = self.runtime.load(np.frombuffer(blob, np.uint8), form)
            self.nbytes += len(blob)
        return graph

    def drop_pages(self) -> None:
        """Let go of the files' pages in memory: runtimes have read what they keep of them, and what they look at again
        is read again."""
        for pages in self._maps:
            pages.madvise(mmap.MADV_DONTNEED)

    def path(self, form: Form, weights: bytes) -> Path:
        """Where the graph lies, or would lie."""
        runtime = self.runtime
        known = (VERSION, runtime.name, runtime.version, runtime.device, target.cpu_name(), astuple(form))
        return self.folder / (sha256(repr(known).encode() + weights).hexdigest() + SUFFIX)

    def _load(self, path: Path, form: Form) -> Graph | None:
        """The graph in a file; None, and no file, where it is not there or not what was written."""
        try:
            with path.open("rb") as file:
                pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
            mapped: Bytes = np.frombuffer(pages, np.uint8)
        except (OSError, ValueError):  # ValueError: an empty file
            return None
        blob, digest = mapped[:-DIGEST], mapped[-DIGEST:].tobytes()
        with suppress(UnitError):
            if digest == _checksum(path, blob):
                graph = self.runtime.load(blob, form)
                self.nbytes += blob.size
                self._opened.add(path)
                self._maps.append(pages)
                with suppress(OSError):
                    os.utime(path)
                return graph
        with suppress(OSError):
            path.unlink()
        return None

    def _prune(self, newest: Path) -> None:
        """Forget the files used longest ago, until few enough are left."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # another process may have pruned it
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total, count = sum(size for _, size, _ in found), len(found)
        for _, size, path in sorted(found):
            if total <= self._limit and count <= self._files:
                break
            if path != newest and path not in self._opened:
                with suppress(OSError):
                    path.unlink()
                total, count = total - size, count - 1


def _checksum(path: Path, blob: Bytes) -> bytes:
    """Of a file's content under its name: a file that was renamed is damaged."""
    digest = sha256(path.stem.encode())
    digest.update(blob.data)
    return digest.digest()
