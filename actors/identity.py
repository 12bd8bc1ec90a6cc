"""Which units there are, and what their times are measured with, as one line each: points with another one are not used
(scheduler/estimate.py)."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from coterie.actors.gpu import Device
from coterie.actors.gpus import open_device
from coterie.actors.npu_cache import VERSION
from coterie.actors.npu_graphs import Runtime, open_runtime
from coterie.errors import UnitError
from coterie.kernels import gpu, library, target
from coterie.storage.arena import Arena


def cpu_key(lanes: int) -> str:
    """The instruction set, the kernels' sources with their compiler, and the number of lanes."""
    return f"{target.path()}, kernels {library.cache_folder().name}, lanes {lanes}"


def gpu_key(device: Device, cores: Collection[int] = ()) -> str:
    """The runtime, device and driver, and the kernels' sources; of a stand-in that keeps to `cores`, how many."""
    sources = hashlib.sha256()
    for path in sorted(Path(gpu.__file__).parent.iterdir()):
        if path.suffix in (".py", ".cl"):
            sources.update(path.name.encode() + b"\0" + path.read_bytes())
    about = device.describe()
    names = (str(about[name]) for name in ("runtime", "name", "platform", "driver", "capability") if name in about)
    kept = f", threads {len(cores)}" if cores and about["stand_in"] else ""
    return f"{', '.join(names)}"[:160] + f", kernels {sources.hexdigest()[:16]}{kept}"


def npu_key(runtime: Runtime, threads: int) -> str:
    """The runtime, its version and device, how blocks become graphs, and, of a stand-in, its threads."""
    where = f"{runtime.name} {runtime.version}, {runtime.device}, graphs {VERSION}"
    return f"{where}, threads {threads}" if runtime.stand_in else where


@dataclass(frozen=True)
class There:
    """The units that are there: `keys` by name, the NPU's runtime, and of the others why not; which are stand-ins."""

    keys: dict[str, str]
    runtime: Runtime | None
    missing: dict[str, str]
    stand_ins: set[str] = field(default_factory=set)


def units_there(wanted: Sequence[str], lanes: int, cores: Collection[int] = ()) -> There:
    """Which of these units there are, where stand-ins have `cores` of their own (none: as many threads as lanes)."""
    there = There({}, None, {})
    for name in wanted:
        try:
            if name == "cpu":
                there.keys[name] = cpu_key(lanes)
            elif name == "gpu":
                there.keys[name], stand_in = _gpu_key(cores)
                there.stand_ins.update({name} if stand_in else ())
            else:
                threads = len(cores) or lanes
                there = replace(there, runtime=(runtime := open_runtime(threads=threads)))
                there.keys[name] = npu_key(runtime, threads)
                there.stand_ins.update({name} if runtime.stand_in else ())
        except UnitError as error:
            there.missing[name] = str(error)
    return there


def _gpu_key(cores: Collection[int]) -> tuple[str, bool]:
    """A GPU's key, and whether it is a stand-in."""
    device = open_device(Arena({"nothing": 1 << 21}), cores=cores)
    key, stand_in = gpu_key(device, cores), bool(device.describe()["stand_in"])
    device.close()
    return key, stand_in
