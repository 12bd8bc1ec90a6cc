"""Opening a model: the file that was named, or where its weights must be streamed its packed copy."""

from collections.abc import Callable
from pathlib import Path

from coterie.errors import PlanError
from coterie.models.gguf_file import GGUFFile
from coterie.models.load import Model, understand
from coterie.scheduler.plan import Wishes, wants_flash
from coterie.storage.flash_file import FlashFile, is_flash_file
from coterie.storage.flash_writer import packed_copy

Progress = Callable[[str, int, int], None]


def open_model(path: str | Path) -> Model:
    """Open a GGUF or a packed file; ModelError says what is wrong with it."""
    return understand(FlashFile(path) if is_flash_file(path) else GGUFFile(path))


def open_to_run(path: Path, wishes: Wishes, progress: Progress) -> Model:
    """The model at `path`; packed first, and once for all, if it is a GGUF that does not fit `wishes`."""
    model = open_model(path)
    try:
        if isinstance(model.file, GGUFFile) and wants_flash(model.file, model.spec, wishes):
            copy = packed_copy(model, progress)
            model.close()
            model = open_model(copy)
        _check_identity(model, wishes)
        return model
    except BaseException:
        model.close()
        raise


def _check_identity(model: Model, wishes: Wishes) -> None:
    if wishes.identity is not None and not (
        isinstance(model.file, FlashFile) and model.file.identity == wishes.identity
    ):
        raise PlanError(
            f"the plan was made for another packing than {model.file.path.name}; make it anew with coterie plan --save"
        )
