"""Understanding a model, of a GGUF or a packed file: its shape, tokenizer and chat template, each checked."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from coterie.errors import ModelError, UsageError
from coterie.models import gemma3, llama
from coterie.models.gguf_file import GGUFFile
from coterie.models.header import ModelHeader, OpenModel
from coterie.models.safetensors_folder import SafetensorsFolder
from coterie.models.source import WeightSource
from coterie.models.spec import ModelSpec
from coterie.models.template import ChatTemplate
from coterie.models.tokenizer import Tokenizer

ARCHITECTURES: dict[str, ModuleType] = {"llama": llama, "bamboo": llama, "gemma3": gemma3}


@dataclass(frozen=True)
class Model:
    """A model file that has been opened and understood. `template` is None where the file has none."""

    file: OpenModel
    spec: ModelSpec
    tokenizer: Tokenizer
    template: ChatTemplate | None

    @property
    def source(self) -> WeightSource:
        """The file, where the tensors' own bytes are needed. Raises UsageError for a packed model."""
        if not isinstance(self.file, WeightSource):
            raise UsageError(f"{self.file.path} is a packed model; this needs what it was made of")
        return self.file

    def close(self) -> None:
        self.file.close()


def open_source(path: str | Path, format: str | None = None) -> WeightSource:
    """A GGUF, or a folder of safetensors whose matrices are coded in `format`. Raises ModelError."""
    if not Path(path).is_dir():
        return GGUFFile(path)
    return SafetensorsFolder(path, format) if format else SafetensorsFolder(path)


def understand(file: OpenModel) -> Model:
    """A model by its open file; ModelError says what is wrong with it. The file is closed in that case."""
    try:
        spec = read_spec(file)
        tokenizer = Tokenizer.from_metadata(file.metadata)
        if tokenizer.vocab_size != spec.vocab:
            raise ModelError(
                f"{file.path.name}: {tokenizer.vocab_size} tokens in the vocabulary, but {spec.vocab} rows "
                "in token_embd.weight; the file is damaged"
            )
        return Model(file, spec, tokenizer, _chat_template(file, tokenizer))
    except BaseException:
        file.close()
        raise


def read_spec(file: ModelHeader) -> ModelSpec:
    """The model's shape; ModelError if it makes no sense or its architecture is not supported."""
    architecture = file.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{file.path.name}: architecture {architecture[:40]!r} is not supported; "
            f"Coterie runs {' and '.join(ARCHITECTURES)}"
        )
    spec: ModelSpec = ARCHITECTURES[architecture].read_spec(file)
    return spec


def _chat_template(file: ModelHeader, tokenizer: Tokenizer) -> ChatTemplate | None:
    if "tokenizer.chat_template" not in file.metadata:
        return None
    bos, eos = ("" if id is None else tokenizer.token_text(id) for id in (tokenizer.bos, tokenizer.eos))
    return ChatTemplate(file.text("tokenizer.chat_template"), bos, eos)
