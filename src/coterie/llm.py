"""The Python API: text in, text out.

>>> from coterie import LLM
>>> with LLM("smollm2") as llm:
...     for piece in llm.chat([{"role": "user", "content": "What is the capital of France?"}]):
...         print(piece, end="")
"""

import ctypes
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.actors.host import Host
from coterie.answer import Generation
from coterie.engine import Engine
from coterie.errors import UsageError
from coterie.fetch import resolve
from coterie.hosts import check_host, open_host
from coterie.models.header import ModelHeader
from coterie.models.template import ChatTemplate
from coterie.opening import begun_wishes, check_together, open_to_run, preset_wishes
from coterie.part_engine import Front, PartEngine
from coterie.sampling import SamplingOptions
from coterie.scheduler.placement import parse_units
from coterie.scheduler.plan import NUMERICS_VERSION, OVERHEAD, Plan, Wishes
from coterie.scheduler.plan_file import read_plan
from coterie.session import session_path
from coterie.sizes import Share, as_ceiling, as_part, required_ceiling
from coterie.storage.activations import model_key
from coterie.storage.journal import Journal, Request

LOGITS_BYTES = 1 << 30  # logits() refuses to return more


class LLM:
    """A language model, ready to generate.

    `model` is a path to a GGUF, a packed file or a folder, or a name that `coterie pull` knows. `threads` are lanes of
    the CPU unit, `context` the positions all open generations hold together, `trace` a file that is written on close.

    `memory` is a hard ceiling: bytes, or text such as "6GiB"; "50%" lets half the weights' bytes be resident; "auto"
    follows what the machine can spare. What does not fit is streamed from a packed copy of the model, made on first
    use. `plan` is a plan file to follow. `cut`: run so many first layers in a Ray actor, in memory of its own, under a
    ceiling of its own. `progress(label, done, total)` is told of slow things; `sources` says where
    values came from ("flag", "config"), for the plan to show.

    `host` says what the units are: "threads" of this process, or "ray" actors, of a Ray that is started for this model
    or of the one at `ray_address` ("auto": what coterie cluster started). Tokens are the same.

    `units` names those that may compute, such as "cpu,gpu,npu" (None: "cpu"). GPU and NPU are of class `near`: their
    tokens may differ from the CPU unit's, and how far they are from it is measured when the model is opened.
    `gpu_share`: the part of the time, 0.01 to 1, for which the GPU is kept busy at most, a few milliseconds at a time.

    `split` "tensor" has several of them compute parts of a product at the same time, and moves the cut by what the
    parts take; "layer" (None) leaves every operator to one unit.

    `preset` names who does what in general terms: "llmnpu", "heteroinfer", "powerinfer2", or a TOML file like these; it
    decides units and split.

    Raises FetchError, ModelError, PlanError, UnitError, UsageError.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        memory: int | str | Share | None = None,
        plan: str | Path | None = None,
        cut: int | None = None,
        trace: str | Path | None = None,
        progress: Callable[..., None] | None = None,
        sources: Mapping[str, str] | None = None,
        host: str = "threads",
        ray_address: str | None = None,
        units: str | None = None,
        gpu_share: float | None = None,
        split: str | None = None,
        preset: str | None = None,
        allow_near: bool = False,
    ) -> None:
        check_host(host, ray_address)
        for name, value in (("threads", threads), ("context", context), ("cut", cut)):
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} is {value!r}: give a whole number above 0, or None to have it chosen")
        start = time.perf_counter()
        wanted = Wishes(
            threads, context, None, as_ceiling(memory), trace is not None, sources=dict(sources or {}), host=host,
            units=parse_units(units), gpu_share=as_part(gpu_share), split=split or "layer",
        )  # fmt: skip
        check_together(wanted, cut=cut, plan=plan, preset=preset)
        if plan is not None:
            wanted = read_plan(Path(plan), wanted)
        path, told = resolve(model, progress), progress or (lambda label, done=0, total=0: None)
        if preset is not None:
            wanted = preset_wishes(path, preset, wanted, near=allow_near)
        wanted = begun_wishes(path, wanted)
        opened = open_to_run(path, wanted, told, layers=None if cut is None else (cut, None))
        self._named, self._path, self._identity = str(model), str(path.absolute()), model_key(opened.file)
        _forget_vocabulary(opened.file.metadata)
        keeper: Host | None = None
        try:
            keeper = open_host(host, ray_address, progress)
            file = None if trace is None else Path(trace)
            kind = Engine if cut is None else PartEngine
            self._engine = kind(opened, wanted, trace=file, progress=progress, host=keeper)
        except BaseException:
            opened.close()
            if keeper is not None:
                keeper.close()
            raise
        if isinstance(self._engine, PartEngine):
            from coterie.cut import add_front

            add_front(self._engine, path, wanted.memory, ray_address, told)
        self._model = opened
        _return_free_memory()
        self.load_seconds = time.perf_counter() - start

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the lanes, write the trace, give the memory back. A second call does nothing."""
        self._engine.close()

    @property
    def plan(self) -> Plan:
        return self._engine.plan

    @property
    def template(self) -> ChatTemplate | None:
        """The model's chat template, if it has one."""
        return self._model.template

    def set_memory(self, memory: int | str | Share) -> None:
        """Change the ceiling, also while answers are being generated: before the next token, weights are dropped, or
        read, until the new one is filled. Tokens do not change. The context and all else but weights keep their size.

        Raises PlanError if the new ceiling cannot hold them (the old one then stays), UsageError for a model that was
        opened without `memory` from a file that is not packed.
        """
        self._engine.set_memory(required_ceiling(memory))

    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text, begun as the model wants it; special tokens are not recognised."""
        return self._model.tokenizer.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        self._engine.check(ids)
        return self._model.tokenizer.decode(ids)

    def generate(
        self,
        prompt: str,
        max_tokens: int = 256,
        *,
        stop: str | Sequence[str] = (),
        session: str | Path | None = None,
        session_kv: bool = False,
        **sampling: Any,
    ) -> Generation:
        """Continue a text. `sampling` are SamplingOptions' fields; `max_tokens` -1 is until the end.

        Generation ends at an end-of-turn token or a stop string ("stop"), after `max_tokens` ("length"), or when
        the context is full ("context"): nothing is shifted out of it. Raises UsageError if the prompt does not
        fit the context.

        `session` names a new journal, from which `resume` continues whatever happens to this process; with
        `session_kv` the KV cache is kept beside it, so that less has to be computed then.
        """
        if not isinstance(prompt, str):
            raise UsageError(f"the prompt is a {type(prompt).__name__}; give text")
        request = self._request(self.tokenize(prompt), max_tokens, stop, sampling, session_kv)
        return self._generation(request, session)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int = 256,
        *,
        stop: str | Sequence[str] = (),
        session: str | Path | None = None,
        session_kv: bool = False,
        **sampling: Any,
    ) -> Generation:
        """Answer a conversation of {"role", "content"} messages, as `generate` does for a text. Raises UsageError
        for a model without a chat template."""
        if self.template is None:
            raise UsageError("this model has no chat template; use generate() on plain text")
        if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
            raise UsageError('messages are a list of {"role": ..., "content": ...}')
        text = self.template.render([dict(message) for message in messages])
        tokenizer = self._model.tokenizer
        ids = tokenizer.encode(text, parse_special=True)
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos:  # the template has written one already
            del ids[0]
        return self._generation(self._request(ids, max_tokens, stop, sampling, session_kv), session)

    def resume(self, session: str | Path) -> Generation:
        """Continue a session: all its text and tokens, those that it has and those that follow, are what they would
        have been had nothing happened.

        Raises UsageError for a session of another model or of a larger context than this one's, or that is in use;
        ModelError where its beginning is damaged.
        """
        journal = Journal.resume(session_path(session))
        try:
            self._check_same(journal)
            generation = Generation(self._engine, journal.request, self.load_seconds)
            generation.keep(journal)
            return generation
        except BaseException:
            journal.close()
            raise

    def _check_same(self, journal: Journal) -> None:
        """Raise UsageError unless this model is the one that the journal is of."""
        request, path = journal.request, journal.path
        if request.identity != self._identity:
            raise UsageError(f"{path} is a session of another model: {request.path}, as it was then; name that one")
        if request.numerics != self._numerics:
            raise UsageError(f"{path} was begun with numerics {request.numerics!r}, here they are {self._numerics!r}")
        if request.context > self.plan.context:
            raise UsageError(f"{path} has a context of {request.context}, here it is {self.plan.context}; raise -c")
        self._engine.check(request.prompt + journal.tokens)

    def _request(
        self, ids: list[int], max_tokens: int, stop: str | Sequence[str], sampling: dict[str, Any], kv: bool
    ) -> Request:
        if not isinstance(max_tokens, int) or max_tokens < -1:
            raise UsageError(f"max_tokens is {max_tokens}: give 0 or more, or -1 for no limit")
        if not ids:
            raise UsageError("the prompt is empty, and this model does not begin texts by itself; give some text")
        if len(ids) > self.plan.context:
            raise UsageError(
                f"the prompt is {len(ids)} tokens, the context {self.plan.context}; shorten it, or raise -c"
            )
        options = asdict(SamplingOptions.of(sampling))
        return Request(
            model=self._named,
            path=self._path,
            identity=self._identity,
            numerics=self._numerics,
            prompt=ids,
            sampling={name: int(n) if isinstance(n, Integral) else float(n) for name, n in options.items()},
            stop=[stop] if isinstance(stop, str) else list(stop),
            max_tokens=int(max_tokens),
            context=self.plan.context,
            kv=kv,
        )

    def _generation(self, request: Request, session: str | Path | None) -> Generation:
        generation = Generation(self._engine, request, self.load_seconds)
        if session is not None and self.front is not None:
            raise UsageError("sessions are for whole models, and this one is cut")
        if session is not None:
            generation.keep(Journal.create(session_path(session), request))
        return generation

    @property
    def _numerics(self) -> str:
        """What a session's tokens depend on beside the model."""
        return f"{self.plan.numerics}, version {NUMERICS_VERSION}"

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32[n, vocab]: for each position, the scores of the token that comes next."""
        size = len(tokens) * self._engine.spec.vocab * 4
        if size > LOGITS_BYTES:
            raise UsageError(f"{len(tokens)} rows of logits are {size >> 20} MiB; ask for fewer tokens at a time")
        sequence = self._engine.sequence()
        try:
            return self._engine.prefill(sequence, list(tokens), range(len(tokens)))
        finally:
            sequence.close()

    def forecast(self) -> dict[str, float]:
        """What decoding can be on this machine now: "read_bandwidth" (bytes/s, measured) and "tokens_per_s", the bound
        it sets."""
        return self._engine.forecast()

    def memory(self) -> dict[str, int]:
        """Bytes: planned by region and in all ("total"), the ceiling (0: none), KV cache taken so far, and the
        process's peak ("peak_rss")."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        plan = self.plan
        return {
            **plan.regions,
            "total": plan.total,
            "ceiling": plan.memory or 0,
            "overhead": OVERHEAD,
            "kv_taken": self._engine.cache.nbytes,
            "peak_rss": peak,
        }

    def lines(self) -> list[str]:
        """What is going to be done, for people: the plan, and how near units beside the CPU unit are."""
        engine = self._engine
        near = [] if engine.divergence is None else [engine.divergence.line(",".join(self.plan.units))]
        return self.plan.lines() + near

    def units(self) -> list[dict[str, Any]]:
        """What the units are, truthfully: "unit", "runtime", "real", of a GPU and an NPU what they have built
        ("builds") and "divergence" from the CPU unit."""
        engine = self._engine
        if engine.others is None or engine.divergence is None:
            return [engine.unit.describe()]
        found = {"divergence": engine.divergence.as_dict()}
        return [engine.unit.describe(), *(unit | found for unit in engine.others.describe())]

    def flash(self) -> dict[str, Any] | None:
        """What streaming has done so far (None: everything is in memory): see Engine.flash_report."""
        return self._engine.flash_report()

    def losses(self) -> list[dict[str, Any]]:
        """Units that were lost and replaced: "unit", "reason", "by" ("actor", "threads"), and the "seconds" it took."""
        return [loss._asdict() for loss in self._engine.supervisor.losses]

    def host(self) -> dict[str, Any]:
        """What keeps the units alive; of Ray its address, and bytes of its own processes and of
        actors, by name."""
        return self._engine.host.describe()

    @property
    def front(self) -> Front | None:
        """The layers that run in another process, if the model is cut."""
        return self._engine.front if isinstance(self._engine, PartEngine) else None

    def bench(self, n_prompt: int, n_gen: int, repetitions: int = 5) -> list[dict[str, Any]]:
        """Time prefill of `n_prompt` random tokens, or decoding of `n_gen`, as llama-bench does: a warm-up, then
        `repetitions` runs from an empty context. One row with llama-bench's field names."""
        if min(n_prompt, n_gen) < 0 or n_prompt + n_gen == 0 or repetitions < 1:
            raise UsageError("nothing to time: give a number of prompt or generated tokens, and a repetition")
        self._timed(n_prompt, n_gen)
        self._engine.count_anew()
        samples = [self._timed(n_prompt, n_gen) for _ in range(repetitions)]
        rates = [(n_prompt + n_gen) / seconds for seconds in samples]
        file = self._model.file
        return [
            {
                "model_filename": str(file.path),
                "model_type": f"{self.plan.architecture} {_weight_kind(file)}",
                "model_size": sum(tensor.nbytes for tensor in file.tensors.values()),
                "model_n_params": sum(tensor.rows * tensor.cols for tensor in file.tensors.values()),
                "n_threads": self.plan.lanes,
                "n_prompt": n_prompt,
                "n_gen": n_gen,
                "avg_ts": float(np.mean(rates)),
                "stddev_ts": float(np.std(rates, ddof=1)) if len(rates) > 1 else 0.0,
                "samples_ts": rates,
                "samples_ns": [round(seconds * 1e9) for seconds in samples],
                "flash": self.flash(),
                "memory": self.memory(),
                "link": self.front and self.front.report(),
            }
        ]

    def _timed(self, n_prompt: int, n_gen: int) -> float:
        engine = self._engine
        ids = np.random.default_rng(0).integers(0, engine.spec.vocab, n_prompt + n_gen).tolist()
        sequence = engine.sequence()
        try:
            start = time.perf_counter()
            if n_prompt:
                engine.prefill(sequence, ids[:n_prompt])
            for token in ids[n_prompt:]:
                engine.decode([sequence], [token])
            return time.perf_counter() - start
        finally:
            sequence.close()


def _weight_kind(file: ModelHeader) -> str:
    """The format that most weights are in."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        sizes[tensor.format] = sizes.get(tensor.format, 0) + tensor.nbytes
    return max(sizes, key=lambda name: sizes[name])


def _forget_vocabulary(metadata: dict[str, Any]) -> None:
    """Drop the vocabulary's raw arrays, which the tokenizer has taken in."""
    for key in [key for key, value in metadata.items() if isinstance(value, list)]:
        del metadata[key]
    _return_free_memory()


def _return_free_memory() -> None:
    """Give freed memory back to the system: loading leaves megabytes of it, which a memory ceiling would count."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)
