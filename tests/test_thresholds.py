"""Thresholds and cores: the methods against their definitions in loops, the file, whether they pay, the command."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from command_line import coterie, refused
from damage import damaged_bytes, little_memory_and_no_hang, survives
from tiny_models import TEXT, write_tiny

from coterie.commands.calibrate import Report, Row
from coterie.errors import ModelError
from coterie.models import thresholds as subject
from coterie.models.llama import Floats, Network, Weights, activated, feed_forward
from coterie.models.load import ARCHITECTURES, Model
from coterie.models.spec import ModelSpec
from coterie.models.thresholds import TENSORS, Calibration, Thresholds, core
from coterie.opening import open_model
from coterie.scheduler.profile import DeviceProfile, FlashProfile, FlashRow, file_system, save_profile
from coterie.scheduler.skipping import Costs, Machine, known_machine

TOKENS = [int(token) for token in np.random.default_rng(5).integers(3, 300, 96)]
PROMPT = 40


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("thresholds") / "m.gguf"
    opened = open_model(write_tiny(path, request.param, formats="Q8_0"))
    yield opened
    opened.close()


def logits(model: Model, network: Network) -> Floats:
    forward = ARCHITECTURES[model.spec.architecture].forward
    values: Floats = forward(model.spec, model.source.floats, TOKENS, network)
    return values


def calibrated(model: Model, sparsities: list[int]) -> Thresholds:
    calibration = Calibration(len(model.spec.layers))
    logits(model, calibration.network)
    return calibration.thresholds(model.source.key(), sparsities)


def gate_up_down(weights: Weights, layer: int) -> tuple[Floats, Floats, Floats]:
    gate, up, down = (weights(f"blk.{layer}.ffn_{name}.weight").T for name in ("gate", "up", "down"))
    return gate, up, down


def slow_cats(at: Floats) -> Network:
    def network(spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
        gate, up, down = gate_up_down(weights, layer)
        gates, ups = h @ gate, h @ up
        hidden = activated(spec.activation, gates, ups)
        for token in range(PROMPT, len(h)):
            for neuron in range(spec.ffn_dim):
                alone = activated(spec.activation, gates[token, neuron : neuron + 1], np.ones(1, np.float32))
                if abs(alone[0]) < at[layer]:
                    hidden[token, neuron] = 0
        return hidden @ down

    return network


def slow_teal(inputs: Floats, hiddens: Floats) -> Network:
    def network(spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
        gate, up, down = gate_up_down(weights, layer)
        h = h.copy()
        for token in range(PROMPT, len(h)):
            for column in range(spec.dim):
                if abs(h[token, column]) < inputs[layer]:
                    h[token, column] = 0
        hidden = activated(spec.activation, h @ gate, h @ up)
        for token in range(PROMPT, len(h)):
            for neuron in range(spec.ffn_dim):
                if abs(hidden[token, neuron]) < hiddens[layer]:
                    hidden[token, neuron] = 0
        return hidden @ down

    return network


def slow_core(share: float, every: int) -> Network:
    def network(spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
        gate, up, down = gate_up_down(weights, layer)
        hidden = activated(spec.activation, h @ gate, h @ up)
        kept = hidden.copy()
        for token in range(PROMPT, len(h)):
            chosen_at = PROMPT + (token - PROMPT) // every * every
            votes = [0] * spec.ffn_dim
            for row in hidden[:chosen_at]:
                strongest = sorted(range(spec.ffn_dim), key=lambda neuron: -abs(row[neuron]))
                for neuron in strongest[: round(0.4 * spec.ffn_dim)]:
                    votes[neuron] += 1
            ranking = sorted(range(spec.ffn_dim), key=lambda neuron: (-votes[neuron], neuron))
            for neuron in ranking[spec.ffn_dim - round(share * spec.ffn_dim) :]:
                kept[token, neuron] = 0
        return kept @ down

    return network


def test_the_asked_share_is_under_the_thresholds(model: Model) -> None:
    seen: dict[tuple[str, int], Floats] = {}

    def looked_on(spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
        gate, up, _ = gate_up_down(weights, layer)
        seen["input", layer] = np.abs(h)
        seen["gate", layer] = np.abs(activated(spec.activation, h @ gate, np.ones_like(h @ gate)))
        seen["hidden", layer] = np.abs(activated(spec.activation, h @ gate, h @ up))
        return feed_forward(spec, weights, layer, h)

    logits(model, looked_on)
    sparsities = [1, 10, 25, 50, 75, 99]
    found = calibrated(model, sparsities)
    for name, layer in seen:
        for row, percent in enumerate(sparsities):
            share = (seen[name, layer] < getattr(found, name)[row, layer]).mean()
            assert share == pytest.approx(percent / 100, abs=0.01)


def test_calibrating_is_looking_on(model: Model) -> None:
    np.testing.assert_array_equal(logits(model, Calibration(2).network), logits(model, feed_forward))


@pytest.mark.parametrize("method", subject.METHODS)
def test_leaving_out_nothing_is_the_dense_model(method: str, model: Model) -> None:
    nothing = np.zeros((1, len(model.spec.layers)), np.float32)
    none = Thresholds(b"", (0,), nothing, nothing, nothing)
    np.testing.assert_array_equal(logits(model, none.network(method, 0, PROMPT)), logits(model, feed_forward))


@pytest.mark.parametrize("percent", [20, 60])
def test_methods_are_what_their_definitions_say(percent: int, model: Model) -> None:
    found = calibrated(model, [20, 60])
    row = [20, 60].index(percent)
    pairs = {
        "cats": (found.network("cats", percent, PROMPT), slow_cats(found.gate[row])),
        "teal": (found.network("teal", percent, PROMPT), slow_teal(found.input[row], found.hidden[row])),
        "core": (found.network("core", percent, PROMPT), slow_core(percent / 100, subject.RESELECT)),
        "core, chosen often": (core(percent / 100, PROMPT, every=7), slow_core(percent / 100, 7)),
    }
    dense = logits(model, feed_forward)
    for network, slow in pairs.values():
        ours = logits(model, network)
        np.testing.assert_array_equal(ours, logits(model, slow))
        np.testing.assert_array_equal(ours[:PROMPT], dense[:PROMPT])
        assert (ours[PROMPT:] != dense[PROMPT:]).any()


def test_a_new_topic_gets_a_core_of_its_own(model: Model) -> None:
    """With unit matrices what comes out shows which neurons were computed: those of the topic before, then its own."""
    n = 8
    spec = replace(model.spec, dim=n, ffn_dim=n)
    topics = np.full((32, n), 0.01, np.float32)
    topics[:8, :4] = topics[8:, 4:] = 1

    def unit(_: str) -> Floats:
        return np.eye(n, dtype=np.float32)

    first, second = np.arange(n) < 4, np.arange(n) >= 4
    kept = core(0.5, 8, every=12)(spec, unit, 0, topics) != 0
    np.testing.assert_array_equal(kept[8:20], np.tile(first, (12, 1)))
    np.testing.assert_array_equal(kept[20:], np.tile(second, (12, 1)))
    always = core(0.5, 8, every=1000)(spec, unit, 0, topics) != 0
    np.testing.assert_array_equal(always[8:], np.tile(first, (24, 1)))


def some_thresholds() -> Thresholds:
    steps = np.linspace(0, 1, 6, dtype=np.float32).reshape(3, 2)
    return Thresholds(bytes(range(32)), (10, 20, 60), steps, 2 * steps, 3 * steps)


def read(data: bytes, model: bytes = bytes(range(32)), layers: int = 2) -> Thresholds:
    return Thresholds.from_bytes(data, "FILE", model, layers)


def test_a_file_comes_back_as_it_was_written() -> None:
    made = some_thresholds()
    found = read(made.to_bytes())
    assert (found.model, found.sparsities) == (made.model, made.sparsities)
    for name in TENSORS:
        np.testing.assert_array_equal(getattr(found, name), getattr(made, name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "something"}, "no thresholds file"),
        ({"version": 2}, "not version 1"),
        ({"version": None}, "not version 1"),
        ({"model": bytes(32)}, "made for another model"),
        ({"sparsities": []}, "ascending"),
        ({"sparsities": [10, 10, 60]}, "ascending"),
        ({"sparsities": [10, 20, 100]}, "ascending"),
        ({"sparsities": [True, 20, 60]}, "ascending"),
        ({"sparsities": [10, 20]}, "gate is not 2 x 2"),
        ({"gate": bytes(20)}, "gate is not 3 x 2"),
        ({"hidden": None}, "hidden is not 3 x 2"),
        ({"input": np.array([0, 0, 1, np.nan, 2, 2], "<f4").tobytes()}, "input are not finite"),
        ({"input": np.array([0, 0, 1, 1, np.inf, 2], "<f4").tobytes()}, "input are not finite"),
        ({"input": np.array([-1, 0, 1, 1, 2, 2], "<f4").tobytes()}, "input are not finite"),
        ({"input": np.array([0, 0, 3, 1, 2, 2], "<f4").tobytes()}, "grow with the sparsity"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(change: dict[str, Any], words: str) -> None:
    content = msgpack.unpackb(some_thresholds().to_bytes())
    with pytest.raises(ModelError, match=words) as caught:
        read(msgpack.packb(content | change))
    assert "\n" not in str(caught.value)


def test_thresholds_of_another_depth_are_refused() -> None:
    with pytest.raises(ModelError, match="gate is not 3 x 5"):
        read(some_thresholds().to_bytes(), layers=5)


def test_damaged_files_are_refused_or_harmless() -> None:
    whole, chance = some_thresholds().to_bytes(), random.Random(1)

    def use(data: bytes) -> None:
        found = read(data)
        assert all(np.isfinite(getattr(found, name)).all() for name in TENSORS)

    with little_memory_and_no_hang():
        sound = sum(survives(use, damaged_bytes(chance, whole, len(whole))) for _ in range(1000))
    assert sound < 250  # some magnitudes, made another


MACHINE = Machine(sequential=1e9, reads=1e5, memory=1e12)
COSTS = Costs(total=100 << 20, gate=20 << 20, up=20 << 20, down=20 << 20, neurons=10_240)


def test_what_a_method_saves_and_costs() -> None:
    missing = 50 << 20
    assert COSTS.seconds("dense", 0, 0.5, MACHINE) == pytest.approx(missing / 1e9)
    # CATS skips Up and Down, 4 KiB a neuron, and all of these that there are can be missing; 10 MiB are dense.
    assert COSTS.skipped("cats", 0.25) == 10 << 20
    assert COSTS.seconds("cats", 0.25, 0.5, MACHINE) == pytest.approx((10 << 20) / 1e9 + 7680 / 1e5)
    assert COSTS.seconds("cats", 0.25, 0.9, MACHINE) == pytest.approx(2560 * 0.75 / 1e5)
    assert COSTS.seconds("teal", 0.25, 0.5, MACHINE) == pytest.approx((30 << 20) / 1e9 + 7680 / 1e5)
    assert COSTS.seconds("core", 0.5, 0.5, MACHINE) == pytest.approx((20 + 50 / subject.RESELECT) * 2**20 / 1e9)
    slow_memory = replace(MACHINE, memory=1e6)
    assert COSTS.seconds("core", 0.5, 0.5, slow_memory) == pytest.approx(70 * 2**20 / 1e6)


@pytest.mark.parametrize("method", subject.METHODS)
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_at_the_break_even_a_token_takes_what_it_takes_densely(method: str, share: float) -> None:
    even = COSTS.break_even(method, share, MACHINE)
    assert 0 < even < 1
    dense = COSTS.seconds("dense", 0, share, MACHINE)
    assert COSTS.seconds(method, even, share, MACHINE) == pytest.approx(dense)
    assert COSTS.seconds(method, even + 0.01, share, MACHINE) < dense


def test_costs_are_of_the_files_tensors(model: Model) -> None:
    costs = Costs.of(model.source, model.spec)
    assert costs.gate == costs.up == 2 * 96 * 64 // 32 * 34
    assert costs.total == sum(tensor.nbytes for tensor in model.source.tensors.values())
    assert costs.neurons == 2 * 96


def profile_of(path: Path, rows: tuple[FlashRow, ...], memory: float | None = 4e10) -> DeviceProfile:
    return DeviceProfile(memory, {file_system(path): FlashProfile("io_uring", 1 << 20, 8, 2.5e9, False, rows)})


def test_a_machine_is_known_when_small_reads_were_measured(tmp_path: Path) -> None:
    small = FlashRow("random", "io_uring", 4096, 32, 1 << 30, 50_000 * 4096, 6.0)
    rows = small, replace(small, depth=1, bytes_per_s=4096), replace(small, pattern="sequential", bytes_per_s=1e9)
    assert known_machine(profile_of(tmp_path, rows), tmp_path) == Machine(2.5e9, 50_000, 4e10)
    assert known_machine(profile_of(tmp_path, rows, memory=None), tmp_path) is None
    assert known_machine(profile_of(tmp_path, (replace(small, block=1 << 20),)), tmp_path) is None
    assert known_machine(DeviceProfile(4e10), tmp_path) is None


def report(*rises: float, speed: float | None) -> Report:
    dense = Row("dense", 0, 10.0, 0.1, 0.0, 0.0, 0.0, 5.0 if speed else None)
    rows = [Row("cats", 10 * n, 10.0, 0.1, rise, 0.01, 1e6, speed) for n, rise in enumerate(rises, 1)]
    return Report([dense, *rows], 100, {"cats": 0.9})


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (report(0.01, 0.2, speed=None), "cats: not known whether it pays; measure"),
        (report(0.01, 0.2, speed=4.0), r"cats: refused: on this disk it pays from 90.0% on, .* allows up to 10 %"),
        (report(0.1, 0.2, speed=8.0), r"cats: refused: .* allows not even 10 %"),
        (report(0.01, 0.04, speed=8.0), r"cats: would pay: 8 tokens/s at 10 % instead of 5; .* allows up to 20 %"),
    ],
)
def test_verdicts(given: Report, verdict: str) -> None:
    (line,) = given.verdicts()
    assert re.match(verdict, line), line


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A tiny model and a text; no profile."""
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path / "home"))
    (tmp_path / "text").write_text(30 * TEXT)
    return str(write_tiny(tmp_path / "m.gguf")), str(tmp_path / "text")


SHORT = ("--tokens", "64", "-c", "32", "--chunks", "2", "--sparsity", "50,10")


def test_the_command_writes_thresholds_and_a_table(files: tuple[str, str], tmp_path: Path) -> None:
    model, text = files
    result = coterie("calibrate", model, "-f", text, "-o", str(tmp_path / "t"), *SHORT)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    cells = [line.split(" | ")[:2] for line in lines[2:9]]
    assert cells == [["| dense", "0 %"], *([f"| {each}", f"{n} %"] for each in subject.METHODS for n in (10, 50))]
    assert all("not known whether it pays" in line for line in lines[-3:])
    opened = open_model(model)
    found = Thresholds.from_bytes((tmp_path / "t").read_bytes(), "t", opened.source.key(), 2)
    opened.close()
    assert found.sparsities == (10, 50)

    again = coterie("calibrate", model, "-f", text, "--thresholds", str(tmp_path / "t"), "-c", "32", "--chunks", "1")
    assert again.exit_code == 0, again.stderr
    assert "| cats | 50 % |" in again.stdout


def test_the_command_says_whether_it_pays(files: tuple[str, str], tmp_path: Path) -> None:
    model, text = files
    row = FlashRow("random", "io_uring", 4096, 32, 1 << 30, 50_000 * 4096, 6.0)
    save_profile(profile_of(tmp_path, (row,)))
    result = coterie("calibrate", model, "-f", text, *SHORT, "--method", "cats", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert [(row["method"], row["sparsity"]) for row in data["rows"]] == [("dense", 0), ("cats", 10), ("cats", 50)]
    assert data["tokens_scored"] == 2 * 15
    assert data["break_even"]["cats"] > 0.99
    assert data["verdicts"][0].startswith("cats: refused: on this disk it pays from 99.")
    assert data["rows"][0].keys() == asdict(Row("", 0, 0, 0, 0, 0, 0, 0)).keys()


def test_mistakes_are_one_line(files: tuple[str, str], tmp_path: Path) -> None:
    model, text = files
    other, relu = write_tiny(tmp_path / "other.gguf", seed=1, layers=3), write_tiny(tmp_path / "r.gguf", sparse=True)
    (tmp_path / "t").write_bytes(replace(some_thresholds(), model=bytes(32)).to_bytes())
    given = ("calibrate", model, "-f", text)
    refused(coterie("calibrate", model), "which text")
    refused(coterie("calibrate", str(relu), "-f", text, *SHORT), "relu", "SwiGLU")
    refused(coterie(*given, "--sparsity", "0,10"), "from 1 to 99")
    refused(coterie(*given, "--sparsity", "ten"), "from 1 to 99")
    refused(coterie(*given, "-c", "1000"), "512 positions at most")
    refused(coterie(*given, "-c", "512", "--chunks", "1000"), "chunks of 512 tokens", "give more text")
    refused(coterie(*given, "--thresholds", str(tmp_path / "t"), "-o", "x"), "made already")
    refused(coterie(*given, "--thresholds", str(tmp_path / "no"), "-c", "32"), "cannot read")
    refused(coterie(*given, "--thresholds", text, "-c", "32"), "no thresholds file", code=3)
    refused(coterie("calibrate", str(other), "-f", text, "--thresholds", str(tmp_path / "t"), "-c", "32"), code=3)
    refused(coterie(*given, *SHORT, "-o", str(tmp_path / "no" / "t")), "cannot write")
    refused(coterie(*given, *SHORT, "-o", model), "is there and holds no thresholds")
    assert coterie(*given, *SHORT, "-o", str(tmp_path / "t"), "--method", "cats").exit_code == 0
