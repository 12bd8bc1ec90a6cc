"""coterie units, and doctor, which shows the same."""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from command_line import coterie

from coterie.actors import ray_folder, ray_session
from coterie.commands import doctor
from coterie.errors import UnitError
from coterie.kernels import target


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COTERIE_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setattr(ray_folder, "read_session", lambda: None)


def found() -> tuple[dict[str, Any], dict[str, Any]]:
    """Units and hosts by name."""
    data = json.loads(coterie("units", "--json").stdout)
    return {unit["name"]: unit for unit in data["units"]}, {host["name"]: host for host in data["hosts"]}


def without_ray(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    real = metadata.version

    def fake(name: str) -> str:
        if name != "ray":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", fake)


def test_what_is_there_can_run_on_both_hosts() -> None:
    units, hosts = found()
    assert list(units) == ["cpu", "flash", "gpu", "npu"]
    for name in ("cpu", "flash"):
        assert units[name]["available"]
        assert units[name]["hardware"] == "real"
        assert units[name]["hosts"] == ["threads", "ray"]
        assert units[name]["why_not"] is None
    assert hosts["ray"]["version"] == metadata.version("ray")
    assert hosts["ray"]["cluster"] is None


def test_what_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("pyopencl", "openvino", "onnxruntime", "numba_cuda", "cuda"):
        monkeypatch.setitem(sys.modules, package, None)
    units, _ = found()
    for name in ("gpu", "npu"):
        assert not units[name]["available"]
        assert units[name]["hosts"] == []
        assert units[name]["hardware"] is None
        assert units[name]["get"] == f"pip install 'coterie[{name}]'"


def test_a_stand_in_is_called_one() -> None:
    units, _ = found()
    for name in ("gpu", "npu"):
        if units[name]["available"] and units[name]["hardware"] != "real":
            assert "a stand-in, no" in units[name]["runtime"]


def test_a_processor_that_will_not_do_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise UnitError("this processor has no AVX2")

    monkeypatch.setattr(target, "path", refuse)
    units, _ = found()
    assert not units["cpu"]["available"]
    assert units["cpu"]["why_not"] == "this processor has no AVX2"
    assert "cpu      this processor has no AVX2; get it: another machine" in coterie("units").stdout


@pytest.mark.parametrize("version", [None, "2.61.0"])
def test_without_our_ray_units_run_on_threads(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    without_ray(monkeypatch, version)
    units, hosts = found()
    assert units["cpu"]["hosts"] == ["threads"]
    assert not hosts["ray"]["available"]
    assert hosts["ray"]["get"] == "pip install 'ray>=2.60,<2.61'"
    assert (version or "not installed") in hosts["ray"]["why_not"]
    with pytest.raises(UnitError, match="pip install"):
        ray_session.import_ray()


def test_a_cluster_that_runs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_folder, "read_session", lambda: {"address": "127.0.0.1:5"})
    _, hosts = found()
    assert hosts["ray"]["cluster"] == "127.0.0.1:5"
    assert "your cluster is at 127.0.0.1:5" in coterie("units").stdout


def test_doctor_shows_the_same() -> None:
    data, units = json.loads(coterie("doctor", "--json").stdout), json.loads(coterie("units", "--json").stdout)
    assert {name: data[name] for name in ("units", "hosts")} == units
    text = " ".join(coterie("doctor").stdout.split())
    for line in coterie("units").stdout.splitlines():
        assert " ".join(line.split()) in text


def test_doctor_says_what_sharing_memory_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.loads(coterie("doctor", "--json").stdout)["sharing"]
    assert data["dev_shm_bytes"] >= data["dev_shm_free_bytes"] >= 0
    assert {data[name] for name in ("memfd", "proc_fd", "pidfd")} == {"works"}

    def refuse() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setitem(doctor.SHARING, "pidfd", refuse)
    data = json.loads(coterie("doctor", "--json").stdout)["sharing"]
    assert data["pidfd"] == "does not work: Operation not permitted"
