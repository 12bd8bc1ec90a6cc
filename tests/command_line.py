"""What tests of the command line share: running it in process, and a stand-in for the engine."""

import json
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from coterie import cli
from coterie.errors import UsageError


def coterie(*args: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(args), input=stdin)


def refused(result: Result, *words: str, code: int = 2) -> None:
    """One line on stderr with these words, nothing on stdout, the exit code of the error."""
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("coterie: error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def answer(*words: str) -> tuple[list[int], str, str, int]:
    """Tokens, text, finish reason and seed of a run."""
    result = coterie("run", *words, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    return data["tokens"], data["text"], data["finish_reason"], data["seed"]


class FakeGeneration:
    """Streams `pieces`; an exception among them is raised in its turn."""

    def __init__(self, pieces: list[Any]) -> None:
        self._pieces = pieces
        self.text = ""
        self.tokens = list(range(len(pieces)))
        self.finish_reason = "stop"
        self.timings = {
            "prompt_tokens": 3,
            "prompt_tokens_per_s": 30.0,
            "resumed_tokens": 0,
            "generated_tokens": len(pieces),
            "tokens_per_s": np.float64(12.5),
        }

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                raise piece
            self.text += piece
            yield piece


def stand_in(monkeypatch: pytest.MonkeyPatch, *answer: Any) -> type["FakeLLM"]:
    """Put a class of its own in the engine's place, which answers so."""

    class LLM(FakeLLM):
        pieces: list[Any] = list(answer)  # noqa: RUF012
        template: object | None = object()
        begin: list[int] = []  # noqa: RUF012

    module = ModuleType("coterie.llm")
    module.LLM = LLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "coterie.llm", module)
    return LLM


class FakeLLM:
    """Records how it was made and asked."""

    pieces: list[Any]
    template: object | None
    vocab = 8
    begin: list[int]
    streamed: dict[str, Any] | None = None

    def __init__(self, model: str, **options: Any) -> None:
        if model == "missing":
            raise UsageError("no file and no known model 'missing'")
        self.model, self.options = model, options
        self.asked: list[Any] = []
        self.closed = False
        self.plan = SimpleNamespace(
            as_dict=lambda: {"lanes": 2},
            forecast_line=lambda forecast: f"expect up to {forecast['tokens_per_s']:.0f} tokens/s",
        )
        type(self).last = self

    last: "FakeLLM"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def generate(self, prompt: str, max_tokens: int = 256, **sampling: Any) -> FakeGeneration:
        self.asked.append((prompt, max_tokens, sampling))
        return FakeGeneration(self.pieces)

    def chat(self, messages: list[Any], max_tokens: int = 256, **sampling: Any) -> FakeGeneration:
        return self.generate(messages, max_tokens, **sampling)  # type: ignore[arg-type]

    def forecast(self) -> dict[str, float]:
        return {"read_bandwidth": 4e10, "tokens_per_s": 400.0}

    front = None

    def memory(self) -> dict[str, int]:
        return {"peak_rss": 64 * 2**20}

    def losses(self) -> list[dict[str, Any]]:
        return []

    def lines(self) -> list[str]:
        return ["plan: all resident"]

    def units(self) -> list[dict[str, Any]]:
        return [{"unit": "cpu"}]

    def host(self) -> dict[str, Any]:
        return {"host": "threads"}

    def flash(self) -> dict[str, Any] | None:
        return self.streamed

    def tokenize(self, text: str) -> list[int]:
        return self.begin + [ord(letter) % self.vocab for letter in text]

    def logits(self, tokens: list[int]) -> Any:
        self.asked.append(tokens)
        return np.zeros((len(tokens), self.vocab), dtype=np.float32)

    def bench(self, n_prompt: int, n_gen: int, repetitions: int) -> list[dict[str, Any]]:
        return [
            {
                "model_filename": self.model,
                "model_type": "llama 135M Q4_1",
                "model_size": 98 * 2**20,
                "model_n_params": 134_515_008,
                "n_threads": self.options["threads"],
                "n_prompt": n_prompt,
                "n_gen": n_gen,
                "avg_ts": 100.0,
                "stddev_ts": 1.5,
                "samples_ts": [100.0] * repetitions,
            }
        ]
