"""What measures the products of a model on the CPU and the GPU unit, for the device profile: parts of their rows, for a
few numbers of tokens.

Programs are the model's own, with the rows of their products cut. Before each run all weights are read, so that those
of a product are as far away as in a real step. All are run in turn, a few times, and the best time counts: what other
programs take of the machine adds to it.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from coterie.actors.gpu import Device, Loaded
from coterie.actors.lanes import IDLE_SPIN
from coterie.commands.model_bench import BUSY, ModelBench, Progress
from coterie.errors import UsageError
from coterie.kernels import operands as o
from coterie.kernels import record as r
from coterie.kernels.formats import ROWS
from coterie.kernels.gpu.signatures import SIGNATURES, operands
from coterie.models.spec import ModelSpec
from coterie.scheduler.device_model import Instruction
from coterie.scheduler.estimate import product_of
from coterie.scheduler.layout import OUTPUT_ROWS, ModelLayout
from coterie.scheduler.lower import PIECES
from coterie.scheduler.operators import Reader, Rows
from coterie.scheduler.profile import Point, Product, ProductTimes
from coterie.scheduler.program import NO_LAYER, Program
from coterie.scheduler.resident import CHUNK
from coterie.storage.arena import BufferRef
from coterie.storage.weights import FFN

SHARES = (0.25, 0.5, 0.75, 1.0)  # of a product's rows
TOKENS = (1, 8, 32, 64, 128, 256)
HEAD_TOKENS = OUTPUT_ROWS  # whose logits are computed together at most
ROUNDS = 7  # behind one that warms up
COPIES = 32  # of a product, of several layers, in a GPU's queue at most
LAUNCHES = 64
PRODUCTS = (r.Opcode.MATMUL, r.Opcode.FFN_UP, r.Opcode.FFN_DOWN)
Points = dict[tuple[int, int], list[float]]  # seconds by rows and tokens


class Meter(Protocol):
    """Measures one unit. `format`, `lengths`: as in UnitTimes."""

    format: str
    lengths: tuple[int, ...]

    def times(self, products: Sequence[Product], progress: Progress) -> Iterator[ProductTimes]:
        """Measure products of the model. Raises UnitError, UsageError."""

    def launches(self) -> tuple[float, float]:
        """Seconds of an empty kernel, on an empty queue until its end is known, and behind another one."""

    def others(self) -> tuple[tuple[int, float], ...]:
        """Seconds a layer of all but products, by tokens; one token behind a chunk."""

    def reader(self) -> Callable[[], int]:
        """A call that reads weights from memory as the unit does for one token; it returns how many bytes."""


class Step(NamedTuple):
    """A program that has products, for so many rows, as one of `tokens`."""

    program: Program
    rows: Rows
    tokens: int


def steps(programs: dict[str, Program]) -> list[Step]:
    """All that are measured. Decode has the head, for one token; prefill has not."""
    many = [Step(programs["prefill"], Rows(tokens, 0), tokens) for tokens in TOKENS[1:]]
    head = Step(programs["head"], Rows(CHUNK, 0, HEAD_TOKENS), HEAD_TOKENS)
    return [Step(programs["decode"], Rows(1, 0), 1), *many, head]


def products_in(step: Step, reader: Reader) -> list[tuple[int, Instruction]]:
    """The products of a step of the CPU unit, with their records' numbers."""
    found = enumerate(operator.instruction for operator in reader.operators(step.program, step.rows))
    return [(i, each) for i, each in found if step.program.words[i, r.OPCODE] & 0xFFFF in PRODUCTS]


def model_products(layout: ModelLayout, spec: ModelSpec) -> list[Product]:
    """The CPU unit's products, each once."""
    found = products_in(steps(layout.programs)[0], Reader(spec, layout))
    return list(dict.fromkeys(product_of(each) for _, each in found))


def portion(count: int, share: float) -> int:
    """So much of `count` groups of rows, at least one."""
    return max(1, round(share * count))


def read_all(bench: ModelBench) -> None:
    """Read all weights from memory, with all lanes. Behind it lanes have gone to sleep."""
    bench.step(bench.layout.programs["probe"], Rows(1, 0))
    time.sleep(2 * IDLE_SPIN)


def best(times: Sequence[float]) -> float:
    """The least that is no slip of a trace, in which what follows a disturbed instruction seems to be short."""
    return min(seconds for seconds in times if seconds >= statistics.median(times) / 2)


def gathered(product: Product, nbytes: float, points: Points) -> ProductTimes:
    return ProductTimes(product, int(nbytes), tuple(Point(*key, best(times)) for key, times in sorted(points.items())))


def behind(bench: ModelBench) -> list[Step]:
    """Steps whose layers are measured beside products: a token behind a chunk, and chunks."""
    programs = bench.layout.programs
    chunks = [Step(programs["prefill"], Rows(tokens, 0), tokens) for tokens in TOKENS[1:]]
    return [Step(programs["decode"], Rows(1, CHUNK), 1), *chunks]


def rest_of(program: Program) -> list[int]:
    """Records of layers that compute no products."""
    opcodes = program.words[: program.length, r.OPCODE]
    layered, products = opcodes >> 16 & 0xFFFF != NO_LAYER, np.isin(opcodes & 0xFFFF, PRODUCTS)
    return np.flatnonzero(layered & ~products).tolist()


class CpuMeter:
    """Whole steps of the CPU unit, in which every product computes a share of its rows; times are the trace's."""

    format = ""
    lengths: tuple[int, ...] = ()

    def __init__(self, bench: ModelBench) -> None:
        self.bench = bench
        ffns = [layer.ffn for layer in bench.layout.weights.layers]
        self._lists = {span.list.offset: span.list for ffn in ffns if isinstance(ffn, FFN) for span in ffn.spans}
        self._loaded: dict[str, Program] = {}

    def times(self, products: Sequence[Product], progress: Progress) -> Iterator[ProductTimes]:
        bench, points, nbytes = self.bench, dict[Product, Points](), dict[Product, float]()
        runs = [(step, self._part(step, share)) for step in steps(bench.layout.programs) for share in SHARES]
        for number in range((ROUNDS + 1) * len(runs)):
            progress("measuring products on the CPU unit", number, (ROUNDS + 1) * len(runs))
            step, program = runs[number % len(runs)]
            read_all(bench)
            seconds = bench.spans(program, step.rows)
            if number < len(runs) or seconds is None:
                continue
            alike: dict[tuple[Product, int], list[float]] = {}
            for i, each in products_in(step, bench.reader):
                nbytes[product_of(each)] = each.nbytes
                alike.setdefault((product_of(each), self._rows(program, i)), []).append(float(seconds[i]))
            for (product, rows), found in alike.items():
                if (middle := statistics.median(found)) > 0:  # what was disturbed may seem to end before it begins
                    points.setdefault(product, {}).setdefault((rows, step.tokens), []).append(middle)
        if not all(product in points for product in products):
            raise UsageError(BUSY)
        for product in products:
            yield gathered(product, nbytes[product], points[product])

    def launches(self) -> tuple[float, float]:
        """Lanes that wait for a flag start at once."""
        each = float(np.median(self.bench.seconds(self.bench.empty, Rows(1, 0), ROUNDS)[1:]))
        return each, each

    def others(self) -> tuple[tuple[int, float], ...]:
        bench, found = self.bench, list[tuple[int, float]]()
        for step in behind(bench):
            program, times = step.program, list[float]()
            rows = rest_of(program)
            for _ in range(ROUNDS + 1):
                seconds = bench.spans(program, step.rows)
                times += [float(seconds[rows].sum())] if seconds is not None else []
            if len(times) < 2:
                raise UsageError(BUSY)
            found.append((step.tokens, best(times[1:]) / len(bench.spec.layers)))
        return tuple(found)

    def reader(self) -> Callable[[], int]:
        bench = self.bench

        def read() -> int:
            bench.step(bench.layout.programs["probe"], Rows(1, 0))
            return bench.layout.weights.pinned.nbytes

        return read

    def _part(self, step: Step, share: float) -> Program:
        """The step's program with a share of the rows of each product, loaded."""
        program = step.program
        name = f"{program.name} {share:g}"
        if share == 1 or name in self._loaded:
            return self._loaded.get(name, program)
        words, lanes = program.words.copy(), self.bench.unit.lanes
        for row in words[: program.length]:
            opcode = row[r.OPCODE] & 0xFFFF
            if opcode == r.Opcode.FFN_UP:
                clusters = self._lists[int(row[o.UP_LIST])]
                count, chunk = portion(clusters.shape[0] - 1, share), o.UP_CHUNK
                row[o.UP_LIST] = self._shorter(clusters, count).offset
            elif opcode in PRODUCTS:
                down = opcode == r.Opcode.FFN_DOWN
                groups, chunk = (o.DOWN_GROUPS, o.DOWN_CHUNK) if down else (o.MATMUL_GROUPS, o.MATMUL_CHUNK)
                row[groups] = count = portion(int(row[groups]), share)
            else:
                continue
            row[chunk] = max(1, min(int(row[chunk]), count // (PIECES * lanes)))
        self._loaded[name] = part = replace(program, name=name, words=words)
        self.bench.unit.load(part)
        return part

    def _shorter(self, clusters: BufferRef, count: int) -> BufferRef:
        """A list of the first clusters of another one."""
        arena = self.bench.arena
        made = arena.allocate("tables", 1 + count, np.int32)
        arena.numpy(made)[:] = [count, *arena.numpy(clusters)[1 : 1 + count]]
        self._lists[made.offset] = made
        return made

    def _rows(self, program: Program, number: int) -> int:
        """Rows that a record's product computes."""
        row = program.words[number]
        if row[r.OPCODE] & 0xFFFF == r.Opcode.FFN_UP:
            return 2 * int(row[o.UP_NEURONS]) * (self._lists[int(row[o.UP_LIST])].shape[0] - 1)
        down = row[r.OPCODE] & 0xFFFF == r.Opcode.FFN_DOWN
        return ROWS * int(row[o.DOWN_GROUPS if down else o.MATMUL_GROUPS])


class Record(NamedTuple):
    """A product's record of a GPU program."""

    words: npt.NDArray[np.int64]
    kernel: str
    instruction: Instruction


class GpuMeter:
    """A product of several layers at a time in the GPU's queue. `device`: of the bench's arena, whose layout has the
    GPU's programs."""

    format = ""
    lengths: tuple[int, ...] = ()

    def __init__(self, bench: ModelBench, device: Device) -> None:
        assert bench.units.gpu is not None
        self.bench, self.device, self.buffers = bench, device, bench.units.gpu
        pinned = bench.layout.weights.pinned
        device.upload(pinned.offset, pinned.nbytes)
        on_gpu = bench.layout.gpu
        self._records: dict[str, list[Record]] = {}
        for step in steps(bench.layout.programs):
            program = on_gpu[step.program.name]
            rows = [i for i in range(program.length) if program.words[i, r.OPCODE] & 0xFFFF in PRODUCTS]
            made = zip(rows, products_in(step, bench.reader), strict=True)
            self._records[program.name] = [Record(program.words[i], program.kernels[i], each) for i, (_, each) in made]

    def times(self, products: Sequence[Product], progress: Progress) -> Iterator[ProductTimes]:
        for number, product in enumerate(products):
            points, runs = Points(), list[tuple[Loaded, int, int, int]]()
            for share in SHARES:
                for name, lengths in self._lengths(product):
                    found = [each for each in self._records[name] if product_of(each.instruction) == product][:COPIES]
                    words, rows = self._part(found, share)
                    loaded = self.device.load(words, [each.kernel for each in found])
                    runs += [(loaded, len(found), rows, tokens) for tokens in lengths]
            for turn in range(ROUNDS + 1):
                done, total = number * (ROUNDS + 1) + turn, len(products) * (ROUNDS + 1)
                progress("measuring products on the GPU unit", done, total)
                for loaded, count, rows, tokens in runs:
                    seconds = self._seconds(loaded, tokens) / count
                    if turn:
                        points.setdefault((rows, tokens), []).append(seconds)
            yield gathered(product, found[0].instruction.nbytes, points)

    def launches(self) -> tuple[float, float]:
        flag = self.bench.arena.allocate("flags", r.LINE)
        operand = operands("post", {"step": self.buffers.header.offset, "flag": flag.offset})
        words = np.zeros((LAUNCHES, r.WORDS), np.int64)
        words[:, list(operand)] = list(operand.values())
        one, many = (self.device.load(words[:count], ["post"] * count) for count in (1, LAUNCHES))
        alone, all_of_them = (min(self._seconds(each, 1) for _ in range(ROUNDS + 1)) for each in (one, many))
        return alone, max(0.0, all_of_them - alone) / (LAUNCHES - 1)

    def others(self) -> tuple[tuple[int, float], ...]:
        bench, arena, found = self.bench, self.bench.arena, list[tuple[int, float]]()
        for step in behind(bench):
            program = bench.layout.gpu[step.program.name]
            rows = rest_of(program)
            loaded = self.device.load(program.words[rows], [program.kernels[i] for i in rows])
            for word, values in (
                (r.POSITIONS, step.rows.position + np.arange(step.tokens)),
                (r.TABLES, np.full(step.tokens, bench.sequence.table_address)),
            ):
                arena.numpy(self.buffers.rows[word])[: step.tokens] = values
            times = [self._seconds(loaded, step.tokens) for _ in range(ROUNDS + 1)]
            found.append((step.tokens, best(times[1:]) / len(bench.spec.layers)))
        return tuple(found)

    def reader(self) -> Callable[[], int]:
        found = self._records["decode"]
        loaded = self.device.load(np.array([each.words for each in found]), [each.kernel for each in found])
        nbytes = int(sum(each.instruction.nbytes for each in found))

        def read() -> int:
            self._run(loaded, 1)
            return nbytes

        return read

    def _lengths(self, product: Product) -> list[tuple[str, tuple[int, ...]]]:
        """Programs that have the product, with the tokens for which they are run."""
        if product.operator == "head":
            return [("decode", TOKENS[:1]), ("head", (HEAD_TOKENS,))]
        return [("decode", TOKENS[:1]), ("prefill", TOKENS[1:])]

    def _part(self, found: list[Record], share: float) -> tuple[npt.NDArray[np.int64], int]:
        """Records of a product, with a share of its rows, and how many rows that is."""
        words = np.array([each.words for each in found])
        family = found[0].kernel.partition(":")[0]
        names = [parameter.name for parameter in SIGNATURES[family]]
        word = r.OPERANDS + names.index("clusters" if family == "ffn_up" else "groups")
        whole, rows = int(words[0, word]), found[0].instruction.rows
        words[:, word] = count = portion(whole, share)
        return words, rows // whole * count

    def _seconds(self, loaded: Loaded, tokens: int) -> float:
        """Until the device has run a program, once all weights were read."""
        read_all(self.bench)
        begun = time.perf_counter()
        self._run(loaded, tokens)
        return time.perf_counter() - begun

    def _run(self, loaded: Loaded, tokens: int) -> None:
        header = self.bench.arena.numpy(self.buffers.header)
        header[[r.EPOCH, r.TOKENS, r.OUTPUTS]] = header[r.EPOCH] + 1, tokens, tokens
        self.device.before_step([self.buffers.header, *self.buffers.rows.values()])
        loaded.run(tokens, tokens)
        self.device.finish()
