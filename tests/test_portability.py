"""What the matrix tiles become on each instruction set: assembly for ARM and both x86-64 paths.

The ARM tiles also run, where a cross compiler and an emulator are installed, and must give the same bits.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from harness import machine
from llvmlite import ir
from reference import FLOAT_FORMATS, FORMATS, INTEGER_FORMATS, product, random_raw, same_bits
from test_kernels import run_matmul

from coterie.kernels import target
from coterie.kernels.formats import FORMATS as PACKED
from coterie.kernels.shapes import TILE_TOKENS
from coterie.kernels.tile import Tile, build_cluster_tile, build_tile, tile_groups
from coterie.storage.pack import pack

TARGETS = {  # path: triple, CPU, features
    "dotprod": ("aarch64-linux-gnu", "cortex-a76", "+dotprod"),
    "avx2": ("x86_64-linux-gnu", "haswell", "+avx2,+fma,+f16c"),
    "vnni": ("x86_64-linux-gnu", "icelake-server", "+avx512vnni,+avx512vl,+avx512bw"),
}
BYTE_DOTS = {"dotprod": r"\bsdot\s", "avx2": r"\bvpmaddubsw\s.*ymm", "vnni": r"\bvpdpbusd\s.*zmm"}
FUSED = {"dotprod": r"\bfmla\s", "avx2": r"\bvfn?madd\d+ps\s.*ymm", "vnni": r"\bvfn?madd\d+ps\s.*zmm"}
SPILLS = {"Q5_0": 4, "Q5_K": 4, "Q6_K": 16}  # vectors stored in 64 byte dots: unpacking takes registers
CALLS = {"dotprod": r"^\s+blr?\s+\S+", "avx2": r"^\s+call\S*\s", "vnni": r"^\s+call\S*\s"}


@pytest.fixture(params=TARGETS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(target, "path", lambda: request.param)
    return str(request.param)


@cache
def machine_for(path: str) -> Any:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple, cpu, features = TARGETS[path]
    return llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic")


def module(path: str, name: str, tokens: int) -> Any:
    """`tile` and `cluster_tile` of a format as C functions of 64-bit integers, optimised for a target."""
    made = ir.Module(name=f"{name}_{tokens}")
    made.triple = TARGETS[path][0]
    tile, word = Tile(PACKED[name], tokens, tile_groups(tokens)), ir.IntType(64)
    for function_name, build, arity in (("tile", build_tile, 7), ("cluster_tile", build_cluster_tile, 8)):
        function = ir.Function(made, ir.FunctionType(ir.VoidType(), [word] * arity), f"{function_name}_{name}_{tokens}")
        b = ir.IRBuilder(function.append_basic_block())
        build(b, tile, *function.args)
        b.ret_void()
    parsed = llvm.parse_assembly(str(made))
    parsed.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine_for(path), tuning)
    builder.getModulePassManager().run(parsed, builder)
    return parsed


def assembly(path: str, name: str, tokens: int) -> str:
    return str(machine_for(path).emit_assembly(module(path, name, tokens)))


def code(text: str) -> Iterator[str]:
    """Lines that are instructions."""
    return (line for line in text.splitlines() if re.match(r"\s+[a-z]", line))


@pytest.mark.parametrize("tokens", [1, TILE_TOKENS])
@pytest.mark.parametrize("name", FORMATS)
def test_tiles_use_the_target_s_instructions_and_no_library(path: str, name: str, tokens: int) -> None:
    text = assembly(path, name, tokens)
    lines = list(code(text))
    assert any(re.search(FUSED[path], line) for line in lines)
    dots = sum(bool(re.search(BYTE_DOTS[path], line)) for line in lines)
    assert (dots == 0) == (name in FLOAT_FORMATS)
    assert not [line for line in lines if re.search(CALLS[path], line)]
    products = [line for line in lines if re.search(r"\bv?f?mulps|\bfmul\s", line)]
    sums = [line for line in lines if re.search(r"\bv?addps\s|\bfadd\s", line)]
    assert not sums  # sums of floats are fused: a separate addition would round twice
    assert not (products and name in FLOAT_FORMATS)


def inner_loop(text: str, function: str) -> list[str]:
    """Instructions of the loop in which a function multiplies: from the label its last branch back names."""
    body = text[text.index(f"\n{function}:") :]
    body = body[: re.search(r"\n\.Lfunc_end\d+:", body).start()]  # type: ignore[union-attr]
    lines, loops = body.splitlines(), []
    labels = {line.rstrip(":").split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".L")}
    for i, line in enumerate(lines):
        jump = re.match(r"\s+j\w+\s+(\.L\w+)", line)
        if jump and labels.get(jump[1], i) < i:
            loops.append(lines[labels[jump[1]] : i])
    innermost = [loop for loop in loops if any(re.search(BYTE_DOTS["vnni"], line) for line in loop)]
    return min(innermost, key=len)


@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_sums_of_a_tile_stay_in_registers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spill in the innermost loop would cost what the tile saves."""
    monkeypatch.setattr(target, "path", lambda: "vnni")
    text = assembly("vnni", name, TILE_TOKENS)
    loop = inner_loop(text, f"tile_{name}_{TILE_TOKENS}")
    spills = [line for line in loop if re.search(r"zmm\d+, -?\d*\(%r[sb]p\)", line)]
    dots = sum(bool(re.search(BYTE_DOTS["vnni"], line)) for line in loop)
    assert dots == 8 * TILE_TOKENS * tile_groups(TILE_TOKENS)
    assert len(spills) <= SPILLS.get(name, 0), spills


def test_this_process_s_path_is_one_of_them() -> None:
    assert target.path() in TARGETS


# --- ARM for real, under an emulator ---------------------------------------------------------------------

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64-static")
MAIN = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
void NAME(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
int main(void) {
    static char w[1 << 20] __attribute__((aligned(64))), x[1 << 20] __attribute__((aligned(64)));
    static char y[1 << 16] __attribute__((aligned(64)));
    if (fread(w, 1, W_BYTES, stdin) != W_BYTES || fread(x, 1, X_BYTES, stdin) != X_BYTES) return 1;
    NAME((int64_t)w, W_GROUP, (int64_t)x, (int64_t)y, Y_ROW, BLOCKS, 0);
    return fwrite(y, 1, Y_BYTES, stdout) != Y_BYTES;
}
"""


@pytest.mark.skipif(not (COMPILER and EMULATOR), reason="needs aarch64-linux-gnu-gcc and qemu-aarch64-static")
@pytest.mark.parametrize("tokens", [1, TILE_TOKENS])
@pytest.mark.parametrize("name", FORMATS)
def test_arm_gives_the_same_bits(name: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f, groups = PACKED[name], tile_groups(tokens)
    rng, columns, rows = np.random.default_rng(0), 2 * f.columns, 16 * groups
    raw, x = random_raw(rng, name, rows, columns), rng.standard_normal((tokens, columns), np.float32)
    expected = product(name, raw, x)
    weights = np.zeros((groups, 2, f.block), np.uint8)
    pack(name, raw, weights)
    with machine() as m:  # activation tiles, as this machine makes them
        assert same_bits(run_matmul(m, name, raw, x, tokens), expected)
        source, tiles = m.put(x), m.tiles(f.is_float, columns // 32)
        ints, floats = (None, tiles) if f.is_float else (tiles, None)
        b = m.builder()
        b.add("merge", 6, m.emit(source, columns // 32, tokens, ints, floats))  # type: ignore[arg-type]
        m.step(m.load(b), tokens)
        activations = m.look(tiles).tobytes()[: columns // 32 * Tile(f, tokens).x_sub]
    monkeypatch.setattr(target, "path", lambda: "dotprod")
    (tmp_path / "tile.o").write_bytes(machine_for("dotprod").emit_object(module("dotprod", name, tokens)))
    (tmp_path / "main.c").write_text(MAIN)
    sizes = {
        "NAME": f"tile_{name}_{tokens}",
        "W_BYTES": weights.nbytes,
        "W_GROUP": 2 * f.block,
        "X_BYTES": len(activations),
        "Y_BYTES": 4 * rows * tokens,
        "Y_ROW": 4 * rows,
        "BLOCKS": 2,
    }
    command = [COMPILER, "-static", "-O1", *(f"-D{key}={value}" for key, value in sizes.items())]
    command += ["-o", str(tmp_path / "run"), str(tmp_path / "main.c"), str(tmp_path / "tile.o")]
    subprocess.run(command, check=True, timeout=60)  # type: ignore[arg-type]
    done = subprocess.run(
        [str(EMULATOR), "-cpu", "max", str(tmp_path / "run")],
        input=weights.tobytes() + activations, stdout=subprocess.PIPE, check=True, timeout=60,
    )  # fmt: skip
    got = np.frombuffer(done.stdout, np.float32).reshape(tokens, rows)
    assert same_bits(np.array(got), expected)
