"""Units that are chosen: never predicted slower than any set that could be named."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from simulated import LLAMA_1B, PHONE, SMALL, on_paper
from tiny_models import write_tiny
from typer.testing import CliRunner

from coterie.cli import app
from coterie.errors import CoterieError, PlanError
from coterie.scheduler.choice import allowed, choices, one_choice, preset_choice
from coterie.scheduler.presets import load_preset, preset_names
from coterie.scheduler.simulate import Question
from coterie.scheduler.soc import Device
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


@pytest.mark.parametrize("soc", ["snapdragon-8gen3", "dimensity-9300", "rk3588", "raspberry-pi-5", "orin"])
@pytest.mark.parametrize("near", [False, True])
def test_no_preset_and_no_single_unit_that_is_allowed_is_faster(soc: str, near: bool) -> None:
    device, (file, spec) = load_soc(soc), on_paper(SMALL)
    question = Question(Share(1.0), prompt=200, tokens=16, threads=2)
    chosen = allowed(choices(file, spec, device, question), near=near)[0]
    assert near or chosen.exact
    single = [name for name, unit in device.units.items() if near or unit.kind == "cpu"]
    others = [one_choice(file, spec, device, question_of(device, question, name))[0] for name in single]
    has_npu = "npu" in {unit.kind for unit in device.units.values()}
    names = [name for name in preset_names() if has_npu and name != "powerinfer2"]  # which is for sparse models
    presets = [preset_choice(file, spec, device, question, load_preset(name))[0] for name in names]
    for other in others + [preset for preset in presets if near or preset.exact]:
        assert chosen.seconds <= other.seconds, other.name


def question_of(device: Device, question: Question, name: str) -> Question:
    """One unit alone; an NPU's products have lengths, so they are cut."""
    return replace(question, units=(name,), cut=(name,) if device.units[name].kind == "npu" else ())


def test_a_preset_is_what_it_says() -> None:
    file, spec = on_paper(SMALL)
    question = Question(Share(1.0), prompt=200, tokens=16, threads=2)
    (llmnpu,) = preset_choice(file, spec, PHONE, question, load_preset("llmnpu"))
    assert llmnpu.simulation.units == ["npu", "cpu"]
    assert llmnpu.answer.plan.chunk == 256
    (chunk, _) = llmnpu.simulation.prompt_steps()
    assert {task.unit for task in chunk.tasks if task.name == "matmul"} == {"npu"}
    alone = one_choice(file, spec, PHONE, replace(question, chunk=256))[0]
    assert llmnpu.answer.decode is not None
    assert alone.answer.decode is not None
    assert llmnpu.answer.decode.seconds == alone.answer.decode.seconds  # decode is the CPU's
    (hetero,) = preset_choice(file, spec, PHONE, question, load_preset("heteroinfer"))
    assert hetero.simulation.units == ["npu", "cpu", "gpu"]
    assert (llmnpu.exact, hetero.exact, alone.exact) == (False, False, True)


def test_where_there_is_no_gpu_a_token_is_cut_with_the_npu() -> None:
    file, spec = on_paper(SMALL)
    units = {name: unit for name, unit in PHONE.units.items() if unit.kind != "gpu"}
    question = Question(Share(1.0), prompt=200, tokens=16, threads=2)
    (found,) = preset_choice(file, spec, replace(PHONE, units=units), question, load_preset("heteroinfer"))
    assert (found.question.cut, found.question.decode) == (("npu", "cpu"), ("npu", "cpu"))
    assert found.answer.decode is not None


def test_what_is_near_is_not_taken_unasked() -> None:
    file, spec = on_paper(SMALL)
    found = choices(file, spec, PHONE, Question(Share(1.0), prompt=200, tokens=4, threads=2))
    assert not found[0].exact
    assert allowed(found, near=True) == found
    assert [choice.name for choice in allowed(found, near=False)] == ["cpu"]
    with pytest.raises(PlanError, match="of class near: allow that with --allow-near"):
        allowed([choice for choice in found if not choice.exact], near=False)


def test_all_sets_are_looked_at_and_the_same_answer_comes_again() -> None:
    file, spec = on_paper(SMALL)
    question = Question(Share(1.0), prompt=32, tokens=4, threads=2)
    found = choices(file, spec, PHONE, question)
    assert len(found) == len({choice.name for choice in found})
    assert {choice.question.units for choice in found if not choice.preset} == {
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
    model = str(write_tiny(tmp_path / "tiny.gguf", dim=256, ffn=1024, formats="Q8_0", context=512))
    asked = f"{model} --soc snapdragon-8gen3 -p 300 -n 4".split()
    result = run(*asked, "--units", "auto", "--explain")
    assert result.exit_code == 0, result.output
    assert "chosen: cpu (exact); the others take" in result.stdout
    assert "--allow-near allows them" in result.stdout
    auto = json.loads(run(*asked, "--units", "auto", "--what-if", "gpu=2x", "--json").stdout)
    assert (auto["units"], auto["preset"]) == (["cpu"], None)
    near = json.loads(run(*asked, "--units", "auto", "--allow-near", "--json").stdout)
    assert {choice["numerics"] for choice in near["choices"]} == {"exact", "near"}
    assert {"llmnpu", "heteroinfer"} <= {choice["name"] for choice in near["choices"]}
    assert near["choices"][0]["seconds"] == min(choice["seconds"] for choice in near["choices"])
    preset = json.loads(run(*asked, "--preset", "heteroinfer", "--json").stdout)
    assert (preset["preset"], preset["decode_units"]) == ("heteroinfer", ["gpu", "cpu"])
    one = json.loads(run(*asked, "--units", "cpu", "--json").stdout)
    assert (one["units"], one["cut"]) == (["cpu"], False)
    refused = run(*asked, "--units", "auto", "--split", "auto")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    for words in (["--preset", "llmnpu", "--units", "auto"], ["--preset", "tpu"]):
        refused = run(*asked, *words)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
