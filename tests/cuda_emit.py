"""What CUDA kernels become, without a device: a line of JSON for each kernel and compute capability, for test_cuda.py.

    python cuda_emit.py PART PARTS [ptxas]

With the path of NVIDIA's assembler (it comes with the package nvidia-cuda-nvcc) also what that makes of them: registers
of a thread, bytes spilled.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

from reference import FORMATS

from coterie.kernels.gpu.cuda_ptx import kept_ptx

CAPABILITIES = ((8, 7), (9, 0))  # Jetson Orin; H100, H200


def kernel_names() -> list[str]:
    """Every kernel: all families, formats and activations, one row and several."""
    names = ["norm", "rope", "attend", "post", "ffn_up:Q4_K:Q6_K:silu:1"]
    names += [f"embed:{name}" for name in FORMATS]
    for tokens in (1, 8):
        names += [f"{family}:{name}:{tokens}" for family in ("matmul", "ffn_down") for name in FORMATS]
        names += [f"ffn_up:{name}:{name}:silu:{tokens}" for name in FORMATS]
    return names + [f"ffn_up:Q4_0:Q8_0:{activation}:1" for activation in ("gelu", "relu", "relu2", "drelu")]


def assembled(ptxas: str, text: str, target: str) -> dict[str, int]:
    """Registers and spills of a kernel; raises where the assembler refuses it."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(text)
        source.flush()
        command = [ptxas, "-v", f"-arch={target}", source.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}
    return {what: int(re.findall(pattern, said)[0]) for what, pattern in numbers.items()}


def main() -> None:
    part, parts = map(int, sys.argv[1:3])
    for name in kernel_names()[part::parts]:
        for capability in CAPABILITIES:
            text, entry, _ = kept_ptx(name, capability)
            found: dict[str, Any] = {
                "name": name,
                "capability": capability,
                "target": re.findall(r"^\.target (\w+)", text, re.MULTILINE),
                "entry": entry,
                "parameters": re.findall(r"^\s*\.param \.(\w+) ", text, re.MULTILINE),
                "loads": re.findall(r"ld\.global\.\S+", text),
                "doubles": len(re.findall(r"\.f64", text)),
                "spills": ".local" in text,
                "dots": len(re.findall(r"dp4a", text)),
                "calls": len(re.findall(r"\bcall\b", text)),
                "shared": sum(int(n) for n in re.findall(r"\.shared .*\[(\d+)\]", text)),
                "threads": re.findall(r"\.maxntid (\d+)", text),
            }
            if len(sys.argv) > 3:
                found |= assembled(sys.argv[3], text, found["target"][0])
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
