"""A model that is cut, as users have it: the command line, the Python API, and Ray between the two processes."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import coterie, refused, stand_in
from tiny_models import write_tiny

from coterie import LLM, cut
from coterie.actors.host import Host
from coterie.actors.link import Call, Chain
from coterie.cut import PartActor
from coterie.errors import UnitError, UsageError

LAYERS, PROMPT = 4, "In the beginning was the word"


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    return write_tiny(folder / "m.gguf", "llama", formats="Q4_0", layers=LAYERS, context=512)


def started(*args: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: Ray stays out of this one."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "coterie", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    if "Ray cannot start" in done.stderr:
        pytest.skip(done.stderr.strip())
    return done


def test_a_ray_actor_with_the_first_layers_gives_the_same_ids(path: Path) -> None:
    done = started(
        "run",
        str(path),
        "--cut",
        "3",
        "--raw",
        "--temp",
        "0",
        "-n",
        "12",
        "-p",
        PROMPT,
        "-t",
        "1",
        "-c",
        "64",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with LLM(path, threads=1, context=64) as llm:
        generation = llm.generate(PROMPT, 12, temperature=0.0)
        list(generation)
    assert found["tokens"] == generation.tokens
    assert found["text"] == generation.text
    assert found["link"]["decode"]["rows"] == 11  # the first token follows from the prompt
    assert found["link"]["prefill"]["rows"] == len(generation.prompt_tokens)
    assert "layers 0 to 2 of 4 run in another process" in done.stderr
    assert " kB a token" in done.stderr


def in_this_process(monkeypatch: pytest.MonkeyPatch, of: Path) -> list[str]:
    """Have the actor be an object here, with a model of the test's choice; what became of it."""
    story: list[str] = []

    def start(host: Host, address: str | None, arguments: tuple[Any, ...]) -> tuple[Call, Callable[[], None]]:
        actor = PartActor(str(of), *arguments[1:])
        story.append("started")

        def close() -> None:
            story.append("ended")
            if actor._server is not None:
                actor._server.part.close()  # type: ignore[attr-defined]

        return actor.handle, close

    monkeypatch.setattr(cut, "_start_actor", start)
    return story


def test_generations_side_by_side(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = in_this_process(monkeypatch, path)

    def texts(llm: LLM) -> list[list[str]]:
        made = [llm.generate(text, 12, seed=i, temperature=5.0) for i, text in enumerate((PROMPT, "the word", "x"))]
        pieces: list[list[str]] = [[] for _ in made]
        for _ in range(13):
            for to, generation in zip(pieces, made, strict=True):
                to.extend([piece] if (piece := next(generation, None)) is not None else [])
        return pieces

    with LLM(path, threads=1, context=512) as llm:
        alone = texts(llm)
    with LLM(path, threads=1, context=512, cut=2) as llm:
        assert texts(llm) == texts(llm) == alone
    llm.close()
    assert story == ["started", "ended"]


def test_a_front_that_does_not_fit_leaves_nothing_running(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_tiny(path.with_name("other.gguf"), "llama", formats="Q4_0", layers=LAYERS, context=512, seed=1)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for wrong, said in ((other, "the two ends differ: model is"), (path.with_name("no.gguf"), "cannot open the model")):
        story = in_this_process(monkeypatch, wrong)
        with pytest.raises(UnitError, match=f"^the part with layers 0 to 1: {said}"):
            LLM(path, threads=2, context=512, cut=2)
        assert story == ["started", "ended"]
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)


@pytest.mark.parametrize("at", [LAYERS, LAYERS + 1, 1 << 40])
def test_layers_that_are_not_there(at: int, path: Path) -> None:
    with pytest.raises(UsageError, match="has layers 0 to 3"):
        LLM(path, cut=at)


@pytest.mark.parametrize("at", [0, -1, 1.5, True, "3"])
def test_a_cut_that_is_no_number(at: Any, path: Path) -> None:
    with pytest.raises(UsageError, match="cut is"):
        LLM(path, cut=at)


def test_a_plan_is_for_a_whole_model(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give plan or cut"):
        LLM(path, cut=2, plan=tmp_path / "plan.toml")


def test_a_model_in_one_process_has_no_front(path: Path) -> None:
    with LLM(path, threads=1, context=64) as llm:
        assert llm.front is None
        (row,) = llm.bench(0, 2, 1)
        assert row["link"] is None


class Report(Chain):
    """Says what a link has cost."""

    def __init__(self) -> None:
        super().__init__([])

    def lines(self) -> list[str]:
        return ["layers 0 to 2 are elsewhere"]

    def report(self) -> dict[str, dict[str, float]]:
        return {"decode": {"rows": 3, "bytes": 2481.0, "added_ms": 0.512}}


def test_run_says_what_the_link_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = stand_in(monkeypatch, "Hello")
    monkeypatch.setattr(fake, "front", Report())
    result = coterie("run", "m.gguf", "--cut", "3", "-p", "hi")
    assert result.exit_code == 0
    assert fake.last.options["cut"] == 3
    assert "layers 0 to 2 are elsewhere" in result.stderr
    assert "expect up to" not in result.stderr  # a forecast of the layers here is none of the model
    assert "link 0.51 ms and 2.5 kB a token" in result.stderr
    refused(coterie("run", "m.gguf", "--cut", "0", "-p", "hi"), "--cut")
