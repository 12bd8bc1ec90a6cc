"""Coterie: language models larger than memory, on every compute unit a device has.

>>> from coterie import LLM
>>> with LLM("smollm2") as llm:
...     for piece in llm.generate("The capital of France is"):
...         print(piece, end="")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coterie.llm import LLM

__all__ = ["LLM", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the engine when it is first asked for: it brings numba, the command's help needs none."""
    if name == "LLM":
        from coterie.llm import LLM

        return LLM
    raise AttributeError(f"module 'coterie' has no attribute {name!r}")
