"""The KV file of a session: finished blocks of its KV cache, which a resumed session then need not compute.

Records of a checksum and a block, in the order of the sequence. The checksum is keyed with a hash of the model, the
layout, the numerics and all ids up to the block's end; a block is used only if it is the very one that would be
computed, and the first that is not ends the file (docs/sessions.md).
"""

import os
import struct
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coterie.errors import UsageError
from coterie.kernels.shapes import SPAN
from coterie.storage.kv import KVLayout
from coterie.storage.kv import Sequence as KVSequence

VERSION = 1
SEAL = 32  # bytes of a checksum


class KVFile:
    """Blocks of one sequence on disk. `about` says what else than ids a block depends on: the model's identity and its
    numerics. Raises UsageError where the file cannot be opened."""

    def __init__(self, path: Path, layout: KVLayout, about: str) -> None:
        self.path, self._record = path, SEAL + layout.block
        self._ids = blake2b(repr((VERSION, layout, about)).encode(), digest_size=SEAL)  # and the ids of `_done` blocks
        self._done = 0
        self._failed = False
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise UsageError(f"cannot open {path}: {error.strerror}") from None
        self._close = weakref.finalize(self, os.close, self._fd)

    def restore(self, sequence: KVSequence, ids: Sequence[int]) -> None:
        """Fill an empty sequence with the blocks of `ids` that are sound; the last id is always left to compute."""
        while (self._done + 1) * SPAN < len(ids):
            sequence.reserve((self._done + 1) * SPAN)
            block, key, seal = sequence.block(self._done), self._key(ids), bytearray(SEAL)
            try:
                count = os.preadv(self._fd, [seal, block], self._done * self._record)  # type: ignore[list-item]
            except OSError:
                break
            if count != self._record or seal != _seal(key, block):
                break
            self._ids, self._done = key, self._done + 1
            sequence.length = self._done * SPAN
        with suppress(OSError):  # what is left of it would not be believed either
            os.ftruncate(self._fd, self._done * self._record)

    def save(self, sequence: KVSequence, ids: Sequence[int]) -> None:
        """Append the blocks that are finished and not in the file yet; `ids` are the sequence's, or more. Where that
        fails, a note says so and nothing more is written: all that the file gives is time."""
        while not self._failed and (self._done + 1) * SPAN <= sequence.length:
            block, key = sequence.block(self._done), self._key(ids)
            try:
                count = os.pwritev(self._fd, [_seal(key, block), block], self._done * self._record)  # type: ignore[list-item]
                problem = "" if count == self._record else "the disk is full"
            except OSError as error:
                problem = str(error.strerror)
            if problem:
                self._failed = True
                print(f"coterie: cannot write {self.path}: {problem}; going on without it", file=sys.stderr)
                return
            self._ids, self._done = key, self._done + 1

    def close(self) -> None:
        """A second call does nothing."""
        self._close()

    def _key(self, ids: Sequence[int]) -> "blake2b":
        """The hash of all ids up to the end of the next block."""
        key = self._ids.copy()
        first = self._done * SPAN
        key.update(struct.pack(f"<{SPAN}I", *ids[first : first + SPAN]))
        return key


def _seal(key: "blake2b", block: npt.NDArray[np.uint8]) -> bytes:
    return blake2b(block, key=key.digest(), digest_size=SEAL).digest()  # type: ignore[arg-type]
