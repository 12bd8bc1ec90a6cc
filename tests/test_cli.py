"""The command line in process, with a stand-in for the engine."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_line import FakeLLM, coterie, refused, stand_in
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from coterie import cli, fetch, opening
from coterie.commands import terminal
from coterie.commands.perplexity import chunk_losses, estimate
from coterie.errors import CoterieError, FetchError, ModelError, PlanError, UsageError
from coterie.sizes import parse_size

HEAVY = {"numba", "llvmlite", "gguf", "tokenizers", "jinja2", "pyarrow", "ray", "coterie.llm"}


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("COTERIE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COTERIE_CONFIG", str(tmp_path / "config.toml"))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    return stand_in(monkeypatch, "Paris", ".", "")


# run


def test_only_the_answer_is_on_stdout(engine: type[FakeLLM]) -> None:
    result = coterie("run", "smollm2", "-p", "Capital of France?", "--seed", "5")
    assert result.exit_code == 0
    assert result.stdout == "Paris.\n"
    first, forecast, last = result.stderr.splitlines()
    assert first == "plan: all resident"
    assert forecast == "expect up to 400 tokens/s"
    for word in ("12.5/s", "30.0/s", "ended by stop", "seed 5", "64.0 MiB"):
        assert word in last
    assert engine.last.closed


def test_a_chat_is_the_default_and_the_system_message_comes_first(engine: type[FakeLLM]) -> None:
    coterie("run", "-m", "smollm2", "-p", "Hi", "--system", "Be brief.")
    [(messages, max_tokens, _)] = engine.last.asked
    assert messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert max_tokens == -1


@pytest.mark.parametrize("template", [None, object()])
def test_without_a_template_or_with_raw_the_prompt_is_continued(engine: type[FakeLLM], template: object) -> None:
    engine.template = template
    coterie("run", "smollm2", "-p", "Hi", *(["--raw"] if template else []))
    assert engine.last.asked[0][0] == "Hi"


def test_flags_reach_the_engine(engine: type[FakeLLM], tmp_path: Path) -> None:
    words = "run x -p Hi -n 7 -c 512 -t 3 --memory 64MiB --temp 0.5 --top-k 3 --top-p 0.9 --min-p 0.1"
    words += f" --repeat-penalty 1.1 --repeat-last-n -1 --seed 9 --stop END --stop . --trace {tmp_path}/t.json"
    assert coterie(*words.split()).exit_code == 0
    options = engine.last.options
    assert (options["context"], options["threads"], options["memory"]) == (512, 3, 64 * 2**20)
    assert options["trace"] == tmp_path / "t.json"
    _, max_tokens, sampling = engine.last.asked[0]
    assert max_tokens == 7
    assert sampling == {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "repeat_last_n": -1,
        "seed": 9,
        "stop": ["END", "."],
    }


def test_run_as_json(engine: type[FakeLLM]) -> None:
    result = coterie("run", "smollm2", "-p", "Hi", "--json")
    data = json.loads(result.stdout)
    names = {"text", "tokens", "finish_reason", "seed", "timings", "memory", "flash", "host"}
    names |= {"units", "losses", "link", "plan"}
    assert set(data) == names
    assert data["text"] == "Paris."
    assert data["tokens"] == [0, 1, 2]
    assert data["seed"] == engine.last.asked[0][2]["seed"]
    assert data["timings"]["tokens_per_s"] == 12.5
    assert data["plan"] == {"lanes": 2, "forecast": {"read_bandwidth": 4e10, "tokens_per_s": 400.0}}


def test_the_prompt_comes_from_a_file_or_a_pipe(engine: type[FakeLLM], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Grüße\n\n", encoding="utf-8")
    coterie("run", "x", "--raw", "-f", str(tmp_path / "prompt.txt"))
    assert engine.last.asked[0][0] == "Grüße\n"
    coterie("run", "x", "--raw", stdin="piped\n")
    assert engine.last.asked[0][0] == "piped"
    coterie("run", "x", "--raw", "-p", "flag", stdin="piped\n")
    assert engine.last.asked[0][0] == "flag"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("run -p Hi", "which model"),
        ("run a -m b -p Hi", "two models"),
        ("run x", "no prompt"),
        ("run x -p Hi -f file", "two prompts"),
        ("run x -f no-such-file", "no-such-file"),
        ("run x -f .", "cannot read"),
        ("run x -p Hi -n -2", "-n"),
        ("run x -p Hi -c -1", "-c"),
        ("run x -p Hi -t 0", "-t"),
        ("run x -p Hi -t many", "-t"),
        ("run x -p Hi --temp -1", "temperature"),
        ("run x -p Hi --temp nan", "temperature"),
        ("run x -p Hi --top-p 2", "top_p"),
        ("run x -p Hi --memory 64XB", "64MiB"),
        ("run x -p Hi --memory 0", "64MiB"),
        ("run x -p Hi --raw --system S", "--system"),
        ("run x -p Hi --trace no-such-folder/t.json", "no-such-folder"),
        ("run x -p \udcff", "UTF-8"),
        ("run missing -p Hi", "missing"),
        ("run x -p Hi --colour", "--colour"),
        ("bench x -p 0 -n 0", "nothing to time"),
        ("bench x -p 1,,2", "-p"),
        ("bench x -n -5", "-n"),
        ("bench x -r 0", "-r"),
        ("bench x -o xml", "-o"),
        ("perplexity x", "-f FILE"),
        ("perplexity x -f no-such-file", "no-such-file"),
        ("perplexity x -f no-such-file -c 4", "-c"),
        ("inspect missing", "missing"),
        ("pull missing", "missing"),
        ("frobnicate", "frobnicate"),
        ("--frobnicate", "--frobnicate"),
    ],
)
@pytest.mark.usefixtures("engine")
def test_what_makes_no_sense_is_one_line(words: str, named: str) -> None:
    refused(coterie(*words.split(" ")), named)


@pytest.mark.usefixtures("engine")
def test_an_empty_stop_string_and_a_system_message_without_a_template_are_refused(
    engine: type[FakeLLM],
) -> None:
    refused(coterie("run", "x", "-p", "Hi", "--stop", ""), "--stop")
    engine.template = None
    result = coterie("run", "x", "-p", "Hi", "--system", "S")
    assert result.exit_code == 2
    assert "no chat template" in result.stderr


@pytest.mark.usefixtures("engine")
def test_a_prompt_that_is_not_text_is_refused(tmp_path: Path) -> None:
    refused(coterie("run", "x", stdin=b"ab\xff"), "stdin", "byte 2")
    (tmp_path / "binary").write_bytes(b"\x80")
    refused(coterie("run", "x", "-f", str(tmp_path / "binary")), "binary", "byte 0")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PlanError("does not fit\nat all"), 4),
        (ModelError("\x1b[2Jdamaged"), 3),
        (CoterieError("odd"), 1),
        (MemoryError(), 4),
        (OSError(28, "No space left on device", "trace.json"), 1),
    ],
)
def test_an_error_on_the_way_is_one_line_and_its_exit_code(engine: type[FakeLLM], error: Exception, code: int) -> None:
    engine.pieces = ["Pa", error]
    result = coterie("run", "x", "-p", "Hi")
    assert result.exit_code == code
    assert result.stdout == "Pa"
    assert result.stderr.splitlines()[-1].startswith("coterie: error: ")
    assert len(result.stderr.splitlines()) == 3
    assert "\x1b" not in result.stderr
    assert engine.last.closed


def test_an_interrupt_ends_with_one_line_and_130(engine: type[FakeLLM]) -> None:
    engine.pieces = ["Pa", KeyboardInterrupt()]
    result = coterie("run", "x", "-p", "Hi")
    assert result.exit_code == 130
    assert result.stdout == "Pa"
    assert result.stderr.endswith("\ninterrupted\n")
    assert engine.last.closed


# where values come from


def test_flag_before_environment_before_configuration(
    engine: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def threads(*flags: str) -> Any:
        assert coterie("run", "x", "-p", "Hi", *flags).exit_code == 0
        return engine.last.options["threads"]

    assert threads() is None
    (tmp_path / "config.toml").write_text('[run]\nthreads = 2\nmemory = "1GiB"\ntemp = 0\nraw = true\nstop = ["."]')
    assert threads() == 2
    assert engine.last.options["memory"] == 2**30
    assert engine.last.asked[0][0] == "Hi"
    assert engine.last.asked[0][2]["temperature"] == 0
    assert engine.last.asked[0][2]["stop"] == ["."]
    monkeypatch.setenv("COTERIE_THREADS", "3")
    assert threads() == 3
    assert threads("-t", "4") == 4


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[run]\nthread = 2", "run.thread"),
        ("[run]\nmodel = 'x'", "run.model"),
        ("[ruin]\nthreads = 2", "ruin"),
        ("threads = 2", "threads"),
        ("[run]\nthreads = 1979-05-27", "run.threads"),
        ("[run]\nthreads = 'two'", "threads"),
        ("[run", "config.toml"),
    ],
)
@pytest.mark.usefixtures("engine")
def test_a_wrong_configuration_is_named(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(text)
    refused(coterie("run", "x", "-p", "Hi"), named)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536),
        ("64MiB", 2**26),
        ("1.5 GiB", 3 * 2**29),
        ("2K", 2000),
        ("3M", 3 * 10**6),
        ("1gb", 10**9),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["99999TiB", "999999999999999G", "1125899906842.625K"])
def test_sizes_beyond_reason_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="more than any machine has"):
        parse_size(text)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_size(text) > 0


# the other commands


def test_bench_as_markdown_csv_and_json(engine: type[FakeLLM]) -> None:
    words = ["bench", "-m", "x.gguf", "-p", "256,0", "-n", "32,64", "-r", "3", "-t", "2"]
    table = coterie(*words).stdout.splitlines()
    assert engine.last.options["context"] >= 256
    assert len({len(line) for line in table}) == 1
    assert [line.split("|")[6].strip() for line in table[2:]] == ["pp256", "tg32", "tg64"]
    assert "100.00 ± 1.50" in table[2]
    assert "134.52 M" in table[2]

    rows = list(csv.DictReader(io.StringIO(coterie(*words, "-o", "csv").stdout)))
    assert (rows[0]["n_prompt"], rows[0]["n_gen"], rows[0]["avg_ts"]) == ("256", "0", "100.0")

    for form in (["-o", "json"], ["--json"]):
        data = json.loads(coterie(*words, *form).stdout)
        assert [(row["n_prompt"], row["n_gen"]) for row in data] == [(256, 0), (0, 32), (0, 64)]
        assert data[0]["samples_ts"] == [100.0] * 3


def test_perplexity_of_a_uniform_model_is_its_vocabulary(engine: type[FakeLLM], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abcdefgh" * 10)
    words = ["perplexity", "-m", "x", "-f", str(tmp_path / "text"), "-c", "16"]
    data = json.loads(coterie(*words, "--json").stdout)
    assert data["perplexity"] == pytest.approx(8)
    assert data["stderr"] == pytest.approx(0, abs=1e-9)
    assert data["chunks"] == 5
    assert data["tokens_scored"] == 5 * 7
    assert "perplexity 8.0000" in coterie(*words, "--chunks", "2").stdout
    assert len(engine.last.asked) == 2
    refused_line = coterie(*words[:-1], "100")
    assert refused_line.exit_code == 2
    assert "80 tokens" in refused_line.stderr


def test_bos_replaces_the_first_token_of_each_chunk(engine: type[FakeLLM], tmp_path: Path) -> None:
    engine.begin = [5]
    (tmp_path / "text").write_text("a" * 19)
    coterie("perplexity", "-m", "x", "-f", str(tmp_path / "text"), "-c", "10")
    assert engine.last.asked == [[5] + [1] * 9, [5] + [1] * 9]


def test_losses_are_of_the_second_half_by_the_row_before() -> None:
    tokens = [0, 1, 2, 0, 1, 2, 0, 1]
    logits = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1, keepdims=True)
    expected = [-np.log(probabilities[i, tokens[i + 1]]) for i in (4, 5, 6)]
    assert chunk_losses(logits, tokens) == pytest.approx(expected)
    value, error = estimate(expected)
    assert value == pytest.approx(np.exp(np.mean(expected)))
    assert error == pytest.approx(value * np.std(expected, ddof=1) / np.sqrt(3))
    logits[5, 0] = np.nan
    with pytest.raises(ModelError, match="position 5"):
        chunk_losses(logits, tokens)


@pytest.fixture
def model_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for what is opened."""
    from dataclasses import make_dataclass

    from coterie.models.spec import LayerSpec, ModelSpec, Rope

    tensor = make_dataclass("TensorInfo", ["name", "format", "rows", "cols", "offset", "nbytes"], frozen=True)
    spec = ModelSpec(
        *("llama", "tiny", 64, 2, 1, 32, 128, 32, 256, 1e-5),
        *("silu", True, 0.125, 1.0, False, False, True, (LayerSpec(Rope(1e4, 32)),)),
    )
    opened = SimpleNamespace(
        file=SimpleNamespace(
            metadata={"general.name": "ti\x1b[2Jny", "tokens": ["a"] * 32, "x": float("nan")},
            tensors={
                "token_embd.weight": tensor("token_embd.weight", "Q4_0", 32, 64, 0, 1152),
                "output_norm.weight": tensor("output_norm.weight", "F32", 1, 64, 1152, 256),
            },
        ),
        spec=spec,
        tokenizer=SimpleNamespace(vocab_size=32, bos=1, eos=2, end_ids=frozenset({2})),
        template=None,
        close=lambda: None,
    )
    monkeypatch.setattr(opening, "open_model", lambda path: opened)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_inspect(model_file: Path) -> None:
    data = json.loads(coterie("inspect", str(model_file), "--json").stdout)
    assert data["parameters"] == 32 * 64 + 64
    assert data["formats"]["Q4_0"] == {"tensors": 1, "parameters": 2048, "bytes": 1152}
    assert data["metadata"]["tokens"] == {"length": 32}
    assert data["metadata"]["x"] is None
    assert data["spec"]["dim"] == 64
    assert [each["name"] for each in data["tensors"]] == ["token_embd.weight", "output_norm.weight"]
    text = coterie("inspect", str(model_file)).stdout
    assert "[32 items]" in text
    assert "\x1b" not in text


def test_doctor() -> None:
    data = json.loads(coterie("doctor", "--json").stdout)
    by_name = {unit["name"]: unit for unit in data["units"]}
    assert by_name["flash"]["runtime"].startswith(("io_uring", "preadv"))
    assert by_name["cpu"]["runtime"].endswith(data["cpu"]["path"])
    assert data["folders"]["kernels"]["writable"] is True
    assert data["packages"]["numpy"] == np.__version__
    assert data["memory"]["total_bytes"] > 0
    text = coterie("doctor").stdout
    assert "huge pages" in text


def test_pull_and_ls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert coterie("ls").stdout == ""
    assert "coterie pull" in coterie("ls").stderr
    assert json.loads(coterie("ls", "--json").stdout) == []

    path = tmp_path / "smollm2.gguf"
    monkeypatch.setattr(fetch, "pull", lambda name, progress: path)
    assert coterie("pull", "smollm2").stdout == f"{path}\n"
    assert json.loads(coterie("pull", "smollm2", "--json").stdout) == {"path": str(path)}
    models = [fetch.PulledModel("smollm2", path, 98_362_432, "Apache-2.0")]
    monkeypatch.setattr(fetch, "list_models", lambda: models)
    assert json.loads(coterie("ls", "--json").stdout)[0]["path"] == str(path)
    assert "93.8 MiB" in coterie("ls").stdout

    def fails(name: str, progress: object) -> Path:
        raise FetchError("no network")

    monkeypatch.setattr(fetch, "pull", fails)
    refused(coterie("pull", "smollm2"), "no network", code=5)


# terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_reach_a_pipe_but_not_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2J\r\n\tb\x9b\x7fé\x00"
    for stream, expected in ((io.StringIO(), text), (Terminal(), "a␛[2J␍\n\tb\ufffd␡é␀")):
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.write(text)
        assert stream.getvalue() == expected


def test_the_spinner_is_gone_before_the_answer(monkeypatch: pytest.MonkeyPatch, engine: type[FakeLLM]) -> None:
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    engine.pieces = ["Pa\x1b[2Jris"]
    with pytest.raises(SystemExit) as ended:
        cli.app(["run", "x", "-p", "Hi"])
    assert not ended.value.code
    shown = screen.getvalue()
    assert "plan: all resident" in shown
    assert shown.rindex("\x1b[?25h") < shown.index("Pa␛[2Jris\n")  # the cursor is back


@pytest.mark.usefixtures("engine")
def test_the_answer_goes_to_stdout_while_stderr_has_a_spinner(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in ([], ["--json"]):
        answer, screen = io.StringIO(), Terminal()
        monkeypatch.setattr(sys, "stdout", answer)
        monkeypatch.setattr(sys, "stderr", screen)
        with pytest.raises(SystemExit):
            cli.app(["run", "x", "-p", "Hi", *flags])
        assert answer.getvalue().startswith('{\n  "text": "Paris."' if flags else "Paris.\n")
        assert "Paris" not in screen.getvalue()


@pytest.mark.parametrize(("count", "size"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**50, "1024.0 TiB")])
def test_sizes_for_people(count: int, size: str) -> None:
    assert terminal.size_text(count) == size


# the process


def python(*args: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, **options)


def test_help_and_version_import_nothing_heavy() -> None:
    script = f"import sys, coterie.cli; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert python("-c", script).stdout == "[]\n"
    assert coterie("--version").stdout.startswith("coterie ")
    assert "perplexity" in coterie().stdout
    assert "--temp" in coterie("run", "--help").stdout


@pytest.mark.parametrize("command", [["--version"], ["doctor"]])
def test_a_reader_that_leaves_is_no_error(command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "coterie", *command], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert process.stderr == b""
    assert process.returncode == 1


def test_the_documented_configuration_holds_the_options_that_there_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    documented = Path(__file__).parent.parent / "configs" / "default.toml"
    lines = documented.read_text().splitlines()
    settings = [line.removeprefix("# ") if " = " in line else line for line in lines if line.startswith(("[", "# "))]
    config = tmp_path / "config.toml"
    config.write_text("\n".join(line for line in settings if line.startswith("[") or " = " in line))
    monkeypatch.setenv("COTERIE_CONFIG", str(config))
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
