"""Units that are chosen: never predicted slower than any set that could be named."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from simulated import LLAMA_1B, PHONE, SMALL, on_paper
from tiny_models import write_tiny
from typer.testing import CliRunner

from coterie.cli import app
from coterie.errors import CoterieError, PlanError
from coterie.scheduler.choice import choices, one_choice
from coterie.scheduler.simulate import Question
from coterie.scheduler.soc_file import load_soc
from coterie.sizes import Share


@pytest.mark.parametrize("soc", ["snapdragon-8gen3", "rk3588", "raspberry-pi-5"])
@pytest.mark.parametrize("memory", [Share(1.0), Share(0.5)])
def test_no_other_set_is_faster(soc: str, memory: Share) -> None:
    device, (file, spec) = load_soc(soc), on_paper(LLAMA_1B)
    question = Question(memory, prompt=48, tokens=16, threads=2)
    found = choices(file, spec, device, question)
    assert [choice.seconds for choice in found] == sorted(choice.seconds for choice in found)
    names = [name for name in device.units if device.units[name].kind != "npu"]
    for count in range(1, len(names) + 1):
        for units in combinations(names, count):
            for cut in ((), units):
                other = Question(memory, units, cut=cut, prompt=48, tokens=16, threads=2)
                assert found[0].seconds <= one_choice(file, spec, device, other)[0].seconds * (1 + 1e-9)


def test_all_sets_are_looked_at_and_the_same_answer_comes_again() -> None:
    file, spec = on_paper(SMALL)
    question = Question(Share(1.0), prompt=32, tokens=4, threads=2)
    found = choices(file, spec, PHONE, question)
    assert len(found) == len({choice.name for choice in found})
    assert {choice.question.units for choice in found} == {
        units for count in (1, 2, 3) for units in combinations(("cpu", "gpu", "npu"), count)
    }
    assert [choice.name for choice in choices(file, spec, PHONE, question)] == [choice.name for choice in found]


def test_where_nothing_can_be_the_reason_is_said() -> None:
    file, spec = on_paper(LLAMA_1B)
    with pytest.raises(PlanError, match="raise --memory"):
        choices(file, spec, PHONE, Question(1 << 20, prompt=8, tokens=2, threads=2))
    with pytest.raises(CoterieError, match="nothing to simulate"):
        choices(file, spec, PHONE, Question(Share(1.0), prompt=0, tokens=0))


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["simulate", *words])


def test_the_command(tmp_path: Path) -> None:
    model = str(write_tiny(tmp_path / "tiny.gguf"))
    asked = f"{model} --soc snapdragon-8gen3 -p 32 -n 4".split()
    result = run(*asked, "--units", "auto", "--explain")
    assert result.exit_code == 0, result.output
    assert "chosen: " in result.stdout
    auto = json.loads(run(*asked, "--units", "auto", "--what-if", "gpu=2x", "--json").stdout)
    assert set(auto["units"]) <= {"cpu", "gpu", "npu"}
    one = json.loads(run(*asked, "--units", "cpu", "--json").stdout)
    assert (one["units"], one["cut"]) == (["cpu"], False)
    refused = run(*asked, "--units", "auto", "--split", "auto")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
