"""Compiled graphs on disk: built once, never trusted blindly, never too many."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from npu_blocks import random_block, tolerance

from coterie.actors import npu_onnx, npu_openvino
from coterie.actors.npu_cache import GraphCache
from coterie.actors.npu_graphs import Graph, Runtime
from coterie.storage.npu_block import Block
from coterie.storage.npu_quantise import Floats


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    pytest.importorskip(request.param, reason="pip install 'coterie[npu]'")
    if request.param == "openvino":
        return npu_openvino.open_device("CPU", 1)
    pytest.importorskip("onnx", reason="pip install 'coterie[npu]'")
    return npu_onnx.open_device("CPU", 1)


def counts(cache: GraphCache) -> tuple[int, int]:
    return cache.builds, cache.loads


def assert_right(graph: Graph, block: Block, x: Floats) -> None:
    y = np.empty((block.form.n, block.form.width_out), np.float32)
    graph.bind(x, y)
    graph.run()
    np.testing.assert_allclose(y, block.reference(x), atol=tolerance(block))


def test_a_second_start_builds_none(runtime: Runtime, tmp_path: Path) -> None:
    """Checklist, rows 31 and 39."""
    blocks = [random_block(kind, "w8a8", seed=seed) for kind in ("qkv", "ffn") for seed in range(2)]
    first = GraphCache(runtime, tmp_path)
    for block, x in blocks:
        assert_right(first.graph(block), block, x)
    assert counts(first) == (4, 0)

    def unexpected() -> Block:
        raise AssertionError("weights are not needed")

    second = GraphCache(runtime, tmp_path)
    for block, x in blocks:
        assert_right(second.open(block.form, block.digest(), unexpected), block, x)
    assert counts(second) == (0, 4)


def test_what_is_computed_is_in_the_key(runtime: Runtime, tmp_path: Path) -> None:
    cache = GraphCache(runtime, tmp_path)
    forms: tuple[dict[str, Any], ...] = {}, {"n": 25}, {"swapped": True}, {"folded": (4, 6)}, {"seed": 1}
    for form in forms:
        cache.graph(random_block("out", "w8a8", **form)[0])
    cache.graph(random_block("out", "w4a8-outliers")[0])
    assert counts(cache) == (len(forms) + 1, 0)


def test_another_version_or_device_is_stale(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, _ = random_block("out", "w8a8")
    cache = GraphCache(runtime, tmp_path)
    paths = {cache.path(block.form, block.digest())}
    for name in ("version", "device", "name"):
        with monkeypatch.context() as patch:
            patch.setattr(runtime, name, "another")
            paths.add(cache.path(block.form, block.digest()))
    assert len(paths) == 4


@pytest.mark.parametrize("damage", ["empty", "short", "bit", "renamed", "refused"])
def test_a_damaged_file_is_built_anew(
    runtime: Runtime, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = random_block("out", "w8a8")
    GraphCache(runtime, tmp_path).graph(block)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "short":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "bit":
        data[len(data) // 3] ^= 4
        path.write_bytes(data)
    elif damage == "renamed":
        other, _ = random_block("out", "w8a8", seed=9)
        GraphCache(runtime, tmp_path).graph(other)
        (second,) = set(tmp_path.iterdir()) - {path}
        os.replace(second, path)
    else:
        from coterie.actors import npu_cache

        path.write_bytes(bytes(1000) + npu_cache._checksum(path, np.zeros(1000, np.uint8)))
    cache = GraphCache(runtime, tmp_path)
    assert_right(cache.graph(block), block, x)
    assert counts(cache) == (1, 0)
    assert_right(cache.graph(block), block, x)
    assert counts(cache) == (1, 1)


def test_the_oldest_are_forgotten_but_not_what_is_open(runtime: Runtime, tmp_path: Path) -> None:
    blocks = [random_block("out", "w8a8", seed=seed)[0] for seed in range(5)]
    for age, block in enumerate(blocks[:4]):
        GraphCache(runtime, tmp_path).graph(block)
        path = GraphCache(runtime, tmp_path).path(block.form, block.digest())
        os.utime(path, (1000 + age, 1000 + age))
    cache = GraphCache(runtime, tmp_path, files=3)
    cache.graph(blocks[0])  # the oldest, now in use
    cache.graph(blocks[4])
    kept = {cache.path(block.form, block.digest()) for block in (blocks[0], blocks[3], blocks[4])}
    assert set(tmp_path.iterdir()) == kept
    small = GraphCache(runtime, tmp_path, limit=1)
    small.graph(blocks[1])
    assert set(tmp_path.iterdir()) == {small.path(blocks[1].form, blocks[1].digest())}


def test_a_folder_that_cannot_be_written_costs_no_graph(runtime: Runtime, tmp_path: Path) -> None:
    block, x = random_block("out", "w8a8")
    (tmp_path / "file").write_text("in the way")
    cache = GraphCache(runtime, tmp_path / "file" / "graphs")
    assert_right(cache.graph(block), block, x)
    assert counts(cache) == (1, 0)


def test_a_graph_outlives_its_file(runtime: Runtime, tmp_path: Path) -> None:
    block, x = random_block("ffn", "w8a8")
    graph = GraphCache(runtime, tmp_path).graph(block)
    for path in tmp_path.iterdir():
        path.unlink()
    assert_right(graph, block, x)
