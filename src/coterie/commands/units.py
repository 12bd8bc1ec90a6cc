"""coterie units: the compute units of this machine, and the hosts that can keep them."""

from typing import Any

from coterie.commands import terminal
from coterie.commands.options import Json

PATHS = {"vnni": "AVX-512 VNNI", "avx2": "AVX2", "dotprod": "ARM dot product"}


def units(as_json: Json = False) -> None:
    """List the compute units, what they run on, and what is missing."""
    with terminal.Progress() as progress:
        progress("looking at this machine")
        found = describe()
    if as_json:
        terminal.write_json(found)
    else:
        terminal.write("\n".join(f"{name:8} {text}" for name, text in texts(found).items()) + "\n")


def describe() -> dict[str, Any]:
    """{"units": [...], "hosts": [...]}.

    A unit has name, kind, available, runtime, hardware ("real", "stand-in" or None), hosts (names), why_not and get
    (None where it is available). A host has name, available, why_not and get; Ray has version and cluster (its
    address) too.
    """
    hosts = [{"name": "threads", "available": True, "why_not": None, "get": None}, _ray()]
    names = [host["name"] for host in hosts if host["available"]]
    found = [_cpu(), _flash(), _gpu(), _npu()]
    for unit in found[2:]:
        unit["hosts"] = names[:1]  # a queue and a thread of this process, on any host of the others
    found = [{"hosts": names} | unit for unit in found]
    return {"units": [unit | ({} if unit["available"] else {"hosts": []}) for unit in found], "hosts": hosts}


def texts(found: dict[str, Any]) -> dict[str, str]:
    """The same for people: a line a unit and a host, by name."""
    lines = {}
    for unit in found["units"]:
        known = f"{unit['runtime']}; {unit['hardware']} hardware; hosts: {', '.join(unit['hosts'])}"
        lines[unit["name"]] = known if unit["available"] else _lacking(unit)
    for host in found["hosts"]:
        lines[host["name"]] = _ray_text(host) if host["name"] == "ray" and host["available"] else _lacking(host)
    return lines


def _lacking(one: dict[str, Any]) -> str:
    return "in this process" if one["available"] else f"{one['why_not']}; get it: {one['get']}"


def _ray_text(host: dict[str, Any]) -> str:
    cluster = f"your cluster is at {host['cluster']}" if host["cluster"] else "no cluster runs (coterie cluster start)"
    return f"Ray {host['version']}; {cluster}"


def _unit(kind: str, **known: Any) -> dict[str, Any]:
    unit = {"name": kind, "kind": kind, "available": "runtime" in known, "runtime": None, "hardware": None}
    return unit | {"why_not": None, "get": None} | known


def _cpu() -> dict[str, Any]:
    from coterie.errors import UnitError
    from coterie.kernels import target

    try:
        return _unit("cpu", runtime=f"numba kernels, {PATHS[target.path()]}", hardware="real")
    except UnitError as error:
        return _unit("cpu", why_not=str(error), get="another machine")


def _flash() -> dict[str, Any]:
    """Which engine would read, and what is known of the disk under the packed models."""
    from coterie.actors.uring import Uring
    from coterie.paths import packed_dir
    from coterie.scheduler.profile import flash_choice, load_profile

    try:
        Uring(1).close()
        engine = "io_uring"
    except OSError as error:
        engine = f"preadv (no io_uring: {error.strerror})"
    choice = flash_choice(load_profile(), packed_dir())
    if choice.bytes_per_s is None:
        return _unit("flash", runtime=f"{engine}; not measured yet: coterie profile --flash", hardware="real")
    measured = f"{choice.bytes_per_s / 1e9:.2f} GB/s in pieces of {choice.block >> 10} KiB ({choice.source})"
    return _unit("flash", runtime=f"{engine}, {measured}", hardware="real") | {"bytes_per_s": choice.bytes_per_s}


def _gpu() -> dict[str, Any]:
    from coterie.actors.gpus import open_device
    from coterie.errors import UnitError
    from coterie.storage.arena import Arena

    try:
        device = open_device(Arena({"nothing": 1 << 21}))
    except UnitError as error:
        return _lacking_runtime("gpu", error)
    about = device.describe()
    device.close()
    runtime = f"{about['runtime']}, {about['name']}" + (": a stand-in, no GPU found" if about["stand_in"] else "")
    return _unit("gpu", runtime=runtime, hardware="stand-in" if about["stand_in"] else "real")


def _npu() -> dict[str, Any]:
    from coterie.actors.npu_graphs import open_runtime
    from coterie.errors import UnitError

    try:
        runtime = open_runtime()
    except UnitError as error:
        return _lacking_runtime("npu", error)
    return _unit("npu", runtime=runtime.describe(), hardware="stand-in" if runtime.stand_in else "real")


def _lacking_runtime(kind: str, error: Exception) -> dict[str, Any]:
    why, _, get = str(error).rpartition(": ")
    return _unit(kind, why_not=why, get=get)


def _ray() -> dict[str, Any]:
    from coterie.actors import ray_folder, ray_session
    from coterie.errors import CoterieError

    host = {"name": "ray", "available": True, "version": None, "cluster": None, "why_not": None, "get": None}
    try:
        host["version"] = ray_session.installed()
        cluster = ray_folder.read_session()
        host["cluster"] = cluster and cluster["address"]
    except CoterieError as error:
        why, _, get = str(error).partition(": ")
        host |= {"available": False, "why_not": why, "get": get}
    return host
