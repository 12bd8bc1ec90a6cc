"""Measuring what the CPU unit's own kernels take, for the device profile.

Programs of two made-up models, a narrow and a wide one, are compiled as those of real models are, and run on weights
that caches cannot hold (model_bench.py).

A kernel's times at several sizes become launch, bytes/s and operations/s.
"""

import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coterie.actors.sweep import Sweep
from coterie.commands.model_bench import ModelBench, Progress
from coterie.errors import CoterieError, UsageError
from coterie.kernels.formats import FORMATS
from coterie.models.header import BLOCKS, TensorInfo
from coterie.models.spec import LayerSpec, ModelSpec, Rope
from coterie.scheduler.device_model import Instruction
from coterie.scheduler.operators import Rows
from coterie.scheduler.profile import FlashProfile, KernelCost, UnitProfile
from coterie.scheduler.resident import CONTEXT
from coterie.scheduler.soc import short_name

USUAL = ("Q4_0", "Q8_0", "Q6_K")
NEAR, FAR = 64, 1024  # positions at which attention is timed
FEW, MANY = 64, 256  # tokens of a chunk
REPEAT = 9
LEAST = 1e-7  # seconds that an instruction takes: what was disturbed may seem to end before it begins
BESIDE = 1.0  # seconds of reading while lanes compute
Point = tuple[Instruction, float]  # and the seconds it took


@dataclass(frozen=True)
class Shape:
    """A made-up model."""

    dim: int
    heads: int
    kv_heads: int
    ffn: int
    layers: int
    vocab: int


NARROW = Shape(512, 8, 4, 1536, 32, 8192)
WIDE = Shape(2048, 32, 8, 8192, 4, 32768)


def measure_units(
    formats: Sequence[str],
    lanes: int,
    progress: Progress,
    pauses: tuple[float, float],
    flash: tuple[Path, FlashProfile] | None = None,
) -> UnitProfile:
    """What `lanes` lanes do with weights of these formats; `pauses` as measure_pauses has found them; with `flash`, a
    large file and how it is read, also how computing slows reading. Raises UsageError for a format that there is
    not."""
    for name in formats:
        if name not in FORMATS or name not in BLOCKS:
            raise UsageError(f"no weights are in {name!r}; there is {', '.join(sorted(set(FORMATS) & set(BLOCKS)))}")
    points: dict[str, list[Point]] = {}
    beside = 1.0
    for number, (name, shape) in enumerate([(name, shape) for name in formats for shape in (NARROW, WIDE)]):
        progress("measuring kernels", number, 2 * len(formats))
        with Bench(shape, name, lanes, progress) as bench:
            for found in bench.all_points():
                points.setdefault(short_name(found[0].kernel), []).append(found)
            if shape is WIDE and name == formats[0] and flash is not None:
                progress("measuring kernels while reading")
                beside = bench.beside(*flash)
    kernels = tuple(fitted(kernel, found) for kernel, found in sorted(points.items()))
    return UnitProfile(lanes, kernels, *pauses, beside)


class Bench(ModelBench):
    """A made-up model, all its weights of one format."""

    def __init__(self, shape: Shape, format: str, lanes: int, progress: Progress) -> None:
        super().__init__(*made_up(shape, format), lanes, progress)

    def all_points(self) -> list[Point]:
        """Times of all instructions of a few kinds of steps."""
        steps = [("decode", Rows(1, NEAR)), ("decode", Rows(1, FAR)), ("prefill", Rows(FEW, 0))]
        steps += [("prefill", Rows(MANY, 0)), ("prefill", Rows(MANY, FAR)), ("head", Rows(MANY, FAR))]
        found = list[Point]()
        for name, rows in steps:
            found += self.points(name, rows)
        return found

    def points(self, name: str, rows: Rows) -> list[Point]:
        """Each instruction of a program once, with the median of its times over repetitions and layers."""
        program = self.layout.programs[name]
        operators = self.reader.operators(program, rows)
        medians = self.seconds(program, rows, REPEAT)
        alike: dict[Instruction, list[float]] = {}
        for operator, seconds in zip(operators, medians.tolist(), strict=True):
            i = operator.instruction
            plain = Instruction(
                i.kind, "cpu", i.rows, i.columns, i.tokens, i.format, i.nbytes, i.flops, i.kernel
            )  # of all layers
            alike.setdefault(plain, []).append(seconds)
        return [(i, statistics.median(seconds)) for i, seconds in alike.items()]

    def beside(self, path: Path, way: FlashProfile) -> float:
        """What share of its rate is left to reading a file while lanes decode."""
        self.unit.connect(0, 0)  # lanes let a reading thread go first, as in a real run; nothing waits for a flag
        with Sweep(path) as sweep:
            point = way.engine, "sequential", way.block, way.depth, sweep.size
            reading_alone = sweep.measure(point, BESIDE).bytes_per_s
            rates = list[float]()

            def read() -> None:
                try:
                    rates.append(sweep.measure(point, BESIDE).bytes_per_s)
                except CoterieError:
                    return

            thread = threading.Thread(target=read)
            thread.start()
            while thread.is_alive():
                self.step(self.layout.programs["decode"], Rows(1, NEAR))
            thread.join()
        return min(1.0, rates[0] / reading_alone) if rates else 1.0


def made_up(shape: Shape, format: str) -> tuple[ModelSpec, dict[str, TensorInfo]]:
    """A dense model of that shape whose matrices are all of one format."""
    head_dim, tensors = shape.dim // shape.heads, dict[str, TensorInfo]()

    def tensor(name: str, rows: int, columns: int, of: str = format) -> None:
        values, size = BLOCKS[of]
        tensors[name] = TensorInfo(name, of, rows, columns, 0, rows * columns // values * size)

    tensor("token_embd.weight", shape.vocab, shape.dim)
    tensor("output_norm.weight", 1, shape.dim, "F32")
    for i in range(shape.layers):
        tensor(f"blk.{i}.attn_norm.weight", 1, shape.dim, "F32")
        tensor(f"blk.{i}.ffn_norm.weight", 1, shape.dim, "F32")
        tensor(f"blk.{i}.attn_q.weight", shape.heads * head_dim, shape.dim)
        tensor(f"blk.{i}.attn_k.weight", shape.kv_heads * head_dim, shape.dim)
        tensor(f"blk.{i}.attn_v.weight", shape.kv_heads * head_dim, shape.dim)
        tensor(f"blk.{i}.attn_output.weight", shape.dim, shape.heads * head_dim)
        tensor(f"blk.{i}.ffn_gate.weight", shape.ffn, shape.dim)
        tensor(f"blk.{i}.ffn_up.weight", shape.ffn, shape.dim)
        tensor(f"blk.{i}.ffn_down.weight", shape.dim, shape.ffn)
    spec = ModelSpec(
        architecture="llama", name="made up", dim=shape.dim, n_heads=shape.heads, n_kv_heads=shape.kv_heads,
        head_dim=head_dim, ffn_dim=shape.ffn, vocab=shape.vocab, context=CONTEXT, norm_eps=1e-5, activation="silu",
        interleaved_rope=True, attention_scale=head_dim**-0.5, embedding_scale=1.0, qk_norm=False, post_norms=False,
        tied=True, layers=(LayerSpec(Rope(10_000.0, head_dim)),) * shape.layers,
    )  # fmt: skip
    return spec, tensors


def fitted(kernel: str, points: Sequence[Point]) -> KernelCost:
    """Launch, bytes/s, operations/s and fill that come nearest to the measured times, relatively: of products for few
    tokens by their bytes, of others by their operations (device_model.time)."""
    seconds = np.maximum([time for _, time in points], LEAST)
    few = all(i.kind in ("matmul", "ffn") and i.tokens <= 2 for i, _ in points)
    operations = np.array([2.0 * i.rows * i.columns * i.tokens or i.flops for i, _ in points])
    nbytes = np.array([i.nbytes for i, _ in points])
    tokens = np.array([float(i.tokens) for i, _ in points])
    if few:
        launch, per_byte = non_negative(np.stack([np.ones_like(nbytes), nbytes], axis=1), seconds)
        return KernelCost(kernel, launch, 0.0, 1 / per_byte if per_byte else 0.0, 0.0)
    many = tokens > 2  # the head's few rows are bound by memory
    if points[0][0].kind not in ("matmul", "ffn"):
        launch, each = non_negative(np.stack([np.ones_like(operations), operations], axis=1), seconds)
        return KernelCost(kernel, launch, 1 / each if each else 0.0, 0.0, 0.0)
    columns = np.stack([np.ones_like(operations), operations, operations / tokens], axis=1)[many]
    launch, each, loading = non_negative(columns, seconds[many])
    rest = [(n, t - launch) for n, t, wide in zip(nbytes, seconds, many, strict=True) if not wide and t > launch]
    bandwidth = statistics.median(n / t for n, t in rest) if rest else 0.0
    return KernelCost(kernel, launch, 1 / each if each else 0.0, bandwidth, loading / each if each else 0.0)


def non_negative(columns: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> list[float]:
    """Coefficients at least 0 that come nearest to `seconds`, relatively; a column that would be negative is left
    out, the worst first."""
    scaled, wanted = columns / seconds[:, None], np.ones_like(seconds)
    kept, found = list(range(columns.shape[1])), np.zeros(columns.shape[1])
    while kept:
        norms = np.linalg.norm(scaled[:, kept], axis=0)
        part = np.linalg.lstsq(scaled[:, kept] / norms, wanted, rcond=None)[0] / norms
        if part.min() >= 0:
            found[kept] = part
            break
        kept.pop(int(np.argmin(part * norms)))
    return [float(value) for value in found]
