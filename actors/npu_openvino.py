"""Graphs through OpenVINO: on Intel's NPU, or on the processor as a stand-in.

On the processor, eight-bit activations and weights meet in int8 instructions (VNNI) where both come as OpenVINO's own
quantiser writes them: a FakeQuantize of the input with 256 levels, and constants in i8 that are converted and scaled.
Constants in i4 would be turned into floats there, which halves the speed, so four-bit values lie in i8 on the
processor; on an NPU they are i4. Float activations (w4a16, w8a16) take i4 or i8 in groups as OpenVINO's compressed
weights; for one row the processor then rounds them in the same groups, where weights are i4: twice as fast, and as the
CPU unit does.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.actors.npu_graphs import Bytes, check_buffers, describe
from coterie.errors import UnitError
from coterie.storage.npu_block import Block, Form
from coterie.storage.npu_quantise import FLOAT_SCHEMES, GROUP, SCHEMES, Columns, Floats, Int8s, Quantised, Rounding

if TYPE_CHECKING:
    import openvino as ov

MISSING = "OpenVINO is not installed: pip install 'coterie[npu]'"


def open_device(device: str, threads: int) -> "OpenVINO":
    """Device "NPU" or "CPU". Raises UnitError where OpenVINO or the device is missing."""
    try:
        import openvino as ov
    except ImportError:
        raise UnitError(MISSING) from None
    core = ov.Core()
    if not any(found.split(".")[0] == device for found in core.available_devices):
        raise UnitError(f"OpenVINO finds no device {device[:40]!r} here; it has {', '.join(core.available_devices)}")
    return OpenVINO(core, ov.get_version(), device, threads)


class OpenVINO:
    """OpenVINO on a device; `packed` says whether four-bit values of w4a8-outliers lie in i4, None: but on the CPU."""

    name = "OpenVINO"
    schemes = SCHEMES

    def __init__(self, core: "ov.Core", version: str, device: str, threads: int, packed: bool | None = None) -> None:
        self._core, self.version, self.device = core, version.split("-")[0], device
        self.stand_in = device == "CPU"
        self._packed = not self.stand_in if packed is None else packed
        self._settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if self.stand_in:
            # Threads stay unpinned: other units' lanes choose their cores. A stream has threads of its own, two a
            # graph; without one (NUM_STREAMS 0) there are none, but half of the runs then had one core only.
            self._settings |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False, "NUM_STREAMS": 1}

    def describe(self) -> str:
        return describe(self)

    def compile(self, block: Block) -> bytes:
        try:
            compiled = self._core.compile_model(_model(block, self._packed), self.device, self._options(block.form))
            return bytes(compiled.export_model().getbuffer())
        except RuntimeError as error:
            raise _failed("cannot build a graph", error) from None

    def load(self, blob: Bytes, form: Form) -> "OpenVINOGraph":
        import openvino as ov

        try:
            tensor = ov.Tensor(blob, list(blob.shape), ov.Type.u8)
            compiled = self._core.import_model(tensor, self.device, self._options(form))
            return OpenVINOGraph(compiled, form, blob)
        except RuntimeError as error:
            raise _failed("refuses a compiled graph", error) from None

    def build(self, block: Block) -> "OpenVINOGraph":
        return self.load(np.frombuffer(self.compile(block), np.uint8), block.form)

    def _options(self, form: Form) -> dict[str, Any]:
        """Floats are float32 beside integers; alone they are the 16 bits of the scheme's name where the processor
        computes with them."""
        if not self.stand_in:
            return self._settings
        one = form.n == 1  # which takes as long as weights are read
        half = form.scheme in FLOAT_SCHEMES and not one
        half = half and "BF16" in self._core.get_property(self.device, "OPTIMIZATION_CAPABILITIES")
        group = GROUP if one and form.scheme == "w4a16" else 0
        how = {"INFERENCE_PRECISION_HINT": "bf16" if half else "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
        return self._settings | how


class OpenVINOGraph:
    """A compiled model with one request. The blob it came from is kept: its constants lie there."""

    def __init__(self, compiled: "ov.CompiledModel", form: Form, blob: Bytes) -> None:
        self.form, self.nbytes = form, len(blob)
        self._blob, self._compiled, self._request = blob, compiled, compiled.create_infer_request()
        self._bound: tuple[Floats, Floats] | None = None

    def bind(self, x: Floats, y: Floats) -> None:
        import openvino as ov

        check_buffers(self.form, x, y)
        self._request.set_input_tensor(ov.Tensor(x, shared_memory=True))
        self._request.set_output_tensor(ov.Tensor(y, shared_memory=True))
        self._bound = x, y

    def run(self) -> None:
        if self._bound is None:
            raise ValueError("bind the graph first")
        try:
            self._request.infer(share_inputs=True, share_outputs=True)  # else results would be copied once more
        except RuntimeError as error:
            raise _failed("failed to run a graph", error) from None

    def primitives(self) -> list[tuple[str, str]]:
        """What the processor's plugin runs, as (operation, primitive with its number type)."""
        nodes = self._compiled.get_runtime_model().get_ordered_ops()
        info = [node.get_rt_info() for node in nodes]
        return [(str(i["layerType"].astype(str)), str(i["primitiveType"].astype(str))) for i in info]


def _failed(what: str, error: RuntimeError) -> UnitError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UnitError(f"OpenVINO {what}: {lines[-1][:200] if lines else 'no reason given'}")


def _model(block: Block, packed: bool) -> "ov.Model":
    """The block as OpenVINO's graph. A swapped one holds everything transposed between its ends."""
    import openvino as ov
    from openvino import opset13 as op

    form = block.form
    given = op.parameter([form.n, form.width_in], np.float32)
    x = given
    if form.folded:
        x = op.reshape(x, np.array([*form.folded, form.width_in]), False)
    if form.swapped:
        x = op.transpose(x, np.array([1, 0]))
    first, rounding = block.matrices[0], block.roundings[0]
    if form.activation is None:
        y = _product(x, first, rounding, form, packed)
    else:  # Gate and Up apart: splitting their outputs would copy them
        gate, up = (_product(x, half, rounding, form, packed) for half in first.halves())
        y = _product(_activated(form.activation, gate, up), block.matrices[1], block.roundings[1], form, packed)
    if form.swapped:
        y = op.transpose(y, np.array([1, 0]))
    if form.folded:
        y = op.reshape(y, np.array([form.n, form.width_out]), False)
    return ov.Model([y], [given], f"{form.kind} of layer {form.layer}")


def _product(x: Any, weights: Quantised, rounding: Rounding | None, form: Form, packed: bool) -> Any:
    """As npu_quantise.product."""
    from openvino import opset13 as op

    if rounding is None:
        return _matmul(x, _grouped(weights), form)
    rounded = _rounded(x, rounding.scale)
    y = _matmul(rounded, _scaled(weights.values, weights.scales, packed and weights.bits == 4), form)
    if len(weights.outliers.index):
        some = _gathered(x, weights.outliers.index, form)
        y = op.add(y, _matmul(_rounded(some, rounding.scale), _columns(weights.outliers), form))
    if len(rounding.hot):
        some = _gathered(x, rounding.hot, form)
        beyond = op.subtract(some, op.clamp(some, -128 * rounding.scale, 127 * rounding.scale))
        y = op.add(y, _matmul(_rounded(beyond, rounding.hot_scale), _columns(weights.hot), form))
    return y


def _matmul(x: Any, weights: Any, form: Form) -> Any:
    from openvino import opset13 as op

    return op.matmul(weights, x, False, False) if form.swapped else op.matmul(x, weights, False, True)


def _gathered(x: Any, index: Any, form: Form) -> Any:
    from openvino import opset13 as op

    return op.gather(x, op.constant(index), op.constant(0 if form.swapped else -1))


def _rounded(x: Any, scale: float) -> Any:
    """To 256 levels, which the plugins recognise as int8."""
    from openvino import opset13 as op

    low, high = (op.constant(np.float32(end * np.float32(scale))) for end in (-128, 127))
    return op.fake_quantize(x, low, high, low, high, 256)


def _columns(part: Columns) -> Any:
    return _scaled(part.values, part.scales[:, None], False)


def _scaled(values: Int8s, scales: Floats, packed: bool) -> Any:
    """Constants with a scale per row."""
    from openvino import opset13 as op

    constant = _nibbles(values) if packed else op.constant(values)
    return op.multiply(op.convert(constant, "f32"), op.constant(scales))


def _grouped(weights: Quantised) -> Any:
    """Compressed weights: i4 or i8 in groups, with half floats as scales."""
    from openvino import opset13 as op

    (rows, cols), groups = weights.shape, weights.scales.shape[1]
    shaped = weights.values.reshape(rows, groups, -1)
    values = op.convert(_nibbles(shaped) if weights.bits == 4 else op.constant(shaped), "f16")
    scaled = op.multiply(values, op.constant(weights.scales[:, :, None].astype(np.float16)))
    return op.convert(op.reshape(scaled, np.array([rows, cols]), False), "f32")


def _nibbles(values: Int8s) -> Any:
    """An i4 constant: two values a byte, the earlier one low. It has its own copy."""
    import openvino as ov
    from openvino import opset13 as op

    flat = np.pad(values.reshape(-1), (0, values.size % 2)).view(np.uint8) & 15
    shared = ov.Tensor(np.ascontiguousarray(flat[::2] | flat[1::2] << 4), list(values.shape), ov.Type.i4)
    own = ov.Tensor(ov.Type.i4, list(values.shape))
    shared.copy_to(own)
    return op.constant(own)


def _activated(activation: str, gate: Any, up: Any) -> Any:
    """As models.llama.activated."""
    from openvino import opset13 as op

    match activation:
        case "silu":
            return op.multiply(op.swish(gate), up)
        case "gelu":
            return op.multiply(op.gelu(gate, "tanh"), up)
        case "relu":
            return op.multiply(op.relu(gate), up)
        case "relu2":
            return op.multiply(op.multiply(op.relu(gate), op.relu(gate)), up)
        case "drelu":
            return op.multiply(op.relu(gate), op.relu(up))
    raise ValueError(f"no activation is called {activation}")
