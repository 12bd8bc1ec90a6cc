"""What goes to the terminal: answers and data to stdout, everything else to stderr."""

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

NOTE_SECONDS = 5.0  # without a terminal, a line of progress this often

PACE_SECONDS = 2.0  # after these, time left is worth saying

# Control characters by which a text could command the terminal, as their visible pictures.
VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    """The text with control characters other than newline and tab made visible."""
    return text.translate(VISIBLE)


def write(text: str) -> None:
    """Print text on stdout at once; to a terminal only what is printable, else untouched."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(data: object) -> None:
    """Print data as JSON on stdout; what JSON has no number for (NaN, infinities) becomes null."""
    write(json.dumps(_plain(data), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def size_text(size: float) -> str:
    """Bytes for people: "512 B", "64.0 MiB"."""
    if size < 1024:
        return f"{size:.0f} B"
    power = next((power for power in (1, 2, 3) if size < 1024 ** (power + 1)), 4)
    return f"{size / 1024**power:.1f} {' KMGT'[power]}iB"


class Progress:
    """What is being done now, on stderr: a spinner on a terminal, elsewhere a line now and then.

    Called with (label, done, total) it is what the engine and the fetcher report to.
    """

    def __init__(self) -> None:
        self._console: Console | None = None
        self._live: Live | None = None
        self._spinner: Spinner | None = None
        self._noted = time.monotonic()
        self._began = ("", 0, 0.0)  # label, what was done and when, at its first report

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live
            from rich.spinner import Spinner

            self._console = Console(stderr=True)
            self._spinner = Spinner("dots")
            # Left alone, rich would send what is written to stdout to this console, on stderr.
            self._live = Live(self._spinner, console=self._console, transient=True, redirect_stdout=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __call__(self, label: str, done: int = 0, total: int = 0) -> None:
        text = printable(f"{label} {100 * done // total} %{self._time_left(label, done, total)}" if total else label)
        if self._spinner is not None:
            from rich.text import Text

            self._spinner.update(text=Text(text))
        elif self._console is None and time.monotonic() - self._noted >= NOTE_SECONDS:
            self._noted = time.monotonic()
            print(f"coterie: {text}", file=sys.stderr, flush=True)

    def _time_left(self, label: str, done: int, total: int) -> str:
        """At the pace since the label's first report; nothing in its first seconds."""
        now = time.monotonic()
        if self._began[0] != label or done < self._began[1]:
            self._began = (label, done, now)
        before, start = self._began[1:]
        if done <= before or now - start < PACE_SECONDS:
            return ""
        left = round((total - done) * (now - start) / (done - before))
        return f", {left // 60}:{left % 60:02} left"

    def say(self, lines: Iterable[str]) -> None:
        """Print lines on stderr that stay."""
        for line in lines:
            if self._console is not None:
                self._console.out(printable(line), highlight=False)
            else:
                print(line, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End the spinner, so that the answer has the terminal to itself."""
        if self._live is not None:
            self._live.stop()
            self._live = None
