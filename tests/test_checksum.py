"""The checksum of extents and bundles, against its definition."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from coterie.kernels import tape as t
from coterie.kernels.checksum import P, Q
from coterie.storage.checksum import checksum

PAGE = t.PAGE
PAGES = 512  # of the test file

DATA = np.random.default_rng(1).integers(0, 256, PAGES * PAGE, np.uint8)


def reference(data: npt.NDArray[np.uint8]) -> int:
    """The checksum by its definition."""
    sums = np.zeros(128, np.uint32)
    for words in data.view(np.uint32).reshape(-1, 128):
        sums = (sums << np.uint32(13) | sums >> np.uint32(19)) * np.uint32(P) + words
    total = data.size
    for each in sums.tolist():
        total = ((total ^ each) * Q) % 2**64
        total ^= total >> 32
    return total


@pytest.mark.parametrize("pages", [0, 1, 3, 64])
def test_the_checksum_is_what_its_definition_says(pages: int) -> None:
    assert checksum(DATA[: pages * PAGE]) == reference(DATA[: pages * PAGE])
    assert checksum(np.zeros(pages * PAGE, np.uint8)) == reference(np.zeros(pages * PAGE, np.uint8))


def test_the_checksum_does_not_change() -> None:
    """Files hold it."""
    counting = np.arange(2048, dtype="<u4").view(np.uint8)
    assert hex(checksum(counting)) == "0x140656332cc22cd2"


def test_every_small_change_shows() -> None:
    data = DATA[: 4 * PAGE].copy()
    right, rng = checksum(data), np.random.default_rng(2)
    for at, bit in zip(rng.integers(0, data.size, 500), rng.integers(0, 8, 500), strict=True):
        data[at] ^= 1 << bit
        assert checksum(data) != right
        data[at] ^= 1 << bit
    words = data.view(np.uint32)
    for i, j in rng.integers(0, words.size, (500, 2)):
        words[[i, j]] ^= 1 << 31  # top bits would cancel out in a plain polynomial
        assert i == j or checksum(data) != right
        words[[i, j]] ^= 1 << 31
    for shift in (512, PAGE, 2 * PAGE):
        assert checksum(np.roll(data, shift)) != right
    assert len({checksum(np.zeros(n * PAGE, np.uint8)) for n in range(1, 20)}) == 19


@pytest.mark.parametrize("data", [np.zeros(100, np.uint8), np.zeros(1024, np.uint32), np.zeros(8192, np.uint8)[::2]])
def test_a_checksum_of_something_else_is_refused(data: npt.NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="contiguous bytes, a multiple of 512"):
        checksum(data)
