"""coterie calibrate: thresholds for a SwiGLU model, what leaving out costs in quality, and whether it pays here."""

import functools
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.commands import terminal
from coterie.commands.options import Json, ModelArgument, ModelOption, pick_model, read_text
from coterie.commands.perplexity import chunk_losses, estimate
from coterie.errors import PlanError, UsageError
from coterie.paths import check_writable

if TYPE_CHECKING:
    from collections.abc import Callable

    from coterie.models.llama import Floats, Network
    from coterie.models.load import Model
    from coterie.models.thresholds import Thresholds
    from coterie.scheduler.skipping import Machine

    Forward = Callable[[list[int], Network], Floats]

SPARSITIES = "10,20,30,40,50,60"
SHARE = 0.5  # of the weights' bytes in memory, for what is expected
MOST_RISE = 0.05  # of perplexity, for a method to be worth its speed


class Method(StrEnum):
    cats = "cats"
    teal = "teal"
    core = "core"
    all = "all"


@dataclass(frozen=True)
class Row:
    """A method at a sparsity (percent): perplexity, and its rise over the dense model's, with standard errors; bytes of
    weights that a token does not need; tokens/s expected with SHARE in memory, None where the machine is not known."""

    method: str
    sparsity: int
    perplexity: float
    stderr: float
    rise: float
    rise_stderr: float
    skipped: float
    tokens_per_s: float | None


@dataclass(frozen=True)
class Report:
    """Rows, the dense model's first; from which sparsity on each method pays on this disk (empty: not known)."""

    rows: list[Row]
    tokens_scored: int
    break_even: dict[str, float]

    def verdicts(self) -> list[str]:
        """A line a method: refused, unless it pays at a sparsity that quality allows."""
        dense, *rows = self.rows
        return [
            self._verdict(method, [row for row in rows if row.method == method], dense.tokens_per_s)
            for method in dict.fromkeys(row.method for row in rows)
        ]

    def _verdict(self, method: str, rows: list[Row], dense: float | None) -> str:
        if dense is None:
            return f"{method}: not known whether it pays; measure this disk with coterie profile --flash"
        good = [row for row in rows if row.rise <= MOST_RISE]
        paying = [row for row in good if (row.tokens_per_s or 0) > dense]
        allowed = f"up to {good[-1].sparsity} %" if good else f"not even {rows[0].sparsity} %"
        if paying:
            best = max(paying, key=lambda row: row.tokens_per_s or 0)
            return (
                f"{method}: would pay: {best.tokens_per_s:.3g} tokens/s at {best.sparsity} % instead of {dense:.3g}; "
                f"quality (perplexity +{MOST_RISE:.0%}) allows {allowed}; the engine does not do it yet"
            )
        return (
            f"{method}: refused: on this disk it pays from {self.break_even[method]:.1%} on, and quality "
            f"(perplexity +{MOST_RISE:.0%}) allows {allowed}"
        )

    def table(self) -> str:
        """Markdown."""
        lines = [
            f"| | left out | perplexity | against dense | not needed | expected tokens/s at {SHARE:.0%} | pays from |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            speed = "?" if row.tokens_per_s is None else f"{row.tokens_per_s:.3g}"
            pays = f"{self.break_even[row.method]:.1%}" if row.method in self.break_even else ""
            lines.append(
                f"| {row.method} | {row.sparsity} % | {row.perplexity:.2f} ± {row.stderr:.2f} "
                f"| {row.rise:+.1%} ± {row.rise_stderr:.1%} | {row.skipped / 1e6:.1f} MB | {speed} | {pays} |"
            )
        return "\n".join(lines)


def calibrate(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="The text.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where the thresholds go.")
    ] = None,
    thresholds: Annotated[
        Path | None, typer.Option("--thresholds", metavar="FILE", help="Score these, made before, instead of new ones.")
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option("--sparsity", metavar="N,...", help=f"Percent to leave out; by default {SPARSITIES}.")
    ] = None,
    method: Annotated[Method, typer.Option("--method", help="What to score.")] = Method.all,
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="Tokens of the text to calibrate on.")] = 2048,
    context: Annotated[int, typer.Option("-c", "--ctx-size", min=8, help="Tokens of a chunk.")] = 512,
    chunks: Annotated[int, typer.Option("--chunks", min=1, help="Chunks of the text, behind these, to score.")] = 4,
    as_json: Json = False,
) -> None:
    """Thresholds for leaving out neurons of a SwiGLU model, what that costs in quality, and whether it pays here.

    Everything is computed by the float oracle, so only for small models. As in perplexity only the second half of a
    chunk is scored, and only there something is left out: the first half is the prompt. Nothing uses thresholds unless
    it is told to.
    """
    name = pick_model(model, model_option)
    if file is None:
        raise UsageError("which text? give -f FILE")
    if output is not None:
        check_writable(output)
    if thresholds and (output or sparsity):
        raise UsageError("--thresholds are made already: leave out -o and --sparsity")
    text, percents = read_text(file), _percents(sparsity or SPARSITIES)
    methods = [each.value for each in Method if each is not Method.all and method in (each, Method.all)]

    with terminal.Progress() as progress:
        from coterie import fetch
        from coterie.opening import open_model
        from coterie.scheduler.profile import load_profile
        from coterie.scheduler.skipping import known_machine

        path = fetch.resolve(name, progress)
        opened = open_model(path)
        try:
            check(opened, context)
            pieces = cut(opened, text, context)
            needed = (0 if thresholds else max(1, tokens // context)) + chunks
            if len(pieces) < needed:
                raise UsageError(
                    f"{file} has {len(pieces)} chunks of {context} tokens, this takes {needed}; give more text, or "
                    "smaller --tokens, --chunks or -c"
                )
            forward = oracle(opened)
            if thresholds:
                found = read_thresholds(thresholds, opened)
            else:
                found = measure(opened, forward, pieces[: needed - chunks], percents, progress)
            if output:
                write_thresholds(output, found)
                progress.say([f"wrote {output}"])
            machine = known_machine(load_profile(), path)
            report = score(opened, forward, found, pieces[needed - chunks : needed], methods, machine, progress)
        finally:
            opened.close()
    if as_json:
        terminal.write_json(asdict(report) | {"verdicts": report.verdicts()})
    else:
        terminal.write("\n".join([report.table(), "", *report.verdicts()]) + "\n")


def _percents(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 3 and int(word) > 0 for word in words):
        raise UsageError(f"--sparsity {text}: give whole numbers of percent from 1 to 99, as in {SPARSITIES}")
    return sorted({int(word) for word in words})


def check(model: "Model", context: int) -> None:
    """Raises UsageError or PlanError for a model that this is not for."""
    from coterie.storage.available import available_memory

    spec, source = model.spec, model.source
    if spec.activation not in ("silu", "gelu"):
        raise UsageError(
            f"{source.path.name} has {spec.activation}, and thresholds are for SwiGLU and GeGLU; its idle neurons add "
            "nothing anyway"
        )
    if context > spec.context:
        raise UsageError(f"-c {context}: {source.path.name} takes {spec.context} positions at most")
    matrices = sum(4 * tensor.rows * tensor.cols for tensor in source.tensors.values())
    needed = matrices + 4 * context * spec.vocab
    if needed > available_memory():
        raise PlanError(
            f"{source.path.name} takes {terminal.size_text(needed)} in float32, more memory than is free; calibrate a "
            "smaller model"
        )


def cut(model: "Model", text: str, context: int) -> list[list[int]]:
    """The text in chunks of tokens, each begun as the model wants it."""
    from coterie.models.tokenizer import chunks_of

    tokens, begin = model.tokenizer.encode(text), model.tokenizer.encode("")[:1]
    return chunks_of(tokens, begin, context)


def oracle(model: "Model") -> "Forward":
    """The oracle of a model, whose weights are dequantised once."""
    from coterie.models.load import ARCHITECTURES

    forward = ARCHITECTURES[model.spec.architecture].forward
    return functools.partial(forward, model.spec, functools.cache(model.source.floats))


def measure(
    model: "Model", forward: "Forward", chunks: list[list[int]], sparsities: list[int], progress: terminal.Progress
) -> "Thresholds":
    """Thresholds by the magnitudes in these chunks."""
    from coterie.models.thresholds import Calibration

    calibration = Calibration(len(model.spec.layers))
    for done, chunk in enumerate(chunks):
        progress("calibrating", done, len(chunks))
        forward(chunk, calibration.network)
    return calibration.thresholds(model.source.key(), sparsities)


def score(
    model: "Model",
    forward: "Forward",
    thresholds: "Thresholds",
    chunks: list[list[int]],
    methods: list[str],
    machine: "Machine | None",
    progress: terminal.Progress,
) -> Report:
    """Each method at each sparsity, and the dense model."""
    from coterie.models.llama import feed_forward
    from coterie.scheduler.skipping import Costs

    cells = [("dense", 0), *((method, percent) for method in methods for percent in thresholds.sparsities)]
    losses: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    for done, chunk in enumerate(chunks):
        for number, (method, percent) in enumerate(cells):
            progress("scoring", done * len(cells) + number, len(chunks) * len(cells))
            network = thresholds.network(method, percent, len(chunk) // 2) if percent else feed_forward
            losses[method, percent] += chunk_losses(forward(chunk, network), chunk)
    costs, dense = Costs.of(model.source, model.spec), losses["dense", 0]
    rows = []
    for (method, percent), found in losses.items():
        ratio, ratio_stderr = estimate([loss - usual for loss, usual in zip(found, dense, strict=True)])
        skipped = costs.skipped(method, percent / 100) if percent else 0.0
        speed = 1 / costs.seconds(method, percent / 100, SHARE, machine) if machine else None
        rows.append(Row(method, percent, *estimate(found), ratio - 1, ratio_stderr, skipped, speed))
    pays = {method: costs.break_even(method, SHARE, machine) for method in methods} if machine else {}
    return Report(rows, len(dense), pays)


def read_thresholds(path: Path, model: "Model") -> "Thresholds":
    """A thresholds file for this model. Raises UsageError where it cannot be read, ModelError where it is not sound."""
    from coterie.models.thresholds import Thresholds

    try:
        data = _content(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    return Thresholds.from_bytes(data, str(path), model.source.key(), len(model.spec.layers))


def write_thresholds(path: Path, thresholds: "Thresholds") -> None:
    """Only a file of such is ever replaced. Raises UsageError where it cannot be written."""
    from coterie.models.thresholds import KIND
    from coterie.paths import replace_file

    try:
        if path.exists() and not (path.is_file() and KIND.encode() in _content(path)[:64]):
            raise UsageError(f"{path} is there and holds no thresholds; give another name, or delete it")
        replace_file(path, thresholds.to_bytes())
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def _content(path: Path) -> bytes:
    """As much of a file as a thresholds file can have. Raises OSError."""
    from coterie.models.thresholds import LARGEST_FILE

    with path.open("rb") as file:
        return file.read(LARGEST_FILE)
