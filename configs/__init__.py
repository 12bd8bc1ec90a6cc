"""Default settings, one TOML file a device class; and which Ray resources units ask for."""

if __name__ != "coterie.configs":  # a second copy of every class would exist under the bare name
    raise ImportError("import this room as coterie.configs, not as configs")

import os
import tomllib
from pathlib import Path

from coterie.errors import UsageError

UNITS = ("cpu", "flash")


def user_folder() -> Path:
    """Where the user's own settings are, if there are any."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (folder if folder.is_absolute() else Path(os.path.expanduser("~/.config"))) / "coterie"


def placement() -> dict[str, dict[str, float]]:
    """By unit, the Ray resources that its actor asks for: of $COTERIE_PLACEMENT, else of placement.toml in the user's
    folder, else of ours. Raises UsageError for a file that says something else."""
    given = os.environ.get("COTERIE_PLACEMENT")
    if given and not os.path.isfile(given):
        raise UsageError(f"COTERIE_PLACEMENT: there is no file {given}")
    places = [Path(given)] if given else [user_folder() / "placement.toml", Path(__file__).with_name("placement.toml")]
    path = next((place for place in places if place.exists()), places[-1])
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
    if wrong := next((name for name in tables if name not in UNITS), None):
        raise UsageError(f"{path}: {wrong}: tables are units: {', '.join(UNITS)}")
    return {unit: _resources(path, unit, tables.get(unit, {})) for unit in UNITS}


def _resources(path: Path, unit: str, table: object) -> dict[str, float]:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {unit}: must be a table")
    for name, amount in table.items():
        if type(amount) not in (int, float) or not 0 < amount < 1e6:
            raise UsageError(f"{path}: {unit}.{name}: must be a number above 0")
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            raise UsageError(f"{path}: {unit}.{name}: name one of your own; units take no cores of Ray's")
    return {name: float(amount) for name, amount in table.items()}
