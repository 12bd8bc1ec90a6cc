"""Sessions whose process was killed: continued, they give the ids and the text of an undisturbed run."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import answer, coterie
from packed_models import pack
from tiny_models import TEXT, write_tiny

from coterie.session import session_path
from coterie.storage.journal import kv_path, read_journal

PROMPT = TEXT * 8  # several blocks of the KV cache

pytestmark = pytest.mark.usefixtures("own_home")

# Runs the command, and kills it by SIGKILL at the given moment: nothing of it can tidy up.
KILLED = """
import os, signal, sys
from coterie import cli, engine
from coterie.storage.journal import Journal
moment, count = sys.argv[1], int(sys.argv[2])
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def counted():
    global count
    count -= 1
    return count < 0
append, write, chunk = Journal.append, os.write, engine.Engine._chunk
def dying_append(self, token):
    if not counted(): return append(self, token)
    if moment == "torn":
        os.write = lambda fd, data: (write(fd, data[: len(data) // 2]), kill())
    if moment != "before": append(self, token)
    kill()
def dying_chunk(self, *args):
    if counted(): kill()
    return chunk(self, *args)
if moment == "prefill": engine.Engine._chunk = dying_chunk
else: Journal.append = dying_append
cli.app(sys.argv[3:])
"""
FLAGS = (
    "--raw",
    "-c",
    "2000",
    "-n",
    "700",
    "--temp",
    "50",
    "--top-k",
    "0",
    "--top-p",
    "1",
    "--min-p",
    "0",
    "--seed",
    "23",
)


def killed(moment: str, count: int, *words: str) -> None:
    result = subprocess.run([sys.executable, "-c", KILLED, moment, str(count), "run", *words], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.fixture(scope="module", params=["in memory", "streamed"])
def process(request: pytest.FixtureRequest, folder: Path) -> tuple[list[str], list[str], tuple[Any, ...]]:
    """A model, options of memory, and what an undisturbed run gives."""
    source = folder / "killed.gguf"
    write_tiny(source, dim=256, ffn=1024, layers=6, formats="Q8_0", context=2048)
    (folder / "prompt").write_text(PROMPT)
    model, memory = [str(source)], list[str]()
    if request.param == "streamed":
        model, memory = [str(pack(source))], ["--memory", "50%"]
    whole = answer(*model, *memory, "-f", str(folder / "prompt"), *FLAGS)
    assert len(whole[0]) > 500
    return model, memory, whole


@pytest.mark.parametrize("kv", [[], ["--session-kv"]])
def test_what_sigkill_ends_is_continued(
    process: tuple[list[str], list[str], tuple[Any, ...]], kv: list[str], folder: Path
) -> None:
    model, memory, whole = process
    chance = random.Random(len(kv))
    killed("prefill", 1, *model, *memory, "-f", str(folder / "prompt"), *FLAGS, "--session", "s", *kv)
    assert read_journal(session_path("s")).tokens == []
    if kv:
        assert kv_path(session_path("s")).stat().st_size  # what was read of the prompt is kept
    for moment, more in (("after", 3), ("torn", 200), ("before", 150), ("prefill", 0)):
        killed(moment, chance.randrange(more + 1), "--resume", "s", *memory)
        kept = read_journal(session_path("s")).tokens
        assert kept == whole[0][: len(kept)]
    assert kept
    assert answer("--resume", "s", *memory) == whole
    plain = coterie("run", "--resume", "s", *model)
    assert plain.exit_code == 0
    assert plain.stdout.removesuffix("\n") == whole[1].removesuffix("\n")


def test_killed_from_outside_at_any_moment(process: tuple[list[str], list[str], tuple[Any, ...]], folder: Path) -> None:
    model, memory, whole = process
    command = [sys.executable, "-m", "coterie", "run", *model, *memory, "-f", str(folder / "prompt"), *FLAGS]
    chance, path = random.Random(1), session_path("s")
    for words in ([*command, "--session", "s"], [*command[:4], "--resume", "s", *memory]):
        before = path.stat().st_size if path.exists() else 0
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
            enough = before + chance.randrange(1, 1500)
            while running.poll() is None and (not path.exists() or path.stat().st_size < enough):
                time.sleep(0.001)
            running.kill()
    assert answer("--resume", "s", *memory) == whole
