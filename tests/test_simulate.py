"""Simulations: real plans and programs, in virtual and in dilated time, are bound by what they should be."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from simulated import DENSE_47B, LLAMA_1B, LLAMA_8B, PHONE, SMALL, on_paper, simulation
from tiny_models import write_tiny
from typer.testing import CliRunner

from coterie.actors.dilated import DilatedClock
from coterie.cli import app
from coterie.errors import PlanError, UsageError
from coterie.scheduler.clock import Clock, Outcome
from coterie.scheduler.flash_model import FlashModel, FlashPoint
from coterie.scheduler.operators import Rows
from coterie.scheduler.simulate import Question, Simulation
from coterie.scheduler.soc_file import parse_soc
from coterie.scheduler.steps import NO_LAUNCH, Request, Requests, Step, Task
from coterie.scheduler.what_if import changed
from coterie.sizes import Share
from coterie.storage.flash_file import is_flash_file

SIMPLE = """
name = "simple"
[memory]
source = "made up"
total = 8_000_000_000_000
together = 1e15
[units.cpu]
kind = "cpu"
source = "made up"
bandwidth = 1e10
[units.cpu.formats.w4]
source = "made up"
rate = 1e15
vector = { launch = 0, source = "made up" }
[flash]
source = "made up"
read = 1_048_576
points = [{ pattern = "sequential", block = 4096, bytes_per_s = 1e9 }]
"""
SIMPLE_DEVICE = parse_soc(SIMPLE.encode(), "simple.toml")


def shares_of(**shares: float) -> tuple[tuple[str, float], ...]:
    return tuple(shares.items())


def test_a_step_has_the_instructions_of_the_program() -> None:
    for memory in (Share(1.0), Share(0.5)):
        made = simulation(memory=memory)
        for name, rows in (("decode", Rows(1, 9)), ("prefill", Rows(16, 0)), ("head", Rows(1, 15))):
            program = made.layout.programs[name]
            operators = made.reader.operators(program, rows)
            assert len(operators) == program.length
            assert all(wait < i for i, each in enumerate(operators) for wait in each.waits)
        operators = made.reader.operators(made.layout.programs["decode"], Rows(1, 9))
        used = sum(each.instruction.nbytes for each in operators if each.instruction.kind in ("matmul", "ffn"))
        assert used == pytest.approx(made.plan.bytes_per_token, rel=0.01)
        step = made.step("decode", Rows(1, 9))
        assert sum(request.nbytes for request in step.requests) == made.plan.streamed_per_token
        assert {task.unit for task in step.tasks} == {"cpu"}


def test_positions_change_attention_only() -> None:
    made = simulation()
    near, far = (made.reader.operators(made.layout.programs["decode"], Rows(1, at)) for at in (0, 400))
    differing = [a.instruction.kind for a, b in zip(near, far, strict=True) if a != b]
    assert differing == ["attention"] * len(made.spec.layers)
    assert far[2].instruction.nbytes == 401 * near[2].instruction.nbytes


def test_in_memory_a_token_takes_what_reading_takes() -> None:
    decode = simulation(SIMPLE_DEVICE, prompt=0).answer().decode
    assert decode is not None
    made = simulation(SIMPLE_DEVICE, prompt=0)
    assert decode.seconds == pytest.approx(made.plan.bytes_per_token / 1e10, rel=0.02)
    assert decode.bottleneck == "cpu: memory"
    assert decode.read_per_token == 0


@pytest.mark.parametrize("part", [0.8, 0.6, 0.4])
def test_streamed_a_token_takes_what_the_slower_one_takes(part: float) -> None:
    for speed in (0.1e9, 5e9, 1e12):
        text = SIMPLE.replace("bytes_per_s = 1e9", f"bytes_per_s = {speed}")
        made = simulation(parse_soc(text.encode(), "x.toml"), LLAMA_1B, memory=Share(part), prompt=0)
        decode, outcome = made.decode()
        reading = made.plan.streamed_per_token / speed
        computing = made.plan.bytes_per_token / 1e10
        assert max(reading, computing) * 0.98 <= decode.seconds <= 1.15 * max(reading, computing) + 0.003
        assert (decode.bottleneck == "flash") == (reading > computing)
        assert outcome.read == 2 * made.plan.streamed_per_token


def test_a_token_that_is_bound_by_flash_keeps_it_busy() -> None:
    made = simulation(SIMPLE_DEVICE, LLAMA_8B, memory=Share(0.25), prompt=0)
    decode, _ = made.decode()
    assert decode.busy["flash"] > 0.97
    assert decode.waits["cpu"]["weights"] > 0.5


def test_more_memory_and_faster_flash_are_never_slower() -> None:
    rates = [
        simulation(shape=LLAMA_1B, memory=Share(part), prompt=0).decode()[0].tokens_per_s
        for part in (0.25, 0.5, 0.75, 1)
    ]
    assert rates == sorted(rates)
    question = Question(Share(0.5), prompt=0, tokens=4)
    speeds = []
    for factor in ("0.5x", "1x", "2x", "8x"):
        device, asked = changed(f"flash={factor}", PHONE, question)
        speeds.append(Simulation(*on_paper(LLAMA_1B), device, asked).decode()[0].tokens_per_s)
    assert speeds == sorted(speeds)


def test_reads_never_run_further_ahead_than_the_ring() -> None:
    made = simulation(shape=LLAMA_1B, memory=Share(0.3), prompt=0)
    steps = [made.step("decode", Rows(1, at)) for at in (5, 6)]
    outcome = made.run(steps)
    reads = [event for event in outcome.events if event.unit == "flash"]
    frees, number, freed = [], 0, 0.0
    for n, step in enumerate(steps):
        done = [event for event in outcome.events if event.unit == "cpu" and event.step == n]
        for task, event in zip(step.tasks, done, strict=True):
            if task.frees:
                frees.append(
                    (event.end, sum(r.nbytes for s in steps[:n] for r in s.requests) + freed_to(step, task.frees))
                )
    arrived = 0
    for read in reads:
        freed = max((nbytes for end, nbytes in frees if end <= read.start + 1e-12), default=0)
        arrived += read.nbytes
        assert arrived - freed <= made.plan.ring
        number += 1
    assert number == 2 * len(steps[0].requests)


@pytest.mark.parametrize(("slots", "rate"), [(1, 1e9), (8, 4e9)])
def test_flash_is_as_fast_as_the_ring_has_room_for_reads(slots: int, rate: float) -> None:
    known = {depth: FlashModel((FlashPoint("sequential", 4096, depth * 1e9),)) for depth in (1, 2, 4)}
    device = replace(SIMPLE_DEVICE, flash=known[4], flashes=known, flash_depth=4)
    count, size = 64, 1 << 20
    reads = tuple(Request(n, n + 1, size, 0) for n in range(count))
    tasks = tuple(Task("cpu", "ffn", 0, NO_LAUNCH, 1e-9, 0.0, (), n + 1, n + 1, False, "memory") for n in range(count))
    ring = SimpleNamespace(pages=slots, room=lambda read: (read.first % slots, read.first % slots + 1))
    outcome = Clock(device, ["cpu"], [Step("decode", tasks, reads, 0, count, 1)], cast(Requests, ring)).run()
    assert outcome.steps[0][1] == pytest.approx(count * size / rate, rel=1e-3)


def freed_to(step: Any, position: int) -> int:
    """Bytes of a step's requests up to a tape position, at most."""
    return sum(request.nbytes for request in step.requests if request.end <= position)


def test_units_that_share_an_operator_share_memory() -> None:
    alone = simulation(shape=LLAMA_8B, units=("gpu",), prompt=0, formats={"gpu": "w4"}).decode()[0]
    both = simulation(
        shape=LLAMA_8B, units=("gpu", "npu"), split=shares_of(gpu=0.6, npu=0.4), formats={"npu": "int4"}, prompt=0
    ).decode()[0]
    assert 1.1 < both.tokens_per_s / alone.tokens_per_s < PHONE.together / 40e9
    made = simulation(shape=LLAMA_8B, prompt=0)
    assert both.tokens_per_s * made.plan.bytes_per_token < PHONE.together
    assert min(both.busy["gpu"], both.busy["npu"]) > 0.5


def test_meeting_by_flags_pays_off() -> None:
    """Checklist row 35: with 400 us for every explicit synchronisation and copy."""
    asked: Mapping[str, Any] = {"units": ("gpu", "npu"), "split": shares_of(gpu=0.75, npu=0.25), "prompt": 256}
    fast, slow = (simulation(shape=LLAMA_1B, fence=fence, **asked).answer() for fence in (False, True))
    assert fast.decode
    assert slow.decode
    assert fast.decode.tokens_per_s / slow.decode.tokens_per_s >= 2
    large = [simulation(shape=LLAMA_8B, fence=fence, **asked).prefill()[0] for fence in (False, True)]
    assert 1.08 < large[0].tokens_per_s / large[1].tokens_per_s < 1.30


def test_the_npu_prefills() -> None:
    made = simulation(shape=LLAMA_8B, units=("cpu", "npu"), prompt=256)
    answer = made.answer()
    assert answer.prefill
    assert answer.decode
    assert answer.prefill.busy["npu"] > 0.8
    assert answer.decode.busy["npu"] == 0
    assert 150 < answer.prefill.tokens_per_s < 350  # HeteroLLM, 5.3.1: 247.9 with the GPU's help
    assert answer.prefill.joules is not None
    assert answer.guesses


@pytest.mark.parametrize(
    "asked", [{"memory": Share(0.5)}, {"units": ("gpu", "npu"), "split": shares_of(gpu=0.5, npu=0.5)}]
)
def test_dilated_time_agrees_with_the_virtual_clock(asked: dict[str, Any]) -> None:
    made = simulation(**asked)
    steps = [made.step("decode", Rows(1, at)) for at in (9, 10)]
    virtual = made.run(steps)
    factor = 1.5 / virtual.steps[-1][1]  # seconds in all: sleeping is most of it
    real = DilatedClock(made.device, made.units, steps, made.requests, factor=factor).run()
    for unit in [*made.units, "flash"]:
        assert work(real, unit) == work(virtual, unit)
        assert real.busy[unit] >= 0.999 * virtual.busy[unit]
    assert real.read == virtual.read
    # A busy machine wakes threads late, and never early: what the model says is the least.
    assert real.steps[-1][1] >= 0.999 * virtual.steps[-1][1]
    ends = {(e.unit, e.name, e.layer, e.step): e.end for e in virtual.events}
    assert all(e.end >= 0.99 * ends[e.unit, e.name, e.layer, e.step] or e.unit == "flash" for e in real.events[-3:])


def work(outcome: Outcome, unit: str) -> list[tuple[str, int]]:
    """What a unit did, in its order."""
    return [(event.name, event.layer) for event in outcome.events if event.unit == unit]


def test_an_8b_token_is_simulated_quickly_and_a_47b_prompt_in_seconds() -> None:
    made = simulation(shape=LLAMA_8B, memory=Share(0.5), prompt=0)
    spent = []
    for at in range(100, 105):
        begun = time.process_time()
        made.run([made.step("decode", Rows(1, at))], record=False)
        spent.append(time.process_time() - begun)
    assert min(spent) < 0.1  # 0.04 on a quiet machine; this one may be anything
    begun = time.process_time()
    answer = simulation(shape=DENSE_47B, memory=12 << 30, prompt=512, tokens=4).answer()
    assert time.process_time() - begun < 20
    assert answer.decode
    assert answer.decode.bottleneck == "flash"


def test_steps_that_can_never_end_are_noticed() -> None:
    made = simulation(memory=Share(0.5), prompt=0)
    step = made.step("decode", Rows(1, 9))
    stuck = replace(step, tasks=tuple(task._replace(frees=0) for task in step.tasks))
    with pytest.raises(PlanError, match="cannot go on"):
        Clock(made.device, made.units, [stuck] * 3, made.requests).run()


def test_requests_are_merged_up_to_the_block() -> None:
    made = simulation(shape=LLAMA_1B, memory=Share(0.5), prompt=0)
    weights = made.layout.weights
    for block in (1, 1 << 20, 8 << 20):
        requests = Requests(weights, block).between(weights.begin, weights.positions[2])
        assert [r.first for r in requests] == [weights.begin, *[r.end for r in requests[:-1]]]
        assert all(r.nbytes <= block or r.end == r.first + 1 for r in requests)
        assert sum(r.nbytes for r in requests) == weights.streamed


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"units": ("tpu",)}, "has no unit 'tpu'"),
        ({"units": ("cpu", "cpu")}, "name each unit once"),
        ({"split": shares_of(cpu=0.5, gpu=0.4)}, "add up to 1"),
        ({"split": shares_of(cpu=1.5, gpu=-0.5)}, "at least 0.01"),
        ({"formats": {"npu": "int3"}}, "knows nothing of 'int3'"),
        ({"memory": 1 << 40}, "has 24576 MiB of memory"),
        ({"memory": "auto"}, "is for this machine"),
        ({"prompt": 0, "tokens": 0}, "nothing to simulate"),
        ({"prompt": -1}, "lengths must be"),
        ({"context": 3}, "do not fit -c 3"),
    ],
)
def test_questions_that_make_no_sense(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        simulation(**asked)


@pytest.mark.parametrize(
    "change",
    ["flash", "flash=", "flash=fast", "flash=-2x", "flash=nan", "tpu=2x", "memory=+50%", "sync=maybe", "memory=auto"],
)
def test_changes_that_make_no_sense(change: str) -> None:
    with pytest.raises(UsageError):
        changed(change, PHONE, Question(8 << 30))


def test_changes() -> None:
    device, question = changed("flash=2x,memory=+1GiB,npu=3x,bandwidth=0.5x,sync=fence", PHONE, Question(8 << 30))
    assert question.memory == 9 << 30
    assert question.fence
    assert device.flash
    assert PHONE.flash
    assert device.flash.bandwidth("sequential", 1 << 20) == pytest.approx(
        2 * PHONE.flash.bandwidth("sequential", 1 << 20)
    )
    assert device.together == PHONE.together / 2
    assert device.units["npu"].rates["int8"].rate == pytest.approx(3 * 34e12)
    assert device.units["npu"].bandwidth == pytest.approx(1.5 * 56e9)


def test_a_sparse_model_is_refused() -> None:
    file, spec = on_paper(SMALL)
    with pytest.raises(PlanError, match="cannot be simulated yet"):
        Simulation(file, replace(spec, sparse=True), PHONE, Question())


# --- the command ----------------------------------------------------------------------------------------


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["simulate", *words])


def test_the_command(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "tiny.gguf")
    timeline = tmp_path / "timeline.json"
    words = [str(model), "--soc", "snapdragon-8gen3", "--units", "cpu,npu", "-p", "32", "-n", "4"]
    result = run(*words, "--what-if", "flash=2x,bandwidth=2x", "--timeline", str(timeline))
    assert result.exit_code == 0, result.output
    assert "emulated, not this machine" in result.stdout
    assert "constants of this device are guesses" in result.stdout
    assert "if flash=2x,bandwidth=2x:" in result.stdout
    assert "wrote" in result.stderr
    events = json.loads(timeline.read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"cpu (emulated: Snapdragon 8 Gen 3)", "npu (emulated: Snapdragon 8 Gen 3)"}
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")
    data = json.loads(run(*words, "--json", "--what-if", "cpu=2x").stdout)
    assert data["emulated"]
    assert data["decode"]["tokens_per_s"] <= data["what_if"]["decode"]["tokens_per_s"]
    assert not is_flash_file(model)


@pytest.mark.parametrize(
    "words",
    [
        ["--soc", "toaster"],
        ["--soc", "/nowhere.toml"],
        ["--soc", "rk3588", "--units", ""],
        ["--soc", "rk3588", "--split", "gpu"],
        ["--soc", "rk3588", "--split", "gpu=x"],
        ["--soc", "rk3588", "--what-if", "nothing"],
        ["--soc", "rk3588", "--timeline", "/nowhere/file.json"],
        ["--soc", "raspberry-pi-5", "--units", "npu"],
        ["--soc", "rk3588", "-p", "0", "-n", "0"],
    ],
)
def test_the_command_refuses_in_one_line(tmp_path: Path, words: list[str]) -> None:
    result = run(str(write_tiny(tmp_path / "tiny.gguf")), *words)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
