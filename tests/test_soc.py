"""Descriptions of devices: what is there is known by its source, and what makes no sense is refused in one line."""

import itertools
import random
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coterie.cli import app
from coterie.errors import CoterieError, UsageError
from coterie.scheduler.soc_file import flash_of_soc, load_soc, parse_soc, soc_names

NAMES = (
    *("core-ultra", "dimensity-9300", "orin", "raspberry-pi-5", "rk3588"),
    *("snapdragon-8-elite", "snapdragon-8gen3", "snapdragon-8plus-gen1"),
)
LEAST = """
name = "least"
[memory]
source = "somewhere"
total = 1000
together = 2e9
[units.cpu]
kind = "cpu"
source = "somewhere"
bandwidth = 1e9
[units.cpu.formats.w4]
guessed = ["rate"]
rate = 1e9
"""


def test_all_devices_can_be_read() -> None:
    assert soc_names() == sorted(NAMES)
    for name in NAMES:
        device = load_soc(name)
        assert device.emulated
        assert device.marks
        assert {mark.how for mark in device.marks} <= {"printed", "fitted", "guessed"}
        assert all(mark.source or mark.how == "guessed" for mark in device.marks)
        assert flash_of_soc(name) is device.flash


def test_printed_constants_of_the_papers_phone_are_not_guesses() -> None:
    guesses = load_soc("snapdragon-8gen3").guesses()
    for path in ("memory.together", "units.npu.step", "units.cpu.bandwidth", "units.gpu.fence", "flash.points"):
        assert path not in guesses
    assert "flash.latency" in guesses


def test_a_least_device() -> None:
    device = parse_soc(LEAST.encode(), "least.toml")
    assert device.flash is None
    assert device.guesses() == ("units.cpu.formats.w4.rate",)
    assert device.unit("cpu").rates_of("matmul:Q4_0:4", "Q4_0").rate == 1e9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("total = 1000", "total = -1000", "memory.total is -1000"),
        ("total = 1000", "total = 1.5", "memory.total is 1.5"),
        ("total = 1000", "", "memory.total is missing"),
        ("total = 1000", "total = true", "memory.total is True"),
        ("together = 2e9", "together = nan", "memory.together is nan"),
        ("together = 2e9", "together = inf", "memory.together is inf"),
        ("together = 2e9", "together = 0", "memory.together is 0"),
        ("together = 2e9", 'together = "fast"', "memory.together is 'fast'"),
        ("bandwidth = 1e9", "bandwidth = -1e9", "units.cpu.bandwidth is -1000000000.0"),
        ("bandwidth = 1e9", "", "units.cpu.bandwidth is missing"),
        ("bandwidth = 1e9", "bandwidth = 1e9\nspeed = 3", "units.cpu.speed is not known"),
        ("bandwidth = 1e9", 'bandwidth = 1e9\nshares = "cpu"', "cpu -> cpu goes in a circle"),
        ("bandwidth = 1e9", 'bandwidth = 1e9\nshares = "gpu"', "there is no unit 'gpu'"),
        ("bandwidth = 1e9", 'bandwidth = 1e9\ndefault = "int8"', "units.cpu.default is 'int8'"),
        ("bandwidth = 1e9", "bandwidth = 1e9\nstep = 0", "units.cpu.step is 0"),
        ("bandwidth = 1e9", "bandwidth = 1e9\nbeside_flash = 1.5", "units.cpu.beside_flash is 1.5"),
        ('kind = "cpu"', 'kind = "tpu"', "units.cpu.kind is 'tpu'"),
        ('source = "somewhere"\nbandwidth', "bandwidth", "units.cpu.bandwidth has no source"),
        ('guessed = ["rate"]', 'guessed = ["rates"]', "must be a list of this table's constants: rate"),
        ('[units.cpu.formats.w4]\nguessed = ["rate"]\nrate = 1e9', "", "units.cpu.formats is missing"),
        ("[memory]", "[memory", "least.toml"),
        ("[memory]", "[flash]\nbeside = 0.5\n[memory]", "flash.points is missing"),
    ],
)
def test_what_makes_no_sense_is_refused(old: str, new: str, message: str) -> None:
    assert old in LEAST
    with pytest.raises(UsageError, match=r"least\.toml") as caught:
        parse_soc(LEAST.replace(old, new).encode(), "least.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_units_that_share_cores_in_a_circle() -> None:
    more = LEAST.replace("bandwidth = 1e9", 'bandwidth = 1e9\nshares = "gpu"') + LEAST[LEAST.index("[units") :].replace(
        "units.cpu", "units.gpu"
    ).replace("bandwidth = 1e9", 'bandwidth = 1e9\nshares = "cpu"')
    with pytest.raises(UsageError, match=r"cpu -> gpu -> cpu goes in a circle"):
        parse_soc(more.encode(), "two.toml")


def test_points_of_flash_are_checked() -> None:
    for point in ('pattern = "zigzag", block = 4096, bytes_per_s = 1e9', 'pattern = "random", block = 4096'):
        text = LEAST + f'[flash]\nsource = "somewhere"\npoints = [{{ {point} }}]\n'
        with pytest.raises(UsageError, match=r"flash.points\[0\]"):
            parse_soc(text.encode(), "flash.toml")


def test_no_such_device() -> None:
    with pytest.raises(UsageError, match="no device is called 'toaster'; there is core-ultra"):
        load_soc("toaster")
    with pytest.raises(UsageError, match=r"cannot read /nowhere/phone\.toml"):
        load_soc("/nowhere/phone.toml")


def test_mutated_files_never_give_a_traceback(tmp_path: Path) -> None:
    chance, text = random.Random(1), (Path(__file__).parent.parent / "configs/soc/snapdragon-8gen3.toml").read_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(text)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            data[at : at + chance.randint(0, 3)] = bytes(chance.randrange(256) for _ in range(chance.randint(0, 3)))
        said = refusal(bytes(data))
        refused += bool(said)
        assert "\n" not in said
    assert refused > 100


def refusal(data: bytes) -> str:
    """What is said of a file; nothing of one that can be read."""
    try:
        parse_soc(data, "mutant.toml")
    except CoterieError as error:
        return str(error)
    return ""


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text(LEAST.replace("1e9", "nan", 1))
    result = CliRunner().invoke(app, ["simulate", "nothing.gguf", "--soc", str(broken)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "bandwidth is nan" in result.stderr


def test_every_number_has_a_home() -> None:
    """No table of a device's file is left unread, so every constant in it is used."""
    for name in NAMES:
        path = Path(__file__).parent.parent / f"configs/soc/{name}.toml"
        values = tomllib.loads(path.read_text())
        assert set(values) <= {"name", "about", "memory", "host", "units", "flash"}
        assert len(load_soc(name).marks) == len(list(itertools.chain(*map(numbers, values.values()))))


def numbers(value: object) -> list[object]:
    """Constants of a table: a list of points counts as one."""
    if isinstance(value, dict):
        return [each for part in value.values() for each in numbers(part)]
    if isinstance(value, list):
        return [value] if value and isinstance(value[0], dict) else []
    return [value] if type(value) in (int, float) else []
