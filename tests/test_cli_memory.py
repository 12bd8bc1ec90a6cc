"""Memory ceilings and plans on the command line: with a stand-in for the engine, and on a tiny model."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import FakeLLM, coterie, refused, stand_in
from tiny_models import write_tiny

from coterie import paths
from coterie.sizes import Share

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache and a configuration of the test's own; compiled kernels are shared."""
    kernels = paths.kernels_dir()
    for name in [name for name in os.environ if name.startswith("COTERIE_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    (home / "kernels").symlink_to(kernels)
    monkeypatch.setenv("COTERIE_HOME", str(home))
    monkeypatch.setenv("COTERIE_CONFIG", str(tmp_path / "config.toml"))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    return stand_in(monkeypatch, "Paris", ".")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GGUF of some MiB."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return str(write_tiny(path, dim=256, ffn=1024, layers=6, formats="Q8_0", context=1024))


@pytest.fixture
def packed(model: str, tmp_path: Path) -> str:
    out = tmp_path / "tiny.coterie"
    assert coterie("pack", model, "-o", str(out)).exit_code == 0
    return str(out)


@pytest.fixture
def plan_file(packed: str, tmp_path: Path) -> str:
    path = tmp_path / "plan.toml"
    assert coterie("plan", packed, "--memory", "50%", "-c", "300", "--save", str(path)).exit_code == 0
    return str(path)


# what reaches the engine


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("50%", Share(0.5)),
        ("12.5 %", Share(0.125)),
        ("100%", Share(1.0)),
        ("auto", "auto"),
        (" AUTO ", "auto"),
        ("6GiB", 6 << 30),
        ("1", 1),
    ],
)
def test_memory_reaches_the_engine(engine: type[FakeLLM], text: str, memory: object) -> None:
    for words in (["run", "x", "-p", "Hi"], ["bench", "x", "-p", "8", "-n", "0"]):
        assert coterie(*words, "--memory", text).exit_code == 0
        assert engine.last.options["memory"] == memory
        assert engine.last.options["sources"]["memory"] == "flag"


@pytest.mark.parametrize(
    "text", ["0%", "0.0%", "100.1%", "-5%", "1e1%", "50 percent", "%", "automatic", "nan", "1e9", ""]
)
@pytest.mark.parametrize("command", ["run", "plan", "bench", "perplexity"])
@pytest.mark.usefixtures("engine")
def test_memory_that_makes_no_sense_is_one_line(command: str, text: str) -> None:
    refused(coterie(command, "x", f"--memory={text}"), "--memory", "50%" if "%" not in text else "%")


def test_flag_before_environment_before_configuration(
    engine: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def memory(*flags: str) -> tuple[Any, Any]:
        assert coterie("run", "x", "-p", "Hi", *flags).exit_code == 0
        options = engine.last.options
        return options["memory"], options["sources"].get("memory")

    assert memory() == (None, None)
    (tmp_path / "config.toml").write_text('[run]\nmemory = "auto"')
    assert memory() == ("auto", "config")
    monkeypatch.setenv("COTERIE_MEMORY", "25%")
    assert memory() == (Share(0.25), "environment")
    assert memory("--memory", "1GiB") == (1 << 30, "flag")


@pytest.mark.parametrize("source", ["environment", "config"])
@pytest.mark.usefixtures("engine")
def test_a_wrong_share_is_refused_wherever_it_comes_from(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if source == "environment":
        monkeypatch.setenv("COTERIE_MEMORY", "150%")
    else:
        (tmp_path / "config.toml").write_text('[run]\nmemory = "150%"')
    refused(coterie("run", "x", "-p", "Hi"), "150%")


def test_the_plan_shows_where_its_ceiling_came_from(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def said(*flags: str) -> str:
        result = coterie("plan", model, *flags)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert "from" not in said()
    (tmp_path / "config.toml").write_text('[plan]\nmemory = "75%"\nthreads = 1')
    assert "[threads from config, memory from config]" in said()
    monkeypatch.setenv("COTERIE_MEMORY", "50%")
    assert "[threads from config, memory from environment]" in said()
    assert "[threads from config, context from flag, memory from flag]" in said("--memory", "40%", "-c", "64")


def test_the_summary_tells_what_flash_did(engine: type[FakeLLM]) -> None:
    engine.streamed = {
        "read_bytes_per_token": 51e6, "bandwidth": 2.5e9, "hit_rate": 0.44, "stall_share": 0.57,
    }  # fmt: skip
    result = coterie("run", "x", "-p", "Hi")
    assert "flash 51 MB/token at 2.50 GB/s, hit rate 44 %, stalled 57 %" in result.stderr.splitlines()[-1]
    assert json.loads(coterie("run", "x", "-p", "Hi", "--json").stdout)["flash"] == engine.streamed
    engine.streamed["hit_rate"] = 1.0  # packed, but all of it fits
    assert "flash" not in coterie("run", "x", "-p", "Hi").stderr


def test_a_plan_file_reaches_the_engine(engine: type[FakeLLM], tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    coterie("run", "x", "-p", "Hi", "--plan", str(path))
    assert engine.last.options["plan"] == path
    coterie("run", "x", "-p", "Hi")
    assert engine.last.options["plan"] is None


# plan


def test_plan_of_a_gguf_and_of_its_packed_file_agree(model: str, packed: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    plans = [json.loads(coterie("plan", each, "--memory", "60%", "--json").stdout) for each in (model, packed)]
    for plan in plans:
        assert 0 < plan["streamed_per_token"] < plan["bytes_per_token"]
        assert plan["units"] == {"cpu": "everything", "flash": "reads"}
        assert plan["sources"]["memory"] == "flag"
        assert set(plan["forecast"]) == {"read_bandwidth", "seconds", "bottleneck", "tokens_per_s"}
        assert plan["total"] >= sum(plan["regions"].values())
    same = ("pinned", "ring", "regions", "context", "chunk", "streamed_per_token", "weight_bytes")
    assert [plans[0][name] for name in same] == [plans[1][name] for name in same]
    assert plans[1]["flash"]["file"] == packed
    assert Path(plans[0]["flash"]["file"]).parent == home / "packed"
    assert not list((home / "packed").iterdir())  # headers only: nothing was packed


def test_plan_keeps_to_its_ceiling_or_says_by_how_much_to_raise_it(packed: str) -> None:
    plan = json.loads(coterie("plan", packed, "--memory", "12MiB", "--json").stdout)
    assert plan["memory"] == 12 << 20 >= plan["total"]
    refused(coterie("plan", packed, "--memory", "1"), "raise --memory by", code=4)
    refused(coterie("plan", packed, "-c", "1025"), "context", "1024")
    refused(coterie("plan", packed, "-t", "65"), "64")


def test_all_in_memory_needs_no_flash(model: str) -> None:
    plan = json.loads(coterie("plan", model, "--json").stdout)
    assert (plan["flash"], plan["streamed_per_token"], plan["resident"]) == (None, 0, 1)
    text = coterie("plan", model, "--memory", "100%").stdout
    assert "all weights in memory" in text
    assert "flash reads" not in text


def test_a_saved_plan_says_the_same(packed: str, plan_file: str) -> None:
    text = Path(plan_file).read_text()
    assert coterie("plan", packed, "--memory", "50%", "-c", "300").stdout.splitlines()[0] in text
    assert coterie("plan", packed, "--memory", "50%", "-c", "300", "--save", plan_file).exit_code == 0  # replaced
    assert Path(plan_file).read_text() == text


def test_where_a_plan_cannot_be_saved(model: str, packed: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "notes.txt").write_text("dear diary")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", "notes.txt", "loop", "", "no/such/folder", "a" * 300, packed, "/dev/full"):
        before = Path(packed).read_bytes()
        refused(coterie("plan", packed, "--memory", "50%", "--save", str(tmp_path / name)))
        assert Path(packed).read_bytes() == before
    assert (tmp_path / "notes.txt").read_text() == "dear diary"
    assert coterie("plan", model, "--save", str(tmp_path / "new")).exit_code == 0  # all in memory: nothing is packed
    assert not list((tmp_path / "home").glob("packed/*"))


def test_a_plan_is_saved_whole_or_not_at_all(
    packed: str, plan_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = Path(plan_file).read_text()
    for name in ("plan.toml", "new.toml"):
        result = coterie("plan", packed, "--memory", "60%", "--save", str(tmp_path / name))
        refused(result, "No space left")
    assert Path(plan_file).read_text() == before
    assert not (tmp_path / "new.toml").exists()


# run, with the engine


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    """A process of its own: what goes to stderr when no terminal is there."""
    command = [sys.executable, "-m", "coterie", "run", *words, "-p", "the word", "--raw", "-n", "4", "--temp", "0"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_gguf_is_packed_on_first_use_and_that_is_said(model: str, tmp_path: Path) -> None:
    plain = run(model)
    assert plain.returncode == 0, plain.stderr
    first, second = run(model, "--memory", "50%"), run(model, "--memory", "50%")
    assert first.stdout == second.stdout == plain.stdout
    (copy,) = (tmp_path / "home" / "packed").glob("*.coterie")
    assert f"coterie: packed tiny.gguf into {copy}, once for all" in first.stderr.splitlines()
    assert "packed" not in second.stderr.replace("/packed/", "")
    for result in (first, second):
        assert "streamed a token" in result.stderr
        assert "[memory from flag]" in result.stderr
        assert "MB/token at" in result.stderr.splitlines()[-1]
    assert "MB/token" not in plain.stderr


def test_what_cannot_be_planned_is_not_packed(model: str, tmp_path: Path) -> None:
    refused(coterie("run", model, "-p", "Hi", "--memory", "1MiB"), "raise --memory by", code=4)
    folder = tmp_path / "home" / "packed"
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("seconds", [0.8, 2.5, 4.0])
def test_ctrl_c_while_kernels_are_compiled_ends_it(seconds: float, packed: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "coterie", "run", packed, "--memory", "50%", "-p", "x", "--raw", "-n", "1000000"]
    environment = os.environ | {"COTERIE_HOME": str(tmp_path / "cold")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (130, False), errors


def test_run_follows_a_plan(packed: str, plan_file: str) -> None:
    result = coterie("run", packed, "-p", "the word", "--raw", "-n", "3", "--temp", "0", "--json", "--plan", plan_file)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["plan"]["context"] == 300
    assert data["plan"]["sources"] == dict.fromkeys(("threads", "context", "memory", "chunk"), "plan") | {
        "units": "automatic",
        "split": "automatic",
        "memory": "automatic",  # a share of the weights sets no ceiling
    }
    assert data["flash"]["hit_rate"] == data["plan"]["resident"] < 1
    assert "context from plan" in result.stderr


@pytest.mark.parametrize(
    ("flags", "variable", "named"),
    [
        (["--memory", "50%"], "", "the flag says 50%"),
        (["-c", "299"], "", "the flag says 299"),
        (["-t", "9"], "", "threads"),
        ([], "COTERIE_MEMORY=auto", "the environment says auto"),
        ([], "COTERIE_CONTEXT=64", "the environment says 64"),
    ],
)
def test_an_option_that_contradicts_the_plan_is_refused(
    packed: str, plan_file: str, flags: list[str], variable: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv(*variable.split("=", 1))
    refused(coterie("run", packed, "-p", "Hi", "--plan", plan_file, *flags), "plan.toml", named, code=4)


def test_an_option_that_says_what_the_plan_says_is_fine(packed: str, plan_file: str) -> None:
    flags = ["-n", "1", "--temp", "0", "--plan", plan_file, "-c", "300"]
    assert coterie("run", packed, "-p", "Hi", *flags).exit_code == 0


def test_what_is_no_plan_file_is_one_line(packed: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", "binary", "empty", "loop", "absent", "", "a" * 300, packed, "/dev/zero", "/dev/null"):
        refused(coterie("run", packed, "-p", "Hi", "--plan", str(tmp_path / name)), code=4)


def test_a_plan_for_another_packing_is_refused(plan_file: str, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.gguf", dim=256, ffn=1024, layers=6, formats="Q8_0", context=1024, seed=1)
    refused_line = coterie("run", str(other), "-p", "Hi", "--plan", plan_file)
    assert refused_line.exit_code == 4
    assert refused_line.stderr.splitlines()[-1].startswith(
        "coterie: error: the plan was made for another model or packing"
    )
