"""Plan files: what a plan decided, in TOML for people to read and edit, with what follows from it as comments; the same
tables in msgpack for programs (docs/plan.md)."""

import errno
import os
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from coterie.errors import PlanError, UsageError
from coterie.paths import replace_file
from coterie.scheduler.plan import Plan, Wishes
from coterie.scheduler.plan_schema import Decisions, parse, tables
from coterie.scheduler.profile import machine
from coterie.scheduler.tables import printable

MAX_BYTES = 1 << 20  # of a plan file
MOST_ITEMS = 1 << 10  # of a table or a list on the wire
FIRST_LINE = "# A plan of Coterie."
MESSAGE = "the plan that came"
COMMENTS = {
    "model.identity": "of its header and weights",
    "device.machine": "the machine it was made on, or for",
    "memory.ceiling": "bytes of all regions together",
    "memory.context": "positions",
    "cpu.lanes": "threads that compute",
    "cpu.chunk": "prompt tokens computed together",
    "cpu.left": "cores left to other units",
    "units.split": "layer: an operator is one unit's; tensor: cut between units",
    "units.flags": "units meet at flags; false: by calls of their runtimes",
    "prefill.unit": "computes prompts",
    "prefill.lengths": "rows of its graphs; the CPU unit computes what fills none",
    "decode.unit": "computes tokens of the answer",
    "residency.pinned": "extents, in the order in which they are given up last to first",
    "residency.ring": "bytes through which the others are streamed",
    "residency.slots": "neurons in the cache of a sparse model",
    "flash.block": "bytes read at a time at most",
    "flash.depth": "reads in flight",
    "batch.splits": "by sequences decoded together",
}
CUT_COMMENTS = {
    "of": "equal parts",
    "pieces": "who computes parts first to last (excluded)",
    "points": "to how many parts the cut may move while it runs",
}


def format_plan(made: Decisions, plan: Plan, notes: Sequence[str] = ()) -> str:
    """The text of a plan file; `notes`: more for people, such as predicted times."""
    regions = ", ".join(f"{name} {size}" for name, size in plan.regions.items())
    streamed = f"{plan.streamed_per_token} of a token's {plan.bytes_per_token} bytes are streamed"
    beside = {"memory": f"regions, bytes: {regions}", "residency": streamed}
    lines = [FIRST_LINE, *(f"# {printable(line)}".rstrip() for line in (*plan.lines(), *notes))]
    return "\n".join([*lines, *_toml(tables(made), beside)]) + "\n"


def _toml(table: Mapping[str, Any], beside: Mapping[str, str], path: str = "") -> Iterator[str]:
    """A table's lines: its values, then the tables in it."""
    for key, value in table.items():
        if not isinstance(value, dict):
            name = f"{path}.{key}".strip(".")
            comment = COMMENTS.get(name) or (CUT_COMMENTS.get(key) if ".cuts." in path else None)
            yield f"{key} = {_value(value)}" + (f"  # {comment}" if comment else "")
    for key, value in table.items():
        if isinstance(value, dict):
            name = f"{path}.{key}".strip(".")
            if any(not isinstance(each, dict) for each in value.values()):
                yield f"\n[{name}]" + (f"  # {beside[name]}" if name in beside else "")
            yield from _toml(value, beside, name)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    escaped = printable(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def write_plan(path: Path, text: str) -> None:
    """Save a plan's text; only a plan is ever replaced. Raises UsageError where it cannot be written."""
    try:
        if os.path.lexists(path):
            with open(_open_regular(path), "rb") as file:
                if file.read(len(FIRST_LINE)) != FIRST_LINE.encode():
                    raise UsageError(f"{path} is there and is no plan; give another name, or delete it")
        replace_file(path, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write the plan {path}: {error.strerror}") from None


def _open_regular(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO's writer is not waited for
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return fd


def read_decisions(path: Path) -> Decisions:
    """What a plan file decides. Raises PlanError, in one line, for anything that is not a sound plan file."""
    return parse(read_toml(path), str(path))


def read_plan(path: Path, wishes: Wishes) -> Wishes:
    """Wishes as a plan file has them. Raises PlanError also for a plan of another device, or where wishes say
    otherwise."""
    made = read_decisions(path)
    if made.machine != machine():
        device = printable(made.machine)[:40]
        raise PlanError(f"{path}: made for another device ({device}); make one for this machine: coterie plan --save")
    return made.wishes(wishes, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a small TOML file that anybody may have written. Raises PlanError."""
    try:
        with open(_open_regular(path), "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise PlanError(f"{path}: a plan file has less than {MAX_BYTES >> 20} MiB")
        return tomllib.loads(data.decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error)
        raise PlanError(f"cannot read the plan {path}: {printable(reason)[:200]}") from None


def plan_to_bytes(made: Decisions) -> bytes:
    """A plan as a message: its tables in msgpack."""
    return bytes(msgpack.packb(tables(made)))


def plan_from_bytes(data: bytes) -> Decisions:
    """What came, read with the same care as a file. Raises PlanError."""
    if len(data) > MAX_BYTES:
        raise PlanError(f"{MESSAGE} has more than {MAX_BYTES >> 20} MiB")
    try:
        values = msgpack.unpackb(data, max_array_len=MOST_ITEMS, max_map_len=MOST_ITEMS, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        raise PlanError(f"{MESSAGE} is damaged; send it again") from None
    return parse(values, MESSAGE)
