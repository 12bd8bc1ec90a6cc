"""The house: rooms are where they should be, import what they may, and start quickly."""

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import coterie
from coterie import startup
from coterie.errors import CoterieError, UnitError, UsageError

ROOT = Path(__file__).parent.parent
PACKAGE = Path(coterie.__file__).parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("actors", "configs", "scheduler", "storage")

# Who may import whom. The front door may import all.
FRONT_DOOR = {
    "auto",
    "__init__",
    "__main__",
    "answer",
    "cli",
    "commands",
    "engine",
    "llm",
    "opening",
    "hosts",
    "ceiling",
    "part_engine",
    "cut",
    "stepping",
    "stream",
    "supervision",
    "meter",
    "others",
    "presence",
    "graphs",
    "divergence",
    "pressure",
    "prompts",
    "recording",
    "room",
    "session",
}
MAY_IMPORT = {
    "errors": set(),
    "paths": {"errors"},
    "startup": {"errors"},
    "configs": {"errors"},
    "trace": {"errors", "kernels"},
    "kernels": {"errors", "paths"},
    "sizes": {"errors"},
    "storage": {"errors", "kernels", "models", "paths"},
    "models": {"errors", "kernels"},
    "fetch": {"errors", "paths"},
    "generation": {"errors", "sampling"},
    "actors": {
        "configs",
        "errors",
        "kernels",
        "paths",
        "scheduler",
        "storage",
        "trace",
    },  # of the scheduler, what a program is
    "scheduler": {"errors", "kernels", "models", "paths", "sizes", "storage", "trace"},
    "sampling": {"errors"},
}
HEAVY = {"gguf", "jinja2", "llvmlite", "numba", "numpy", "pyarrow", "ray", "tokenizers", "torch"}

in_checkout = pytest.mark.skipif(
    not (ROOT / "actors").is_dir(), reason="an sdist holds each room once, inside the package"
)


@in_checkout
@pytest.mark.parametrize("room", ROOMS)
def test_a_room_of_the_root_is_linked_into_the_package(room: str) -> None:
    link = ROOT / "src" / "coterie" / room
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / room


@in_checkout
@pytest.mark.parametrize("room", ROOMS)
def test_a_room_refuses_its_bare_name(room: str) -> None:
    spec = importlib.util.spec_from_file_location(room, ROOT / room / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=rf"^import this room as coterie.{room}, not as {room}$"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def imported_rooms(source: str) -> Iterator[str]:
    """The names under `coterie` that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("coterie."))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    folder, module = PACKAGE / room, PACKAGE / f"{room}.py"
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [module]
    assert files
    for path in files:
        foreign = set(imported_rooms(path.read_text())) - {room} - MAY_IMPORT[room]
        assert not foreign, f"{path.name} of {room} imports {', '.join(sorted(foreign))}"


def test_every_room_has_a_rule() -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert files | folders <= FRONT_DOOR | set(MAY_IMPORT)


def test_help_imports_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "coterie", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "coterie" in imported
    assert not imported & HEAVY


def test_the_version_is_written_once() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "coterie.__version__"}
    assert f"\n## {coterie.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_supported_pythons_are_the_same_for_pip_and_for_people() -> None:
    (_, first), (_, end) = startup.PYTHON_FIRST, startup.PYTHON_END
    assert PYPROJECT["project"]["requires-python"] == f">=3.{first},<3.{end}"


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
    project = PYPROJECT["project"]
    wanted = {line.partition(">")[0] for line in project["dependencies"] + project["optional-dependencies"]["dev"]}
    assert wanted <= pinned


CPU = "processor\t: 0\nflags\t\t: fpu avx2 fma f16c\n\nprocessor\t: 1\nflags\t\t: fpu avx2 fma f16c\n"


@pytest.mark.parametrize(
    ("machine", "cpuinfo"),
    [
        ("x86_64", CPU),
        ("x86_64", ""),
        ("x86_64", "model name : a container that hides its flags\n"),
        ("aarch64", "Features\t: fp asimd asimddp\n"),
    ],
)
def test_a_processor_that_will_do_passes(machine: str, cpuinfo: str) -> None:
    startup.check_cpu("linux", machine, cpuinfo)


@pytest.mark.parametrize(
    ("system", "machine", "cpuinfo", "message"),
    [
        ("linux", "x86_64", "flags : sse2 avx fma", r"^this x86_64 processor has no AVX2, F16C: "),
        ("linux", "x86_64", CPU.replace("f16c", "", 1), r"^this x86_64 processor has no F16C: "),
        ("linux", "aarch64", "Features : fp asimd", r"has no dot product instructions"),
        ("linux", "riscv64", "", r"^Coterie runs on Linux on x86-64 and aarch64; this is linux on riscv64$"),
        ("darwin", "arm64", "", r"this is darwin on arm64$"),
    ],
)
def test_an_unsuitable_processor_is_named(system: str, machine: str, cpuinfo: str, message: str) -> None:
    with pytest.raises(UnitError, match=message):
        startup.check_cpu(system, machine, cpuinfo)


def test_an_unsuitable_python_is_named() -> None:
    startup.check_python((3, 11))
    startup.check_python((3, 14))
    for version in ((3, 10), (3, 15)):
        with pytest.raises(UsageError, match=rf"^Python 3.{version[1]} .* needs Python 3.11 to 3.14"):
            startup.check_python(version)


def test_a_missing_venv_module_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert startup.main() == 0
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert startup.main() == UsageError.exit_code
    assert "has no module ensurepip; install it (Debian, Ubuntu: apt install python3." in capsys.readouterr().err


def test_the_command_says_why_it_cannot_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from coterie import __main__

    def refuse() -> None:
        raise UnitError("too old")

    monkeypatch.setattr(__main__, "check_machine", refuse)
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == UnitError.exit_code
    assert capsys.readouterr().err == "coterie: error: too old\n"


def test_every_error_has_an_exit_code_of_its_own() -> None:
    kinds = CoterieError.__subclasses__()
    assert len({kind.exit_code for kind in kinds} | {0, 1}) == len(kinds) + 2


@in_checkout
def test_make_names_an_unsuitable_python_before_it_downloads(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'named at once' >&2\nexit 2\n")
    python.chmod(0o755)
    command = ["make", "demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert result.stderr.startswith("named at once\n")
    assert not (tmp_path / "venv").exists()
