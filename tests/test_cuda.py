"""The CUDA unit without a device: kernels in numba's simulator against numpy, their PTX, and the runtime's complaints.

docs/cuda.md says what this shows and what it does not.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from cuda_emit import CAPABILITIES, kernel_names
from reference import FORMATS

from coterie.actors import cuda_driver
from coterie.actors.cuda import CudaDevice
from coterie.actors.cuda_driver import Driver
from coterie.errors import UnitError
from coterie.kernels.gpu.signatures import SIGNATURES
from coterie.storage.arena import Arena

HERE = Path(__file__).parent
EMITTERS = 2
MIXED = ("Q4_1", "Q6_K", "F16")  # of each kind one: what several rows change is the same for all formats
CASES = {
    "matrices": [f"matmul:{name}:{tokens}" for name in FORMATS for tokens in (1, 8)] + ["tiles", "narrow"],
    "Down": [f"ffn_down:{name}:1" for name in FORMATS] + [f"ffn_down:{name}:8" for name in MIXED],
    "Gate and Up": [f"ffn_up:{name}:{name}:silu:1" for name in FORMATS]
    + [f"ffn_up:{name}:{name}:silu:8" for name in MIXED]
    + [f"ffn_up:Q4_0:Q8_0:{activation}:1" for activation in ("gelu", "relu", "relu2", "drelu")]
    + ["ffn_up:Q4_K:Q6_K:silu:1"],
    "rows": [f"embed:{name}" for name in FORMATS]
    + ["norm:nothing:32", "norm:plain:100", "norm:normed:100", "program:shared", "program:own", "complaints"],
    "attention": ["attention:16:4:2:0:norms", "attention:48:2:1:7:rounded", "attention:64:2:2:0:own"],
}

needs_numba_cuda = pytest.mark.skipif(
    find_spec("numba_cuda") is None, reason="numba-cuda is not installed: pip install -c constraints.txt -e .[cuda]"
)


def installed(*packages: str) -> bool:
    try:
        return all(map(version, packages))
    except PackageNotFoundError:
        return False


COMPILES = installed("numba-cuda", "nvidia-nvvm", "nvidia-cuda-nvrtc")
needs_nvvm = pytest.mark.skipif(not COMPILES, reason="NVVM and NVRTC are not installed: pip install -e .[cuda]")


def start(script: str, *arguments: str, simulate: bool) -> "subprocess.Popen[str]":
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1" if simulate else "0"}
    command = [sys.executable, str(HERE / script), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """All of them side by side, each simulating some cases or compiling some kernels."""
    running = {group: start("cuda_simulation.py", *cases, simulate=True) for group, cases in CASES.items()}
    if COMPILES:
        for part in range(EMITTERS):
            running[f"emitter {part}"] = start("cuda_emit.py", str(part), str(EMITTERS), simulate=False)
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


def finished(process: "subprocess.Popen[str]") -> list[str]:
    """The lines of a process that ended well."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    return out.splitlines()


@needs_numba_cuda
@pytest.mark.parametrize("group", CASES)
def test_kernels_in_the_simulator_equal_numpy(group: str, processes: dict[str, "subprocess.Popen[str]"]) -> None:
    assert finished(processes[group]) == CASES[group]


@pytest.fixture(scope="module")
def emitted(processes: dict[str, "subprocess.Popen[str]"]) -> list[dict[str, Any]]:
    """What cuda_emit.py found of all kernels."""
    return [json.loads(line) for part in range(EMITTERS) for line in finished(processes[f"emitter {part}"])]


@needs_nvvm
def test_every_kernel_becomes_ptx(emitted: list[dict[str, Any]]) -> None:
    got = {(each["name"], tuple(each["capability"])) for each in emitted}
    assert got == {(name, capability) for name in kernel_names() for capability in CAPABILITIES}
    for each in emitted:
        assert each["target"] == ["sm_{}{}".format(*each["capability"])]


@needs_nvvm
def test_launches_pass_what_kernels_take(emitted: list[dict[str, Any]]) -> None:
    kinds = {"int": "u32", "float": "f32"}
    for each in emitted:
        parameters = SIGNATURES[each["name"].partition(":")[0]]
        assert each["parameters"] == ["u64", "u64", *(kinds.get(p.kind, "u64") for p in parameters)], each["name"]


@needs_nvvm
def test_kernels_keep_to_registers_and_single_precision(emitted: list[dict[str, Any]]) -> None:
    for each in emitted:
        assert not each["spills"], each["name"]
        assert each["doubles"] == 0, each["name"]
        assert each["calls"] == 0, each["name"]
        assert each["shared"] <= 48 << 10, each["name"]
        assert each["threads"] == ["256"], each["name"]


@needs_nvvm
def test_weights_are_loaded_in_words_and_vectors(emitted: list[dict[str, Any]]) -> None:
    matrices = [each for each in emitted if each["name"].partition(":")[0] in ("matmul", "ffn_up", "ffn_down")]
    assert matrices
    for each in matrices:
        kinds = set(each["loads"])
        assert not {kind for kind in kinds if re.search(r"\.[usb](8|16)$", kind)}, each["name"]
        assert {kind for kind in kinds if ".v4." in kind or ".v2." in kind}, each["name"]
        integers = not any(f":{name}" in each["name"] for name in ("F16", "BF16", "F32"))
        assert (each["dots"] > 0) == integers, each["name"]


# --- without a device ----------------------------------------------------------------------------------


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena({"weights": 4096, "state": 4096})
    yield made
    made.close()


def has_device() -> bool:
    try:
        Driver()
    except UnitError:
        return False
    return True


def test_a_missing_package_is_named(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UnitError, match=r"^the CUDA packages are not installed; .*pip install 'coterie\[cuda\]'.*$"):
        CudaDevice(arena)


@needs_numba_cuda
@pytest.mark.skipif(has_device(), reason="there is a CUDA device")
def test_a_missing_driver_is_named(arena: Arena) -> None:
    with pytest.raises(UnitError, match=r"NVIDIA driver") as refused:
        CudaDevice(arena)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("share", [0, 1.5, float("nan")])
def test_a_share_that_makes_no_sense_is_refused(share: float, arena: Arena) -> None:
    with pytest.raises(UnitError, match="share"):
        CudaDevice(arena, share=share, driver=object())


class Api:
    """A driver's functions, of which `broken` fails with the code of a lost device; it remembers who was called."""

    class CUdevice_attribute:
        def __getattr__(self, name: str) -> str:
            return name

    CUdevice_attribute = CUdevice_attribute()  # type: ignore[assignment,misc]

    def __init__(self, broken: str = "") -> None:
        self.broken, self.called = broken, []  # type: tuple[str, list[str]]

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> tuple[Any, ...]:
            self.called.append(name)
            return 719 if name == self.broken else 0, b"a name\0\0" if name == "cuDeviceGetName" else 1

        return function


def driver(monkeypatch: pytest.MonkeyPatch, broken: str = "") -> Driver:
    monkeypatch.setattr(cuda_driver, "_bindings", lambda: Api(broken))
    return Driver()


def test_a_lost_device_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnitError, match=r"^CUDA: kernel matmul:Q4_0:1 failed, or one before it: 719$"):
        driver(monkeypatch, "cuLaunchKernel").launch(0, (1, 1), 256, 0, "matmul:Q4_0:1")
    with pytest.raises(UnitError, match=r"^CUDA: kernel post failed, or one before it: 719$"):
        driver(monkeypatch, "cuStreamSynchronize").synchronize("post")
    with pytest.raises(UnitError, match=r"^CUDA: cuMemAlloc: 719$"):
        driver(monkeypatch, "cuMemAlloc").allocate(64)
    with pytest.raises(UnitError, match=r"^CUDA: no CUDA device can be used: 719$"):
        driver(monkeypatch, "cuInit")
    monkeypatch.undo()


def test_a_driver_is_given_back_as_it_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = driver(monkeypatch)
    assert (made.name, made.integrated, made.capability) == ("a name", True, (1, 1))
    at = made.register(4096, 4096)
    made.upload(at, 4096, 64)
    made.download(4096, at, 64)
    made.unregister(4096)
    made.close()
    assert made._api.called[-3:] == ["cuStreamSynchronize", "cuStreamDestroy", "cuDevicePrimaryCtxRelease"]


@pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-bindings is not installed")
def test_the_driver_functions_that_are_used_exist() -> None:
    from cuda.bindings import driver as api

    source = Path(cuda_driver.__file__).read_text()
    used = set(re.findall(r"\bcu[A-Z]\w+", source)) - {"cuda"}
    assert len(used) > 15
    assert not {name for name in used if not hasattr(api, name)}
