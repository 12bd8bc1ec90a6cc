"""Ray sessions: they start, keep to themselves, and leave nothing, whoever is killed."""

import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
from ray_driver import workers
from ray_sessions import SECONDS, Driver, runtime_folder, sessions

from coterie.actors import ray_folder, ray_session
from coterie.actors.greeting import check_greeting, greeting, read_greeting, same_kernel
from coterie.actors.ray_session import RaySession, open_session
from coterie.errors import UnitError, UsageError

__all__ = ["runtime_folder"]  # a fixture

RAY_OWN = "/tmp/ray/", str(Path.home() / ".ray/")


def surroundings() -> tuple[object, ...]:
    """What Ray changes of a process, left alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return environment, signal.getsignal(signal.SIGTERM)


@pytest.fixture(scope="module")
def session(runtime_folder: Path) -> Iterator[RaySession]:
    """One of this process; others come and go beside it."""
    before = surroundings()
    try:
        opened = open_session(None)
    except UnitError as error:
        pytest.skip(f"no Ray here: {error}")
    with opened:
        yield opened
    assert surroundings() == before
    assert sessions() == []


@pytest.fixture(scope="module")
def manners(session: RaySession) -> tuple[int, int, int, bytes]:
    """Of a worker (ray_driver.Worker)."""
    [worker] = workers(session.ray, 1)
    answer: tuple[int, int, int, bytes] = session.ray.get(worker.manners.remote(), timeout=SECONDS)
    return answer


def known(session: RaySession) -> dict[str, Any]:
    assert session._folder is not None
    found = ray_folder.read_session(session._folder.name)
    assert found is not None
    return found


# a session


def test_a_session_is_owned_and_alive(session: RaySession) -> None:
    assert session.owned
    assert session.alive()
    assert session.ray.is_initialized()


def test_sessions_of_a_process_share_a_connection(session: RaySession) -> None:
    for address in (None, session.address):
        with open_session(address) as other:
            assert (other.ray, other.address) == (session.ray, session.address)
            assert other.alive()
        assert not other.alive()
        other.close()
        assert session.alive()
    with pytest.raises(UsageError, match=f"connected to Ray at {session.address}"):
        open_session("127.0.0.1:1")


def test_a_session_that_is_dropped_is_closed(session: RaySession) -> None:
    users = session._connection.users
    other = open_session(None)
    assert session._connection.users == users + 1
    del other
    assert session._connection.users == users


def test_nothing_but_the_folder_is_the_users_alone(session: RaySession) -> None:
    folder = Path(known(session)["folder"])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    assert len((folder / "token").read_text()) == 64


def test_its_memory_is_named(session: RaySession) -> None:
    memory = session.memory()
    assert set(memory) == {"keeper", "gcs", "raylet", "head", "agents", "sum"}
    assert memory["sum"] == sum(size for name, size in memory.items() if name != "sum")
    assert 0 < memory["keeper"] < 20e6
    assert 0 < memory["head"] < 5e6  # it has made room
    assert memory["sum"] < 200e6


def links(session: RaySession) -> list[str]:
    """What the descriptors of all its processes are."""
    found = known(session)
    pids = {*found["pids"].values(), *ray_folder.members(Path(found["folder"]))}
    targets = []
    for entry in [entry for pid in pids for entry in Path(f"/proc/{pid}/fd").iterdir()]:
        with suppress(FileNotFoundError):  # closed meanwhile
            targets.append(os.readlink(entry))
    return targets


def test_its_files_are_in_its_folder(session: RaySession, manners: object) -> None:
    files = links(session)
    assert any(file.startswith(known(session)["folder"]) for file in files)
    assert not [file for file in files if file.startswith(RAY_OWN)]
    assert all(file.endswith(" (deleted)") for file in files if file.startswith("/dev/shm/"))


def test_it_listens_on_this_machine_only(session: RaySession, manners: object) -> None:
    inodes = {link[8:-1] for link in links(session) if link.startswith("socket:[")}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    addresses = {words[1].partition(":")[0] for words in lines if words[3] == "0A" and words[9] in inodes}
    assert addresses
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_workers_run_as_this_process_does(manners: tuple[int, int, int, bytes]) -> None:
    nice, oom_score, _, _ = manners
    assert nice == os.nice(0)
    assert oom_score == int(Path("/proc/self/oom_score_adj").read_text())


def test_a_worker_greets_as_this_process_does(manners: tuple[int, int, int, bytes]) -> None:
    theirs = check_greeting(greeting(), manners[3])
    assert same_kernel(read_greeting(greeting()), theirs)
    assert theirs["pid"] != os.getpid()


def test_rays_memory_monitor_is_off(session: RaySession) -> None:
    log = Path(known(session)["folder"], "r", "s", "logs", "raylet.out").read_text()
    assert "MemoryMonitor disabled" in log


def test_the_kernel_kills_workers_with_the_raylet(manners: tuple[int, int, int, bytes]) -> None:
    assert manners[2] == signal.SIGKILL


# who is killed


@pytest.mark.parametrize("victim", ["driver", "keeper", "raylet", "gcs", "head"])
def test_nothing_is_left_whoever_is_killed(session: RaySession, victim: str) -> None:
    with Driver() as driver:
        ready = driver.ready()
        assert ready["owned"]
        assert len(sessions()) == 2
        pids = ready["pids"] | {"driver": driver.process.pid}
        os.kill(pids[victim], signal.SIGKILL)
        assert driver.gone(*(driver.opened.keys() - {"driver"}))
        if victim != "driver":
            out, err = driver.finish()
            assert out == '{"alive": false}\n'
            assert err == ""
    assert len(sessions()) == 1
    assert session.alive()


def test_what_a_killed_keeper_leaves_is_swept_by_the_next_start(session: RaySession) -> None:
    with Driver() as driver:
        ready = driver.ready()
        os.kill(ready["pids"]["keeper"], signal.SIGKILL)
        assert driver.gone("gcs", "raylet", "head", "stopped", "worker")
        driver.process.kill()
        assert driver.gone("driver")
    assert Path(ready["folder"]).name in sessions()
    path, lock = ray_folder.claim(cluster=False)
    try:
        assert sessions() == sorted([path.name, Path(known(session)["folder"]).name])
    finally:
        ray_folder.discard(path)
        os.close(lock)


def test_an_interrupt_while_it_starts_leaves_nothing(session: RaySession) -> None:
    with Driver() as driver:
        assert driver.says() == "starting Ray"
        driver.process.send_signal(signal.SIGINT)
        _, err = driver.process.communicate(timeout=SECONDS)
        assert driver.process.returncode == -signal.SIGINT
        assert err.rstrip().endswith("KeyboardInterrupt")
    assert len(sessions()) == 1


def test_a_program_that_does_not_close_leaves_nothing(session: RaySession) -> None:
    program = (
        "from coterie.actors.ray_session import open_session; s = open_session(None); print(s._connection.keeper.pid)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=SECONDS)
    assert done.stderr == ""
    try:
        keeper = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        pass
    else:
        assert select.select([keeper], [], [], SECONDS)[0]
        os.close(keeper)
    assert len(sessions()) == 1


# joining


def test_a_session_is_joined_with_its_token(session: RaySession) -> None:
    token = known(session)["token"]
    with Driver(session.address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=token) as driver:
        ready = driver.ready()
        assert not ready["owned"]
        assert ready["memory"] == {}  # not known to be ours
        os.kill(ready["pids"]["stopped"], signal.SIGCONT)
        out, err = driver.finish()
        assert out == '{"alive": true}\n'
        assert err == ""
    assert session.alive()


def test_without_the_token_it_is_refused(session: RaySession, tmp_path: Path) -> None:
    assert ray_session.probe(known(session))["ray"] == session.ray.__version__
    (tmp_path / "wrong").write_text("0" * 64)
    for found in (known(session) | {"token": str(tmp_path / "wrong")}, {"address": session.address}):
        with pytest.raises(UnitError, match=f"^Ray at {session.address} refuses the token: set RAY_AUTH_MODE"):
            ray_session.probe(found)


def test_an_address_where_nobody_is_is_named(runtime_folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UnitError, match=rf"^Ray at {address} does not answer \(Connection refused\): check"):
        ray_session.probe({"address": address})


def test_an_address_where_somebody_else_is_is_named(runtime_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "ANSWER_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UnitError, match=rf"^Ray at {address} does not answer"):
            ray_session.probe({"address": address})


@pytest.mark.parametrize("address", ["", "here", "here:", ":1", "here:0", "here:65536", "here:-1", "here:1:x"])
def test_an_address_that_is_none_is_named(runtime_folder: Path, address: str) -> None:
    with pytest.raises(UsageError, match=r"must be HOST:PORT, or auto$"):
        ray_session.find(address)


def test_auto_needs_a_cluster(runtime_folder: Path) -> None:
    with pytest.raises(UsageError, match="no cluster of yours runs here: coterie cluster start"):
        ray_session.find("auto")


def test_other_versions_there_are_named() -> None:
    class Ray:
        __version__ = "2.60.0"

    python = ".".join(map(str, sys.version_info[:3]))
    ray_session.check_versions(Ray, {"ray": "2.60.0", "python": python})
    with pytest.raises(UnitError, match=r"^Ray is 2.60.0 here and 2.59.1 there: install the same on both$"):
        ray_session.check_versions(Ray, {"ray": "2.59.1", "python": python})
    with pytest.raises(UnitError, match=rf"^Python is {python} here and 3.9.1 there"):
        ray_session.check_versions(Ray, {"ray": "2.60.0", "python": "3.9.1"})


def test_without_ray_it_says_how_to_get_it(runtime_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnitError, match=r"pip install 'ray>=2.60,<2.61'$") as error:
        ray_session.import_ray()
    assert "\n" not in str(error.value)


# greetings


def changed(**fields: Any) -> bytes:
    return bytes(msgpack.packb(msgpack.unpackb(greeting()) | fields))


def test_a_greeting_of_the_same_is_taken() -> None:
    assert check_greeting(greeting(), changed(hostname="board"))["hostname"] == "board"


@pytest.mark.parametrize(
    ("field", "label"),
    [("coterie", "Coterie"), ("kernels", "Coterie's kernel sources"), ("python", "Python"), ("ray", "Ray")],
)
def test_other_versions_of_an_actor_are_named(field: str, label: str) -> None:
    with pytest.raises(UnitError, match=rf"^{label}: .* here, 9.9 on board: install the same on both$"):
        check_greeting(greeting(), changed(hostname="board", **{field: "9.9"}))


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\xc1", b"\x93\x01", b"\x90", msgpack.packb({})),
        *(changed(uid="0"), changed(uid=True), changed(pid=-1), changed(ray=2), changed(hostname="x" * 5000)),
    ],
)
def test_a_damaged_greeting_is_refused(data: bytes) -> None:
    with pytest.raises(UnitError, match="greeting cannot be read"):
        check_greeting(greeting(), data)


def test_memory_is_shared_only_on_one_system() -> None:
    here = read_greeting(greeting())
    assert same_kernel(here, here | {"pid": 1})
    for field in ("boot", "pid_namespace", "uid"):
        assert not same_kernel(here, here | {field: "other"})


# folders


def test_a_folder_is_claimed_and_locked(runtime_folder: Path) -> None:
    path, lock = ray_folder.claim(cluster=False)
    try:
        assert ray_folder.held(path)
        ray_folder.sweep()
        assert path.exists()
    finally:
        os.close(lock)
    assert not ray_folder.held(path)
    ray_folder.sweep()
    assert not path.exists()


def test_a_sweep_ends_what_a_dead_session_has_left(runtime_folder: Path) -> None:
    path, lock = ray_folder.claim(cluster=False)
    (path / "r").mkdir()
    with subprocess.Popen(["sleep", "1000"], env=os.environ | {ray_folder.MARK: str(path)}) as left:
        left.send_signal(signal.SIGSTOP)
        ray_folder.sweep()
        assert left.poll() is None  # it is held
        os.close(lock)
        ray_folder.sweep()
        assert left.wait(SECONDS) == -signal.SIGKILL
    assert not path.exists()


def test_a_folder_that_others_may_enter_is_refused(runtime_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = runtime_folder / "x"
    place.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    ray_folder.base().mkdir()
    ray_folder.base().chmod(0o755)
    try:
        with pytest.raises(UnitError, match="others may enter it"):
            ray_folder.claim(cluster=False)
    finally:
        shutil.rmtree(place)


def test_a_long_folder_is_passed_over(runtime_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_folder / ("x" * 90)))
    assert len(os.fsencode(ray_folder.base() / ray_folder.CLUSTER / ray_folder.SOCKET)) <= ray_folder.SOCKET_LIMIT
    assert "xxx" not in str(ray_folder.base())


def test_locks_are_the_keepers(session: RaySession) -> None:
    fd = os.open(known(session)["folder"], os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)
