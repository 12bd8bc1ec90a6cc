"""The compiler in a process of its own.

Its memory, some 100 MB and as much of libraries' code, goes back to the system before weights are loaded, and an
interrupt of this process cannot fall into LLVM's callbacks. The process is asked for a kernel at a time, and ends with
its input, when nobody has asked for a while, or when it has grown large.
"""

import os
import select
import signal
import struct
import subprocess
import sys
import threading
from contextlib import suppress

from coterie.errors import UnitError

IDLE = 2.0  # seconds
LARGE = 130_000_000  # bytes, beside libraries' code
ATTEMPTS = 2  # a process that ends by itself may do so just when it is asked
_ANSWER = struct.Struct("<?Q")  # whether it worked, and how many bytes follow


class CompilerProcess:
    """Compiles kernels by name, for any thread. Raises UnitError for those that cannot be compiled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def compile(self, name: str) -> tuple[str, bytes]:
        """Entry symbol and ELF object of a kernel."""
        with self._lock:
            try:
                for _ in range(ATTEMPTS):
                    answer = self._ask(name)
                    if answer is not None:
                        break
                    status = self._end()
                else:
                    raise UnitError(f"cannot compile kernel {name}: {_why(status)}")
            except BaseException:
                self._end()
                raise
        worked, data = answer
        if not worked:
            raise UnitError(f"cannot compile kernel {name}: {data.decode()}")
        symbol, _, code = data.partition(b"\n")
        return symbol.decode(), code

    def end(self) -> None:
        """Give the process's memory back; the next call starts another."""
        with self._lock:
            self._end()

    def _ask(self, name: str) -> tuple[bool, bytes] | None:
        """The answer; None from a process that has ended."""
        process = self._process = self._process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(name.encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        head = process.stdout.read(_ANSWER.size)
        if len(head) < _ANSWER.size:
            return None
        worked, size = _ANSWER.unpack(head)
        data = process.stdout.read(size)
        return (worked, data) if len(data) == size else None

    def _end(self) -> int:
        """Its exit status; 0 if there is none."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()
        if process.poll() is None:
            process.kill()
        return process.wait()


def _start() -> "subprocess.Popen[bytes]":
    """In a session of its own, where a terminal's Ctrl-C does not reach it; with this process's import path."""
    command = [sys.executable, "-P", "-m", "coterie.kernels.apart"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise UnitError(f"cannot start the compiler, {command[0] or 'python'}: {error.strerror}") from None


def _why(status: int) -> str:
    if status == -signal.SIGKILL:
        return "the compiler was killed; a first run needs 300 MB of memory in all"
    return f"the compiler ended with status {status}"


def _anonymous() -> int:
    """Bytes of this process that are no file's."""
    with open("/proc/self/statm", encoding="ascii") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGESIZE")


def serve() -> None:
    """Compile what stdin names, a kernel a line."""
    from coterie.kernels.compiler import compile_kernel

    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while select.select([sys.stdin], [], [], IDLE)[0] and (name := sys.stdin.readline().strip()):
        try:
            symbol, code = compile_kernel(name)
            worked, data = True, symbol.encode() + b"\n" + code
        except Exception as error:  # whatever it is, it is for who asked
            worked, data = False, " ".join(f"{type(error).__name__}: {error}".split())[:300].encode()
        try:
            answers.write(_ANSWER.pack(worked, len(data)) + data)
            answers.flush()
        except BrokenPipeError:
            break
        if _anonymous() > LARGE:
            break


if __name__ == "__main__":
    serve()
    os._exit(0)  # the compiler takes its time to take itself apart
