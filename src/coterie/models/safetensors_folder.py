"""A Hugging Face folder as a model: config.json, tokenizer.json and safetensors files, shown as the GGUF that
llama.cpp's converter would make of them. Matrices are coded as they are read.

Nothing in the folder is taken on trust; it is checked when it is opened, as GGUF files are.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ModelError, UsageError
from coterie.kernels.shapes import DOWN_FORMATS
from coterie.models import llama
from coterie.models.dequant import quantise
from coterie.models.folder_config import config_metadata, rope_factors
from coterie.models.folder_tokenizer import TokenizerFiles, tokenizer_metadata
from coterie.models.gguf_header import header_bytes
from coterie.models.header import BLOCKS
from coterie.models.json_object import entry, read_object, read_small
from coterie.models.safetensors_file import SafetensorsFile, Stored
from coterie.models.source import Bytes, Made, WeightSource

CONFIG, TOKENIZER, INDEX = "config.json", "tokenizer.json", "model.safetensors.index.json"
GENERATION, SETTINGS, TEMPLATE = "generation_config.json", "tokenizer_config.json", "chat_template.jinja"
# Bytes of a file at most. The first two must be there.
MOST = {
    CONFIG: 1 << 20,
    TOKENIZER: 32 << 20,
    GENERATION: 1 << 20,
    SETTINGS: 16 << 20,
    INDEX: 4 << 20,
    TEMPLATE: 1 << 20,
}
CHUNK = 1 << 22  # values that are coded at a time
FREQUENCIES = "rope_freqs.weight"
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,3})\.(.+)\.weight")
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class SafetensorsFolder(WeightSource):
    """An open folder. Matrices are coded in `format`, or in F16 where their rows are no blocks of it.

    Raises ModelError for what is damaged or not supported, UsageError for another `format` than DOWN_FORMATS.
    """

    def __init__(self, path: str | Path, format: str = "Q4_0") -> None:
        if format not in DOWN_FORMATS:
            raise UsageError(f"a folder cannot be coded as {format!r}; choose one of {', '.join(DOWN_FORMATS)}")
        self.path, self.format = Path(os.path.abspath(path)), format
        with ExitStack() as files:
            names = self._file_names()
            self._shards = [
                files.enter_context(closing(SafetensorsFile(self.path / name))) for name in sorted(set(names))
            ]
            self._stored = self._find(self._shards)
            self._understand()
            self._files = files.pop_all()

    # --- opening ---------------------------------------------------------------------------------------------

    def _object(self, name: str) -> dict[str, Any]:
        """What a JSON file holds, {} where it may be left out and is."""
        path = self.path / name
        return read_object(path, MOST[name]) if name in (CONFIG, TOKENIZER) or path.exists() else {}

    def _file_names(self) -> list[str]:
        """Of the files with weights: those of the index, or all there are."""
        index = self._object(INDEX)
        if not index:
            names = [path.name for path in self.path.glob("*.safetensors")]
            if not names:
                raise ModelError(f"{self.path.name}: there is no safetensors file in the folder; download it again")
            return names
        found = list(entry(index, "weight_map", dict, INDEX).values())
        for name in found:
            # Only files of this folder: an index must not lead out of it.
            if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
                raise ModelError(f"{INDEX}: {repr(name)[:60]} is no safetensors file of this folder")
        return found

    def _find(self, shards: Sequence[SafetensorsFile]) -> dict[str, Stored]:
        """All tensors, by GGUF's names."""
        stored: dict[str, Stored] = {}
        for shard in shards:
            for name, tensor in shard.tensors.items():
                new = gguf_name(name)
                if new is None:
                    continue
                if not new:
                    raise ModelError(
                        f"{shard.path.name}: tensor {name[:60]!r} has no place in the models that Coterie knows; "
                        "this variant is not supported"
                    )
                if new in stored:
                    raise ModelError(f"{shard.path.name}: tensor {name[:60]!r} is in {stored[new].file.path.name} too")
                stored[new] = tensor
        return stored

    def _understand(self) -> None:
        """Metadata and tensors as of a GGUF, and a check that they make a model."""
        config = self._object(CONFIG)
        self.metadata = config_metadata(config) | {"general.name": self.path.name.encode(errors="replace").decode()}
        if entry(config, "tie_word_embeddings", bool, CONFIG, False):
            self._stored.pop("output.weight", None)
        self._made = {name: self._matrix(name, tensor) for name, tensor in self._stored.items()}
        self.tensors = {name: made.info(name) for name, made in self._made.items()}
        self._head_dim = llama.read_sizes(self, self.metadata["general.architecture"])["head_dim"]
        self._factors = rope_factors(config, self._head_dim)
        if (factors := self._factors) is not None:
            made = Made("F32", (1, factors.size), lambda rows: factors[None].view(np.uint8).copy())
            self._made[FREQUENCIES], self.tensors[FREQUENCIES] = made, made.info(FREQUENCIES)
        template = read_small(self.path / TEMPLATE, MOST[TEMPLATE]) if (self.path / TEMPLATE).exists() else b""
        files = TokenizerFiles(
            self._object(TOKENIZER), self._object(SETTINGS), config, self._object(GENERATION), _text(template)
        )
        self.metadata |= tokenizer_metadata(files, self.tensor("token_embd.weight").rows)
        _check_text(self.path.name, self.metadata)
        llama.read_spec(self)

    def _matrix(self, name: str, tensor: Stored) -> Made:
        """A tensor as it is coded: vectors as they are."""
        values, _ = BLOCKS[self.format]
        format = "F32" if tensor.rows == 1 else self.format if tensor.cols % values == 0 else "F16"

        def read(rows: range) -> Bytes:
            step = max(1, CHUNK // tensor.cols)
            pieces = [rows[at : at + step] for at in range(0, len(rows), step)] or [rows]
            coded = [quantise(self._floats(name, piece), format) for piece in pieces]
            return coded[0] if len(coded) == 1 else np.concatenate(coded)

        return Made(format, (tensor.rows, tensor.cols), read)

    # --- reading ---------------------------------------------------------------------------------------------

    def _floats(self, name: str, rows: range) -> NDArray[np.float32]:
        """Rows as the file has them, those of queries and keys in GGUF's order: rotary pairs side by side."""
        stored = self._stored[name]
        if not name.endswith(("attn_q.weight", "attn_k.weight")):
            return stored.floats(rows.start, rows.stop)
        dim = self._head_dim
        low, high = rows.start // dim * dim, -(-rows.stop // dim) * dim  # whole heads
        order = np.arange(high - low).reshape(-1, 2, dim // 2).swapaxes(1, 2).ravel()
        return stored.floats(low, high)[order[rows.start - low : rows.stop - low]]

    def read(self, name: str, first: int = 0, last: int | None = None) -> Bytes:
        return self._made[self.tensor(name).name].read(self.rows(name, first, last))

    def floats(self, name: str) -> NDArray[np.float32]:
        """As the files have it, not as it is coded."""
        if name not in self._stored:
            return super().floats(name)
        floats = self._floats(name, self.rows(name, 0, None))
        return floats[0] if len(floats) == 1 else floats

    def stored_format(self, name: str) -> str:
        return self._stored[name].format if name in self._stored else super().stored_format(name)

    def changes(self, names: Collection[str]) -> list[str]:
        """How these tensors are coded, where that is not as they are in the files, in lines."""
        formats = [(self.stored_format(name), self.tensors[name].format) for name in names if name in self.tensors]
        counts = Counter(pair for pair in formats if pair[0] != pair[1])
        return [f"{old} to {new}: {count} tensors" for (old, new), count in counts.items()]

    def header_bytes(self) -> bytes:
        return header_bytes(self.metadata, self.tensors.values())

    def key(self) -> bytes:
        return sha256(self.origin() + self.format.encode()).digest()

    def origin(self) -> bytes:
        """Of what was read when it was opened, and of the files' sizes and times of change."""
        factors = b"" if self._factors is None else self._factors.tobytes()
        stamps = b"".join(shard.stamp() for shard in self._shards)
        return sha256(repr(self.metadata).encode() + factors + stamps).digest()

    def forget(self) -> None:
        for shard in self._shards:
            shard.forget()

    def check_unchanged(self) -> None:
        for shard in self._shards:
            shard.check_unchanged()

    def close(self) -> None:
        self._files.close()


def gguf_name(name: str) -> str | None:
    """GGUF's name of a tensor; "" where it has none, None where the tensor says nothing new."""
    if name.endswith(".rotary_emb.inv_freq"):
        return None
    found = LAYER_NAME.fullmatch(name)
    if found and found[2] in LAYER_NAMES:
        return f"blk.{found[1]}.{LAYER_NAMES[found[2]]}.weight"
    return NAMES.get(name, "")


def _text(data: bytes) -> str | None:
    return data.decode(errors="replace") or None


def _check_text(name: str, metadata: Mapping[str, Any]) -> None:
    """JSON can hold halves of characters, which no GGUF can."""
    for key, value in metadata.items():
        texts = value if isinstance(value, list) else [value]
        try:
            "".join(text for text in texts if isinstance(text, str)).encode()
        except UnicodeEncodeError:
            raise ModelError(f"{name}: metadata {key!r} hold text that is not Unicode; download it again") from None
