"""Sessions by name: where their journals lie, and which there are (docs/sessions.md)."""

import re
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import CoterieError, UsageError
from coterie.paths import sessions_dir
from coterie.storage.journal import read_journal

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
SUFFIX = ".journal"


def session_path(session: str | Path) -> Path:
    """The journal of a session: a name, or a path if there is a "/" in it. Raises UsageError for neither."""
    if isinstance(session, Path) or "/" in session:
        return Path(session).absolute()
    if not NAME.fullmatch(session):
        raise UsageError(
            f"{session[:80]!r} is no session: give up to 64 letters, digits, '.', '_' or '-', or a path with a '/'"
        )
    return sessions_dir() / f"{session}{SUFFIX}"


@dataclass(frozen=True)
class Session:
    """What `coterie sessions` shows. `state`: the finish reason, "unfinished", or "damaged"; `changed`: seconds since
    1970."""

    name: str
    model: str
    tokens: int
    finished: bool
    state: str
    changed: float


def list_sessions() -> list[Session]:
    """The sessions that have a name, the one that changed last first."""
    found = []
    for path in sessions_dir().glob(f"*{SUFFIX}"):
        name, changed = path.name.removesuffix(SUFFIX), path.stat().st_mtime
        try:
            contents = read_journal(path)
        except CoterieError:
            found.append(Session(name, "", 0, False, "damaged", changed))
            continue
        reason = contents.finish_reason
        state = reason or "unfinished"
        found.append(Session(name, contents.request.model, len(contents.tokens), reason is not None, state, changed))
    return sorted(found, key=lambda session: -session.changed)
