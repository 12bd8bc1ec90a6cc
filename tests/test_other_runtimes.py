"""GPU and NPU units with their real runtimes (PoCL, OpenVINO, ONNX Runtime, where installed): nothing is built in a
step, a second start builds nothing, and what vanishes or is damaged is replaced."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from command_line import coterie
from split_engines import cuts, logits
from test_other_units import prompts
from tiny_models import write_tiny

from coterie.actors.gpu import Loaded
from coterie.actors.gpus import open_device
from coterie.actors.npu_graphs import open_runtime
from coterie.divergence import divergences
from coterie.engine import Engine
from coterie.errors import UnitError
from coterie.opening import open_model
from coterie.paths import cache_dir, kernels_dir
from coterie.scheduler.placement import ROW_KINDS
from coterie.scheduler.plan import Wishes
from coterie.storage.arena import Arena

UNITS = ("cpu", "gpu", "npu")


@pytest.fixture(scope="module", autouse=True)
def _runtimes() -> None:
    try:
        open_device(Arena({"nothing": 1 << 21})).close()
        open_runtime()
    except UnitError as error:
        pytest.skip(str(error))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which nothing but the CPU unit's kernels is compiled."""
    kernels = kernels_dir()
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "kernels").symlink_to(kernels)
    monkeypatch.setenv("COTERIE_HOME", str(folder))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf", formats="Q8_0")


def opened(model: Path, trace: Path | None = None, units: tuple[str, ...] = UNITS) -> Engine:
    return Engine(open_model(model), Wishes(threads=2, context=512, chunk=64, units=units), trace=trace)


def builds(engine: Engine) -> list[int]:
    assert engine.others is not None
    return [unit["builds"] for unit in engine.others.describe()]


def test_no_step_builds_anything(model: Path, home: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    engine = opened(model, trace)
    built = builds(engine)
    assert all(count > 0 for count in built)
    prompts(engine, [1, 33, 40, 64, 65, 150])
    assert builds(engine) == built
    engine.close()
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    for unit, work in (("gpu", "step"), ("npu", "ffn")):
        own = [event for event in events if event["pid"] == names[unit] and event["ph"] == "X"]
        ends = [event["ts"] + event["dur"] for event in own if event["name"] == "build"]
        starts = [event["ts"] for event in own if event["name"] == work]
        assert ends
        assert starts
        assert max(ends) <= min(starts)

    again = opened(model)
    assert builds(again) == [0, 0]
    again.close()


@pytest.mark.parametrize(("formats", "scheme"), [("Q4_0", "w4a16"), ("Q8_0", "w8a16"), ("Q4_1", "w8a16")])
def test_tokens_on_graphs_of_one_row_are_near(formats: str, scheme: str, tmp_path: Path, home: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", formats=formats)
    asked = Wishes(threads=2, context=512, chunk=64, units=("cpu", "npu"), split="tensor")
    with closing(opened(path, units=("cpu",))) as alone, closing(Engine(open_model(path), asked)) as both:
        assert both.others is not None
        assert scheme in both.others.describe()[0]["scheme"].split(",")
        for last in (0, -1):
            cuts(both, matmul=0, ffn=0, **{kind: both.others.placement.cuts[kind].points[last] for kind in ROW_KINDS})
            exact, near = logits(alone, (5, 9, 40)), logits(both, (5, 9, 40))
            assert (exact != near).any(axis=1).sum() == 12  # the tokens; prompts are the CPU unit's
            assert divergences(exact, near).mean() < 0.01
        assert not both.supervisor.losses


def test_damaged_graphs_and_programs_are_built_again(model: Path, home: Path) -> None:
    engine = opened(model)
    built, wanted = builds(engine), prompts(engine, [40])
    engine.close()
    files = [*(cache_dir() / "graphs").glob("*.graph"), *(cache_dir() / "gpu").iterdir()]
    for i, file in enumerate(files):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data if i % 2 else data[: len(data) // 3])
    engine = opened(model)
    assert builds(engine) == built
    np.testing.assert_array_equal(prompts(engine, [40]), wanted)
    engine.close()


def test_a_gpu_that_vanishes_is_replaced_by_the_cpu_unit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, alone = opened(model, units=("gpu",)), opened(model, units=("cpu",))
    assert engine.others is not None
    assert engine.others.gpu is not None
    fails = iter([False, False, True])

    class Vanishing:
        def __init__(self, loaded: Loaded) -> None:
            self.loaded = loaded

        def run(self, tokens: int, outputs: int, records: range | None = None) -> None:
            if next(fails):
                raise UnitError("OpenCL device failed at kernel norm: DEVICE_NOT_AVAILABLE (-2)")
            self.loaded.run(tokens, outputs, records)

        def units(self, record: int) -> int:
            return self.loaded.units(record)

        def limit(self, record: int, first: int, units: int) -> None:
            self.loaded.limit(record, first, units)

    programs = engine.others.gpu._programs
    for name, (program, loaded) in list(programs.items()):
        programs[name] = program, Vanishing(loaded)
    np.testing.assert_array_equal(prompts(engine, [64, 20]), prompts(alone, [64, 20]))
    (loss,) = engine.supervisor.losses
    assert (loss.unit, loss.by) == ("gpu", "cpu")
    assert "DEVICE_NOT_AVAILABLE" in loss.reason
    engine.close()
    alone.close()


@pytest.mark.parametrize("units", [("gpu",), ("cpu", "gpu")])
def test_after_ctrl_c_nothing_is_left_in_the_queue(
    units: tuple[str, ...], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt while the device works: the next step, of whichever unit, waits for what is in the queue first."""
    engine, alone = opened(model, units=units), opened(model, units=("cpu",))
    assert engine.others is not None
    gpu = engine.others.gpu
    assert gpu is not None
    real, waits = gpu._await, list[int]()

    def interrupted(*arguments: int) -> int:
        waits.append(arguments[1])
        if len(waits) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    tokens = np.random.default_rng(3).integers(0, engine.spec.vocab, 64).tolist()
    sequence = engine.sequence()
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_await", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.prefill(sequence, tokens)
        assert gpu._under_way is not None
        sequence.close()
        found = prompts(engine, [40, 64])
    assert waits[1] == waits[0]  # the same step was waited for once more, before another began
    np.testing.assert_array_equal(found, prompts(alone, [40, 64]))
    engine.close()
    alone.close()


def test_units_are_told_of(model: Path) -> None:
    result = coterie(
        "run", str(model), "-p", "the word", "--raw", "-n", "2", "--units", "cpu,gpu,npu", "--json", "-c", "256"
    )
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert [unit["unit"] for unit in data["units"]] == ["cpu", "gpu", "npu"]
    assert data["plan"]["numerics"] == "near"
    assert set(data["plan"]["copies"]) == {"gpu", "npu"}
    assert data["units"][2]["weight_copies"] > 0
    assert "KL" in result.stderr
    assert "npu computes: prompts' matrix products" in result.stderr
    result = coterie("run", str(model), "-p", "x", "--units", "npu")
    assert (result.exit_code, "needs the CPU unit" in result.stderr) == (2, True)
