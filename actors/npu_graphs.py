"""Static graphs of dense blocks on an NPU, or on what stands in for one: the interface, and which runtime serves.

A runtime compiles a block (storage/npu_block.py) into bytes, and loads such bytes as a graph, which computes on memory
it is bound to. A real NPU goes first: OpenVINO's device NPU, then ONNX Runtime's providers for NPUs. Where there is
none, the faster of both runtimes on the processor stands in, and says so.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.actors.npu_fastest import faster
from coterie.errors import UnitError
from coterie.storage.npu_block import KINDS, Block, Form
from coterie.storage.npu_quantise import Floats, Scheme

Bytes = NDArray[np.uint8]

WINDOW = 4 << 30  # bytes that a phone's NPU can address (llm.npu, section 4)


class Graph(Protocol):
    """A loaded graph. Not for several threads at once.

    nbytes: what the runtime keeps of the weights in memory of its own, computed from how it keeps them (the benchmark
    compares it with what the process really grew by).
    """

    form: Form
    nbytes: int

    def bind(self, x: Floats, y: Floats) -> None:
        """Compute on this memory from now on: x float32[n][width_in], y float32[n][width_out], each one piece, without
        gaps between rows. Neither is copied by us, and both must outlive the graph or the next `bind`. Raises
        ValueError for what does not fit."""

    def run(self) -> None:
        """y becomes the block's product of x. Raises UnitError where the device fails."""


class Runtime(Protocol):
    """One runtime on one device, with so many threads where that is the processor.

    name     "OpenVINO" or "ONNX Runtime"
    device   "NPU", "CPU", or a provider's name
    version  of the runtime: compiled graphs of another one are not loaded
    stand_in whether no NPU computes
    schemes  that it can run
    """

    name: str
    device: str
    version: str
    stand_in: bool
    schemes: tuple[Scheme, ...]

    def describe(self) -> str:
        """One line for people."""

    def compile(self, block: Block) -> bytes:
        """The block as bytes that `load` takes, in this version on this device. Raises UnitError."""

    def load(self, blob: Bytes, form: Form) -> Graph:
        """The graph that `compile` made; `blob` may be a mapped file, and is kept where that saves a copy. Raises
        UnitError where the runtime refuses it."""

    def build(self, block: Block) -> Graph:
        """Compile and load."""


def describe(runtime: Runtime) -> str:
    """A runtime for people: one that stands in says so."""
    where = f"{runtime.name} {runtime.version}, {runtime.device}"
    return f"{where}: a stand-in, no NPU found" if runtime.stand_in else where


def open_runtime(wanted: str | None = None, threads: int | None = None) -> Runtime:
    """The runtime for graphs: a real NPU's where there is one, else the faster stand-in, found by a short measurement
    once a machine.

    `wanted`: "openvino" or "onnxruntime", at any device; "openvino:NPU", "openvino:CPU", "onnxruntime:CPU" or
    "onnxruntime:" and a provider's name (QNN, VitisAI, CoreML, OpenVINO); None: whichever is best. `threads`: of a
    stand-in; None: one a core. Raises UnitError, in one line, where it is not there.
    """
    from coterie.actors import npu_onnx, npu_openvino

    threads = threads or len(os.sched_getaffinity(0))
    name, _, device = (wanted or "").partition(":")
    makers: dict[str, Callable[[str, int], Runtime]] = {
        "openvino": npu_openvino.open_device,
        "onnxruntime": npu_onnx.open_device,
    }
    if name and name not in makers:
        raise UnitError(f"no runtime for graphs is called {name[:40]!r}; there are {' and '.join(makers)}")
    if device:
        return makers[name](device, threads)
    names = [name] if name else list(makers)
    missing = []
    for each in names:
        try:
            found = makers[each]("NPU", threads)
        except UnitError as error:
            missing.append(str(error))
        else:
            return found
    stand_ins = list(_there([makers[each] for each in names], threads))
    if not stand_ins:
        raise UnitError(missing[0] if name else "no runtime for graphs is installed: pip install 'coterie[npu]'")
    return faster(stand_ins)


def _there(makers: Iterable[Callable[[str, int], Runtime]], threads: int) -> Iterable[Runtime]:
    """The stand-ins whose packages are installed."""
    for maker in makers:
        try:
            yield maker("CPU", threads)
        except UnitError:
            continue


def choose_blocks(blocks: Sequence[tuple[Form, int]], window: int = WINDOW) -> list[int]:
    """Which blocks an NPU gets that can address `window` bytes, by their indices, ascending: of forms and bytes.

    Feed-forward networks first, then qkv, then out, each from the first layer on (llm.npu, section 4). One that does
    not fit is left out, a smaller one after it may still fit. Lengths of one block share nothing: each counts.
    """
    order = sorted(range(len(blocks)), key=lambda i: (KINDS.index(blocks[i][0].kind), blocks[i][0].layer, i))
    chosen, left = [], window
    for index in order:
        nbytes = blocks[index][1]
        if nbytes <= left:
            chosen.append(index)
            left -= nbytes
    return sorted(chosen)


def check_buffers(form: Form, x: Floats, y: Floats) -> None:
    """Raise ValueError unless a graph of this form can compute on them in place."""
    for name, array, width in (("x", x, form.width_in), ("y", y, form.width_out)):
        if array.shape != (form.n, width) or array.dtype != np.float32 or not array.flags.c_contiguous:
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}; the graph takes float32[{form.n}, {width}] in one piece"
            )
    if not y.flags.writeable:
        raise ValueError("y cannot be written")
