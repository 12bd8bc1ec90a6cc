"""Graphs through ONNX Runtime: on an NPU through its maker's provider, or on the processor as a stand-in.

One form serves all: QuantizeLinear to uint8 with its zero at 128 (the same values as int8 -128..127), constants in
int8, DequantizeLinear of both, MatMul. Providers of NPUs take it as it is; on the processor ONNX Runtime makes
QuantizeLinear and MatMulIntegerToFloat of it, whose u8 x s8 products are VNNI's own. Signed activations would run 25
times slower there. Four-bit values lie in int8 on the processor, which has no product for them, and in int4 on NPUs.
Float activations (w4a16, w8a16) take MatMulNBits, which the processor's provider has; for one row it rounds them in
groups, as the CPU unit does: eight-bit weights take 25 times as long with floats.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.actors.npu_graphs import Bytes, check_buffers, describe
from coterie.actors.npu_onnx_model import model
from coterie.errors import UnitError
from coterie.kernels import target
from coterie.storage.npu_block import Block, Form
from coterie.storage.npu_quantise import SCHEMES, Floats, Scheme

if TYPE_CHECKING:
    import onnxruntime as ort

MISSING = "ONNX Runtime or the package onnx is not installed: pip install 'coterie[npu]'"
COPIES = 2  # of weights that it keeps on the processor: as they came, and packed
PROVIDERS: dict[str, dict[str, str]] = {  # of NPUs, with their options
    "QNN": {"backend_type": "htp", "htp_performance_mode": "burst"},
    "VitisAI": {},
    "CoreML": {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndNeuralEngine", "RequireStaticInputShapes": "1"},
    "OpenVINO": {"device_type": "NPU"},
}


def open_device(device: str, threads: int) -> "ONNXRuntime":
    """Device "CPU", "NPU" (the first provider of one that is there), or a provider: QNN, VitisAI, CoreML, OpenVINO.
    Raises UnitError where it is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime as ort
    except ImportError:
        raise UnitError(MISSING) from None
    there = [name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()]
    wanted = [name for name in PROVIDERS if name in there] if device == "NPU" else [device]
    if not wanted or not set(wanted) <= {"CPU", *PROVIDERS}.intersection(there):
        raise UnitError(f"ONNX Runtime has no provider for {device[:40]!r} here; it has {', '.join(there)}")
    failures = []
    for name in wanted:
        runtime = ONNXRuntime(ort.__version__, name, threads)
        try:
            runtime.probe()
        except UnitError as error:
            failures.append(str(error))
        else:
            return runtime
    raise UnitError(failures[0])


class ONNXRuntime:
    """ONNX Runtime with one provider, and no other behind it. `options` are the provider's; `packed` says whether
    four-bit values of w4a8-outliers lie in int4, None: but on the CPU."""

    name = "ONNX Runtime"

    def __init__(
        self,
        version: str,
        device: str,
        threads: int,
        options: dict[str, str] | None = None,
        packed: bool | None = None,
    ) -> None:
        self.version, self.device, self._threads = version, device, threads
        self.stand_in = device == "CPU"
        self._packed = not self.stand_in if packed is None else packed
        self._options = PROVIDERS.get(device, {}) if options is None else options
        self.schemes: tuple[Scheme, ...] = SCHEMES if self.stand_in else ("w8a8", "w4a8-outliers")

    def describe(self) -> str:
        return describe(self)

    def probe(self) -> None:
        """A provider may be installed without its device: raise UnitError unless a small graph runs."""
        from coterie.actors.npu_fastest import sample

        block = sample(32, 64, 64)
        graph = self.build(block)
        x, y = np.ones((32, 64), np.float32), np.zeros((32, 64), np.float32)
        graph.bind(x, y)
        graph.run()

    def compile(self, block: Block) -> bytes:
        """The model as ONNX Runtime has optimised it, or as the provider has compiled it."""
        if block.form.scheme not in self.schemes:
            raise UnitError(f"{self.name} on {self.device} has no product for {block.form.scheme}")
        source = model(block, self._packed)
        with tempfile.TemporaryDirectory(prefix="coterie-") as folder:
            path = Path(folder) / "graph.onnx"
            options = self._session_options()
            if self.stand_in:
                options.optimized_model_filepath = str(path)
            else:
                for key, value in (("enable", "1"), ("file_path", str(path)), ("embed_mode", "1")):
                    options.add_session_config_entry(f"ep.context_{key}", value)
            self._session(source, options)
            # A provider that keeps nothing of what it compiles writes no file: it compiles again at every start.
            return path.read_bytes() if path.exists() else source

    def load(self, blob: Bytes, form: Form) -> "ONNXGraph":
        import onnxruntime as ort

        options = self._session_options()
        if self.stand_in:  # it has been optimised
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return ONNXGraph(self._session(blob.tobytes(), options), form, COPIES * len(blob))

    def build(self, block: Block) -> "ONNXGraph":
        return self.load(np.frombuffer(self.compile(block), np.uint8), block.form)

    def _session_options(self) -> "ort.SessionOptions":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 4  # what matters is raised
        options.add_session_config_entry("session.force_spinning_stop", "1")  # between runs other units compute
        if self.stand_in and target.path() == "avx2":  # without VNNI sums of u8 x s8 saturate
            options.add_session_config_entry("session.x64quantprecision", "1")
        if not self.stand_in:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return options

    def _session(self, source: bytes, options: "ort.SessionOptions") -> "ort.InferenceSession":
        import onnxruntime as ort

        provider = f"{self.device}ExecutionProvider"
        try:
            return ort.InferenceSession(
                source,
                options,
                providers=[(provider, self._options)],
                enable_fallback=False,
                disabled_optimizers=["MatMulAddFusion"],  # it would hide products that are added from int8
            )
        except Exception as error:  # its classes share no base
            raise self._failed("refuses a graph", error) from None

    def _failed(self, what: str, error: Exception) -> UnitError:
        return UnitError(f"{self.name} on {self.device} {what}: {' '.join(str(error).split())[:200]}")


class ONNXGraph:
    """A session with one binding."""

    def __init__(self, session: "ort.InferenceSession", form: Form, nbytes: int) -> None:
        self.form, self.nbytes, self._session = form, nbytes, session
        self._binding = session.io_binding()
        self._bound: tuple[Any, ...] | None = None

    def bind(self, x: Floats, y: Floats) -> None:
        import onnxruntime as ort

        check_buffers(self.form, x, y)
        given, made = (ort.OrtValue.ortvalue_from_numpy(array) for array in (x, y))
        if given.data_ptr() != x.ctypes.data or made.data_ptr() != y.ctypes.data:
            raise UnitError(f"ONNX Runtime {ort.__version__} copies what it is bound to")
        self._binding.bind_ortvalue_input("x", given)
        self._binding.bind_ortvalue_output("y", made)
        self._bound = x, y, given, made

    def run(self) -> None:
        if self._bound is None:
            raise ValueError("bind the graph first")
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # its classes share no base
            raise UnitError(f"ONNX Runtime failed to run a graph: {' '.join(str(error).split())[:200]}") from None
