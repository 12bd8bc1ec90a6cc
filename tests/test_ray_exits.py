"""What is left of a model on the Ray host when it ends, in whatever way: nothing."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from packed_models import packed
from ray_sessions import SECONDS, runtime_folder, sessions

from coterie.actors import ray_folder

assert runtime_folder  # a fixture
pytestmark = pytest.mark.usefixtures("runtime_folder")


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    """A packed model that other processes can read too."""
    return packed(folder, "llama Q4_0")


class Running:
    """tests/ray_model.py in a process of its own."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ray_model.py")), str(path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.inode, self.pidfds = 0, dict[str, int]()

    def ready(self) -> None:
        """Wait until it runs."""
        found = self.says()
        self.inode = found["inode"]
        self.pidfds = {name: os.pidfd_open(pid) for name, pid in found["pids"].items()}

    def says(self) -> Any:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            text = self.process.stderr.read().decode()
            if "Ray did not start" in text:
                pytest.skip(text.strip())
            pytest.fail(text)
        return json.loads(line)

    def send(self, name: str, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # its keeper was faster
            signal.pidfd_send_signal(self.pidfds[name], number)

    def ended(self) -> bool:
        """Whether all of its processes end."""
        return all(select.select([fd], [], [], SECONDS)[0] for fd in self.pidfds.values())


@contextmanager
def running(path: Path) -> Iterator[Running]:
    program = Running(path)
    try:
        program.ready()
        yield program
    finally:
        program.process.kill()
        program.process.communicate()
        for fd in program.pidfds.values():
            os.close(fd)


def mapped(inode: int) -> list[str]:
    """Processes that still have an arena."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            text = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue
        found += [pid for line in text.splitlines() if "memfd:coterie" in line and line.split()[4] == str(inode)]
    return found


ENDS: dict[str, list[tuple[str, signal.Signals]]] = {
    "Ctrl-C": [("driver", signal.SIGINT)],
    "SIGTERM": [("driver", signal.SIGTERM)],
    "SIGKILL": [("driver", signal.SIGKILL)],
    "SIGKILL beside a stopped unit": [("cpu", signal.SIGSTOP), ("driver", signal.SIGKILL)],
    "its keeper killed, then itself": [("keeper", signal.SIGKILL), ("driver", signal.SIGKILL)],
    "Ray killed, then itself": [("raylet", signal.SIGKILL), ("gcs", signal.SIGKILL), ("driver", signal.SIGKILL)],
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left(end: str, path: Path) -> None:
    shared = set(os.listdir("/dev/shm"))
    with running(path) as program:
        assert program.says() == "answered"
        assert mapped(program.inode)
        for name, number in ENDS[end]:
            if name == "driver":
                program.process.send_signal(number)
            else:
                program.send(name, number)
        assert program.process.wait(SECONDS) != 0
        assert program.ended()
        assert not mapped(program.inode)
    ray_folder.sweep()  # as the next start does; only a keeper that was killed leaves something to it
    assert not sessions()
    assert set(os.listdir("/dev/shm")) <= shared


def test_an_answer_goes_on_without_ray_and_a_later_start_works(path: Path) -> None:
    for name in ("raylet", "keeper"):
        with running(path) as program:
            assert program.says() == "answered"
            program.send(name, signal.SIGKILL)
            for _ in range(8):
                assert program.says() == "answered"
            out, err = program.process.communicate(timeout=SECONDS)
            assert (program.process.returncode, err) == (0, b"")
            assert set(out.splitlines()) <= {b'"answered"'}
            assert program.ended()
            assert not mapped(program.inode)
