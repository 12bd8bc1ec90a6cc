"""coterie perplexity: how well a model predicts a text, by llama.cpp's convention."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.commands import terminal
from coterie.commands.options import (
    Json,
    Memory,
    ModelArgument,
    ModelOption,
    Threads,
    Units,
    pick_model,
    read_text,
    value_sources,
)
from coterie.errors import ModelError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def perplexity(
    command: typer.Context,
    model: ModelArgument = None,
    model_option: ModelOption = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="The text.")] = None,
    context: Annotated[int, typer.Option("-c", "--ctx-size", min=8, help="Tokens of a chunk.")] = 512,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, help="Chunks at most; else all.")] = None,
    threads: Threads = None,
    memory: Memory = None,
    units: Units = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a text with its standard error.

    As llama.cpp does it: the text is cut into chunks of -c tokens, each begins with BOS if the
    model wants one, and only the second half of a chunk is scored.
    """
    name = pick_model(model, model_option)
    if file is None:
        raise UsageError("which text? give -f FILE")
    text = read_text(file)

    from coterie.llm import LLM

    with (
        terminal.Progress() as progress,
        LLM(
            name,
            threads=threads,
            context=context,
            memory=memory,
            units=units,
            progress=progress,
            sources=value_sources(command),
        ) as llm,
    ):
        progress.say(llm.lines())
        started = time.perf_counter()
        tokens = llm.tokenize(text)
        count = min(len(tokens) // context, chunks or len(tokens))
        if count == 0:
            raise UsageError(
                f"{file} has {len(tokens)} tokens, one chunk takes {context}; give more text or a smaller -c"
            )
        begin = llm.tokenize("")[:1]  # BOS, where the model wants one
        losses: list[float] = []
        for index in range(count):
            chunk = tokens[index * context : (index + 1) * context]
            losses += chunk_losses(llm.logits(begin + chunk[len(begin) :]), chunk)
            value, error = estimate(losses)
            progress(f"chunk {index + 1} of {count}: perplexity {value:.4f} +/- {error:.4f}")
    if as_json:
        terminal.write_json(
            {
                "perplexity": value,
                "stderr": error,
                "chunks": count,
                "n_ctx": context,
                "tokens_scored": len(losses),
                "seconds": time.perf_counter() - started,
            }
        )
    else:
        terminal.write(f"perplexity {value:.4f} +/- {error:.5f} ({count} chunks of {context} tokens)\n")


def chunk_losses(logits: "NDArray[np.float32]", tokens: list[int]) -> list[float]:
    """Negative log-likelihoods (nats) of the second half of a chunk.

    `logits` is float32[n, vocab] of the chunk's n tokens: row i predicts token i + 1. Raises
    ModelError where it has none for it.
    """
    import numpy as np

    losses = []
    for position in range(len(tokens) // 2, len(tokens) - 1):
        row = logits[position].astype(np.float64)
        highest = row.max()
        loss = highest + np.log(np.exp(row - highest).sum()) - row[tokens[position + 1]]
        if not np.isfinite(loss):
            raise ModelError(f"the logits at position {position} of a chunk are not finite; the model is damaged")
        losses.append(float(loss))
    return losses


def estimate(losses: list[float]) -> tuple[float, float]:
    """Perplexity and its standard error, exp(mean) and exp(mean) * standard error of the mean."""
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / len(losses)
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    return value, value * math.sqrt(variance / (len(losses) - 1))
