"""Faults of a real block device: a loop device whose backing file is cut. Needs root, loop devices and mkfs.ext4."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from exact_models import CASES, decoded, some_tokens
from reference import same_bits
from tiny_models import write_tiny

from coterie.engine import Engine
from coterie.errors import UnitError, UsageError
from coterie.opening import open_model
from coterie.scheduler.plan import Wishes
from coterie.sizes import Share
from coterie.storage import runs
from coterie.storage.flash_writer import pack_model

SIZE = 96 << 20  # the packer wants 64 MiB free beside the model
NEEDED = ("mkfs.ext4", "losetup", "mount", "umount")
missing = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or bool(missing) or not Path("/dev/loop-control").exists(),
    reason="needs root, loop devices, and mkfs.ext4",
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Path, str]]:
    """A small file system on a loop device: its folder, its backing file, and the device."""
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    folder.mkdir()
    image.touch()
    os.truncate(image, SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    made = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device can be had: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        if subprocess.run(["mount", device, folder], capture_output=True, check=False).returncode:
            pytest.skip("nothing can be mounted here")
        yield folder, image, device
    finally:
        subprocess.run(["umount", "--lazy", folder], capture_output=True, check=False)
        subprocess.run(["losetup", "--detach", device], capture_output=True, check=False)


def test_a_device_that_ends_is_a_clear_error(
    disk: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, image, device = disk
    monkeypatch.setattr(runs, "SMALL", 2 * runs.PAGE)  # many extents, as large models have
    monkeypatch.setattr(runs, "LOOKUP", 1)
    model = open_model(write_tiny(tmp_path / "m.gguf", **(CASES["llama Q4_0"] | {"layers": 10})))
    pack_model(model, folder / "m.coterie", lambda label, done, total: None)
    model.close()
    os.sync()
    try:
        engine = Engine(open_model(folder / "m.coterie"), Wishes(threads=2, context=64, memory=Share(0.8)))
    except UsageError as error:
        pytest.skip(str(error))
    try:
        tokens = some_tokens(8)
        expected = decoded(engine, tokens)
        assert same_bits(decoded(engine, tokens), expected)
        os.truncate(image, 1 << 20)  # of the device, only the beginning is left
        subprocess.run(["losetup", "--set-capacity", device], check=True)
        with pytest.raises(UnitError, match=r"cannot read .*m\.coterie"):
            decoded(engine, tokens)
    finally:
        engine.close()


def test_a_device_that_is_full_is_a_clear_error(disk: tuple[Path, Path, str], tmp_path: Path) -> None:
    folder, _, _ = disk
    model = open_model(write_tiny(tmp_path / "m.gguf", **(CASES["llama F32"] | {"layers": 10})))
    (folder / "ballast").write_bytes(bytes(SIZE // 2))
    with pytest.raises(UsageError, match=r"free|space"):
        pack_model(model, folder / "m.coterie", lambda label, done, total: None)
    assert [path.name for path in folder.iterdir() if "coterie" in path.name] == []
    model.close()
