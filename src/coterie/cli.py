"""The command line: its commands, where their defaults come from, and how errors end it.

A value is taken from the flag, else from the environment (COTERIE_THREADS, COTERIE_MEMORY,
COTERIE_CONTEXT), else from the configuration file, else it is chosen automatically.
"""

import os
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import coterie
from coterie.commands import models
from coterie.commands.bench import bench
from coterie.commands.calibrate import calibrate
from coterie.commands.cluster import cluster
from coterie.commands.doctor import doctor
from coterie.commands.inspect import inspect
from coterie.commands.pack import pack, verify
from coterie.commands.perplexity import perplexity
from coterie.commands.plan import plan
from coterie.commands.profile import profile
from coterie.commands.run import run
from coterie.commands.sessions import sessions
from coterie.commands.simulate import simulate
from coterie.commands.terminal import printable
from coterie.commands.train_predictor import train_predictor
from coterie.commands.units import units
from coterie.configs import user_folder
from coterie.errors import CoterieError, PlanError, UsageError

INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended


class Coterie(TyperGroup):
    """The one place that turns errors into a line on stderr and an exit code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a locale that cannot say it gets a "?", not an error
                stream.reconfigure(errors="replace")
        sys.exit(self._exit_code(*args, **extra))

    def _exit_code(self, *args: Any, **extra: Any) -> int:
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
            sys.stdout.flush()
        except (CoterieError, typer.TyperException) as error:
            text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
            return fail(text, error.exit_code)
        except BrokenPipeError:
            # Nobody reads any more, as after `| head`: also Python's own flush must find a taker.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except MemoryError:
            return fail("out of memory; give a smaller -c, or a smaller model", PlanError.exit_code)
        except OSError as error:
            return fail(str(error), 1)
        if code == INTERRUPTED:
            print("\ninterrupted", file=sys.stderr)
        return code if isinstance(code, int) else 0


def fail(text: str, code: int) -> int:
    """Print the one line an error is worth; return the exit code."""
    print(f"coterie: error: {printable(' '.join(text.split()))}", file=sys.stderr)
    return code


app = typer.Typer(
    cls=Coterie,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Language models larger than memory, on every compute unit a device has."""
    if version:
        print(f"coterie {coterie.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit
    context.default_map = read_config(context)


def config_path() -> Path:
    """$COTERIE_CONFIG, else coterie/config.toml in the user's configuration folder."""
    if given := os.environ.get("COTERIE_CONFIG"):
        return Path(given)
    return user_folder() / "config.toml"


def read_config(context: typer.Context) -> dict[str, dict[str, Any]]:
    """Defaults by command: each table of the file is a command, its keys are option names.

    Example: `[run]` with `threads = 2`, `memory = "64MiB"`, `temp = 0.5`. Raises UsageError that
    names the key for what no command knows; no file is no defaults.
    """
    path = config_path()
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    group = context.command
    assert isinstance(group, TyperGroup)
    return {name: _defaults(path, group, name, table) for name, table in tables.items()}


def _defaults(path: Path, group: TyperGroup, name: str, table: Any) -> dict[str, Any]:
    """One table with the commands' own parameter names."""
    if name not in group.commands or not isinstance(table, dict):
        raise UsageError(f"{path}: {name}: tables are commands: {', '.join(group.commands)}")
    names = {
        option.removeprefix("--"): parameter.name
        for parameter in group.commands[name].params
        for option in parameter.opts
        if option.startswith("--") and option not in ("--model", "--help") and parameter.name
    }
    for key, value in table.items():
        if key not in names:
            raise UsageError(f"{path}: {name}.{key}: no such option; there are {', '.join(sorted(names))}")
        if not isinstance(value, (str, int, float, list)):
            raise UsageError(f"{path}: {name}.{key}: must be a string, a number, true, false or a list")
    return {names[key]: value if isinstance(value, (bool, list)) else str(value) for key, value in table.items()}


for command in (
    run,
    sessions,
    plan,
    bench,
    perplexity,
    calibrate,
    pack,
    verify,
    train_predictor,
    inspect,
    profile,
    simulate,
    units,
    doctor,
    models.pull,
    models.ls,
):
    app.command()(command)
app.add_typer(cluster, name="cluster")


def main() -> None:
    """The console script."""
    app(prog_name="coterie")
