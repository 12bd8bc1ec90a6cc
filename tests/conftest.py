"""Fixtures of several modules."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from packed_models import packed, small_extents


@pytest.fixture(scope="module")
def many_extents() -> Iterator[None]:
    """Tiny models are cut as finely as large ones, for a module that says so by usefixtures."""
    with small_extents():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module's own."""
    return tmp_path_factory.mktemp("module")


@pytest.fixture(scope="module")
def llama(many_extents: None, folder: Path) -> Path:
    """A packed model of many extents, beside its GGUF."""
    return packed(folder, "llama Q4_0")
