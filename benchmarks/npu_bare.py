"""Bare int8 graphs of a chain of matrices, as each runtime's own documentation has them: what npu.py is measured by."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
LARGEST = 4.0  # of activations


def weights(k: int, n: int, pairs: int) -> list[Floats]:
    """float32[n, k] and float32[k, n] in turn."""
    rng = np.random.default_rng(0)
    shapes = [(n, k), (k, n)] * pairs
    return [(rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[1] ** 0.5)) for shape in shapes]


def chains(matrices: list[Floats], rows: int, threads: int) -> dict[str, Callable[[], Any]]:
    """By name, what runs the chain once on bound memory. ONNX Runtime twice: quantised before and after each product,
    as its static quantiser does, and with float sums between."""
    return {
        "bare OpenVINO, int8": openvino_chain(matrices, rows, threads),
        "bare ONNX Runtime, QDQ": onnx_chain(matrices, rows, threads, "qdq"),
        "bare ONNX Runtime, MatMulInteger": onnx_chain(matrices, rows, threads, "integer"),
    }


def openvino_network(k: int, n: int, rows: int, threads: int) -> Callable[[], Any]:
    """A SwiGLU network of k and n columns, FakeQuantize of both sides of its three products."""
    from openvino import opset13 as op

    up, down, gate = (*weights(k, n, 1), weights(k, n, 1)[0])
    given = op.parameter([rows, k], np.float32)
    hidden = op.multiply(op.swish(_rounded_product(given, gate)), _rounded_product(given, up))
    return _openvino(_rounded_product(hidden, down), given, threads)


def openvino_chain(matrices: list[Floats], rows: int, threads: int) -> Callable[[], Any]:
    """FakeQuantize of both sides."""
    from openvino import opset13 as op

    given = op.parameter([rows, matrices[0].shape[1]], np.float32)
    y = given
    for w in matrices:
        y = _rounded_product(y, w)
    return _openvino(y, given, threads)


def _rounded_product(x: Any, w: Floats) -> Any:
    from openvino import opset13 as op

    ends = [op.constant(np.float32(end)) for end in (-LARGEST, LARGEST * 127 / 128)]
    largest = np.abs(w).max(axis=1, keepdims=True)
    sides = [op.constant(side) for side in (-largest, largest)]
    rounded = op.fake_quantize(x, *ends, *ends, 256)
    return op.matmul(rounded, op.fake_quantize(op.constant(w), *sides, *sides, 255), False, True)


def _openvino(y: Any, given: Any, threads: int) -> Callable[[], Any]:
    import openvino as ov

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(ov.Model([y], [given]), "CPU", settings).create_infer_request()
    x = np.random.default_rng(1).standard_normal(tuple(given.get_output_shape(0))).astype(np.float32)
    request.set_input_tensor(ov.Tensor(x, shared_memory=True))
    return lambda: (request.infer(share_inputs=True, share_outputs=True), x)  # a tensor does not keep its array


def onnx_chain(matrices: list[Floats], rows: int, threads: int, form: str) -> Callable[[], Any]:
    """uint8 activations, int8 weights."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants = [
        numpy_helper.from_array(np.array(LARGEST / 127, np.float32), "unit"),
        numpy_helper.from_array(np.array(128, np.uint8), "zero"),
    ]
    y = "x"
    for i, w in enumerate(matrices):
        scales = (np.abs(w).max(axis=1) / 127).astype(np.float32)
        values = np.ascontiguousarray(np.rint(w / scales[:, None]).astype(np.int8).T)
        constants += [numpy_helper.from_array(values, f"w{i}"), numpy_helper.from_array(scales, f"s{i}")]
        nodes.append(helper.make_node("QuantizeLinear", [y, "unit", "zero"], [f"q{i}"]))
        if form == "qdq":
            nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", "unit", "zero"], [f"d{i}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"w{i}", f"s{i}"], [f"f{i}"], axis=1))
            nodes.append(helper.make_node("MatMul", [f"d{i}", f"f{i}"], [f"y{i}"]))
        else:
            inputs = [f"q{i}", f"w{i}", "unit", f"s{i}", "zero"]
            nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [f"y{i}"], domain="com.microsoft"))
        y = f"y{i}"
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width])
        for name, width in (("x", matrices[0].shape[1]), (y, len(matrices[-1])))
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((rows, matrices[0].shape[1])).astype(np.float32)
    out = np.empty((rows, len(matrices[-1])), np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output(y, ort.OrtValue.ortvalue_from_numpy(out))
    return lambda: (session.run_with_iobinding(binding), x, out)
