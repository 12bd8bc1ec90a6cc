"""Units as Ray actors: the same bits, one copy of the weights, and generations that outlive the loss of an actor."""

import os
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_models import decoded, opened, prefilled, some_tokens, write_model
from harness import until
from packed_models import streaming
from ray_actors import a_session, actor_of, at_step, hurt, on_ray, pid_of
from sparse_models import write_gated, write_predicted

from coterie.actors import cpu, ray_host
from coterie.actors.host import ThreadActor, UnitLost
from coterie.actors.messages import pack
from coterie.actors.ray_host import RayActor
from coterie.actors.ray_session import RaySession
from coterie.engine import Engine
from coterie.errors import UnitError
from coterie.kernels.record import LINE_PROGRESS
from coterie.sizes import Share

N = 24
CHUNKS = (7, 16)
SHARE = 0.5


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    with a_session() as session:
        yield session


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A GGUF, in memory as a whole."""
    return write_model(folder, "gemma3 Q4_0")


@pytest.fixture(scope="module")
def gated(many_extents: None, folder: Path) -> Path:
    return write_gated(folder / "gated.gguf")


@pytest.fixture(scope="module")
def predicted(many_extents: None, folder: Path) -> Path:
    return write_predicted(folder / "predicted.gguf")


def results(engine: Engine) -> np.ndarray[Any, Any]:
    """Logits of a prompt in chunks, of decoding, and of a batch."""
    tokens = some_tokens(N)
    sequences = [engine.sequence() for _ in range(3)]
    for i, sequence in enumerate(sequences):
        engine.prefill(sequence, tokens[: 3 + i])
    batch = engine.decode(sequences, tokens[:3]).copy()
    for sequence in sequences:
        sequence.close()
    return np.concatenate([prefilled(engine, tokens, CHUNKS), decoded(engine, tokens), batch])


def same(engine: Engine, expected: np.ndarray[Any, Any]) -> bool:
    return bool((results(engine).view(np.uint32) == expected.view(np.uint32)).all())


@pytest.mark.parametrize("kind", ["whole", "llama", "gated", "predicted"])
def test_hosts_agree(kind: str, session: RaySession, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    if kind == "whole":
        with opened(path, threads=2) as engine:
            expected = results(engine)
        share = None
    else:
        share = SHARE if kind == "llama" else 0.6
        with streaming(path, share) as engine:
            expected = results(engine)
    with on_ray(session, path, share) as engine:
        assert same(engine, expected)
        assert engine.plan.host == "ray"
        assert not engine.supervisor.losses


# --- one copy ---------------------------------------------------------------------------------------------


def mappings(pid: int, inode: int) -> list[tuple[int, int]]:
    """Where a process has mapped the memfd, and from which offset."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, _, offset, _, number, *_ = line.split()
        if int(number) == inode:
            found.append((int(span.partition("-")[0], 16), int(offset, 16)))
    return found


def shared_pss(pid: int, inode: int) -> int:
    """Bytes of the memfd that count for this process: those it shares with others divided by their number."""
    total, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = int(line.split()[4]) == inode
        elif inside and line.startswith("Pss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_there_is_one_copy_however_many_processes(session: RaySession, llama: Path) -> None:
    with on_ray(session, llama, SHARE) as engine:
        results(engine)
        description = engine.arena.describe()
        inode = description["inode"]
        pids = [os.getpid(), *(pid_of(actor_of(engine, unit)) for unit in ("cpu", "flash"))]
        assert len(set(pids)) == 3
        for pid in pids:
            assert mappings(pid, inode) == [(engine.arena.base, 0)]  # so an address is the same page in all of them
        held = os.stat(f"/proc/self/fd/{description['fd']}").st_blocks * 512
        assert sum(shared_pss(pid, inode) for pid in pids) <= held + (1 << 16)
        weights = engine.layout.weights
        assert held >= weights.pinned.nbytes + weights.staging.nbytes


def test_what_one_process_writes_others_see(session: RaySession, whole: Path) -> None:
    with on_ray(session, whole) as engine:
        assert engine.unit.detached
        before = engine.unit._counts[:, LINE_PROGRESS].copy()  # progress, which only lanes count: they are elsewhere
        decoded(engine, some_tokens(1))
        assert (engine.unit._counts[:, LINE_PROGRESS] > before).any()


def test_nothing_large_goes_through_ray(session: RaySession, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[int]()

    def counted(message: Any) -> bytes:
        sizes.append(len(pack(message)))
        return pack(message)

    monkeypatch.setattr(ray_host, "pack", counted)
    with on_ray(session, llama, SHARE) as engine:
        results(engine)
    assert sizes
    assert max(sizes) < 20_000  # from 100 KB on Ray would put it into its object store


# --- losses ------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped actors are found sooner."""
    monkeypatch.setattr(ray_host, "PULSE_LIMIT", 0.5)


STEPS = {"prefill": 6, "head": 7, "decode": 20, "batch": 5}  # of `results`, in the chunks or in between


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("unit", ["cpu", "flash"])
@pytest.mark.parametrize(
    ("kind", "number"),
    [("llama", signal.SIGKILL), ("llama", signal.SIGSTOP), ("gated", signal.SIGKILL)],
    ids=["killed", "stopped", "killed, sparse"],
)
def test_a_lost_unit_is_replaced(
    kind: str,
    unit: str,
    number: signal.Signals,
    session: RaySession,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, share = request.getfixturevalue(kind), SHARE if kind == "llama" else 0.6
    with streaming(path, share) as engine:
        expected = results(engine)
    with on_ray(session, path, share) as engine:
        for count, step in enumerate(STEPS.values(), start=1):
            pid = pid_of(actor_of(engine, unit))
            at_step(engine, step, partial(hurt, engine, unit, number), monkeypatch)
            assert same(engine, expected)
            assert [loss.unit for loss in engine.supervisor.losses] == [unit] * count
            with pytest.raises(ProcessLookupError):  # killed and reaped: waking it up changes nothing
                os.kill(pid, signal.SIGCONT)
            assert pid_of(actor_of(engine, unit)) != pid
        assert same(engine, expected)


@pytest.mark.usefixtures("quick")
def test_units_lost_between_steps_and_together(session: RaySession, llama: Path) -> None:
    with streaming(llama, SHARE) as engine:
        expected = results(engine)
    with on_ray(session, llama, SHARE) as engine:
        for unit in ("cpu", "flash"):
            hurt(engine, unit, signal.SIGKILL)
        assert same(engine, expected)
        hurt(engine, "flash", signal.SIGSTOP)
        hurt(engine, "cpu", signal.SIGKILL)
        assert same(engine, expected)
        assert len(engine.supervisor.losses) >= 2


@pytest.mark.usefixtures("quick")
def test_a_new_ceiling_with_a_lost_unit(session: RaySession, llama: Path) -> None:
    with streaming(llama, SHARE) as engine:
        expected = results(engine)
    with on_ray(session, llama, SHARE) as engine:
        for unit, share in (("flash", 0.8), ("cpu", 0.4), ("flash", 0.6)):
            hurt(engine, unit, signal.SIGKILL)
            engine.set_memory(Share(share))
            assert same(engine, expected)
        assert [loss.unit for loss in engine.supervisor.losses] == ["flash", "cpu", "flash"]


def test_a_pause_is_not_a_loss(session: RaySession, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(whole, threads=2) as engine:
        expected = results(engine)
    with on_ray(session, whole) as engine:

        def pause() -> None:
            for number in (signal.SIGSTOP, signal.SIGCONT):
                hurt(engine, "cpu", number)

        at_step(engine, 5, pause, monkeypatch)
        assert same(engine, expected)
        assert not engine.supervisor.losses


def test_a_lane_that_hangs_is_replaced_with_its_process(
    session: RaySession, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that stands still, while its pulse is not looked at."""
    monkeypatch.setattr(ray_host, "PULSE_LIMIT", 1e9)
    monkeypatch.setattr(cpu, "HUNG", 0.5)
    with opened(whole, threads=2) as engine:
        expected = results(engine)
    with on_ray(session, whole) as engine:
        assert same(engine, expected)
        pid = hurt(engine, "cpu", signal.SIGSTOP)
        until(lambda: " T " in Path(f"/proc/{pid}/stat").read_text())
        engine.unit._counts[0, LINE_PROGRESS] |= 1  # as if it had been inside of an instruction
        assert same(engine, expected)
        assert ["lane 0 has been at one piece of work" in loss.reason for loss in engine.supervisor.losses] == [True]


@pytest.mark.parametrize("unit", ["cpu", "flash"])
def test_a_replacement_that_is_interrupted_or_dies_is_replaced(
    unit: str, session: RaySession, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the new actor starts: Ctrl-C, then its death."""
    with streaming(llama, SHARE) as engine:
        expected = results(engine)
    with on_ray(session, llama, SHARE) as engine:
        assert same(engine, expected)
        greet, left = RayActor._greet, [KeyboardInterrupt(), UnitLost(unit, "it died")]

        def interrupted(actor: RayActor) -> None:
            if left:
                raise left.pop(0)
            greet(actor)

        monkeypatch.setattr(RayActor, "_greet", interrupted)
        hurt(engine, unit, signal.SIGKILL)
        with pytest.raises(KeyboardInterrupt):
            results(engine)
        assert same(engine, expected)
        assert not left
        assert [loss.unit for loss in engine.supervisor.losses] == [unit]


def test_what_is_lost_again_and_again_is_an_error(
    session: RaySession, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_ray(session, whole) as engine:
        begin = engine.unit._begin

        def begun(*arguments: int) -> int:
            if engine.unit.actor.lost() is None:
                hurt(engine, "cpu", signal.SIGKILL)
                until(engine.unit.actor.lost)
            return begin(*arguments)

        decoded(engine, some_tokens(1))
        monkeypatch.setattr(engine.unit, "_begin", begun)
        with pytest.raises(UnitError, match="5 times in one step"):
            decoded(engine, some_tokens(1))


def test_without_a_new_actor_threads_take_over(
    session: RaySession, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    with streaming(llama, SHARE) as engine:
        expected = results(engine)
    with on_ray(session, llama, SHARE) as engine:
        monkeypatch.setattr(engine.supervisor, "_progress", lambda label, done=0, total=0: said.append(label))
        monkeypatch.setattr(session, "alive", lambda: False)
        hurt(engine, "cpu", signal.SIGKILL)
        hurt(engine, "flash", signal.SIGKILL)
        assert same(engine, expected)
        assert isinstance(engine.unit.actor, ThreadActor)
        assert isinstance(actor_of(engine, "flash"), ThreadActor)
    assert any("threads of this process" in label for label in said)


def test_an_actor_that_cannot_be_had_is_an_error(
    session: RaySession, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "placement.toml").write_text("[cpu]\nnobody_has_this = 1\n")
    monkeypatch.setenv("COTERIE_PLACEMENT", str(tmp_path / "placement.toml"))
    monkeypatch.setattr(ray_host, "START_LIMIT", 1.0)
    with (
        pytest.raises(UnitError, match="Ray has no place for unit cpu, which asks for 1 of nobody_has_this: "),
        on_ray(session, whole),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gpu]\nx = 1\n", "tables are units"),
        ("cpu = 3\n", "must be a table"),
        ("[cpu]\nx = 0\n", "above 0"),
        ("[cpu]\nx = true\n", "above 0"),
        ("[flash]\nCPU = 1\n", "one of your own"),
        ("[cpu\n", "placement.toml"),
    ],
)
def test_wrong_placements_are_refused(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coterie.configs import placement
    from coterie.errors import UsageError

    (tmp_path / "placement.toml").write_text(text)
    monkeypatch.setenv("COTERIE_PLACEMENT", str(tmp_path / "placement.toml"))
    with pytest.raises(UsageError, match=said):
        placement()
