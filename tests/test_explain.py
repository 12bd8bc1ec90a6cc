"""--explain: a table of operators that adds up, and what changes would give."""

import json
from pathlib import Path
from typing import Any

import pytest
from simulated import LLAMA_1B, LLAMA_8B, PHONE, on_paper, simulation
from tiny_models import write_tiny
from typer.testing import CliRunner

from coterie.cli import app
from coterie.scheduler.device_model import Instruction
from coterie.scheduler.explain import explain, table
from coterie.scheduler.operators import Rows
from coterie.scheduler.profile import DeviceProfile
from coterie.sizes import Share

UNITS = "gpu", "npu"


def test_the_table_is_the_step() -> None:
    """In memory, on one unit, the lines' times are the simulated step's, but for launches behind each other."""
    made = simulation(PHONE, LLAMA_1B, prompt=0, tokens=2)
    lines = table(made, "decode", Rows(1, 0))
    assert sum(line.count for line in lines) == made.layout.programs["decode"].length
    assert [line.seconds for line in lines] == sorted((line.seconds for line in lines), reverse=True)
    outcome = made.run([made.step("decode", Rows(1, 0))])
    assert sum(line.seconds for line in lines) == pytest.approx(outcome.steps[0][1], rel=0.1)


def test_cuts_are_named() -> None:
    made = simulation(PHONE, LLAMA_8B, prompt=256, tokens=0, units=UNITS, cut=UNITS, memory=1 << 34, chunk=256)
    down = next(line for line in table(made, "prefill", Rows(256, 0)) if line.name.startswith("ffn down"))
    assert down.count == 32
    assert down.where.startswith("rows: gpu ")
    assert "npu" in down.where
    padded = simulation(PHONE, LLAMA_8B, prompt=200, tokens=0, units=("npu",), cut=("npu",), memory=1 << 34, chunk=224)
    lines = [line for line in table(padded, "prefill", Rows(200, 0)) if line.name.startswith("ffn")]
    assert {line.where.split(" ", 1)[0] for line in lines} <= {"padding:", "lengths:"}
    norm = next(line for line in table(made, "prefill", Rows(256, 0)) if line.name == "norm")
    assert norm.where == "gpu"


def test_changes_go_the_right_way() -> None:
    file, _ = on_paper(LLAMA_1B)
    made = simulation(PHONE, LLAMA_1B, prompt=32, tokens=2, units=UNITS, memory=Share(0.5))
    found = {change.name: change for change in explain(made, file, made.answer()).changes}
    assert list(found) == ["1 GiB more memory", "flash twice as fast", "cpu too", "without gpu", "without npu"]
    for name in ("1 GiB more memory", "flash twice as fast"):
        decode = found[name].decode
        assert decode is not None
        assert decode > 1.2
    slower = found["without npu"].prefill
    assert slower is not None
    assert slower < 1
    whole = simulation(PHONE, LLAMA_1B, prompt=0, tokens=2)
    names = [change.name for change in explain(whole, file, whole.answer()).changes]
    assert names == ["gpu too", "npu too"]


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_the_commands(tmp_path: Path, measured: DeviceProfile) -> None:
    model = str(write_tiny(tmp_path / "tiny.gguf"))
    asked = f"simulate {model} --soc snapdragon-8gen3 --units cpu,npu --split auto -p 32 -n 4".split()
    result = run(*asked, "--explain")
    assert result.exit_code == 0, result.output
    for text in ("prefill, a chunk of 32 tokens", "decode, a token at position 34", "gpu too", "without npu"):
        assert text in result.stdout
    data = json.loads(run(*asked, "--explain", "--json").stdout)
    assert {line["name"].split()[0] for line in data["explain"]["decode"]} >= {"matmul", "ffn", "attend"}
    assert "explain" not in json.loads(run(*asked, "--json").stdout)
    mine = run("plan", model, "--explain", "-t", "2")
    assert mine.exit_code == 0, mine.output
    assert "decode, a token at position" in mine.stdout
    assert json.loads(run("plan", model, "--explain", "--json", "-t", "2").stdout)["explain"]["prefill"]


def test_a_saved_plan_has_predicted_times_where_they_are_known(tmp_path: Path, measured: DeviceProfile) -> None:
    model, path = str(write_tiny(tmp_path / "tiny.gguf")), tmp_path / "plan.toml"
    asked = ["plan", model, "-t", "2", "--save", str(path)]
    assert run(*asked).exit_code == 0
    text = path.read_text()
    assert "# decode, a token at position" in text
    assert "# expect up to" in text
    assert run("plan", model, "-t", "1", "--save", str(path)).exit_code == 0  # not measured with one lane
    assert "# decode, a token" not in path.read_text()


def test_what_cannot_be_explained_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path))
    model = str(write_tiny(tmp_path / "tiny.gguf"))
    for words, message, code in (
        (["plan", model, "--explain"], "coterie profile --units", 2),
        (["plan", model, "--explain", "--units", "gpu"], "coterie profile --shapes MODEL", 4),
        (["plan", model, "--explain", "--units", "cpu,gpu", "--split", "tensor"], "--shapes MODEL --split tensor", 4),
    ):
        result = run(*words)
        assert result.exit_code == code
        assert result.stderr.count("\n") == 1
        assert message in result.stderr


def test_labels_are_for_people() -> None:
    from coterie.scheduler.explain import _label

    assert _label(Instruction("ffn", "", 8, 4, kernel="ffn_up:Q4_0:x:4")) == "ffn up 8 x 4"
    assert _label(Instruction("norm", "", kernel="norm")) == "norm"
