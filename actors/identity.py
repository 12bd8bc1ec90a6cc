"""What a unit's times were measured with, as one line: points with another one are not used (scheduler/estimate.py)."""

import hashlib
from pathlib import Path

from coterie.actors.gpu import Device
from coterie.actors.npu_cache import VERSION
from coterie.actors.npu_graphs import Runtime
from coterie.kernels import gpu, library, target


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
