"""A block as an ONNX model (npu_onnx.py says in what form)."""

from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.storage.npu_block import Block
from coterie.storage.npu_quantise import GROUP, Columns, Floats, Int8s, Quantised, Rounding

if TYPE_CHECKING:
    import onnx

OPSET, CONTRIBUTED, IR = 21, 1, 10  # the first opset with int4


def model(block: Block, packed: bool) -> bytes:
    """The serialised model: input "x", output "y". `packed`: four-bit values lie in int4."""
    from onnx import TensorProto, helper

    form = block.form
    graph = _Graph(form.swapped, packed, rounding=form.n == 1)
    x = "x"
    if form.folded:
        x = graph.op("Reshape", x, graph.constant(np.array([*form.folded, form.width_in], np.int64)))
    if form.swapped:
        x = graph.op("Transpose", x, perm=[1, 0])
    y = graph.product(x, block.matrices[0], block.roundings[0])
    if form.activation is not None:
        gate, up = graph.halves(y)
        y = graph.product(graph.activated(form.activation, gate, up), block.matrices[1], block.roundings[1])
    if form.swapped:
        y = graph.op("Transpose", y, perm=[1, 0])
    if form.folded:
        y = graph.op("Reshape", y, graph.constant(np.array([form.n, form.width_out], np.int64)))
    graph.nodes.append(helper.make_node("Identity", [y], ["y"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [form.n, width])
        for name, width in (("x", form.width_in), ("y", form.width_out))
    ]
    body = helper.make_graph(graph.nodes, f"{form.kind} of layer {form.layer}", ends[:1], ends[1:], graph.constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", CONTRIBUTED)]
    made = helper.make_model(body, opset_imports=opsets)
    made.ir_version = IR
    return bytes(made.SerializeToString())


class _Graph:
    """Nodes and constants, named by number. A swapped graph holds everything transposed between its ends. `rounding`:
    float activations are rounded in groups."""

    def __init__(self, swapped: bool, packed: bool, rounding: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._swapped, self._packed = swapped, packed
        self._accuracy = 4 if rounding else 1  # of MatMulNBits: computes in int8, or in float32
        self._axis = 0 if swapped else -1  # of channels

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output, whose name it gives."""
        from onnx import helper

        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, array: Any, four_bits: bool = False) -> str:
        from onnx import TensorProto, numpy_helper

        name = f"c{len(self.constants)}"
        if four_bits:
            flat = np.pad(array.reshape(-1), (0, array.size % 2)).view(np.uint8) & 15
            raw = (flat[::2] | flat[1::2] << 4).tobytes()
            tensor = TensorProto(name=name, data_type=TensorProto.INT4, dims=array.shape, raw_data=raw)
        else:
            tensor = numpy_helper.from_array(np.asarray(array, order="C"), name)
        self.constants.append(tensor)
        return name

    def product(self, x: str, weights: Quantised, rounding: Rounding | None) -> str:
        """As npu_quantise.product."""
        if rounding is None:
            return self._floats(x, weights)
        scales = weights.scales[:, 0]
        y = self._integers(x, weights.values, scales, rounding.scale, self._packed and weights.bits == 4)
        if len(weights.outliers.index):
            some = self._gathered(x, weights.outliers.index)
            y = self.op("Add", y, self._columns(some, weights.outliers, rounding.scale))
        if len(rounding.hot):
            some = self._gathered(x, rounding.hot)
            low, high = (self.constant(np.float32(end * np.float32(rounding.scale))) for end in (-128, 127))
            beyond = self.op("Sub", some, self.op("Clip", some, low, high))
            y = self.op("Add", y, self._columns(beyond, weights.hot, rounding.hot_scale))
        return y

    def _gathered(self, x: str, index: Any) -> str:
        return self.op("Gather", x, self.constant(index), axis=self._axis)

    def _columns(self, x: str, part: Columns, unit: float) -> str:
        return self._integers(x, part.values, part.scales, unit, four_bits=False)

    def _integers(self, x: str, values: Int8s, scales: Floats, unit: float, four_bits: bool) -> str:
        scale, zero = self.constant(np.float32(unit)), self.constant(np.uint8(128))
        q = self.op("DequantizeLinear", self.op("QuantizeLinear", x, scale, zero), scale, zero)
        if self._swapped:
            constant = self.constant(values, four_bits)
            return self.op("MatMul", self.op("DequantizeLinear", constant, self.constant(scales), axis=0), q)
        constant = self.constant(np.ascontiguousarray(values.T), four_bits)
        return self.op("MatMul", q, self.op("DequantizeLinear", constant, self.constant(scales), axis=1))

    def _floats(self, x: str, weights: Quantised) -> str:
        """MatMulNBits: unsigned values with their zero in the middle, which it takes for granted, of four bits two a
        byte. A swapped product is the same here, as it has its weights on one side only."""
        (rows, cols), bits = weights.shape, weights.bits
        shifted = (weights.values.view(np.uint8) + np.uint8(1 << bits - 1)).reshape(rows, cols // GROUP, GROUP)
        packed = self.constant(shifted[:, :, ::2] | shifted[:, :, 1::2] << 4 if bits == 4 else shifted)
        sizes = {"K": cols, "N": rows, "bits": bits, "block_size": GROUP, "accuracy_level": self._accuracy}
        straight = self.op("Transpose", x, perm=[1, 0]) if self._swapped else x
        y = self.op("MatMulNBits", straight, packed, self.constant(weights.scales), domain="com.microsoft", **sizes)
        return self.op("Transpose", y, perm=[1, 0]) if self._swapped else y

    def halves(self, y: str) -> tuple[str, str]:
        from onnx import helper

        gate, up = f"{y}_gate", f"{y}_up"
        self.nodes.append(helper.make_node("Split", [y], [gate, up], axis=self._axis, num_outputs=2))
        return gate, up

    def activated(self, activation: str, gate: str, up: str) -> str:
        """As models.llama.activated."""
        match activation:
            case "silu":
                return self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
            case "gelu":
                return self.op("Mul", self.op("Gelu", gate, approximate="tanh"), up)
            case "relu":
                return self.op("Mul", self.op("Relu", gate), up)
            case "relu2":
                positive = self.op("Relu", gate)
                return self.op("Mul", self.op("Mul", positive, positive), up)
            case "drelu":
                return self.op("Mul", self.op("Relu", gate), self.op("Relu", up))
        raise ValueError(f"no activation is called {activation}")
