"""Writing what stands before a GGUF's weights, for models that are made of others."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coterie.models.header import TensorInfo

ARCHITECTURE = "general.architecture"
LARGEST_FLOAT = float(np.finfo(np.float32).max)
LARGEST = {"UINT32": 1 << 32, "INT32": 1 << 31, "UINT64": 1 << 64, "INT64": 1 << 63}


def header_bytes(metadata: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> bytes:
    """A GGUF's bytes before its tensors' data. Whole numbers get 32 bits where these do, other
    numbers are float32 where they fit."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = gguf.GGUFWriter(path, metadata[ARCHITECTURE])
        for key, value in metadata.items():
            if key == ARCHITECTURE or value == []:  # the writer knows no empty arrays
                continue
            if isinstance(value, list):
                inner = gguf.GGUFValueType[_kind(value)]
                writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, inner)
            else:
                writer.add_key_value(key, value, gguf.GGUFValueType[_kind([value])])
        for tensor in tensors:
            if tensor.rows == 1 and tensor.format == "F32":
                writer.add_tensor_info(tensor.name, (tensor.cols,), np.dtype(np.float32), tensor.nbytes)
            else:
                kind = gguf.GGMLQuantizationType[tensor.format]
                raw = tensor.rows, tensor.row_bytes
                writer.add_tensor_info(tensor.name, raw, np.dtype(np.uint8), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()


def _kind(values: list[Any]) -> str:
    """GGUF's type that holds all of these."""
    if any(isinstance(value, str) for value in values):
        return "STRING"
    if values and all(isinstance(value, bool) for value in values):
        return "BOOL"
    if any(isinstance(value, float) for value in values):
        return "FLOAT32" if all(abs(value) <= LARGEST_FLOAT for value in values) else "FLOAT64"
    low, high = min(values, default=0), max(values, default=0)
    kinds = ("INT32", "INT64") if low < 0 else ("UINT32", "UINT64")
    return next(kind for kind in kinds if high < LARGEST[kind] and -low <= LARGEST[kind])
