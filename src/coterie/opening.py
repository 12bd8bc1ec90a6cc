"""Opening a model: the file that was named, or where its weights must be streamed its packed copy."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from coterie.actors.sweep import quick_flash
from coterie.errors import CoterieError, PlanError, UsageError
from coterie.models.header import ModelHeader, OpenModel
from coterie.models.load import Model, open_source, read_spec, understand
from coterie.models.part import model_identity, part_of
from coterie.models.source import WeightSource
from coterie.models.spec import ModelSpec
from coterie.models.transposed import by_neurons
from coterie.paths import packed_dir
from coterie.presence import lacking
from coterie.scheduler.plan import Flash, Wishes
from coterie.scheduler.planner import make_plan, plan_flash, wants_flash
from coterie.scheduler.presets import load_preset, resolve
from coterie.scheduler.profile import file_system, flash_choice, load_profile, save_profile
from coterie.storage.activations import activations_of
from coterie.storage.flash_file import FlashFile, is_flash_file
from coterie.storage.flash_writer import packed_copy, packed_path

LARGE_ENOUGH = 64 << 20  # bytes of a file that can be measured by
Progress = Callable[[str, int, int], None]

AUTO = "auto"  # the preset that is worked out


def open_file(path: str | Path, format: str | None = None) -> OpenModel:
    """Open a GGUF, a packed file, or a folder of safetensors, coded in `format`; ModelError says what is wrong."""
    if Path(path).is_dir() or not is_flash_file(path):
        return open_source(path, format)
    return FlashFile(path)


def open_model(path: str | Path, format: str | None = None) -> Model:
    """The same with tokenizer and template."""
    return understand(open_file(path, format))


def open_by_neurons(
    path: str | Path, activation: str | None, format: str | None = None, counts: Path | None = None
) -> Model:
    """A model whose neurons can be skipped, made of one that is not packed; raises as `by_neurons`. `counts`: a file of
    activations of this model in its own order, by which neurons are put in the order of how often they are live."""
    model = open_model(path, format)
    try:
        made = by_neurons(model.source, model.spec, activation=activation, format=format)
        if counts is not None:
            order = activations_of(counts, model.spec, made, model.source).order()
            made = by_neurons(model.source, model.spec, activation=activation, format=format, order=order)
        return replace(model, file=made, spec=read_spec(made))
    except BaseException:
        model.close()
        raise


def open_to_run(
    path: Path, wishes: Wishes, progress: Progress, *, layers: tuple[int, int | None] | None = None
) -> Model:
    """The model at `path`, or of it `layers`, the first and the one behind the last (None: to the end); packed first,
    and once for all, if it is a GGUF that does not fit `wishes`."""
    model = open_model(path)
    try:
        if layers is not None:
            model = _cut(model, *layers)
        elif model.spec.part is not None:
            raise UsageError(f"{path.name} is only {model.spec.part}; run the whole model, with --cut in two processes")
        streaming = wants_flash(model.file, model.spec, wishes)
        if isinstance(model.file, WeightSource) and streaming:
            first = not packed_path(model.file).exists()
            if first:
                make_plan(
                    model.file, model.spec, wishes, flash_of(model.file, model.spec, wishes)
                )  # what cannot be is not packed
            copy = packed_copy(model, progress)
            if first:  # it takes the disk's room for good
                print(f"coterie: packed {path.name} into {copy}, once for all", file=sys.stderr, flush=True)
            model.close()
            model = open_model(copy)
        _check_identity(model, wishes)
        if streaming:
            _measure(model.file.path, progress)
        return model
    except BaseException:
        model.close()
        raise


def _cut(model: Model, first: int, last: int | None) -> Model:
    """A part of an open model; one that is that part already stays as it is."""
    part, whole = model.spec.part, len(model.spec.layers)
    if part is not None and (part.first, part.last) == (first, part.layers if last is None else last):
        return model
    made = part_of(model.source, model.spec, first, whole if last is None else last)
    return replace(model, file=made, spec=read_spec(made))


def check_together(wishes: Wishes, *, cut: int | None, plan: object, preset: object) -> None:
    """Raise UsageError for ways to say who computes what that exclude each other."""
    if cut is not None and wishes.units != ("cpu",):
        raise UsageError("a cut model's layers are the CPU unit's: drop units, or cut")
    for name, given in (("plan", plan), ("preset", preset)):
        if given is not None and cut is not None:
            raise UsageError(f"a {name} is for a whole model; give {name} or cut, not both")
    if plan is not None and preset is not None:
        raise UsageError("a plan decides what a preset would; give plan or preset, not both")


def preset_wishes(path: Path, preset: str, wishes: Wishes, *, near: bool = False) -> Wishes:
    """Wishes for the model at `path` as a preset has them; "auto" takes what is expected to be fastest, of class near
    only where that is allowed. Raises as presets.load_preset and resolve, and auto.auto_wishes."""
    if preset == AUTO:
        from coterie.auto import auto_wishes

        if wishes.units != ("cpu",) or wishes.split != "layer":
            raise UsageError("--preset auto decides who does what; drop --units and --split")
        with open_file(path) as file:
            return auto_wishes(file, read_spec(file), wishes, near=near)
    if near:
        raise UsageError(f"--allow-near is for --preset auto; {preset} says itself who computes")
    found = load_preset(preset)
    with open_file(path) as file:
        return resolve(found, file, read_spec(file), wishes, lacking)


def begun_wishes(path: Path, wishes: Wishes) -> Wishes:
    """Wishes in which units share products, with where cuts begin: by what was measured, unless a plan file or a preset
    says so, or else in the middle."""
    if wishes.split != "tensor" or len(wishes.units) == 1 or wishes.placement is not None or wishes.begin:
        return wishes
    from coterie.auto import begun

    with open_file(path) as file:
        spec = read_spec(file)
        return wishes if spec.sparse or spec.part is not None else begun(file, spec, wishes)


def flash_of(file: ModelHeader, spec: ModelSpec, wishes: Wishes) -> Flash | None:
    """How the weights of an open model would be streamed; for a GGUF that needs it, from a copy still to be made."""
    if isinstance(file, FlashFile):
        return plan_flash(file.path, file.identity, wishes)
    if not isinstance(file, WeightSource) or not wants_flash(file, spec, wishes):
        return None
    return replace(plan_flash(packed_dir(), "", wishes), file=str(packed_path(file)))


def _measure(path: Path, progress: Progress) -> None:
    """See how the disk is read fastest, if nobody has yet. Where that fails, the plan says that it assumes."""
    profile = load_profile()
    if flash_choice(profile, path).source == "assumed" and path.stat().st_size >= LARGE_ENOUGH:
        progress("measuring the disk", 0, 0)
        with suppress(CoterieError):
            profile.flash[file_system(path)] = quick_flash(path)
            save_profile(profile)


def plan_identity(file: OpenModel) -> str:
    """What a plan knows an open model by: the whole packing, or of what is not packed the header and every tensor's
    first row. Nothing else of the weights is read."""
    if isinstance(file, FlashFile):
        return file.identity
    assert isinstance(file, WeightSource)
    return model_identity(file)


def _check_identity(model: Model, wishes: Wishes) -> None:
    if wishes.identity not in (None, plan_identity(model.file)):
        raise PlanError(
            f"the plan was made for another model or packing than {model.file.path.name}; make it anew with coterie "
            "plan --save"
        )
