"""CUDA kernels as PTX, which the driver makes machine code of; kept on disk, since numba takes seconds for one."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

from coterie.errors import UnitError
from coterie.kernels.gpu.cuda_kernels import kernel
from coterie.kernels.gpu.cuda_products import THREADS
from coterie.kernels.gpu.signatures import SIGNATURES
from coterie.paths import kernels_dir, replace_file

Capability = tuple[int, int]
PACKAGES = ("numba-cuda", "llvmlite", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12")  # the last two: NVVM of CUDA 13 or 12


def ptx(name: str, capability: Capability) -> tuple[str, str]:
    """A kernel as PTX for devices of that compute capability and later ones, and the entry's name. Needs numba-cuda and
    NVVM, no driver. Raises UnitError where there is no such kernel, or no compiler."""
    from cuda.pathfinder import DynamicLibNotFoundError
    from numba import cuda, types

    made = kernel(name)
    kinds = {"int": types.int32, "float": types.float32}
    parameters = [kinds.get(parameter.kind, types.int64) for parameter in SIGNATURES[made.family]]
    signature = types.void(types.int64, types.int64, *parameters)
    with _for_devices_of(capability):
        try:
            text, _ = cuda.compile(
                made.function, signature, cc=capability, device=False, abi="numba", output="ptx", launch_bounds=THREADS
            )
        except DynamicLibNotFoundError:
            raise UnitError("NVIDIA's compiler (NVVM, NVRTC) is not installed: pip install 'coterie[cuda]'") from None
    return text, _entry(text, name)


@contextmanager
def _for_devices_of(capability: Capability) -> Iterator[None]:
    """numba asks the present device what it should compile kernels' functions for, though the kernel says it; there
    need not be one here."""
    from numba.cuda import dispatcher

    before = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = before


def kept_ptx(name: str, capability: Capability) -> tuple[str, str, bool]:
    """The same, from disk where it was made before, by this source and these packages, and is whole; and whether it had
    to be compiled."""
    path = _folder() / f"{name.replace(':', '-')}-{capability[0]}{capability[1]}.ptx"
    with suppress(OSError):
        body, digest = (data := path.read_bytes())[:-32], data[-32:]
        if hashlib.sha256(body).digest() == digest:
            return body.decode(), _entry(body.decode(), name), False
    text, entry = ptx(name, capability)
    body = text.encode()
    with suppress(OSError):  # the next process makes it again
        path.parent.mkdir(exist_ok=True)
        replace_file(path, body + hashlib.sha256(body).digest())
    return text, entry, True


def _entry(text: str, name: str) -> str:
    entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\(", text)
    if entry is None:
        raise UnitError(f"CUDA kernel {name} has no entry")
    return entry[1]


@cache
def _folder() -> Path:
    """One for each state of the source and of what compiles it."""
    folder = Path(__file__).parent
    shared = [folder.parent / f"{module}.py" for module in ("formats", "record", "shapes")]
    sources = [*sorted(folder.glob("*.py")), *shared]
    state = b"".join(path.read_bytes() for path in sources) + " ".join(map(_version, PACKAGES)).encode()
    return kernels_dir() / f"cuda-{hashlib.sha256(state).hexdigest()[:16]}"


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""
