"""What tests of Ray sessions share: a folder of their own, programs with a session, and whether processes are gone."""

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from coterie.actors import ray_folder

SECONDS = 60.0  # for what takes one or two; a test that waits longer fails


@pytest.fixture(scope="module")
def runtime_folder() -> Iterator[Path]:
    """Where this module's sessions are: not beside the user's, and with a short name. Nothing is in it afterwards."""
    place = Path(tempfile.mkdtemp(prefix="ct-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(place))
        yield place
    left = list(place.rglob("*"))
    shutil.rmtree(place)
    assert not left


class Driver:
    """tests/ray_driver.py in a process of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ray_driver.py")), *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.opened: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        for fd in self.opened.values():
            os.close(fd)

    def says(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            pytest.fail(f"the driver ended: {self.process.stderr.read()}")
        return json.loads(line)

    def ready(self) -> dict[str, Any]:
        """What it says once its workers run; its processes are watched from now on."""
        while not isinstance(said := self.says(), dict):
            pass
        pids = said["pids"] | {"driver": self.process.pid}
        self.opened = {name: os.pidfd_open(pid) for name, pid in pids.items() if pid}
        return dict(said)

    def gone(self, *names: str) -> bool:
        """Whether these processes end."""
        return all(select.select([self.opened[name]], [], [], SECONDS)[0] for name in names)

    def finish(self) -> tuple[str, str]:
        """Let it end; the rest of its stdout, and its stderr."""
        out, err = self.process.communicate("go on\n", timeout=SECONDS)
        return out, err


def sessions() -> list[str]:
    """Names of session folders, running or left."""
    folder = ray_folder.base()
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
