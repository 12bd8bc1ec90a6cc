"""coterie cluster: a Ray that stays, is joined, and is ended whole."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import coterie, refused
from ray_sessions import Driver, runtime_folder, sessions

from coterie.actors import keeper, ray_folder

__all__ = ["runtime_folder"]  # a fixture


@pytest.fixture(autouse=True)
def _own_surroundings(runtime_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COTERIE_CONFIG", str(tmp_path / "config.toml"))
    yield
    coterie("cluster", "stop")
    assert sessions() == []


def started(*options: str) -> dict[str, Any]:
    result = coterie("cluster", "start", "--json", *options)
    if result.exit_code:
        pytest.skip(f"no Ray here: {result.stderr}")
    return dict(json.loads(result.stdout))


def test_a_cluster_is_started_joined_and_stopped_with_all_that_runs_on_it() -> None:
    facts = started()
    assert facts["address"].startswith("127.0.0.1:")
    assert facts["memory"]["sum"] == sum(each["memory"] for each in facts["processes"])

    refused(coterie("cluster", "start"), "runs already", "coterie cluster stop", code=6)

    with Driver("auto") as driver:
        ready = driver.ready()
        assert not ready["owned"]
        assert ready["memory"]["sum"] > 0
        status = json.loads(coterie("cluster", "status", "--json").stdout)
        assert status["running"]
        assert status["address"] == facts["address"]
        workers = {worker["pid"] for worker in status["workers"]}
        assert workers == {ready["pids"]["stopped"], ready["pids"]["worker"]}
        text = coterie("cluster", "status").stdout
        assert f"Ray runs at {facts['address']} since " in text
        assert "ray::Worker" in text

        assert coterie("cluster", "stop").exit_code == 0
        assert driver.gone(*(driver.opened.keys() - {"driver"}))
        out, err = driver.finish()
        assert out == '{"alive": false}\n'
        assert err == ""
    assert json.loads(coterie("cluster", "status", "--json").stdout) == {"running": False}
    assert "coterie cluster start" in coterie("cluster", "status").stdout
    refused(coterie("cluster", "stop"), "no cluster of yours runs here")


def test_it_outlives_a_driver_and_is_swept_when_its_keeper_was_killed() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    facts = started("--port", str(port))
    assert facts["address"] == f"127.0.0.1:{port}"
    with Driver("auto") as driver:
        driver.ready()
        driver.process.kill()
        assert driver.gone("driver", "worker")  # Ray ends a driver's actors
        assert json.loads(coterie("cluster", "status", "--json").stdout)["running"]
        pids = {each["name"]: each["pid"] for each in facts["processes"]}
        os.kill(pids["keeper"], signal.SIGKILL)
        assert driver.gone("keeper", "gcs", "raylet", "head", "stopped")
    assert not json.loads(coterie("cluster", "status", "--json").stdout)["running"]
    assert sessions() == ["cluster"]
    assert coterie("cluster", "stop").exit_code == 0  # what is left of it


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(coterie("cluster", "start", "--port", str(port)), f"--port {port}: Address already in use")
    refused(coterie("cluster", "start", "--port", "65536"), "--port")


def test_one_that_is_only_just_starting_is_not_stopped() -> None:
    path, lock = ray_folder.claim(cluster=True)
    try:
        refused(coterie("cluster", "stop"), "only just starting", code=6)
        assert path.exists()
        (path / "session.json").write_text("{damaged")
        assert not json.loads(coterie("cluster", "status", "--json").stdout)["running"]
    finally:
        os.close(lock)


def test_a_head_that_cannot_start_is_named_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('damaged')")
    monkeypatch.syspath_prepend(tmp_path)
    refused(coterie("cluster", "start"), "Ray did not start: ImportError: damaged", code=6)
    assert sessions() == []


def test_all_descendants_are_ended() -> None:
    """Also one that was stopped, one in a session of its own, and one whose parent is gone."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            keeper.prctl(keeper.PR_SET_CHILD_SUBREAPER, 1)
            for _ in range(2):
                if os.fork() == 0:
                    os.setsid()
                    if os.fork() == 0:
                        os.kill(os.getpid(), signal.SIGSTOP)
                    time.sleep(1000)
            keeper.end_descendants()
            os.write(write, b"ended")
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"ended"  # and nobody holds the other end
    assert os.waitpid(pid, 0)[1] == 0


def test_a_keeper_is_small() -> None:
    program = "import sys, coterie.actors.keeper; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "coterie.actors.keeper" in done.stdout.split()
    assert not {"numpy", "ray", "numba", "msgpack", "typer"} & set(done.stdout.split())
