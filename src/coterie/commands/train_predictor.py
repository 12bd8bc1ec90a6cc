"""coterie train-predictor: networks that say which neurons of a sparse model are worth computing."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.commands import terminal
from coterie.commands.options import Activation, Counts, Json, ModelArgument, ModelOption, pick_model, read_text
from coterie.commands.perplexity import chunk_losses, estimate
from coterie.errors import PlanError, UsageError

if TYPE_CHECKING:
    from coterie.models.load import Model
    from coterie.models.predictor import Figures, Trained
    from coterie.models.spec import ModelSpec

LOSSY = "lossy: predictors decide which neurons are computed"


def train_predictor(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="The text to learn from.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="The packed model to write.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Hidden units a layer; by default an eighth of the model's width.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of the text at most.")] = 16384,
    recall: Annotated[float, typer.Option("--recall", help="Share of live neurons to be found.")] = 0.95,
    format: Annotated[str, typer.Option("--format", help="Of the predictors: Q8_0, Q4_0, F16.")] = "Q8_0",
    activation: Activation = None,
    activations: Counts = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed, the same predictors.")] = 0,
    as_json: Json = False,
) -> None:
    """Train predictors for a sparse model and pack it with them; what the predictors overlook is lost.

    A tenth of the text is held out: training ends by it, and the figures are of it.
    """
    name = pick_model(model, model_option)
    if file is None:
        raise UsageError("which text? give -f FILE")
    if output is None:
        raise UsageError("where to? give -o FILE")
    text = read_text(file)

    with terminal.Progress() as progress:
        from coterie import fetch
        from coterie.opening import open_by_neurons

        path = fetch.resolve(name, progress)
        progress(f"reading {path}")
        started = time.monotonic()
        opened = open_by_neurons(path, activation, counts=activations)
        with opened.file:
            from coterie.models import predictor as p
            from coterie.models.load import understand
            from coterie.models.predictor_training import Training
            from coterie.storage.flash_writer import check_place, pack_model

            source, spec = opened.source, opened.spec
            wanted = Training(p.default_rank(spec) if rank is None else rank, format, recall, seed)
            p.check_trainable(spec, wanted)
            chunks = p.cut(opened.tokenizer.encode(text)[:tokens], opened.tokenizer.encode("")[:1])
            check_place(output, progress)
            _check_memory(spec, len(chunks))
            trained = p.train(source, spec, chunks, wanted, progress)
            predicted = understand(p.with_predictors(source, spec, trained.predictors))
            facts = _facts(predicted, trained) | _perplexities(opened, trained, chunks, progress)
            pack_model(predicted, output, progress)
        chosen = {"rank": wanted.rank, "format": format, "recall_wanted": recall, "seed": seed}
        facts |= chosen | {"path": output, "tokens": sum(map(len, chunks)), "seconds": time.monotonic() - started}
        progress.say(_lines(facts))
    if as_json:
        terminal.write_json(facts)
    else:
        terminal.write(f"{output}\n")


def _check_memory(spec: "ModelSpec", chunks: int) -> None:
    """Raises PlanError where what is recorded of a layer does not fit."""
    from coterie.models.predictor import CHUNK
    from coterie.storage.available import available_memory

    needed = chunks * CHUNK * (4 * 4 * spec.dim + 2 * spec.ffn_dim)
    if needed > available_memory():
        raise PlanError(
            f"{chunks * CHUNK} tokens take {terminal.size_text(needed)} to record, more memory than is free; lower "
            "--tokens"
        )


def _facts(model: "Model", trained: "Trained") -> dict[str, Any]:
    """What the predictors do on the tokens that were held out, and their bytes against those that they save."""
    from coterie.models.predictor import Figures

    tensors = model.source.tensors
    roles = ("fc1", "fc2"), ("ffn_gate", "ffn_up", "ffn_down_t")
    predictor, network = (
        [sum(tensors[f"blk.{i}.{role}.weight"].nbytes for role in of) for i in range(len(trained.figures))]
        for of in roles
    )
    saved = [round(size * figures.skipped) for size, figures in zip(network, trained.figures, strict=True)]
    layers = [
        _shares(figures) | {"predictor_bytes": read, "saved_bytes_per_token": less}
        for figures, read, less in zip(trained.figures, predictor, saved, strict=True)
    ]
    return {
        "numerics": LOSSY,
        "held_out_tokens": sum(map(len, trained.exact)),
        **_shares(Figures.total(trained.figures)),
        "predictor_bytes": sum(predictor),
        "predictor_share": sum(predictor) / sum(tensor.nbytes for tensor in tensors.values()),
        "network_bytes": sum(network),
        "saved_bytes_per_token": sum(saved),
        "layers": layers,
    }


def _shares(figures: "Figures") -> dict[str, float]:
    return {"recall": figures.recall, "skipped": figures.skipped, "live": figures.live_share}


def _perplexities(
    model: "Model", trained: "Trained", chunks: list[list[int]], progress: terminal.Progress
) -> dict[str, Any]:
    """Of the chunks that were held out, by the float oracle: with all neurons, and with those that are chosen."""
    from coterie.models.predictor import logits

    held, found = chunks[-len(trained.exact) :], dict[str, Any]()
    for name, states in (("exact", trained.exact), ("lossy", trained.lossy)):
        progress(f"perplexity, {name}")
        losses = list[float]()
        for rows, chunk in zip(logits(model.source, model.spec, states), held, strict=True):
            losses += chunk_losses(rows, chunk)
        found[f"perplexity_{name}"], found[f"perplexity_{name}_stderr"] = estimate(losses)
    return found


def _lines(facts: dict[str, Any]) -> list[str]:
    """The summary for people."""

    def shares(of: dict[str, Any]) -> str:
        return f"recall {of['recall']:.1%}, {of['skipped']:.1%} skipped, {of['live']:.1%} live"

    size = terminal.size_text
    return [
        *(f"layer {i}: {shares(layer)}" for i, layer in enumerate(facts["layers"])),
        f"all layers: {shares(facts)} ({facts['held_out_tokens']} tokens held out of {facts['tokens']})",
        f"predictors: {size(facts['predictor_bytes'])} in {facts['format']}, {facts['predictor_share']:.1%} of the "
        f"model; a token reads them and saves {size(facts['saved_bytes_per_token'])} of {size(facts['network_bytes'])} "
        "of Gate, Up and Down",
        f"perplexity {facts['perplexity_lossy']:.4f} +/- {facts['perplexity_lossy_stderr']:.4f} ({facts['numerics']}); "
        f"with all neurons {facts['perplexity_exact']:.4f} +/- {facts['perplexity_exact_stderr']:.4f}",
    ]
