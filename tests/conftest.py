"""Fixtures of several modules."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from packed_models import packed, small_extents
from simulated import ROWS, UNIT

from coterie import paths
from coterie.scheduler import profile


def pytest_configure() -> None:
    """Ctrl-C is what several tests are about, and is ignored in what a shell starts in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder and a configuration of the test's own; compiled kernels are shared."""
    kernels = paths.kernels_dir()
    home = tmp_path / "home"
    home.mkdir()
    (home / "kernels").symlink_to(kernels)
    monkeypatch.setenv("COTERIE_HOME", str(home))
    monkeypatch.setenv("COTERIE_CONFIG", str(tmp_path / "config.toml"))
    return home


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> profile.DeviceProfile:
    """A profile of this machine, made up, in a cache folder of the test's own."""
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path))
    flash = profile.FlashProfile("io_uring", 1 << 20, 4, 4e9, False, ROWS)
    found = profile.DeviceProfile(2e10, {profile.file_system(tmp_path): flash}, {"2": UNIT})
    profile.save_profile(found)
    return found
