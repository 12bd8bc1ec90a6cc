"""Nested tables that anybody may have written, read key by key: every refusal is one line that names the key."""

from collections.abc import Sequence
from importlib import resources
from math import isfinite
from typing import Any, ClassVar

from coterie.errors import PlanError, UsageError

LONGEST_TEXT = 1000  # characters of a value
LONGEST_NAME = 60  # characters of a key in a message


def configured(folder: str) -> list[str]:
    """Names of the files in that folder of configs/."""
    files = (resources.files("coterie.configs") / folder).iterdir()
    return sorted(path.name.removesuffix(".toml") for path in files if path.name.endswith(".toml"))


class Table:
    """A table of `where` (a file, for messages), at `path` in it. `done` refuses keys that were not asked for. All
    raise `error`."""

    error: ClassVar[type[PlanError] | type[UsageError]] = PlanError

    def __init__(self, values: Any, where: str, path: str = "") -> None:
        self.where, self.path = where, path
        if not isinstance(values, dict):
            raise self.error(f"{where}: {path or 'it'} must be a table")
        self._values: dict[str, Any] = values
        self._asked = set[str]()

    def wrong(self, key: str, what: str) -> PlanError | UsageError:
        return self.error(f"{self.where}: {self._name(key)} {what}")

    def _name(self, key: str) -> str:
        name = f"{self.path}.{key}" if self.path and key else self.path or key
        return name if name.isprintable() and len(name) <= LONGEST_NAME else repr(name[:LONGEST_NAME])

    def has(self, key: str) -> bool:
        self._asked.add(key)
        return key in self._values

    def value(self, key: str) -> Any:
        if not self.has(key):
            raise self.wrong(key, "is missing")
        return self._values[key]

    def whole(self, key: str, least: int, most: int, multiple: int = 1) -> int:
        """A whole number within limits."""
        return self._whole(key, self.value(key), least, most, multiple)

    def _whole(self, key: str, value: Any, least: int, most: int, multiple: int = 1) -> int:
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"is {shown(value)}, but must be a whole number from {least} to {most}")
        if value % multiple:
            raise self.wrong(key, f"is {value}, but must be a multiple of {multiple}")
        return value

    def wholes(self, key: str, least: int, most: int, count: int, multiple: int = 1) -> tuple[int, ...]:
        """Ascending whole numbers: one at least, `count` at most."""
        found = tuple(self._whole(key, each, least, most, multiple) for each in self._list(key, count))
        if sorted(set(found)) != list(found):
            raise self.wrong(key, f"is {list(found)}, but must be ascending")
        return found

    def share(self, key: str) -> float:
        """A number above 0 and up to 1."""
        value = self.value(key)
        if type(value) not in (int, float) or not isfinite(value) or not 0 < value <= 1:
            raise self.wrong(key, f"is {shown(value)}, but must be a number above 0 and at most 1")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.wrong(key, f"is {shown(value)}, but must be true or false")
        return value

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str) or len(value) > LONGEST_TEXT:
            raise self.wrong(key, "must be text")
        return value

    def word(self, key: str, allowed: Sequence[str]) -> str:
        """One of `allowed`."""
        return self._word(key, self.value(key), allowed)

    def words(self, key: str, allowed: Sequence[str]) -> tuple[str, ...]:
        """Some of `allowed`, each once."""
        found = tuple(self._word(key, each, allowed) for each in self._list(key, len(allowed)))
        if len(set(found)) < len(found):
            raise self.wrong(key, f"is {list(found)}: name each once")
        return found

    def _word(self, key: str, value: Any, allowed: Sequence[str]) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise self.wrong(key, f"is {shown(value)}: there is {', '.join(allowed)}")
        return value

    def table(self, key: str) -> "Table":
        return Table(self.value(key), self.where, self._name(key))

    def tables(self, key: str, most: int) -> "list[Table]":
        """A list of tables: one at least."""
        return [
            Table(each, self.where, f"{self._name(key)}[{number}]") for number, each in enumerate(self._list(key, most))
        ]

    def _list(self, key: str, most: int) -> list[Any]:
        value = self.value(key)
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            raise self.wrong(key, f"must be a list of 1 to {most}")
        return value

    def done(self) -> None:
        """Nothing else may be here, so that no wish is silently ignored."""
        for key in self._values:
            if key not in self._asked:
                raise self.wrong(str(key), "is not known here; check the spelling")


def printable(text: str) -> str:
    """The text in one line; a file's name may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in text)


def shown(value: Any) -> str:
    """A value for a message: of what may be nested, or have more digits than Python prints, only the kind."""
    if value is None:
        return "missing"
    if isinstance(value, (dict, list)) or (isinstance(value, int) and abs(value) >= 1 << 64):
        return "too large" if isinstance(value, int) else f"a {type(value).__name__}"
    return repr(value)[:40]
