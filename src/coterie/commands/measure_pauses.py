"""Measuring what an engine takes between two tokens, for the device profile: of a made-up model on disk, in memory and
streamed. A thread that has waited for a streamed step finds caches cold, so that the two differ."""

import statistics
import tempfile
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np

from coterie.commands.measure_units import NARROW, Shape, made_up
from coterie.commands.model_bench import FILL, Progress
from coterie.engine import Engine
from coterie.opening import open_model
from coterie.paths import cache_dir
from coterie.scheduler.plan import Wishes
from coterie.sizes import Share
from coterie.storage.flash_writer import pack_model
from coterie.trace.chrome import read_rings

FORMAT = "Q4_0"
STREAMED = Share(0.75)  # of the weights in memory; embeddings too, so that no read is waited for
CONTEXT, TOKENS, FIRST = 64, 48, 8  # tokens until caches are warm
CONTROLS = ("<unk>", "<s>", "</s>")


def measure_pauses(lanes: int, progress: Progress) -> tuple[float, float]:
    """Seconds between the last instruction of a token and the first of the next, in memory and where weights are
    streamed."""
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:  # reads are direct, which memory's files are not for
        file, packed = Path(folder) / "model.gguf", Path(folder) / "model.coterie"
        write_made_up(file, NARROW, FORMAT)
        with closing(open_model(file)) as model:
            pack_model(model, packed, progress)
        progress("measuring the time between tokens")
        return _pause(file, lanes, None), _pause(packed, lanes, STREAMED)


def _pause(path: Path, lanes: int, memory: Share | None) -> float:
    model = open_model(path)
    wishes = Wishes(threads=lanes, context=CONTEXT, memory=memory)
    with closing(Engine(model, wishes, trace=path.with_suffix(".json"))) as engine:
        with closing(engine.sequence()) as sequence:
            for token in range(TOKENS):
                engine.decode([sequence], [token])
        assert engine.unit.buffers.rings is not None
        events = np.concatenate(read_rings(engine.arena.numpy(engine.unit.buffers.rings)))
        seconds = 1 / engine.unit.cycles_per_second()
    steps = [events[events["epoch"] == epoch] for epoch in np.unique(events["epoch"])[FIRST:]]
    begun, ended = [int(step["start"].min()) for step in steps], [int(step["end"].max()) for step in steps]
    return statistics.median(b - e for b, e in zip(begun[1:], ended[:-1], strict=True)) * seconds


def write_made_up(path: Path, shape: Shape, format: str) -> None:
    """A GGUF of such a model, its matrices all of one format, with words that mean nothing."""
    spec, tensors = made_up(shape, format)
    writer = gguf.GGUFWriter(str(path), spec.architecture)
    writer.add_block_count(shape.layers)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(shape.dim)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_freq_base(spec.layers[0].rope.base)
    writer.add_vocab_size(shape.vocab)
    words = [*CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.CONTROL] * len(CONTROLS) + [gguf.TokenType.BYTE] * 256
    words += [f"w{number}" for number in range(shape.vocab - len(words))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([*kinds, *([gguf.TokenType.NORMAL] * (len(words) - len(kinds)))])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for tensor in tensors.values():
        if tensor.rows == 1:
            writer.add_tensor(tensor.name, np.ones(tensor.cols, np.float32))
        else:
            raw = np.full((tensor.rows, tensor.nbytes // tensor.rows), FILL, np.uint8)
            writer.add_tensor(tensor.name, raw, raw_dtype=gguf.GGMLQuantizationType[format])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
