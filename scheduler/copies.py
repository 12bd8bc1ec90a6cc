"""What runtimes of other units keep for themselves: part of the budget, though not in the arena."""

from coterie.models.spec import ModelSpec
from coterie.scheduler.placement import Placement

GPU_RUNTIME = 160 << 20  # bytes: an OpenCL driver and its compiler (measured: PoCL, docs/benchmarks.md)
NPU_RUNTIME = 160 << 20  # bytes: OpenVINO or ONNX Runtime, loaded
WEIGHTS = 2.2  # times the int8 weights that a graph takes (measured: OpenVINO)
ROW_WEIGHTS = 1.15  # the same of a token's graph; one in four bits takes 0.7
GRAPH = 800 << 10  # bytes that each further graph of a product takes, its weights apart (measured: OpenVINO)


def unit_copies(placement: Placement, spec: ModelSpec) -> dict[str, int]:
    """Bytes that runtimes take, by unit: themselves, and of graphs the weights and what is computed within, for each
    length (docs/benchmarks.md compares this with what processes grew by)."""
    copies = {}
    if placement.gpu:
        copies["gpu"] = GPU_RUNTIME
    if placement.prefill == "npu":
        heads = (2 * spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
        parts = {kind: cut.points[-1] / cut.of for kind, cut in placement.cuts.items()}
        weights = WEIGHTS * spec.dim * (parts["matmul"] * heads + parts["ffn"] * 3 * spec.ffn_dim)
        widths = 4 * (4 * spec.dim + heads + 3 * spec.ffn_dim)  # bytes of a row in a layer's graphs
        layers = len(spec.layers)
        row = layers * 3 * spec.ffn_dim * parts.get("row_ffn", 0) + spec.vocab * parts.get("row_head", 0)
        copies["npu"] = NPU_RUNTIME + int(ROW_WEIGHTS * spec.dim * row)
        copies["npu"] += sum(int(layers * (weights + rows * widths)) for rows in placement.lengths)
        pieces = {kind: len(cut.points) for kind, cut in placement.cuts.items()}
        further = len(placement.lengths) * (2 * (pieces["matmul"] - 1) + pieces["ffn"] - 1) + pieces.get("row_ffn", 0)
        copies["npu"] += GRAPH * (layers * further + pieces.get("row_head", 0))
    return copies
