"""What an actor says of itself first, so that its caller can tell whether they speak of the same things."""

import hashlib
import os
import platform
import socket
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import msgpack

import coterie
from coterie.errors import UnitError

GREETING_LIMIT = 4096  # bytes
TEXTS = ("coterie", "python", "ray", "machine", "hostname", "boot", "pid_namespace", "kernels")
SAME = {  # what must be equal on both sides, and what people call it
    "coterie": "Coterie",
    "kernels": "Coterie's kernel sources",
    "python": "Python",
    "ray": "Ray",
}


def greeting() -> bytes:
    """msgpack: versions of Coterie, Python and Ray, machine, hostname, boot id, user id, pid and its namespace, and the
    hash of the kernels' sources."""
    return bytes(
        msgpack.packb(
            {
                "coterie": coterie.__version__,
                "python": platform.python_version(),
                "ray": _ray_version(),
                "machine": platform.machine(),
                "hostname": socket.gethostname(),
                "boot": _read("/proc/sys/kernel/random/boot_id"),
                "uid": os.getuid(),
                "pid": os.getpid(),
                "pid_namespace": _link("/proc/self/ns/pid"),
                "kernels": kernels_hash(),
            }
        )
    )


def read_greeting(data: bytes) -> dict[str, Any]:
    """A greeting's fields. Raises UnitError for what is none."""
    try:
        if len(data) > GREETING_LIMIT:
            raise ValueError
        fields = msgpack.unpackb(data)
        if any(not isinstance(fields[name], str) for name in TEXTS):
            raise ValueError
        if any(type(fields[name]) is not int or fields[name] < 0 for name in ("uid", "pid")):
            raise ValueError
    except (ValueError, KeyError, TypeError, msgpack.UnpackException):
        raise UnitError("an actor's greeting cannot be read: install the same Coterie on both sides") from None
    return dict(fields)


def check_greeting(mine: bytes, theirs: bytes) -> dict[str, Any]:
    """Their fields. Raises UnitError, in one line, unless both sides have the same versions."""
    here, there = read_greeting(mine), read_greeting(theirs)
    for name, label in SAME.items():
        if here[name] != there[name]:
            raise UnitError(
                f"{label}: {here[name]} here, {there[name]} on {there['hostname'][:64]}: install the same on both"
            )
    return there


def same_kernel(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether both are processes of one running system, one pid namespace and one user: then they can share memory, and
    signal each other."""
    return all(mine[name] == theirs[name] for name in ("boot", "pid_namespace", "uid"))


@cache
def kernels_hash() -> str:
    """Of all kernel sources: programs name kernels, and two sides must mean the same by a name."""
    import coterie.kernels

    digest = hashlib.sha256()
    for source in sorted(Path(coterie.kernels.__path__[0]).glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _ray_version() -> str:
    module = sys.modules.get("ray")
    return str(module.__version__) if module is not None else metadata.version("ray")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
