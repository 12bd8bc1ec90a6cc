"""coterie inspect: what a model file holds."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.commands import terminal
from coterie.commands.options import Json, ModelArgument, ModelOption, pick_model

if TYPE_CHECKING:
    from coterie.models.load import Model
    from coterie.storage.flash_file import FlashFile
    from coterie.storage.runs import Run

LONG = 16  # longer lists, such as a vocabulary, are told by their length


def inspect(model: ModelArgument = None, model_option: ModelOption = None, as_json: Json = False) -> None:
    """Metadata, tensors and shape of a model; reads only its file."""
    name = pick_model(model, model_option)

    from coterie import fetch

    with terminal.Progress() as progress:
        path = fetch.resolve(name, progress)
        progress(f"reading {path}")
        from coterie.opening import open_model

        opened = open_model(path)
        try:
            facts = describe(path, opened)
        finally:
            opened.close()
    if as_json:
        terminal.write_json(facts)
    else:
        terminal.write("\n".join(_lines(facts)) + "\n")


def describe(path: Path, model: "Model") -> dict[str, Any]:
    """Everything `inspect` says, as data."""
    tensors = list(model.file.tensors.values())
    formats: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        entry = formats.setdefault(tensor.format, {"tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["parameters"] += tensor.rows * tensor.cols
        entry["bytes"] += tensor.nbytes
    return {
        "path": str(path),
        "size": sum(each.stat().st_size for each in (path.glob("*.safetensors") if path.is_dir() else [path])),
        "parameters": sum(entry["parameters"] for entry in formats.values()),
        "formats": formats,
        "spec": dataclasses.asdict(model.spec),
        "tokenizer": {
            "vocab_size": model.tokenizer.vocab_size,
            "bos": model.tokenizer.bos,
            "eos": model.tokenizer.eos,
            "end_ids": sorted(model.tokenizer.end_ids),
            "chat_template": model.template is not None,
        },
        "packed": _packed(model),
        "metadata": {key: _short(value) for key, value in model.file.metadata.items()},
        "tensors": [dataclasses.asdict(tensor) for tensor in tensors],
    }


def _packed(model: "Model") -> dict[str, Any] | None:
    """How a packed file is laid out; None for a GGUF."""
    runs: tuple[Run, ...] = getattr(model.file, "runs", ())  # by name, so that a GGUF costs no look at packed files
    if not runs:
        return None
    kinds: dict[str, dict[str, int]] = {}
    for run in runs:
        entry = kinds.setdefault(run.kind, {"runs": 0, "extents": 0, "bytes": 0})
        entry["runs"] += 1
        entry["extents"] += run.extents
        entry["bytes"] += run.nbytes
    file: FlashFile = model.file  # type: ignore[assignment]
    return {"layout": "dense", "identity": file.identity, "source_key": file.source_key, "kinds": kinds}


def _short(value: Any) -> Any:
    return {"length": len(value)} if isinstance(value, list) and len(value) > LONG else value


def _lines(facts: dict[str, Any]) -> list[str]:
    spec = facts["spec"]
    lines = [f"{facts['path']}: {terminal.size_text(facts['size'])}, {facts['parameters'] / 1e6:.2f} M parameters"]
    lines += ["", "spec"]
    lines += [f"  {key} {value}" for key, value in spec.items() if key != "layers"]
    lines.append(f"  layers {len(spec['layers'])}")
    lines += ["", "tokenizer", *(f"  {key} {value}" for key, value in facts["tokenizer"].items())]
    lines += ["", "formats"]
    lines += [
        f"  {name:5} {entry['tensors']:4} tensors {entry['parameters']:>14,} parameters "
        f"{terminal.size_text(entry['bytes']):>11}"
        for name, entry in facts["formats"].items()
    ]
    if packed := facts["packed"]:
        lines += ["", f"packed, layout {packed['layout']}, identity {packed['identity'][:16]}"]
        lines += [
            f"  {kind:10} {entry['runs']:4} runs {entry['extents']:7,} extents {terminal.size_text(entry['bytes']):>11}"
            for kind, entry in packed["kinds"].items()
        ]
    lines += ["", "metadata"]
    for key, value in facts["metadata"].items():
        text = f"[{value['length']} items]" if isinstance(value, dict) else repr(value)
        lines.append(f"  {key} = {text if len(text) <= 100 else text[:97] + '...'}")
    lines += ["", "tensors"]
    lines += [f"  {each['name']:32} {each['format']:5} {each['rows']} x {each['cols']}" for each in facts["tensors"]]
    return lines
