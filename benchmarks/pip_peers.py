"""Decoding by the two pip packages that also run models larger than memory, beside ours at half the weights.

    python benchmarks/pip_peers.py llama-1b.gguf --python VENV/bin/python [--work DIR] [--pairs 3] [--out FILE.json]

VENV has `pip install neurostream==0.2.1 airllm==4.0.0` and a torch for the CPU. Both get every advantage: no memory
cgroup, and their files may stay in the page cache.

* NeuroStream knows no Llama: it gets the same blocks as a Qwen3 GGUF, which adds two norms a layer; 64 MB for streams,
  and --share of the weights resident.
* AirLLM reads Hugging Face folders, in 4 bits with CUDA only: it gets the same shape in bfloat16, random. It keeps
  nothing resident.
* Ours: `coterie bench --memory 50%` on the packed file, direct reads.

They run in turn, --pairs times. What is made (the GGUF once, the shape in bfloat16 twice: 6 GB for 1B) is deleted at
the end.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = 2
PROMPT = [5, 6, 7, 8]


def as_qwen3(source: Path, target: Path) -> dict[str, Any]:
    """Writes a Llama GGUF as one of Qwen3; returns its shape in the words of transformers."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "qwen3")
    about = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name.replace("llama.", "qwen3.", 1), field.contents(), field.types[0], inner)
    heads = about["llama.attention.head_count"]
    ones = np.ones(about["llama.embedding_length"] // heads, np.float32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
        if tensor.name.endswith("attn_k.weight"):
            for kind in ("q", "k"):
                writer.add_tensor(tensor.name.replace("attn_k", f"attn_{kind}_norm"), ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "hidden_size": about["llama.embedding_length"],
        "intermediate_size": about["llama.feed_forward_length"],
        "num_hidden_layers": about["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": about["llama.attention.head_count_kv"],
        "vocab_size": about["llama.vocab_size"],
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
    }


def make_folder(folder: str, shape: str) -> None:
    """Runs in VENV: a Hugging Face folder of random weights."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**json.loads(shape), dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    noise = torch.randn(1 << 20, dtype=torch.bfloat16) * 0.02
    for weight in model.parameters():
        weight.data = noise.repeat(-(-weight.numel() // noise.numel()))[: weight.numel()].view(weight.shape)
    model.tie_weights()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def neurostream(path: str, tokens: str, resident: str) -> float:
    """Runs in VENV: tokens/s."""
    import torch
    from neurostream import NeuroStream

    torch.set_num_threads(THREADS)
    model = NeuroStream.load(path, device="cpu", mem_budget="64MB", ram_budget=int(resident), n_workers=16)
    for _ in model.generate(PROMPT, max_tokens=int(tokens) + 1, stop_on_eos=False):
        pass
    return int(tokens) / float(model.stats.decode_seconds)  # the first token is the prompt's


def airllm(path: str, tokens: str) -> float:
    """Runs in VENV: tokens/s."""
    import torch
    from airllm import AutoModel

    torch.set_num_threads(THREADS)
    model = AutoModel.from_pretrained(path, device="cpu")
    times = []
    for count in (1, int(tokens) + 1):
        start = time.perf_counter()
        model.generate(torch.tensor([PROMPT]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        times.append(time.perf_counter() - start)
    return int(tokens) / (times[1] - times[0])


def child(python: str | Path, *words: object) -> str:
    """The last line that a command of this file, run by VENV's python, prints."""
    done = subprocess.run([str(python), __file__, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def ours(model: Path, tokens: int, share: int) -> float:
    command = [sys.executable, "-m", "coterie", "bench", str(model), "--memory", f"{share}%"]
    command += ["-p", "0", "-n", str(tokens), "-r", "3", "-t", str(THREADS), "-o", "json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("coterie bench failed: see above")
    return float(statistics.median(json.loads(done.stdout)[0]["samples_ts"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF of architecture llama")
    parser.add_argument("--python", type=Path, required=True, help="the interpreter of VENV")
    parser.add_argument("--work", type=Path, help="folder for what is made (default: beside the model)")
    parser.add_argument("--packed", type=Path, help="our packed model (default: Coterie's cache)")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4, help="of the peers; ours makes 16")
    parser.add_argument("--share", type=int, default=50)
    parser.add_argument("--out", type=Path, help="write every run here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work or arguments.model.parent) as work:
        qwen, folder = Path(work) / "qwen3.gguf", Path(work) / "airllm"
        shape = as_qwen3(arguments.model, qwen)
        child(arguments.python, "make_folder", folder, json.dumps(shape))
        child(arguments.python, "airllm", folder, 1)  # splits it into layers
        resident = arguments.model.stat().st_size * arguments.share // 100
        runs: dict[str, list[float]] = {"neurostream": [], "airllm": [], "ours": []}
        for turn in range(arguments.pairs):
            runs["neurostream"].append(float(child(arguments.python, "neurostream", qwen, arguments.tokens, resident)))
            runs["airllm"].append(float(child(arguments.python, "airllm", folder, arguments.tokens)))
            runs["ours"].append(ours(arguments.packed or arguments.model, 16, arguments.share))
            print(
                f"round {turn + 1}: " + ", ".join(f"{name} {rates[-1]:.3g}" for name, rates in runs.items()), flush=True
            )
    best = [max(pair) for pair in zip(runs["neurostream"], runs["airllm"], strict=True)]
    ratio = statistics.median(mine / theirs for mine, theirs in zip(runs["ours"], best, strict=True))
    print("| | tokens/s |\n|---|---|")
    for name, rates in runs.items():
        print(f"| {name} | {statistics.median(rates):.3g} ({min(rates):.3g}-{max(rates):.3g}) |")
    print(f"\nours over the better of the two: {ratio:.1f}; ≥ 3: {'met' if ratio >= 3 else 'MISSED'}")
    if arguments.out:
        arguments.out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    steps = {"make_folder": make_folder, "neurostream": neurostream, "airllm": airllm}
    if len(sys.argv) > 2 and sys.argv[1] in steps:
        print(steps[sys.argv[1]](*sys.argv[2:]))
    else:
        main()
