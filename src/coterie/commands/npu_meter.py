"""What measures the products of a model as graphs of the NPU unit, for the device profile."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from coterie.actors.npu_graphs import Graph, Runtime
from coterie.commands.model_bench import ModelBench, Progress
from coterie.commands.shape_meters import ROUNDS, SHARES, Points, gathered, portion, read_all
from coterie.models.spec import ModelSpec
from coterie.scheduler.profile import Product, ProductTimes
from coterie.scheduler.sharing import row_graphs_of
from coterie.storage.npu_block import Block, Form
from coterie.storage.npu_quantise import (
    FLOAT_SCHEMES,
    GROUP,
    HOT,
    SCHEME,
    SCHEMES,
    STEP,
    Columns,
    Quantised,
    fit_rounding,
)

READS = 8192, 8192  # rows and columns of a matrix that no cache holds


def graph_products(products: Sequence[Product], spec: ModelSpec) -> list[Product]:
    """What of a model's products, and of its layers' own graphs (lower_npu.py), an NPU could compute. The head is a
    graph for a token only."""
    found = [each._replace(format=SCHEME) for each in products if each.operator != "head"]
    columns = next(each.columns for each in found if each.operator == "matmul")
    found.append(Product("matmul", spec.qkv_rows, columns, SCHEME))
    found += [each._replace(operator="ffn") for each in found if each.operator == "ffn_up"]
    return list(dict.fromkeys([*found, *row_graphs_of(spec, products).values()]))


class NpuMeter:
    """Graphs of random weights, one a part and number of tokens."""

    format: str = SCHEME
    lengths: tuple[int, ...] = (1, 32, 64, 128, 256)

    def __init__(self, bench: ModelBench, runtime: Runtime) -> None:
        self.bench, self.runtime = bench, runtime
        self._random = np.random.default_rng(0)
        self._small = self._graph(self._block(Product("matmul", STEP, STEP, SCHEME), 1.0)[0], 1)

    def times(self, products: Sequence[Product], progress: Progress) -> Iterator[ProductTimes]:
        for number, product in enumerate(products):
            points = Points()
            for done, share in enumerate(SHARES, number * len(SHARES)):
                progress("measuring graphs on the NPU unit", done, len(products) * len(SHARES))
                block, rows = self._block(product, share)
                lengths = (1,) if product.format in FLOAT_SCHEMES else self.lengths
                graphs = {tokens: self._graph(block, tokens) for tokens in lengths}
                for turn in range(ROUNDS + 1):
                    for tokens, graph in graphs.items():
                        seconds = self._seconds(graph)
                        if turn:
                            points.setdefault((rows, tokens), []).append(seconds)
            yield gathered(product, block.nbytes, points)  # of all rows, which come last

    def launches(self) -> tuple[float, float]:
        times = [[self._seconds(self._small, awake) for _ in range(ROUNDS + 1)] for awake in (False, True)]
        return min(times[0]), min(times[1])

    def others(self) -> tuple[tuple[int, float], ...]:
        return ()

    def reader(self) -> Callable[[], int]:
        block, _ = self._block(Product("matmul", *READS, SCHEME), 1.0)
        graph, nbytes = self._graph(block, 1), block.nbytes

        def read() -> int:
            graph.run()
            return nbytes

        return read

    def _block(self, product: Product, share: float) -> tuple[Block, int]:
        """A product's first rows as a block for one token, and how many rows those are."""
        columns, step = product.columns, 2 * STEP if product.operator == "ffn" else STEP
        scheme = next(each for each in SCHEMES if each == product.format)
        rows = min(product.rows, step * portion(-(-product.rows // step), share))
        if product.operator == "ffn":
            form = Form("ffn", 0, 1, columns, columns, scheme, self.bench.spec.activation)
            return self._made(form, [(rows, columns), (columns, rows // 2)]), rows
        return self._made(Form("out", 0, 1, columns, rows, scheme), [(rows, columns)]), rows

    def _made(self, form: Form, shapes: Sequence[tuple[int, int]]) -> Block:
        """Random matrices, whose inputs have a few channels beyond the others, as real ones have."""
        if form.scheme in FLOAT_SCHEMES:
            bits = 4 if form.scheme == "w4a16" else 8
            return Block(form, tuple(self._in_groups(*shape, bits) for shape in shapes), (None,) * len(shapes))
        matrices, roundings = list[Quantised](), []
        for rows, columns in shapes:
            peaks = np.ones(columns, np.float32)
            peaks[: min(HOT, columns // 2)] = 8
            rounding = fit_rounding(peaks)
            values = self._random.integers(-127, 128, (rows, columns), np.int8)
            scales = np.full(rows, 0.01 / columns, np.float32)
            none = Columns(np.empty(0, np.int64), np.empty((rows, 0), np.int8), np.ones(rows, np.float32))
            hot = Columns(rounding.hot, values[:, rounding.hot], scales)
            matrices.append(Quantised(values, scales[:, None], 8, none, hot))
            roundings.append(rounding)
        return Block(form, tuple(matrices), tuple(roundings))

    def _in_groups(self, rows: int, columns: int, bits: int) -> Quantised:
        most = (1 << bits - 1) - 1
        values = self._random.integers(-most, most + 1, (rows, columns), np.int8)
        none = Columns(np.empty(0, np.int64), np.empty((rows, 0), np.int8), np.ones(rows, np.float32))
        return Quantised(values, np.full((rows, -(-columns // GROUP)), 0.01 / columns, np.float32), bits, none, none)

    def _graph(self, block: Block, tokens: int) -> Graph:
        form = replace(block.form, n=tokens)
        graph = self.runtime.build(Block(form, block.matrices, block.roundings))
        x = self._random.standard_normal((tokens, form.width_in), np.float32)
        graph.bind(x, np.empty((tokens, form.width_out), np.float32))
        return graph

    def _seconds(self, graph: Graph, awake: bool = True) -> float:
        """Of a run, once all weights were read; behind another one, unless the runtime's threads are to be asleep."""
        read_all(self.bench)
        if awake:
            self._small.run()
        begun = time.perf_counter()
        graph.run()
        return time.perf_counter() - begun
