"""Running a model on a device that is described, under a memory ceiling: plans as for a real run, then a virtual clock.

The plan, the residency, the programs and the tape are the engine's own (planner.make_plan, layout.lay_out_model on a
ledger); only the units are models. Decode is simulated at a few positions, prefill chunk by chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil

from coterie.errors import PlanError, UsageError
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
from coterie.scheduler.clock import Clock, Outcome
from coterie.scheduler.cutting import LENGTHS, Cutter, Place, Steps
from coterie.scheduler.device_model import Instruction, flash_rate
from coterie.scheduler.layout import LOOKUPS, lay_out_model
from coterie.scheduler.operators import Operator, Reader, Rows
from coterie.scheduler.plan import Flash, Plan, Wishes
from coterie.scheduler.planner import make_plan
from coterie.scheduler.soc import Device
from coterie.scheduler.steps import Placement, Requests, Shares, Step, make_step, placements
from coterie.sizes import Memory, Share
from coterie.storage.arena import Ledger
from coterie.storage.runs import lay_out_runs
from coterie.trace.timeline import Span

USUAL_SHARE = 0.75  # of a device's memory that one app may take, if nothing is said
SETTLE = 1  # tokens until reads run ahead as they will
SAMPLES = 3  # positions at which decode is looked at
MOST_TOKENS = 1 << 20


@dataclass(frozen=True)
class Question:
    """What is to be simulated: `memory`, a ceiling in bytes or a share of the weights (None: what the device's memory
    allows); `units` that work, the first GPU or CPU decodes; `split`: shares of decode's matrices; `cut`: units
    across which the partition solver cuts all products instead, `lengths`: of an NPU's graphs then; `decode`: units of
    decode, where they are others than those of prompts (with `cut`, it is cut across them); `formats`: by unit, what it
    takes weights for; `fence`: units meet by calls of their runtimes; `prompt` and `tokens`: lengths; `chunk`:
    tokens of a prompt that are computed at a time (None: as planned for this machine)."""

    memory: Memory | None = None
    units: tuple[str, ...] = ("cpu",)
    split: Shares = ()
    cut: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    lengths: tuple[int, ...] = LENGTHS
    formats: Mapping[str, str] = field(default_factory=dict)
    fence: bool = False
    prompt: int = 256
    tokens: int = 64
    context: int | None = None
    threads: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class Phase:
    """Prefill or decode: tokens/s, seconds (of the prompt, or of a token), how busy units were (0 to 1), what each
    waited for (a share of the time, by reason), what bounds it, joules a token (None: not known)."""

    tokens_per_s: float
    seconds: float
    busy: dict[str, float]
    waits: dict[str, dict[str, float]]
    bottleneck: str
    joules: float | None
    read_per_token: float


@dataclass(frozen=True)
class Answer:
    """What came out; `events` of the prompt and of the last token looked at, one after the other."""

    device: str
    plan: Plan
    decode: Phase | None
    prefill: Phase | None
    guesses: tuple[str, ...]
    constants: int
    events: tuple[Span, ...]
    emulated: bool

    def as_dict(self) -> dict[str, object]:
        return {
            "device": self.device,
            "emulated": self.emulated,
            "decode": vars(self.decode) if self.decode else None,
            "prefill": vars(self.prefill) if self.prefill else None,
            "guesses": list(self.guesses),
            "constants": self.constants,
            "plan": self.plan.as_dict(),
        }


class Simulation:
    """A model on a device, ready to be run in virtual time. Raises PlanError, UsageError."""

    def __init__(self, file: ModelHeader, spec: ModelSpec, device: Device, question: Question) -> None:
        if spec.sparse:
            raise PlanError(f"{file.path.name} has single neurons that are skipped: they cannot be simulated yet")
        if not 0 <= question.prompt <= MOST_TOKENS or not 0 <= question.tokens <= MOST_TOKENS:
            raise UsageError(f"lengths must be from 0 to {MOST_TOKENS} tokens")
        if question.prompt + question.tokens == 0:
            raise UsageError("nothing to simulate: both lengths are 0")
        self.spec, self.device, self.question = spec, device, question
        self.decoding, _ = self._placements(question.decode or question.units)
        _, self.prefilling = self._placements(question.units)
        shared = (name for name, _ in question.split)
        self.units = list(dict.fromkeys([*question.units, *question.decode, *shared]))
        self.cutter = self._cutter(question.cut, self.prefilling.others)
        self.decode_cutter = self._cutter(question.decode, self.decoding.others) if question.cut else None
        wishes = Wishes(question.threads, self._context(), memory=self._memory(), chunk=question.chunk)
        self.plan, residency = make_plan(file, spec, wishes, self._flash())
        runs, plan = lay_out_runs(file.tensors, spec), self.plan
        layout = lay_out_model(
            Ledger(), file, spec, runs, residency,
            lanes=plan.lanes, context=plan.context, chunk=plan.chunk, tile=plan.tile,
        )  # fmt: skip
        self.layout, self.reader = layout, Reader(spec, layout)
        block = plan.flash.block if plan.flash else 1 << 20
        self.requests = Requests(layout.weights, block)
        begin, head, end = layout.weights.positions
        self._spans = {"decode": (begin, end), "prefill": (begin, head), "head": (head, end)}
        self._merged = {name: self.requests.between(*span) for name, span in self._spans.items()}
        if layout.weights.tape.size and device.streamed is not None:
            self.device = replace(device, between=device.streamed)

    def _placements(self, units: tuple[str, ...]) -> tuple[Placement, Placement]:
        asked = self.question
        return placements(self.device, units, asked.split, fence=asked.fence, formats=asked.formats)

    def _cutter(self, units: tuple[str, ...], home: str) -> Cutter | None:
        asked = self.question
        return Cutter(self.device, units, home, asked.fence, asked.formats, asked.lengths) if units else None

    def _memory(self) -> Memory:
        memory = self.question.memory
        if memory is None:
            return int(self.device.memory * USUAL_SHARE)
        if memory == "auto":
            raise UsageError("--memory auto is for this machine; give a size, as 8GiB")
        if not isinstance(memory, Share) and memory > self.device.memory:
            raise UsageError(f"{self.device.name} has {self.device.memory >> 20} MiB of memory, not {memory >> 20}")
        return memory

    def _context(self) -> int | None:
        question = self.question
        if question.context is None:
            return min(self.spec.context, question.prompt + question.tokens + 1)
        if question.context < question.prompt + question.tokens:
            raise UsageError(f"{question.prompt} and {question.tokens} tokens do not fit -c {question.context}")
        return question.context

    def _flash(self) -> Flash | None:
        """How the device's flash would be read."""
        flash, device = self.device.flash, self.device
        if flash is None:
            return None
        known = "sequential" if any(point.pattern == "sequential" for point in flash.points) else "random"
        rate = flash_rate(flash, Instruction("read", "flash", pattern=known, block=device.flash_block))
        return Flash(device.flash_block, device.flash_depth, rate, device.name, file="", identity="")

    def step(self, name: str, rows: Rows) -> Step:
        """A step of a program: "decode", "prefill" (a chunk), "head"."""
        operators, placement = self.operators(name, rows), self.placement(name, rows)
        lookup = 0.0 if name == "head" else self._lookup(rows.tokens)
        return make_step(
            name, operators, self.device, placement, self._merged[name], self._spans[name], rows.tokens, lookup
        )

    def operators(self, name: str, rows: Rows) -> list[Operator]:
        """Those of a program."""
        return self.reader.operators(self.layout.programs[name], rows)

    def placement(self, name: str, rows: Rows) -> Placement:
        """Who does what in it."""
        fixed = self.decoding if name == "decode" else self.prefilling
        if self.cutter is None:
            return fixed
        prompts, tokens = self._outside
        outside = prompts if name == "prefill" else tokens
        cutter = self.cutter if name == "prefill" else self.decode_cutter or self.cutter
        return replace(fixed, cuts=cutter.cut(self.operators(name, rows), outside))

    @cached_property
    def _outside(self) -> list[set[Place]]:
        """Products that do not fit a unit's window, of prompts' chunks and of tokens. Where other units decode, each
        phase has the window for itself: presets have no unit with a window in both."""
        assert self.cutter is not None
        chunk = max(1, min(self.question.prompt, self.plan.chunk))
        prompts = Steps(self.operators("prefill", Rows(chunk, 0)), self.question.prompt / chunk)
        tokens = Steps(self.operators("decode", Rows(1, self.question.prompt)), self.question.tokens)
        if self.decode_cutter is not None:
            return [*self.cutter.outside([prompts]), *self.decode_cutter.outside([tokens])]
        return self.cutter.outside([prompts, tokens])

    def _lookup(self, tokens: int) -> float:
        """Seconds until embeddings that are not pinned are there (expected): each extent that holds some is read once,
        LOOKUPS at a time, for one token behind what the tape has in flight."""
        embedding = self.layout.weights.embedding
        if embedding is None or self.device.flash is None:
            return 0.0
        pinned = sum(part.count for part in embedding.slices if part.position < 0) / embedding.run.extents
        if pinned >= 1:
            return 0.0
        size, flash, extents = embedding.run.stride, self.device.flash, embedding.run.extents
        distinct = (1 - pinned) * extents * (1 - (1 - 1 / extents) ** tokens)
        known = [depth for depth in self.device.flashes if depth <= min(LOOKUPS, max(1, ceil(distinct)))]
        model = self.device.flashes[max(known)] if known else flash
        pattern = flash.points[0].pattern
        reads = distinct * size / model.bandwidth(pattern, size) + min(1.0, distinct) * self.device.latency
        if tokens > 1 or not self.layout.weights.tape.size:
            return reads
        in_flight = min(self.device.flash_depth * self.requests_size(), self.plan.ring)
        return reads + distinct * in_flight / flash.bandwidth(pattern, self.device.flash_block)

    def requests_size(self) -> float:
        """Bytes of a request, on average."""
        merged = self._merged["decode"]
        return sum(r.nbytes for r in merged) / max(1, len(merged))

    def run(self, steps: Sequence[Step], *, record: bool = True) -> Outcome:
        """Steps one after the other in virtual time."""
        return Clock(self.device, self.units, steps, self.requests, fence=self.question.fence, record=record).run()

    def prompt_steps(self) -> list[Step]:
        """A prompt's chunks, and the head for its last row."""
        length, chunk = self.question.prompt, self.plan.chunk
        steps = [self.step("prefill", Rows(min(chunk, length - at), at)) for at in range(0, length, chunk)]
        return [*steps, self.step("head", Rows(1, length - 1))] if "head" in self.layout.programs else steps

    def prefill(self) -> tuple[Phase, Outcome]:
        """A prompt. Where weights are streamed, the second of two: reads have run ahead before it, as they have in an
        engine that is open."""
        steps = self.prompt_steps()
        outcome = self.run(steps * 2 if steps[0].requests else steps)
        begun = outcome.steps[len(steps) - 1][1] if steps[0].requests else 0.0
        seconds = outcome.steps[-1][1] - begun
        return self._phase(_since(outcome, begun), seconds, self.question.prompt), outcome

    def decode(self) -> tuple[Phase, Outcome]:
        """Tokens at the beginning, the middle and the end of the answer, each in a steady state."""
        first, last = self.question.prompt, self.question.prompt + self.question.tokens - 1
        places = sorted({first + (last - first) * n // (SAMPLES - 1) for n in range(SAMPLES)})
        seconds, phases = list[float](), list[Phase]()
        for place in places:
            steps = [self.step("decode", Rows(1, place))] * (SETTLE + 1)
            outcome = self.run(steps)
            begun = outcome.steps[SETTLE - 1][1]
            seconds.append(outcome.steps[SETTLE][1] - begun)
            phases.append(self._phase(_since(outcome, begun), seconds[-1], 1))
        mean = sum(seconds) / len(seconds)
        middle = phases[len(phases) // 2]
        return Phase(1 / mean, mean, *list(vars(middle).values())[2:]), outcome

    def _phase(self, outcome: Outcome, seconds: float, tokens: int) -> Phase:
        busy = {name: min(1.0, spent / seconds) for name, spent in outcome.busy.items()}
        waits = {name: {why: t / seconds for why, t in each.items() if t > 0} for name, each in outcome.waits.items()}
        return Phase(
            tokens / seconds, seconds, busy, waits, _bottleneck(outcome, busy), self._joules(outcome, seconds, tokens),
            outcome.read / tokens,
        )  # fmt: skip

    def _joules(self, outcome: Outcome, seconds: float, tokens: int) -> float | None:
        device = self.device
        power = {name: device.units[name].power for name in self.units} | {"flash": device.flash_power}
        watts = {name: power[name] for name, spent in outcome.busy.items() if spent > 0}
        if device.idle_power is None or any(value is None for value in watts.values()):
            return None
        spent = sum((watts[name] or 0.0) * outcome.busy[name] for name in watts)
        return (device.idle_power * seconds + spent) / tokens

    def answer(self) -> Answer:
        """Prefill and decode, as far as asked for."""
        events, prefill, decode = list[Span](), None, None
        if self.question.prompt:
            prefill, outcome = self.prefill()
            events += outcome.events
        if self.question.tokens:
            decode, outcome = self.decode()
            shift = max((event.end for event in events), default=0.0)
            events += [_moved(event, shift) for event in outcome.events]
        guesses, constants = self.device.guesses(), len(self.device.marks)
        return Answer(
            self.device.name, self.plan, decode, prefill, guesses, constants, tuple(events), self.device.emulated
        )


def _since(outcome: Outcome, begun: float) -> Outcome:
    """The part of an outcome after a moment, from its events."""
    kept = [event for event in outcome.events if event.end > begun]
    found = Outcome(steps=outcome.steps, busy=dict.fromkeys(outcome.busy, 0.0), events=kept)
    total = {name: sum(each.values()) for name, each in outcome.bound.items()}
    for event in kept:
        found.busy[event.unit] += event.end - max(event.start, begun)
        found.read += event.nbytes
    for name, each in outcome.bound.items():
        part = found.busy[name] / total[name] if total[name] else 0.0
        found.bound[name] = {kind: spent * part for kind, spent in each.items()}
    length = outcome.steps[-1][1]
    part = (length - begun) / length
    found.waits = {name: {why: t * part for why, t in each.items()} for name, each in outcome.waits.items()}
    return found


def _bottleneck(outcome: Outcome, busy: Mapping[str, float]) -> str:
    """The unit that is busy most of the time, and what keeps it so."""
    name = max(busy, key=lambda each: busy[each])
    if name == "flash":
        return "flash"
    kinds = outcome.bound[name]
    return f"{name}: {max(kinds, key=lambda kind: kinds[kind])}" if kinds else name


def _moved(event: Span, by: float) -> Span:
    return event._replace(start=event.start + by, end=event.end + by)
