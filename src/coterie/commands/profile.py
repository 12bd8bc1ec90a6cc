"""coterie profile: measure this machine, once, for plans to rely on."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.commands import terminal
from coterie.commands.activations import count, lines
from coterie.commands.options import Json, Memory, ModelOption, Threads, pick_model
from coterie.commands.shape_tables import shape_lines, shapes_dict
from coterie.errors import UsageError

if TYPE_CHECKING:
    from coterie.scheduler.profile import DeviceProfile, FlashProfile, FlashRow, UnitProfile

FILE_BYTES = 1 << 30  # of the file that is made to be read
SPARE_BYTES = 1 << 30  # that must be left on the disk beside it
PIECE = 16 << 20


def profile(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE | MODEL",
            help="A large file to read, on the disk of your models, else one is made; the model to count.",
        ),
    ] = None,
    model_option: ModelOption = None,
    flash: Annotated[bool, typer.Option("--flash", help="Measure how the disk is read fastest, and memory.")] = False,
    units: Annotated[
        bool, typer.Option("--units", help="Measure the CPU unit's kernels, for coterie simulate --soc this.")
    ] = False,
    shapes: Annotated[
        bool, typer.Option("--shapes", help="Measure the products of MODEL on each unit, for products to be cut.")
    ] = False,
    on: Annotated[
        str | None, typer.Option("--on", metavar="cpu,gpu,npu", help="Units that --shapes measures; by default all.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="tensor", help="Have --shapes measure units as they are beside each other."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Have --shapes measure what it has measured before.")] = False,
    formats: Annotated[
        str, typer.Option("--formats", metavar="FORMAT,...", help="Weight formats to measure units with.")
    ] = "Q4_0,Q8_0,Q6_K",
    activations: Annotated[
        Path | None,
        typer.Option("--activations", metavar="COUNTS", help="Count a sparse MODEL's live neurons, and add them here."),
    ] = None,
    text: Annotated[Path | None, typer.Option("-f", "--file", help="The text that the model reads for it.")] = None,
    steps: Annotated[int, typer.Option("-n", "--steps", min=1, help="Tokens of each sequence.")] = 256,
    batches: Annotated[str, typer.Option("--batches", help="Numbers of sequences that are read at once.")] = "1,2,4",
    threads: Threads = None,
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Measure this machine for later plans (--flash, --units, --shapes), or count a sparse model's live neurons
    (--activations); without an option, show what has been measured."""
    if (on is not None or again or split is not None) and not shapes:
        raise UsageError("--on, --split and --again belong to --shapes")
    if shapes:
        if flash or units or activations is not None or text is not None:
            raise UsageError("--shapes measures a model's products and nothing else: one at a time")
        if split not in (None, "layer", "tensor"):
            raise UsageError(f"split is {split!r:.40}: there are layer and tensor")
        name = pick_model(None if file is None else str(file), model_option)
        _profile_shapes(name, on, split == "tensor", threads, again, as_json)
        return
    if activations is not None:
        if flash or units:
            raise UsageError("--flash and --units measure this machine and --activations a model: one at a time")
        name = pick_model(None if file is None else str(file), model_option)
        with terminal.Progress() as progress:
            facts = count(activations, name, text, steps, batches, {"threads": threads, "memory": memory}, progress)
        if as_json:
            terminal.write_json(facts)
        else:
            terminal.write("\n".join(lines(facts)) + "\n")
        return
    if model_option is not None or text is not None:
        raise UsageError("-m belongs to --shapes and --activations COUNTS, -f to --activations COUNTS")
    if file is not None and not (flash or units):
        raise UsageError(f"to measure by reading {file}, give --flash")
    with terminal.Progress() as progress:
        progress("looking at this machine")
        from coterie.scheduler.profile import file_system, load_profile, profile_path, save_profile

        known = load_profile()
        if flash or units:
            from coterie.actors.sweep import Sweep, memory_bandwidth

            with _given(file) if file is not None else _made(progress) as (path, place):
                name = file_system(place)
                if flash:
                    with Sweep(path) as sweep:
                        known.flash[name] = sweep.whole(progress)
                if units:
                    measured = _measured_units(formats, threads, progress, path, known.flash.get(name))
                    known.units[str(measured.lanes)] = measured
            progress("measuring memory")
            known.memory_bandwidth = memory_bandwidth()
            progress.say([f"wrote {save_profile(known)}"])
    if as_json:
        terminal.write_json({"path": profile_path()} | asdict(known))
    else:
        terminal.write("\n".join(_lines(known)) + "\n")


def _profile_shapes(name: str, on: str | None, beside: bool, threads: int | None, again: bool, as_json: bool) -> None:
    """Measure a model's products, as far as they are not known, and show them; `beside`: on units that have products
    to share."""
    with terminal.Progress() as progress:
        progress("looking at this machine")
        from coterie import fetch
        from coterie.actors.identity import units_there
        from coterie.commands.measure_shapes import measure_shapes
        from coterie.models.load import read_spec
        from coterie.opening import open_file
        from coterie.scheduler.placement import UNITS, Placement
        from coterie.scheduler.plan import Wishes
        from coterie.scheduler.planner import lanes_and_kept
        from coterie.scheduler.profile import load_profile, profile_path, save_profile

        wanted = [unit.strip() for unit in on.split(",")] if on is not None else list(UNITS)
        if unknown := set(wanted) - set(UNITS):
            raise UsageError(f"unit is {min(unknown)!r:.40}: there are {', '.join(UNITS)}")
        units = tuple(unit for unit in UNITS if unit in wanted)
        if beside and ("cpu" not in units or len(units) == 1):
            raise UsageError("units beside each other are the CPU unit and another one: --on cpu,gpu or cpu,npu")
        lanes, kept = lanes_and_kept(Wishes(threads, units=units, split="tensor" if beside else "layer"))
        cores = Placement(kept=kept).own_cores() if beside else ()
        known = load_profile()
        measured = known.beside if beside else known.shapes
        with open_file(fetch.resolve(name, progress)) as file:
            spec = read_spec(file)
            there = units_there(units, lanes, cores)
            measured, said = measure_shapes(file, spec, there, lanes, measured, progress, again=again, cores=cores)
        known.beside, known.shapes = (measured, known.shapes) if beside else (known.beside, measured)
        progress.say([*said, f"wrote {save_profile(known)}"])
    if as_json:
        terminal.write_json({"path": profile_path()} | shapes_dict(measured))
    else:
        terminal.write("\n".join(shape_lines(measured)) + "\n")


def _measured_units(
    formats: str, threads: int | None, progress: terminal.Progress, path: Path, flash: "FlashProfile | None"
) -> "UnitProfile":
    from coterie.actors.sweep import quick_flash
    from coterie.commands.measure_pauses import measure_pauses
    from coterie.commands.measure_units import measure_units

    lanes = threads or len(os.sched_getaffinity(0))
    names = [name.strip() for name in formats.split(",")]
    pauses = measure_pauses(lanes, progress)
    return measure_units(names, lanes, progress, pauses, (path, flash or quick_flash(path)))


@contextmanager
def _given(path: Path) -> Iterator[tuple[Path, Path]]:
    yield path, path


@contextmanager
def _made(progress: terminal.Progress) -> Iterator[tuple[Path, Path]]:
    """A file of random bytes that has no name, so that it goes with this process; and the folder it is in."""
    from coterie.paths import cache_dir

    folder = cache_dir()
    free = shutil.disk_usage(folder).free
    if free < FILE_BYTES + SPARE_BYTES:
        raise UsageError(
            f"{folder} has {terminal.size_text(free)} left, too little for a file of "
            f"{terminal.size_text(FILE_BYTES)} to measure with; name a large file that is there"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            _fill(file.fileno(), progress)
        except OSError as error:
            raise UsageError(f"cannot write a file to measure with in {folder}: {error.strerror}") from None
        yield Path(f"/proc/self/fd/{file.fileno()}"), folder


def _fill(fd: int, progress: terminal.Progress) -> None:
    """Bytes that no disk can make fewer of."""
    import numpy as np

    random = np.random.default_rng()
    for done in range(0, FILE_BYTES, PIECE):
        progress("writing a file to read", done, FILE_BYTES)
        left = memoryview(random.bytes(PIECE))
        while left:
            left = left[os.write(fd, left) :]
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _lines(known: "DeviceProfile") -> list[str]:
    """A profile for people."""
    lines = []
    for name, found in known.flash.items():
        lines += [f"flash {name}", *_tables(found.rows), "  " + _choice(found), ""]
    for unit in known.units.values():
        lines += _unit_lines(unit)
    lines += shape_lines(known.shapes)
    if known.beside.units:
        lines += ["units that share products:", *shape_lines(known.beside)]
    if known.memory_bandwidth is not None:
        lines.append(f"memory: {known.memory_bandwidth / 1e9:.1f} GB/s read by all cores")
    return lines or ["nothing has been measured yet: coterie profile --flash"]


def _unit_lines(unit: "UnitProfile") -> list[str]:
    """Rates of the CPU unit's kernels."""
    lines = [f"cpu, {unit.lanes} lane{'s' * (unit.lanes > 1)}: launch in us, bytes/s, operations/s by kernel"]
    for cost in unit.kernels:
        memory = f"{cost.bandwidth / 1e9:.1f} GB/s" if cost.bandwidth else ""
        compute = f"{cost.rate / 1e9:.1f} G/s" if cost.rate else ""
        lines.append(f"  {cost.kernel:20}{1e6 * cost.launch:8.1f}{memory:>14}{compute:>14}")
    left = f"flash keeps {100 * unit.flash_beside:.0f} % of its rate beside it"
    lines += [f"  {left}; {1e6 * unit.between:.0f} us between steps, {1e6 * unit.streamed:.0f} where streamed", ""]
    return lines


def _choice(found: "FlashProfile") -> str:
    quickly = ", found quickly" if found.quick else ""
    return (
        f"reads by {found.engine}, {terminal.size_text(found.block)} at a time, {found.depth} in flight: "
        f"{found.bytes_per_s / 1e9:.2f} GB/s{quickly}"
    )


def _tables(rows: "tuple[FlashRow, ...]") -> list[str]:
    """MB/s, and in brackets the processor's microseconds a read, by block and depth."""
    lines = []
    key = lambda row: (row.engine, row.pattern, row.span)  # noqa: E731
    for (engine, pattern, span), group in itertools.groupby(sorted(rows, key=key), key):
        cells = {(row.block, row.depth): f"{row.bytes_per_s / 1e6:.0f} ({row.cpu_us:.0f})" for row in group}
        depths = sorted({depth for _, depth in cells})
        lines.append(f"  {engine}, {pattern} over {terminal.size_text(span)}: MB/s (CPU us a read) by depth")
        lines.append("  " + " " * 9 + "".join(f"{depth:>14}" for depth in depths))
        for block in sorted({block for block, _ in cells}):
            values = "".join(f"{cells.get((block, depth), ''):>14}" for depth in depths)
            lines.append(f"  {terminal.size_text(block):9}{values}")
    return lines
