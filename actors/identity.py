"""Which units there are, and what their times are measured with, as one line each: points with another one are not used
(scheduler/estimate.py)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
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


def gpu_key(device: Device) -> str:
    """The runtime, device and driver, and the kernels' sources."""
    sources = hashlib.sha256()
    for path in sorted(Path(gpu.__file__).parent.iterdir()):
        if path.suffix in (".py", ".cl"):
            sources.update(path.name.encode() + b"\0" + path.read_bytes())
    about = device.describe()
    names = (str(about[name]) for name in ("runtime", "name", "platform", "driver", "capability") if name in about)
    return f"{', '.join(names)}"[:160] + f", kernels {sources.hexdigest()[:16]}"


def npu_key(runtime: Runtime, threads: int) -> str:
    """The runtime, its version and device, how blocks become graphs, and, of a stand-in, its threads."""
    where = f"{runtime.name} {runtime.version}, {runtime.device}, graphs {VERSION}"
    return f"{where}, threads {threads}" if runtime.stand_in else where


@dataclass(frozen=True)
class There:
    """The units that are there: `keys` by name, the NPU's runtime, and of the others why not."""

    keys: dict[str, str]
    runtime: Runtime | None
    missing: dict[str, str]


def units_there(wanted: Sequence[str], lanes: int) -> There:
    """Which of these units there are."""
    there = There({}, None, {})
    for name in wanted:
        try:
            if name == "cpu":
                there.keys[name] = cpu_key(lanes)
            elif name == "gpu":
                there.keys[name] = _gpu_key()
            else:
                there = replace(there, runtime=(runtime := open_runtime(threads=lanes)))
                there.keys[name] = npu_key(runtime, lanes)
        except UnitError as error:
            there.missing[name] = str(error)
    return there


def _gpu_key() -> str:
    device = open_device(Arena({"nothing": 1 << 21}))
    key = gpu_key(device)
    device.close()
    return key
