"""Static graphs compute what their references say, in place, on every runtime that is installed."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from npu_blocks import random_block, tolerance

from coterie.actors import npu_fastest, npu_graphs, npu_onnx, npu_openvino
from coterie.actors.npu_graphs import Runtime, choose_blocks, open_runtime
from coterie.errors import UnitError
from coterie.models.spec import Activation
from coterie.storage.npu_block import Block, Form, Kind
from coterie.storage.npu_quantise import FLOAT_SCHEMES, SCHEMES, Floats, Scheme

RUNTIMES: dict[str, tuple[str, Callable[[str, int], Runtime]]] = {
    "openvino": ("openvino", npu_openvino.open_device),
    "onnxruntime": ("onnx", npu_onnx.open_device),
}
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "relu", "relu2", "drelu")


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    package, maker = RUNTIMES[request.param]
    pytest.importorskip(package, reason="pip install 'coterie[npu]'")
    pytest.importorskip(request.param, reason="pip install 'coterie[npu]'")
    return maker("CPU", 2)


def computed(runtime: Runtime, block: Block, x: Floats) -> Floats:
    y = np.full((block.form.n, block.form.width_out), np.nan, np.float32)
    graph = runtime.build(block)
    graph.bind(x, y)
    graph.run()
    return y


def assert_close(runtime: Runtime, block: Block, x: Floats) -> None:
    half = runtime.name == "OpenVINO" or len(x) == 1  # has bfloat16 for float activations; rounds those of one row
    expected = block.reference(x)
    scale = 1.0 if block.form.scheme not in FLOAT_SCHEMES else max(1.0, float(np.abs(expected).max()))
    allowed = tolerance(block, half) * scale
    np.testing.assert_allclose(computed(runtime, block, x), expected, atol=allowed, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["qkv", "out", "ffn"])
@pytest.mark.parametrize(("n", "dim", "padded"), [(1, 64, 64), (33, 70, 96), (7, 129, 160)])
def test_a_graph_computes_its_reference(
    runtime: Runtime, kind: Kind, scheme: Scheme, n: int, dim: int, padded: int
) -> None:
    block, x = random_block(kind, scheme, n=n, dim=dim, padded=padded, hidden=101)
    assert_close(runtime, block, x)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(runtime: Runtime, activation: Activation, scheme: Scheme) -> None:
    assert_close(runtime, *random_block("ffn", scheme, activation))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["out", "ffn"])
def test_swapped_operands_and_folded_rows_give_the_same(runtime: Runtime, kind: Kind, scheme: Scheme) -> None:
    """Checklist, rows 25 and 45."""
    plain, x = random_block(kind, scheme)
    expected = computed(runtime, plain, x)
    for form in ({"swapped": True}, {"folded": (4, 6)}, {"folded": (24, 1)}, {"folded": (1, 24)}):
        other, _ = random_block(kind, scheme, **form)
        assert_close(runtime, other, x)
        half = scheme in FLOAT_SCHEMES
        allowed = 2 * tolerance(plain, half) * (max(1.0, float(np.abs(expected).max())) if half else 1)
        np.testing.assert_allclose(computed(runtime, other, x), expected, atol=allowed)


def test_ranges_are_exceeded_and_hot_channels_used() -> None:
    """What the blocks here are for, or they would test too little."""
    for kind in ("out", "ffn"):
        block, x = random_block(kind, "w8a8")
        for rounding in block.roundings:
            assert rounding is not None
            assert len(rounding.hot) == 32
        assert block.roundings[0] is not None
        assert np.abs(x).max() > 127 * (block.roundings[0].scale + block.roundings[0].hot_scale)


@pytest.mark.parametrize("kind", ["out", "ffn"])
def test_four_bit_constants_as_npus_get_them(kind: Kind) -> None:
    """They are computed as floats on the processor, but are the same numbers."""
    block, x = random_block(kind, "w4a8-outliers")
    pytest.importorskip("openvino")
    import openvino as ov

    packed = npu_openvino.OpenVINO(ov.Core(), ov.get_version(), "CPU", 2, packed=True)
    np.testing.assert_allclose(computed(packed, block, x), block.reference(x), atol=tolerance(block), rtol=1e-4)
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    other = npu_onnx.ONNXRuntime(ort.__version__, "CPU", 2, packed=True)
    np.testing.assert_allclose(computed(other, block, x), block.reference(x), atol=tolerance(block), rtol=1e-4)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-outliers"])
@pytest.mark.parametrize("form", [{}, {"swapped": True}, {"folded": (4, 6)}])
def test_openvino_multiplies_integers(scheme: Scheme, form: dict[str, object]) -> None:
    pytest.importorskip("openvino")
    block, _ = random_block("ffn", scheme, **form)  # type: ignore[arg-type]
    graph = npu_openvino.open_device("CPU", 2).build(block)
    products = [kind for operation, kind in graph.primitives() if operation.startswith(("FullyConnected", "MatMul"))]
    assert len(products) == 6 + 3 * (scheme == "w4a8-outliers")
    assert all(kind.endswith("_i8") for kind in products), products


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-outliers"])
def test_onnx_runtime_multiplies_integers(scheme: Scheme) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    block, _ = random_block("ffn", scheme)
    blob = npu_onnx.open_device("CPU", 2).compile(block)
    operations = [node.op_type for node in onnx.load_from_string(blob).graph.node]
    assert operations.count("MatMulIntegerToFloat") == 4 + 2 * (scheme == "w4a8-outliers")
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(operations)


def test_graphs_read_and_write_the_bound_memory(runtime: Runtime) -> None:
    """Slices of one buffer, as an arena has them: a second run sees what was written there since."""
    block, x = random_block("out", "w8a8")
    size = x.size
    arena = np.zeros(2 * size + 16, np.float32)
    given, made = arena[:size].reshape(x.shape), arena[size + 16 :].reshape(x.shape)
    graph = runtime.build(block)
    graph.bind(given, made)
    for factor in (1.0, 0.5, -1.0):
        given[:] = x * np.float32(factor)
        graph.run()
        np.testing.assert_allclose(made, block.reference(given), atol=tolerance(block))
    assert not arena[size : size + 16].any()
    elsewhere = np.empty_like(x)
    graph.bind(given, elsewhere)
    made[:] = 0
    graph.run()
    assert not made.any()
    np.testing.assert_allclose(elsewhere, block.reference(given), atol=tolerance(block))


def test_memory_that_does_not_fit_is_refused(runtime: Runtime) -> None:
    block, x = random_block("out", "w8a8")
    graph, y = runtime.build(block), np.empty_like(x)
    wide = np.empty((x.shape[0], 2 * x.shape[1]), np.float32)
    locked = np.empty_like(x)
    locked.flags.writeable = False
    for bad in ((x[:-1], y), (x.astype(np.float64), y), (wide[:, ::2], y), (x, wide[:, : x.shape[1]]), (x, locked)):
        with pytest.raises(ValueError, match=r"the graph takes float32\[24, 96\] in one piece|cannot be written"):
            graph.bind(*bad)
    with pytest.raises(ValueError, match="bind the graph first"):
        graph.run()


def test_a_damaged_blob_is_refused_in_one_line(runtime: Runtime) -> None:
    block, _ = random_block("out", "w8a8")
    with pytest.raises(UnitError, match="refuses a"):
        runtime.load(np.zeros(4096, np.uint8), block.form)


def test_a_stand_in_says_so(runtime: Runtime) -> None:
    assert runtime.stand_in
    assert runtime.describe() == f"{runtime.name} {runtime.version}, CPU: a stand-in, no NPU found"


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnitError, match=r"not installed: pip install 'coterie\[npu\]'$"):
        open_runtime(f"{name}:CPU")
    with pytest.raises(UnitError, match=r"not installed: pip install 'coterie\[npu\]'$"):
        open_runtime(name)


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RUNTIMES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnitError, match=r"^no runtime for graphs is installed: pip install 'coterie\[npu\]'$"):
        open_runtime()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("tensorrt", r"^no runtime for graphs is called 'tensorrt'; there are openvino and onnxruntime$"),
        ("openvino:NPU", r"^OpenVINO finds no device 'NPU' here; it has "),
        ("onnxruntime:NPU", r"^ONNX Runtime has no provider for 'NPU' here; it has "),
        ("onnxruntime:QNN", r"^ONNX Runtime has no provider for 'QNN' here; it has "),
    ],
)
def test_what_is_not_here_is_refused_in_one_line(wanted: str, message: str) -> None:
    for name, (package, maker) in RUNTIMES.items():
        pytest.importorskip(package)
        pytest.importorskip(name)
        if wanted == f"{name}:NPU":
            try:
                maker("NPU", 1)
            except UnitError:
                continue
            pytest.skip("this machine has an NPU")
    with pytest.raises(UnitError, match=message):
        open_runtime(wanted)


def test_the_faster_stand_in_is_measured_once(monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    both = []
    for name, (package, maker) in RUNTIMES.items():
        pytest.importorskip(package)
        pytest.importorskip(name)
        both.append(maker("CPU", 1))
    asked = []

    def measured(runtimes: object) -> dict[str, float]:
        asked.append(runtimes)
        return {"OpenVINO": 2.0, "ONNX Runtime": 1.0}

    monkeypatch.setattr(npu_fastest, "measure", measured)
    assert npu_fastest.faster(both).name == "ONNX Runtime"
    assert npu_fastest.faster(both).name == "ONNX Runtime"
    assert len(asked) == 1
    both[0].version = "another"
    npu_fastest.faster(both)
    assert len(asked) == 2
    (own_home / "npu.json").write_text("{]")
    npu_fastest.faster(both)
    assert len(asked) == 3


def test_a_measurement_runs_both() -> None:
    both = []
    for name, (package, maker) in RUNTIMES.items():
        pytest.importorskip(package)
        pytest.importorskip(name)
        both.append(maker("CPU", 2))
    times = npu_fastest.measure(both)
    assert set(times) == {"OpenVINO", "ONNX Runtime"}
    assert all(seconds > 0 for seconds in times.values())


def form(kind: Kind, layer: int) -> Form:
    return Form(kind, layer, 32, 64, 64, "w8a8", "silu" if kind == "ffn" else None)


def test_a_window_is_filled_with_networks_first() -> None:
    """Checklist, row 46."""
    kinds: tuple[Kind, ...] = ("qkv", "out", "ffn")
    blocks = [(form(kind, layer), {"qkv": 30, "out": 20, "ffn": 100}[kind]) for layer in range(3) for kind in kinds]
    names = [(made.kind, made.layer) for made, _ in blocks]

    def chosen(window: int) -> list[tuple[str, int]]:
        indices = choose_blocks(blocks, window)
        assert indices == sorted(indices)
        assert sum(blocks[i][1] for i in indices) <= window
        return [names[i] for i in indices]

    assert chosen(10_000) == names
    assert chosen(250) == [("qkv", 0), ("out", 0), ("ffn", 0), ("ffn", 1)]
    assert chosen(300) == [("ffn", 0), ("ffn", 1), ("ffn", 2)]
    assert chosen(335) == [("qkv", 0), ("ffn", 0), ("ffn", 1), ("ffn", 2)]
    assert chosen(0) == []
    assert choose_blocks([]) == []
    assert npu_graphs.WINDOW == 4 << 30
