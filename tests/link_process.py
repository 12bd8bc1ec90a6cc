"""A part of a model in a process that shares no memory with ours; run as a program, it is that process.

python link_process.py MODEL FIRST LAST CONTEXT: frames come on stdin and their answers go to stdout, each behind its
length (8 bytes, little-endian).
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from coterie.actors.link import Call
from coterie.cut import PartActor
from coterie.errors import UnitError


def send(stream: IO[bytes], frame: bytes) -> None:
    stream.write(len(frame).to_bytes(8, "little") + frame)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """The next frame; None where there will be none."""
    length = stream.read(8)
    return stream.read(int.from_bytes(length, "little")) if len(length) == 8 else None


@contextmanager
def part_process(path: Path, first: int, last: int, context: int) -> Iterator[tuple[Call, int]]:
    """How to ask the part, and its process's id."""
    paths = [str(Path(__file__).parent), *(p for p in sys.path if p)]
    command = [sys.executable, __file__, str(path), str(first), str(last), str(context)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        to, back = process.stdin, process.stdout

        def call(frame: bytes) -> bytes:
            try:
                send(to, frame)
            except BrokenPipeError:
                raise UnitError("the other process has ended") from None
            answer = receive(back)
            if answer is None:
                raise UnitError("the other process has ended")
            return answer

        try:
            yield call, process.pid
        finally:
            process.kill()


def main(path: str, first: int, last: int, context: int) -> None:
    part = PartActor(path, first, last, threads=1, context=context, memory=None)
    while (frame := receive(sys.stdin.buffer)) is not None:
        send(sys.stdout.buffer, part.handle(frame))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
