"""Plan files: what a plan decided, in TOML for people to read and edit, with what follows from it as comments.

A later version of the schema adds tables; what this one does not know it refuses, so that no wish is silently ignored.
"""

import errno
import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie.errors import PlanError, UsageError
from coterie.paths import replace_file
from coterie.scheduler.layout import BATCH
from coterie.scheduler.plan import MAX_LANES, VERSION, Plan, Wishes
from coterie.sizes import MOST

MAX_BYTES = 1 << 20  # of a plan file

# Table, key: the least and the largest value, or None for text.
SCHEMA: dict[str, dict[str, tuple[int, int] | None]] = {
    "": {"version": (1, 1 << 30)},
    "model": {"name": None, "identity": None},
    "memory": {"ceiling": (1, MOST), "context": (1, 1 << 30)},
    "cpu": {"lanes": (1, MAX_LANES), "chunk": (BATCH, 1 << 16)},
    "residency": {"pinned": (1, 1 << 30), "ring": (0, MOST), "slots": (0, 1 << 30)},
    "flash": {"block": (4096, 1 << 30), "depth": (1, 1 << 10)},
}
OPTIONAL = {("memory", "ceiling")}
MULTIPLE = {"cpu.chunk": BATCH, "residency.ring": 4096, "flash.block": 4096}
FIRST_LINE = "# A plan of Coterie."


def format_plan(plan: Plan) -> str:
    """The text of a plan file. Raises PlanError for a plan without a packed model: nothing could be bound to it."""
    if plan.flash is None or not plan.flash.identity:
        raise PlanError("a plan is saved for a packed model; make one with coterie pack")
    said = "\n".join(f"# {_printable(line)}" for line in plan.lines())
    ceiling = "" if plan.memory is None else f"ceiling = {plan.memory}  # bytes of all regions together\n"
    regions = ", ".join(f"{name} {size}" for name, size in plan.regions.items())
    return f"""{FIRST_LINE}
{said}
version = {plan.version}

[model]
name = {_quoted(plan.model)}
identity = "{plan.flash.identity}"

[memory]  # regions, bytes: {regions}
{ceiling}context = {plan.context}  # positions

[cpu]
lanes = {plan.lanes}
chunk = {plan.chunk}  # prompt tokens computed together

[residency]  # {plan.streamed_per_token} of a token's {plan.bytes_per_token} bytes are streamed
pinned = {plan.pinned}  # extents, in the order in which they are given up last to first
ring = {plan.ring}  # bytes through which the others are streamed
slots = {plan.slots}  # neurons in the cache of a sparse model

[flash]
block = {plan.flash.block}  # bytes read at a time at most
depth = {plan.flash.depth}  # reads in flight
"""


def _printable(text: str) -> str:
    """The text in one line; a file's name may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _quoted(text: str) -> str:
    escaped = _printable(text).replace("\\", "\\\\").replace('"', '\\"')
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


def read_plan(path: Path, wishes: Wishes) -> Wishes:
    """Wishes as a plan file has them; the user's own `threads`, `context` or `memory` may not contradict it. Raises
    PlanError, in one line, for anything that is not a sound plan file."""
    values = _values(path, _tables(path))
    decided = {
        "threads": values["cpu", "lanes"],
        "context": values["memory", "context"],
        "memory": values.get(("memory", "ceiling")),
    }
    for name, value in decided.items():
        if getattr(wishes, name) not in (None, value):
            source = wishes.sources.get(name, "argument")
            raise PlanError(
                f"{path}: the plan decides {name}, and the {source} says {getattr(wishes, name)}; drop one of them"
            )
    return replace(
        wishes,
        **decided,
        chunk=values["cpu", "chunk"],
        pinned=values["residency", "pinned"],
        ring=values["residency", "ring"],
        slots=values["residency", "slots"],
        block=values["flash", "block"],
        depth=values["flash", "depth"],
        identity=values["model", "identity"],
        sources=dict.fromkeys(("threads", "context", "memory", "chunk"), "plan"),
    )


def _tables(path: Path) -> Mapping[str, Any]:
    try:
        with open(_open_regular(path), "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise PlanError(f"{path}: a plan file has less than {MAX_BYTES >> 20} MiB")
        return tomllib.loads(data.decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error)
        raise PlanError(f"cannot read the plan {path}: {_printable(reason)[:200]}") from None


def _values(path: Path, tables: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """Every value, checked. The version comes first: another one may know other keys."""
    version = tables.get("version")
    if type(version) is not int or version != VERSION:
        raise PlanError(f"{path}: plan version {_shown(version)}, but this Coterie writes {VERSION}; make it anew")
    found: dict[tuple[str, str], Any] = {}
    flat = {
        (name, key): value for name, table in tables.items() if isinstance(table, dict) for key, value in table.items()
    }
    flat |= {("", name): value for name, value in tables.items() if not isinstance(value, dict)}
    for (table, key), value in flat.items():
        if key not in SCHEMA.get(table, {}):
            raise PlanError(f"{path}: {f'{table}.{key}'.strip('.')[:60]!r} is not known here; check the spelling")
        found[table, key] = _checked(path, f"{table}.{key}".strip("."), value, SCHEMA[table][key])
    for table, keys in SCHEMA.items():
        for key in keys:
            if (table, key) not in found and (table, key) not in OPTIONAL:
                raise PlanError(f"{path}: {f'{table}.{key}'.strip('.')!r} is missing")
    return found


def _checked(path: Path, name: str, value: Any, limits: tuple[int, int] | None) -> Any:
    if limits is None:
        if not isinstance(value, str) or len(value) > 1000:
            raise PlanError(f"{path}: {name} must be text")
    elif type(value) is not int or not limits[0] <= value <= limits[1]:
        raise PlanError(
            f"{path}: {name} is {_shown(value)}, but must be a whole number from {limits[0]} to {limits[1]}"
        )
    elif value % MULTIPLE.get(name, 1):
        raise PlanError(f"{path}: {name} is {value}, but must be a multiple of {MULTIPLE[name]}")
    return value


def _shown(value: Any) -> str:
    """A value for a message: of what may be nested, or have more digits than Python prints, only the kind."""
    if value is None:
        return "missing"
    if isinstance(value, (dict, list)) or (isinstance(value, int) and abs(value) >= 1 << 64):
        return "too large" if isinstance(value, int) else f"a {type(value).__name__}"
    return repr(value)[:40]
