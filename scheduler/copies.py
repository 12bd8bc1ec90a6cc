"""What runtimes of other units keep for themselves: part of the budget, though not in the arena."""

from coterie.models.spec import ModelSpec
from coterie.scheduler.placement import Placement

GPU_RUNTIME = 160 << 20  # bytes: an OpenCL driver and its compiler (measured: PoCL, docs/benchmarks.md)
NPU_RUNTIME = 160 << 20  # bytes: OpenVINO or ONNX Runtime, loaded
GRAPH = 1 << 20  # bytes of a graph beside its weights


def unit_copies(placement: Placement, spec: ModelSpec) -> dict[str, int]:
    """Bytes of weights that runtimes copy, and of the runtimes, by unit: graphs hold int8 weights of their own, one for
    each length."""
    copies = {}
    if placement.gpu:
        copies["gpu"] = GPU_RUNTIME
    if placement.prefill == "npu":
        heads = (2 * spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
        weights = len(spec.layers) * spec.dim * (heads + 3 * spec.ffn_dim)
        copies["npu"] = NPU_RUNTIME + len(placement.lengths) * (weights + 3 * len(spec.layers) * GRAPH)
    return copies
