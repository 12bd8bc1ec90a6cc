"""A connection of this process to Ray: to one that is started for it alone, or to one that runs already.

    with open_session(None, progress=print) as session:
        session.ray.get(...)

One started here lies under a keeper (keeper.py), which ends it when this process ends, in whatever way.
"""

import atexit
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from coterie.actors import ray_folder
from coterie.actors.ray_memory import by_name, measure, session_processes
from coterie.errors import UnitError, UsageError

ANSWER_SECONDS = 10.0  # a Ray that runs already answers within these
END_SECONDS = 15.0
RAY_VERSIONS = "2.60."  # ray_head.py builds on their inside
INSTALL = "pip install 'ray>=2.60,<2.61'"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PATIENCE = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3600",  # 60 s by default, and then Ray aborts the process
    "RAY_task_events_shutdown_flush_timeout_ms": "100",  # 5 s by default, where GCS is gone
    "RAY_task_events_report_interval_ms": "0",  # nobody asks for a history of all calls
}

_lock = threading.RLock()  # Ray is one to a process; a session that is dropped may be closed anywhere
_current: "_Connection | None" = None


class RaySession:
    """What `open_session` gives. Close it, or use it as a context manager; one that is dropped is closed too, and all
    are when the process ends. Sessions of one process share a connection, which ends with the last of them.

    `ray`: the connected module. `address`: host:port. `owned`: whether this process started it.
    """

    def __init__(self, connection: "_Connection") -> None:
        self._connection, self.ray, self.address = connection, connection.ray, connection.address
        self.owned, self._folder = connection.keeper is not None, connection.folder
        connection.users += 1
        self._release = weakref.finalize(self, connection.release)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def alive(self) -> bool:
        """Whether Ray is there: one of Coterie's is gone as soon as its GCS or raylet is; another where it answers."""
        return self._release.alive and self._connection.alive()

    def memory(self) -> dict[str, int]:
        """PSS, bytes, of Ray's own processes by name (keeper, gcs, raylet, head, agents) and their "sum"; workers, and
        processes of other machines, are not in it. Empty for a Ray that is not Coterie's."""
        return by_name(measure(session_processes(self._folder)[0])) if self._folder is not None else {}

    def close(self) -> None:
        """Disconnect; end Ray if it was started here, and no other session uses it. A second call does nothing."""
        self._release()


class _Connection:
    """This process's connection to Ray; `users` sessions share it."""

    def __init__(self, ray: Any, found: dict[str, Any], keeper: "subprocess.Popen[bytes] | None") -> None:
        self.ray, self.keeper, self.users = ray, keeper, 0
        self.address: str = found["address"]
        self.folder = Path(found["folder"]) if "folder" in found else None
        self._maker, self._ended = os.getpid(), False

    def alive(self) -> bool:
        if self._ended or os.getpid() != self._maker or not self.ray.is_initialized():
            return False
        if self.keeper is not None:
            return self.keeper.poll() is None
        if self.folder is not None:
            return ray_folder.held(self.folder)
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), 1.0).close()
        except OSError:
            return False
        return True

    def release(self) -> None:
        """A session is closed."""
        global _current
        if os.getpid() != self._maker:
            return  # a fork's copy
        with _lock:
            self.users -= 1
            if self.users == 0:
                self.end()
                if _current is self:
                    _current = None

    def end(self) -> None:
        if self._ended:
            return
        self._ended = True
        try:
            with _quiet():
                self.ray.shutdown()
        finally:
            if self.keeper is not None:
                end_keeper(self.keeper)


def _forget_in_fork() -> None:
    """The keeper watches for the end of this process, not of its forks."""
    if _current is not None and _current.keeper is not None and _current.keeper.stdin is not None:
        _current.keeper.stdin.close()


os.register_at_fork(after_in_child=_forget_in_fork)


def open_session(address: str | None, *, progress: Callable[[str], object] = lambda label: None) -> RaySession:
    """Start Ray for this process (`address` None), or join the one at `address` ("host:port"; "auto": the one that
    `coterie cluster start` started); or share what this process is connected to already, where that is the same.
    `progress` is told what is being waited for.

    Raises UsageError for an address that is none, or another one than this process is connected to; UnitError where Ray
    cannot be started, does not answer, refuses the token or has other versions.
    """
    global _current
    with _lock:
        if _current is not None and not _current.alive():
            _current.end()
            _current = None
        if _current is None:
            _current = _connected(address, progress)
        elif address is not None and find(address)["address"] != _current.address:
            raise UsageError(
                f"this process is connected to Ray at {_current.address}, and can be to one only: close what uses that"
            )
        return RaySession(_current)


def _connected(address: str | None, progress: Callable[[str], object]) -> _Connection:
    keeper = None
    try:
        if address is None:
            progress("starting Ray")
            keeper = start_keeper("driver")
            ray = import_ray()  # meanwhile
            found = keeper_answer(keeper)
        else:
            progress(f"joining Ray at {address}")
            found = find(address)
            ray = import_ray()
            check_versions(ray, probe(found))
        if ray.is_initialized():
            raise UsageError("this process is connected to Ray already: ray.shutdown() first")
        progress("connecting to Ray")
        _connect(ray, found)
        return _Connection(ray, found, keeper)
    except BaseException:
        if keeper is not None:
            end_keeper(keeper)
        raise


def import_ray() -> Any:
    """The module. Raises UnitError where it is not installed, or another version than ours."""
    installed()
    try:
        with _environment({}), _quiet():
            import ray

            atexit.unregister(ray.shutdown)  # sessions do it, and a fork must not
    except ImportError as error:
        raise UnitError(f"Ray cannot be imported ({error}): {INSTALL}") from None
    return ray


def installed() -> str:
    """Ray's version, without importing it. Raises UnitError where there is none, or another than ours."""
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:
        raise UnitError(f"Ray is not installed: {INSTALL}") from None
    if not version.startswith(RAY_VERSIONS):
        raise UnitError(f"Ray {version} is installed, which Coterie does not know: {INSTALL}")
    return version


def start_keeper(kind: str, port: int = 0) -> "subprocess.Popen[bytes]":
    """A keeper of this kind (keeper.py), which goes on to start Ray."""
    command = [sys.executable, "-P", "-m", "coterie.actors.keeper", kind, str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        command,
        env=environment | _import_path(),
        stdin=subprocess.PIPE if kind == "driver" else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # a terminal's Ctrl-C is not for Ray
    )


def keeper_answer(keeper: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """What it says of its session, once Ray runs. Raises UnitError."""
    assert keeper.stdout is not None
    with keeper.stdout as answer:
        line = answer.readline()
    found = json.loads(line) if line else {"error": "the process that keeps Ray has ended"}
    if "error" in found:
        raise UnitError(found["error"])
    return dict(found)


def end_keeper(keeper: "subprocess.Popen[bytes]") -> None:
    """Let it end its session, and wait until it has."""
    if keeper.stdin is not None:
        keeper.stdin.close()
    else:
        keeper.terminate()
    try:
        keeper.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()
    if keeper.returncode < 0:  # somebody killed it
        ray_folder.sweep()


def find(address: str) -> dict[str, Any]:
    """Address, and folder and token where they are known, of a Ray that runs already."""
    cluster = ray_folder.read_session()
    if address == "auto":
        if cluster is None:
            raise UsageError("no cluster of yours runs here: coterie cluster start, or give --ray-address HOST:PORT")
        return cluster
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--ray-address {address}: must be HOST:PORT, or auto")
    if host in LOOPBACK:
        address = f"127.0.0.1:{port}"
    if cluster is not None and cluster["address"] == address:
        return cluster
    return {"address": address}


def probe(found: dict[str, Any]) -> dict[str, str]:
    """Versions of a Ray that runs already: {"ray", "python"}.

    Another process asks: Ray's own client waits for minutes, writes to stderr, and may abort. Raises UnitError.
    """
    command = [sys.executable, "-P", "-m", "coterie.actors.ray_probe", found["address"]]
    environment = os.environ | _credentials(found) | _import_path()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=ANSWER_SECONDS, check=False)
        versions = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise UnitError(f"Ray at {found['address']} does not answer: check the address, and that it runs") from None
    except ValueError:
        versions = {"error": "does not answer as Ray does: check the address"}
    if "error" in versions:
        raise UnitError(f"Ray at {found['address']} {versions['error']}")
    return dict(versions)


def check_versions(ray: Any, theirs: dict[str, str]) -> None:
    """Raises UnitError unless Ray and Python there are those here, as Ray needs them."""
    mine = {"Ray": ray.__version__, "Python": ".".join(map(str, sys.version_info[:3]))}
    for name, version in mine.items():
        if theirs[name.lower()] != version:
            raise UnitError(f"{name} is {version} here and {theirs[name.lower()]} there: install the same on both")


def _connect(ray: Any, found: dict[str, Any]) -> None:
    """ray.init, without what it changes in this process beside: environment, SIGTERM, logging."""
    from ray._private import ray_constants, worker
    from ray._raylet import AuthenticationTokenLoader, Config

    loopback = found["address"].startswith("127.")
    clusters, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, not loopback
    listen = worker.listen_error_messages
    worker.listen_error_messages = lambda worker, stopped: None  # it prints to stdout, where only answers belong
    try:
        with _environment(PATIENCE | _credentials(found)), _quiet():
            Config.initialize("")  # read the environment again
            AuthenticationTokenLoader.instance().reset_cache()
            ray.init(
                address=found["address"],
                _node_ip_address="127.0.0.1" if loopback else None,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
    except Exception as error:  # ray's own are of many kinds
        raise UnitError(f"cannot connect to Ray at {found['address']}: {' '.join(str(error).split())[:200]}") from None
    finally:
        ray_constants.ENABLE_RAY_CLUSTER, worker.listen_error_messages = clusters, listen


def _credentials(found: dict[str, Any]) -> dict[str, str]:
    """What the environment must say for a connection: for a Ray of Coterie's its token, else what the user has set."""
    if "token" not in found:
        return {name: os.environ[name] for name in os.environ if name.startswith("RAY_AUTH_")}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": found["token"]}


@contextlib.contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """RAY_* variables are these; afterwards the environment is what it was, whatever Ray has set."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of Ray's, and SIGTERM means afterwards what it meant before."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _import_path() -> dict[str, str]:
    """Another Python finds the modules that this one finds."""
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
